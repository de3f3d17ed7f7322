//! `capsieve submit` as a person runs it: closed pipes, signals, token files.

use std::process::Stdio;
use std::time::{Duration, Instant};

use super::super::server::Shards;
use super::fake::{Fake, Turn, all, chunk, started, turn};
use crate::support::{program, read_parquet, run};

/// A worker that scores for ever.
fn endless() -> Fake {
    Fake::new(|_, _| {
        let rows = (0u64..).map(|row| chunk(0, &[(row, 0), (row, 1)]));
        let events = std::iter::once(started(&["/a"])).chain(rows);
        Turn { events: Box::new(events), pause: Duration::from_millis(1), ..turn(Vec::new(), None) }
    })
}

/// `capsieve submit` of `/a`.
fn command(endpoint: &str) -> std::process::Command {
    let mut command = program();
    command.args(["submit", "--input", "/a", "--endpoint", endpoint]);
    command
}

/// Serves on a runtime of its own while `work` runs the program.
fn beside(fake: &Fake, work: impl FnOnce(&str)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let endpoint = runtime.block_on(fake.serve());
    work(&endpoint);
}

#[test]
fn a_reader_that_has_seen_enough_stops_the_job() {
    use std::io::BufRead;
    let fake = endless();
    beside(&fake, |endpoint| {
        let mut child = command(endpoint).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("\"shard\":\"/a\""), "{line}");
        // The pipe is closed.
        let ran = child.wait_with_output().unwrap();
        let words = String::from_utf8(ran.stderr).unwrap();
        assert_eq!(ran.status.code(), Some(1), "{words}");
        assert!(words.starts_with("error: standard output was closed") && words.lines().count() == 1, "{words}");
        let start = Instant::now();
        while *fake.streams_over.lock().unwrap() == 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "the call is cancelled");
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
#[cfg(unix)]
fn an_interruption_says_what_stays() {
    for (more, words) in [
        (&[][..], "the lines that were printed stay"),
        (&["--output", "/out/"], "the shards that the worker has finished stay, the same command goes on"),
        (&["--output", "/out/", "--overwrite"], "without --overwrite"),
    ] {
        let fake = endless();
        beside(&fake, |endpoint| {
            // Nobody reads its output: the pipe is full when the signal comes.
            let mut child = command(endpoint).args(more).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(1500));
            let sent = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
            assert!(sent.success());
            let start = Instant::now();
            while child.try_wait().unwrap().is_none() {
                if start.elapsed() > Duration::from_secs(10) {
                    child.kill().unwrap();
                    panic!("a full pipe keeps it from ending");
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            let ran = child.wait_with_output().unwrap();
            let stderr = String::from_utf8(ran.stderr).unwrap();
            assert!(ran.status.code() == Some(1) && stderr.contains(words), "{stderr}");
        });
    }
}

#[test]
fn the_token_is_a_line_as_the_worker_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    for (text, want) in [
        ("\u{feff}# of the team\n\n  secret  \nother\n", Some("Bearer secret")),
        ("\u{feff}secret\r\n", Some("Bearer secret")),
        ("# nothing\n\n", None),
    ] {
        std::fs::write(&file, text).unwrap();
        let fake = Fake::new(|_, request| all(request));
        let mut ran = None;
        beside(&fake, |endpoint| {
            ran = Some(run(command(endpoint).args(["--token-file", file.to_str().unwrap()])));
        });
        let (ran, seen) = (ran.unwrap(), fake.tokens.lock().unwrap().first().cloned().flatten());
        assert_eq!(seen.as_deref(), want, "{text:?}: {ran:?}");
        assert_eq!(ran.code, Some(if want.is_some() { 0 } else { 1 }), "{text:?}: {ran:?}");
        assert!(want.is_some() || ran.stderr.contains("holds no token"), "{ran:?}");
    }
}

/// A real worker that writes shards, and dies twice while it does.
#[test]
#[cfg(unix)]
fn shards_are_written_whole_though_workers_die() {
    let shards = Shards::new(&[200, 900, 300]);
    let listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let start = || {
        let mut command = program();
        command.args(["serve", "--model", "synthetic:tiny", "--allow-uri", &shards.root(), "--batch-size", "1"]);
        command.args(["--listen", &listen, "--progress-interval", "0.05"]).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut worker = start();
    let (endpoint, input, output) = (format!("http://{listen}"), shards.text("in") + "/", shards.text("out") + "/");
    let submit = move || {
        run(program().args(["submit", "--endpoint", &endpoint, "--input", &input, "--output", &output, "--overwrite"]))
    };
    let submitting = std::thread::spawn(submit);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(600));
        worker.kill().unwrap();
        worker.wait().unwrap();
        worker = start();
    }
    let ran = submitting.join().unwrap();
    worker.kill().unwrap();
    worker.wait().unwrap();
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.stdout.starts_with("3 shards to") && ran.stdout.contains("1400 rows, 1199 scored, 201"), "{ran:?}");
    for (name, rows) in [("a", 200), ("b", 900), ("c", 300)] {
        assert_eq!(read_parquet(&shards.path(&format!("out/{name}.parquet"))).num_rows(), rows);
    }
}
