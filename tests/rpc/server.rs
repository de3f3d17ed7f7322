//! A running worker and what the tests send it.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use capsieve_rpc::v1;
use capsieve_rpc::v1::score_batch_request::Source;
use capsieve_rpc::v1::score_batch_response::Event;
use capsieve_rpc::v1::scoring_service_client::ScoringServiceClient;
use tempfile::TempDir;
use tonic::Status;
use tonic::transport::Channel;

use crate::support::{picture, program, shard, write_parquet};

pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

/// `capsieve serve` on a free port; killed when dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) address: String,
    pub(crate) metrics: Option<String>,
    pub(crate) log: Arc<Mutex<String>>,
}

impl Server {
    /// Waits until it serves.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let server = Self::listen("synthetic:tiny", arguments);
        server.wait_for("serving");
        server
    }

    /// Waits until it listens.
    pub(crate) fn listen(model: &str, arguments: &[&str]) -> Self {
        let mut command = program();
        command.args(["serve", "--model", model, "--listen", "127.0.0.1:0"]).args(arguments);
        Self::spawn(command)
    }

    /// Runs `command` and waits until it listens.
    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (lines, log) = (BufReader::new(child.stderr.take().unwrap()), Arc::new(Mutex::new(String::new())));
        let (found, address) = channel();
        let into = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut log = into.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
                if let Some((_, address)) = line.split_once("listening on ") {
                    drop(found.send(address.to_owned()));
                }
            }
        });
        let address = address.recv_timeout(TIMEOUT).unwrap_or_else(|_| panic!("{}", log.lock().unwrap()));
        let metrics = log.lock().unwrap().lines().find_map(|line| Some(line.split_once("metrics on ")?.1.to_owned()));
        Self { child, address, metrics, log }
    }

    pub(crate) fn wait_for(&self, words: &str) {
        let start = Instant::now();
        while !self.log.lock().unwrap().contains(words) {
            assert!(start.elapsed() < TIMEOUT, "no {words:?} in {}", self.log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) async fn client(&self) -> ScoringServiceClient<Channel> {
        let channel = Channel::from_shared(self.endpoint()).unwrap().connect().await.unwrap();
        ScoringServiceClient::new(channel).max_decoding_message_size(8 << 20)
    }

    #[cfg(unix)]
    pub(crate) fn signal(&self, name: &str) {
        let sent = std::process::Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// The largest and the present resident memory in bytes.
    #[cfg(target_os = "linux")]
    pub(crate) fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
        };
        (field("VmHWM:"), field("VmRSS:"))
    }

    /// Its exit code.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        let start = Instant::now();
        while start.elapsed() < TIMEOUT {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the worker does not end: {}", self.log.lock().unwrap());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A client that takes next to nothing on its own: the rest waits in the worker.
pub(crate) async fn narrow(server: &Server) -> ScoringServiceClient<Channel> {
    let endpoint = Channel::from_shared(server.endpoint()).unwrap();
    let endpoint = endpoint.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    ScoringServiceClient::new(endpoint.connect().await.unwrap()).max_decoding_message_size(8 << 20)
}

/// What a call gave: its messages, and how it ended.
pub(crate) struct Answer {
    pub(crate) events: Vec<Event>,
    pub(crate) end: Option<Status>,
}

/// Calls and takes everything.
pub(crate) async fn call(client: &mut ScoringServiceClient<Channel>, request: v1::ScoreBatchRequest) -> Answer {
    let mut events = Vec::new();
    let mut stream = match client.score_batch(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return Answer { events, end: Some(status) },
    };
    loop {
        match stream.message().await {
            Ok(Some(message)) => events.push(message.event.unwrap()),
            Ok(None) => return Answer { events, end: None },
            Err(status) => return Answer { events, end: Some(status) },
        }
    }
}

/// A score as it came: shard, row, caption, scores' bits, status.
pub(crate) type Entry = (u32, u64, u32, u32, u32, String);

impl Answer {
    /// The entries of a call that succeeded.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        assert!(self.end.is_none(), "{:?}", self.end);
        assert!(matches!(self.events.first(), Some(Event::Started(_))));
        assert!(matches!(self.events.last(), Some(Event::Summary(_))), "a summary is the last message");
        entries(&self.events)
    }

    pub(crate) fn summary(&self) -> &v1::ScoreSummary {
        match self.events.last() {
            Some(Event::Summary(summary)) => summary,
            other => panic!("{other:?} {:?}", self.end),
        }
    }

    pub(crate) fn status(&self) -> &Status {
        self.end.as_ref().expect("the call fails")
    }
}

pub(crate) fn entries(events: &[Event]) -> Vec<Entry> {
    let chunks = events.iter().filter_map(|event| if let Event::Chunk(chunk) = event { Some(chunk) } else { None });
    chunks.flat_map(of_chunk).collect()
}

pub(crate) fn of_chunk(chunk: &v1::ScoreChunk) -> Vec<Entry> {
    let status = |i: usize| {
        let error = chunk.errors.iter().find(|error| error.index as usize == i);
        error.map_or("ok".to_owned(), |error| error.status.clone())
    };
    let bits = |scores: &[f32], i: usize| scores.get(i).copied().unwrap_or(f32::NAN).to_bits();
    (0..chunk.row.len())
        .map(|i| {
            let (itm, cosine) = (bits(&chunk.itm_score, i), bits(&chunk.cosine_score, i));
            (chunk.shard_index, chunk.row[i], chunk.caption[i], itm, cosine, status(i))
        })
        .collect()
}

/// A folder with shards `a.parquet`, `b.parquet` and so on, of so many rows each; every seventh row is bad.
pub(crate) struct Shards(TempDir);

impl Shards {
    pub(crate) fn new(rows: &[usize]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("in")).unwrap();
        std::fs::create_dir(folder.path().join("out")).unwrap();
        for (number, count) in rows.iter().enumerate() {
            let name = format!("in/{}.parquet", char::from(b'a' + u8::try_from(number).unwrap()));
            write_parquet(&folder.path().join(name), &shard(&pairs(*count, number)), 16);
        }
        Self(folder)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(crate) fn root(&self) -> String {
        self.0.path().display().to_string()
    }
}

/// Images and captions of a shard.
pub(crate) fn pairs(count: usize, seed: usize) -> Vec<(Option<Vec<u8>>, Option<String>)> {
    let pair = |row: usize| {
        let image = if row % 7 == 3 { b"no image".to_vec() } else { picture((row + 31 * seed) as u64) };
        (Some(image), Some(format!("picture {row} of shard {seed}")))
    };
    (0..count).map(pair).collect()
}

pub(crate) fn of_shards<S: AsRef<str>>(uris: &[S]) -> v1::ScoreBatchRequest {
    let uris = uris.iter().map(|uri| uri.as_ref().to_owned()).collect();
    let shards = v1::ParquetShards { uris, ..Default::default() };
    v1::ScoreBatchRequest { source: Some(Source::Shards(shards)), ..Default::default() }
}

pub(crate) fn of_pairs(pairs: &[(Option<Vec<u8>>, Option<String>)]) -> v1::ScoreBatchRequest {
    let item = |(i, (image, caption)): (usize, &(Option<Vec<u8>>, Option<String>))| v1::ImageCaptions {
        key: format!("{i:05}"),
        image: image.clone().map(|image| v1::image_captions::Image::ImageBytes(image.into())),
        captions: caption.iter().cloned().collect(),
    };
    let items = pairs.iter().enumerate().map(item).collect();
    v1::ScoreBatchRequest { source: Some(Source::Pairs(v1::InlinePairs { items })), ..Default::default() }
}

pub(crate) fn with_tokens(mut request: v1::ScoreBatchRequest, tokens: Vec<Vec<u8>>) -> v1::ScoreBatchRequest {
    if let Some(Source::Shards(shards)) = &mut request.source {
        shards.resume_tokens = tokens.into_iter().map(Into::into).collect();
    }
    request
}

/// Runs a test's calls.
pub(crate) fn wait<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(240), work).await.expect("it ends") })
}
