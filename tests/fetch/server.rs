//! A web server on this machine that answers as it is told.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::picture;

/// How the server answers.
pub(crate) enum Reply {
    /// With the picture of a number.
    Image(u64),
    /// The same, without a length before it.
    Chunked(u64),
    /// The same, after some time.
    Late(Duration, u64),
    /// With half of it.
    Cut(u64),
    /// Not at all.
    Close,
    Status(u16),
    /// 429, come again in so many seconds.
    RetryAfter(u64),
    Redirect(String),
    /// Announces so many bytes, and sends some.
    Announced(u64),
    /// Sends until nobody takes it.
    Endless,
}

#[derive(Default)]
struct Seen {
    requests: Vec<String>,
    arrivals: Vec<Instant>,
    /// Requests for each path.
    paths: BTreeMap<String, usize>,
    now: usize,
    most: usize,
    sent: u64,
}

type Answers = dyn Fn(&str, usize) -> Reply + Send + Sync;

#[derive(Clone)]
pub(crate) struct Server {
    address: String,
    seen: Arc<Mutex<Seen>>,
    answers: Arc<Answers>,
}

impl Server {
    /// `answers` is asked with the path, and the number of requests for it before.
    pub(crate) fn start(answers: impl Fn(&str, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { address, seen: Arc::default(), answers: Arc::new(answers) };
        let answering = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = answering.clone();
                std::thread::spawn(move || drop(server.serve(stream)));
            }
        });
        server
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.address)
    }

    /// First line and headers of each request.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().requests.clone()
    }

    /// When each request came.
    pub(crate) fn arrivals(&self) -> Vec<Instant> {
        self.seen.lock().unwrap().arrivals.clone()
    }

    /// Requests that were answered at the same time.
    pub(crate) fn most_at_a_time(&self) -> usize {
        self.seen.lock().unwrap().most
    }

    /// Bytes of bodies that were too large.
    pub(crate) fn sent(&self) -> u64 {
        self.seen.lock().unwrap().sent
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let headers: Vec<String> = lines.map_while(|line| line.ok().filter(|line| !line.is_empty())).collect();
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let nth = {
            let mut seen = self.seen.lock().unwrap();
            seen.requests.push(format!("{request}\n{}", headers.join("\n")));
            seen.arrivals.push(Instant::now());
            seen.now += 1;
            seen.most = seen.most.max(seen.now);
            let count = seen.paths.entry(path.clone()).or_default();
            *count += 1;
            *count - 1
        };
        let reply = (self.answers)(&path, nth);
        if let Reply::Late(time, _) = reply {
            std::thread::sleep(time);
        }
        // Before the answer: with it the client may come again.
        self.seen.lock().unwrap().now -= 1;
        self.answer(&mut stream, reply)
    }

    fn answer(&self, stream: &mut TcpStream, reply: Reply) -> std::io::Result<()> {
        let head = |status: &str, headers: &str| format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n");
        let with_length = |length: u64| head("200 OK", &format!("Content-Length: {length}\r\n"));
        match reply {
            Reply::Close => Ok(()),
            Reply::Status(204) => stream.write_all(head("204 No Content", "").as_bytes()),
            Reply::Status(status) => stream.write_all(head(&status.to_string(), "Content-Length: 0\r\n").as_bytes()),
            Reply::RetryAfter(seconds) => {
                let headers = format!("Retry-After: {seconds}\r\nContent-Length: 0\r\n");
                stream.write_all(head("429 Too Many Requests", &headers).as_bytes())
            }
            Reply::Redirect(to) => {
                stream.write_all(head("302 Found", &format!("Location: {to}\r\nContent-Length: 0\r\n")).as_bytes())
            }
            Reply::Image(number) | Reply::Late(_, number) => {
                let image = picture(number);
                stream.write_all(with_length(image.len() as u64).as_bytes())?;
                stream.write_all(&image)
            }
            Reply::Cut(number) => {
                let image = picture(number);
                stream.write_all(with_length(image.len() as u64).as_bytes())?;
                stream.write_all(&image[..image.len() / 2])
            }
            Reply::Chunked(number) => {
                stream.write_all(head("200 OK", "Transfer-Encoding: chunked\r\n").as_bytes())?;
                for piece in picture(number).chunks(100) {
                    write!(stream, "{:x}\r\n", piece.len())?;
                    stream.write_all(piece)?;
                    stream.write_all(b"\r\n")?;
                }
                stream.write_all(b"0\r\n\r\n")
            }
            Reply::Announced(length) => {
                stream.write_all(with_length(length).as_bytes())?;
                self.flood(stream, &vec![0; 10_000], 2)
            }
            Reply::Endless => {
                stream.write_all(head("200 OK", "Transfer-Encoding: chunked\r\n").as_bytes())?;
                let piece = [b"100000\r\n".as_slice(), &vec![0; 1 << 20], b"\r\n"].concat();
                self.flood(stream, &piece, usize::MAX)
            }
        }
    }

    fn flood(&self, stream: &mut TcpStream, piece: &[u8], times: usize) -> std::io::Result<()> {
        for _ in 0..times {
            stream.write_all(piece)?;
            self.seen.lock().unwrap().sent += piece.len() as u64;
        }
        Ok(())
    }
}
