//! Models of the hub, from a small server on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use capsieve_store::{Error, HubConfig, fetch_model, fetch_model_with};

use super::{listed, wait};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "Salesforce/blip";

/// How the server answers for one file.
#[derive(Clone)]
enum Answer {
    File(Vec<u8>),
    /// Announces all bytes and closes after half of them, so many times.
    Cut(Vec<u8>, usize),
    /// Announces one length and sends another body whole, as a proxy with an error page does.
    Page(Vec<u8>),
    Status(u16),
}

#[derive(Clone)]
struct Server {
    address: String,
    files: Arc<Mutex<BTreeMap<String, Answer>>>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(files: &[(&str, Answer)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            files: Arc::new(Mutex::new(
                files.iter().map(|(name, answer)| ((*name).to_owned(), answer.clone())).collect(),
            )),
            requests: Arc::default(),
        };
        let answering = server.clone();
        std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| drop(answering.answer(stream))));
        server
    }

    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let headers: Vec<String> = lines.map_while(|line| line.ok().filter(|line| !line.is_empty())).collect();
        let token = headers.iter().find(|line| line.to_lowercase().starts_with("authorization:"));
        self.requests.lock().unwrap().push(format!("{request}{}", token.map_or("", |token| token)));
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let known = path.strip_prefix(&format!("/{ID}/resolve/")).and_then(|rest| rest.split_once('/'));
        let Some((_, file)) = known.filter(|(revision, _)| ["main", COMMIT].contains(revision)) else {
            return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        let answer = self.files.lock().unwrap().get(file).cloned().unwrap_or(Answer::Status(404));
        let head = |status: &str, length: usize| {
            format!(
                "HTTP/1.1 {status}\r\nETag: \"tag-{file}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: {length}\r\n\
                 Connection: close\r\n\r\n"
            )
        };
        let get = method == "GET";
        let (head, body) = match answer {
            Answer::Status(status) => (head(&format!("{status} Refused"), 0), Vec::new()),
            Answer::Cut(bytes, times) if get => {
                let next = if times > 1 { Answer::Cut(bytes.clone(), times - 1) } else { Answer::File(bytes.clone()) };
                self.files.lock().unwrap().insert(file.to_owned(), next);
                (head("200 OK", bytes.len()), bytes[..bytes.len() / 2].to_vec())
            }
            Answer::Page(_) if get => (head("200 OK", 5), b"sorry".to_vec()),
            Answer::File(bytes) | Answer::Cut(bytes, _) | Answer::Page(bytes) => (head("200 OK", bytes.len()), bytes),
        };
        stream.write_all(head.as_bytes())?;
        if get { stream.write_all(&body) } else { Ok(()) }
    }

    fn set(&self, file: &str, answer: Answer) {
        self.files.lock().unwrap().insert(file.to_owned(), answer);
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }

    fn config(&self, cache: &Path) -> HubConfig {
        HubConfig {
            endpoint: self.address.clone(),
            cache: cache.to_owned(),
            token: Some("secret".to_owned()),
            offline: false,
        }
    }
}

fn file(text: &str) -> Answer {
    Answer::File(text.as_bytes().to_vec())
}

fn small() -> Vec<(&'static str, Answer)> {
    vec![("config.json", file("{}")), ("preprocessor_config.json", file("{ }")), ("vocab.txt", file("a\nb\n"))]
}

fn with(more: &[(&'static str, Answer)]) -> Server {
    Server::start(&small().into_iter().chain(more.iter().cloned()).collect::<Vec<_>>())
}

#[test]
fn a_model_is_fetched_once() {
    let cache = tempfile::tempdir().unwrap();
    let server = with(&[("model.safetensors", file("weights")), ("pytorch_model.bin", file("not wanted"))]);
    let config = server.config(cache.path());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let watch = Arc::clone(&seen);
    let folder = wait(fetch_model_with(&config, ID, move |progress| watch.lock().unwrap().push(progress))).unwrap();
    assert_eq!(folder, cache.path().join("models--Salesforce--blip/snapshots").join(COMMIT));
    assert_eq!(listed(&folder), ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.txt"]);
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), b"weights");
    let requests = server.requests();
    assert!(requests.iter().all(|request| request.ends_with("authorization: Bearer secret")), "{requests:?}");
    let last = seen.lock().unwrap().iter().rfind(|progress| progress.file == "model.safetensors").cloned().unwrap();
    assert_eq!((last.bytes, last.bytes_total), (7, 7));
    // The second time only the branch is asked for, and offline nothing is.
    assert_eq!(wait(fetch_model(&config, ID)).unwrap(), folder);
    let again = server.requests();
    assert_eq!(again.len(), 1, "{again:?}");
    assert!(again[0].starts_with("HEAD /Salesforce/blip/resolve/main/config.json"), "{again:?}");
    assert_eq!(wait(fetch_model(&HubConfig { offline: true, ..config.clone() }, ID)).unwrap(), folder);
    assert_eq!(wait(fetch_model(&config, &format!("{ID}@{COMMIT}"))).unwrap(), folder);
    assert!(server.requests().is_empty());
    // A server that is gone does not take the cache with it.
    let gone = HubConfig { endpoint: "http://127.0.0.1:9".to_owned(), ..config };
    assert_eq!(wait(fetch_model(&gone, ID)).unwrap(), folder);
}

#[test]
fn weights_in_every_layout() {
    let index = r#"{"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let sharded = [
        ("model.safetensors.index.json", file(index)),
        ("model-1.safetensors", file("one")),
        ("model-2.safetensors", file("two")),
        ("pytorch_model.bin", file("not wanted")),
    ];
    let cache = tempfile::tempdir().unwrap();
    let folder = wait(fetch_model(&with(&sharded).config(cache.path()), ID)).unwrap();
    let names = listed(&folder);
    assert!(names.contains(&"model-1.safetensors".to_owned()) && names.contains(&"model-2.safetensors".to_owned()));
    assert!(!names.contains(&"pytorch_model.bin".to_owned()));

    let cache = tempfile::tempdir().unwrap();
    let folder = wait(fetch_model(&with(&[("pytorch_model.bin", file("pickle"))]).config(cache.path()), ID)).unwrap();
    assert_eq!(std::fs::read(folder.join("pytorch_model.bin")).unwrap(), b"pickle");

    let cache = tempfile::tempdir().unwrap();
    let error = wait(fetch_model(&with(&sharded[..2]).config(cache.path()), ID)).unwrap_err();
    assert!(matches!(&error, Error::HubIncomplete { missing, .. } if missing == "model-2.safetensors"), "{error}");
    let cache = tempfile::tempdir().unwrap();
    let error = wait(fetch_model(&with(&[]).config(cache.path()), ID)).unwrap_err();
    assert!(error.to_string().contains("has no model.safetensors"), "{error}");
}

#[test]
fn a_cut_download_is_tried_again_and_never_left_behind() {
    let weights = vec![7u8; 100_000];
    let cache = tempfile::tempdir().unwrap();
    let server = with(&[("model.safetensors", Answer::Cut(weights.clone(), 2))]);
    let folder = wait(fetch_model(&server.config(cache.path()), ID)).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights);

    for answer in [Answer::Cut(weights.clone(), 1000), Answer::Page(weights.clone())] {
        let cache = tempfile::tempdir().unwrap();
        let server = with(&[("model.safetensors", answer)]);
        let config = server.config(cache.path());
        let error = wait(fetch_model(&config, ID)).unwrap_err();
        assert!(matches!(error, Error::Hub { .. } | Error::HubCut { .. }), "{error:?}");
        let offline = HubConfig { offline: true, ..config.clone() };
        assert!(matches!(wait(fetch_model(&offline, ID)), Err(Error::HubOffline { .. })), "it must not look complete");
        // Once the server is well, the same command works.
        server.set("model.safetensors", Answer::File(weights.clone()));
        let folder = wait(fetch_model(&config, ID)).unwrap();
        assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights);
    }
}

#[test]
fn errors_name_the_model_and_what_to_try() {
    let cache = tempfile::tempdir().unwrap();
    let server = with(&[("model.safetensors", file("weights"))]);
    let config = server.config(cache.path());
    let message = |config: &HubConfig, id: &str| wait(fetch_model(config, id)).unwrap_err().to_string();
    for id in ["Salesforce/blop", "Salesforce/blip@v9"] {
        let text = message(&config, id);
        assert!(text.starts_with(&format!("{id} is not on {}", server.address)), "{text}");
    }
    let text = message(&HubConfig { offline: true, ..config.clone() }, "Salesforce/blop");
    assert!(text.contains("Salesforce/blop") && text.contains("HF_HUB_OFFLINE"), "{text}");
    for id in ["", "../../etc", "a/b/c", "a b"] {
        assert!(matches!(wait(fetch_model(&config, id)), Err(Error::HubId { .. })), "{id}");
    }
    for status in [401, 403] {
        server.set("config.json", Answer::Status(status));
        let text = message(&config, ID);
        assert!(text.contains(ID) && text.contains("HF_TOKEN"), "{status}: {text}");
    }
    server.set("config.json", Answer::Status(404));
    let text = message(&config, ID);
    assert!(text.contains("has no config.json"), "{text}");
    let gone = HubConfig { endpoint: "http://127.0.0.1:9".to_owned(), ..config };
    let text = message(&gone, "Salesforce/other");
    assert!(text.contains("Salesforce/other") && text.contains("HF_ENDPOINT"), "{text}");
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("file");
    std::fs::write(&cache, b"not a folder").unwrap();
    let error = wait(fetch_model(&with(&[]).config(&cache), ID)).unwrap_err();
    assert!(matches!(&error, Error::HubCache { path, .. } if path.ends_with("file")), "{error:?}");
}
