//! Images of web addresses, from small servers on this machine: what a real server, a dead or a hostile one does to its rows, and
//! that it does nothing to the others.

mod server;

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use capsieve_store::{Access, Address, WebAddress, WebClient, WebError};
use capsieve_worker::limits::{FETCHES_PER_HOST, HOST_FAILURES, IMAGE_BYTES_MAX};

use self::server::{Reply, Server};
use crate::support::{floats, picture, program, read_parquet, run, texts, write_parquet};

/// What a run is to take where nothing is slow; the machine may be.
const SOON: Duration = Duration::from_secs(20);

/// Scores rows with these images; gives status and reason of each row.
fn scored(urls: &[String], more: &[&str]) -> Vec<(String, Option<String>)> {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.parquet"), folder.path().join("out.parquet"));
    write_parquet(&input, &rows(urls), 1000);
    let path = |path: &Path| path.display().to_string();
    let arguments = ["score", "--model", "synthetic:tiny", "--input", &path(&input), "--output", &path(&output)];
    let ran = run(program().args(arguments).args(more));
    assert!(matches!(ran.code, Some(0 | 3)), "{ran:?}");
    let found = read_parquet(&output);
    let statuses: Vec<_> = texts(&found, "score_status").into_iter().flatten().collect();
    let has_score: Vec<bool> = floats(&found, "itm_score").iter().map(Option::is_some).collect();
    assert_eq!(has_score, statuses.iter().map(|status| status == "ok").collect::<Vec<_>>());
    assert_eq!(texts(&found, "url").into_iter().flatten().collect::<Vec<_>>(), urls, "in their order");
    statuses.into_iter().zip(texts(&found, "score_error")).collect()
}

fn rows(urls: &[String]) -> RecordBatch {
    let captions: Vec<String> = (0..urls.len()).map(|row| format!("caption {row}")).collect();
    let column = |texts: Vec<String>| Arc::new(StringArray::from(texts)) as ArrayRef;
    RecordBatch::try_from_iter([("url", column(urls.to_vec())), ("caption", column(captions))]).unwrap()
}

fn ok(rows: &[(String, Option<String>)]) -> usize {
    rows.iter().filter(|(status, _)| status == "ok").count()
}

/// The reason of a row that failed.
fn reason((status, error): &(String, Option<String>)) -> &str {
    assert_eq!(status, "fetch_failed", "{error:?}");
    let reason = error.as_deref().unwrap();
    assert!(!reason.contains('\n') && !reason.contains("s3cret"), "{reason}");
    reason
}

/// An address where nobody listens.
fn dead() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn an_image_is_one_plain_request_with_its_query() {
    let server = Server::start(|path, _| match path {
        "/a%20b.png?id=7&sig=s3cret" => Reply::Image(1),
        "/none.png?sig=s3cret" => Reply::Status(404),
        _ => Reply::Status(500),
    });
    let urls = [server.url("/a%20b.png?id=7&sig=s3cret#part"), server.url("/none.png?sig=s3cret#part")];
    let found = scored(&urls, &[]);
    assert_eq!(found[0], ("ok".to_owned(), None));
    assert_eq!(
        reason(&found[1]),
        format!("{}?... cannot be fetched: the server answers 404 Not Found", server.url("/none.png"))
    );
    let requests = server.requests();
    assert_eq!(requests.len(), 2, "{requests:?}");
    for request in requests {
        assert!(request.starts_with("GET "), "{request}");
        let lower = request.to_lowercase();
        assert!(
            ["range:", "if-match:", "referer:", "accept-encoding:"].iter().all(|name| !lower.contains(name)),
            "{request}"
        );
    }
}

#[test]
fn what_may_pass_is_tried_again_and_what_may_not_is_not() {
    let server = Server::start(|path, nth| match (path, nth) {
        ("/busy", 0 | 1) => Reply::Status(503),
        ("/cut", 0) => Reply::Cut(1),
        ("/closed", 0) => Reply::Close,
        ("/limited", 0) => Reply::RetryAfter(1),
        ("/away", _) => Reply::RetryAfter(3600),
        ("/broken", _) => Reply::Status(500),
        ("/gone", _) => Reply::Status(410),
        ("/always-cut", _) => Reply::Cut(1),
        (path, 0) if path.starts_with("/nothing") => Reply::Status(204),
        _ => Reply::Image(2),
    });
    let paths = ["/busy", "/cut", "/closed", "/limited", "/away", "/broken", "/gone", "/always-cut", "/nothing"];
    let found = scored(&paths.map(|path| server.url(path)), &[]);
    let tries = |path: &str| server.requests().iter().filter(|line| line.starts_with(&format!("GET {path} "))).count();
    assert_eq!(ok(&found[..4]), 4, "{found:?}");
    assert_eq!(paths.map(tries), [3, 2, 2, 2, 1, 3, 1, 3, 1]);
    assert!(
        reason(&found[4]).contains("429") && reason(&found[5]).contains("500") && reason(&found[6]).contains("410")
    );
    assert!(reason(&found[7]).contains("broke off"), "{:?}", found[7]);
    assert_eq!(found[8].0, "decode_failed", "nothing is no image");
}

#[test]
fn dead_links_cost_seconds_and_no_other_row() {
    let server = Server::start(|_, _| Reply::Image(3));
    let (gone, start) = (dead(), Instant::now());
    // Of one host a whole column, and a few of names that do not exist.
    let url = |row: usize| match row % 4 {
        0 => server.url(&format!("/{row}")),
        _ => format!("{gone}/{row}.jpg?sig=s3cret"),
    };
    let mut urls: Vec<String> = (0..268).map(url).collect();
    urls.push("http://no-such-host.invalid/1.jpg".to_owned());
    let found = scored(&urls, &[]);
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(ok(&found), 67);
    let (mut refused, mut left_alone) = (0, 0);
    for failed in found.iter().filter(|(status, _)| status != "ok") {
        let reason = reason(failed);
        refused += usize::from(reason.contains("its host cannot be reached: "));
        left_alone += usize::from(reason.contains("times in a row and is left alone for 30 s"));
    }
    assert_eq!(refused + left_alone, 202, "{found:?}");
    assert!(left_alone > 100 && refused >= HOST_FAILURES as usize, "{refused} refused, {left_alone} not asked");
}

#[test]
fn a_slow_host_has_its_places_and_others_have_theirs() {
    // Longer than the test's patience if its images came one after another, or in fours.
    let slow = Server::start(|_, _| Reply::Late(Duration::from_millis(400), 4));
    let fast = Server::start(|_, _| Reply::Late(Duration::from_millis(5), 5));
    let url =
        |row: usize| if row.is_multiple_of(2) { slow.url(&format!("/{row}")) } else { fast.url(&format!("/{row}")) };
    let urls: Vec<String> = (0..128).map(url).collect();
    let found = scored(&urls, &[]);
    assert_eq!(ok(&found), 128);
    assert_eq!(slow.most_at_a_time(), FETCHES_PER_HOST);
    assert!(fast.most_at_a_time() <= FETCHES_PER_HOST);
    // All of the fast ones came while the slow host was asked for its first half.
    let half = slow.arrivals()[31];
    let early = fast.arrivals().iter().filter(|at| **at < half).count();
    assert!(early >= 48, "{early} of 64 images of a fast host before half of the slow one's");
}

#[test]
fn the_places_of_a_host_are_an_option() {
    let server = Server::start(|_, _| Reply::Late(Duration::from_millis(30), 6));
    let urls: Vec<String> = (0..40).map(|row| server.url(&format!("/{row}"))).collect();
    assert_eq!(ok(&scored(&urls, &["--fetches-per-host", "3"])), 40);
    assert_eq!(server.most_at_a_time(), 3);
}

#[test]
fn what_is_too_large_is_not_read_to_its_end() {
    let server = Server::start(|path, _| match path {
        "/announced" => Reply::Announced(1 << 40),
        "/endless" => Reply::Endless,
        _ => Reply::Chunked(7),
    });
    let found = scored(&["/announced", "/endless", "/unannounced"].map(|path| server.url(path)), &[]);
    for failed in &found[..2] {
        assert!(reason(failed).ends_with(&format!("it has more than {IMAGE_BYTES_MAX} bytes")), "{failed:?}");
    }
    assert_eq!(found[2].0, "ok", "a length that is not known is no fault: {found:?}");
    let sent = server.sent();
    // What was on its way when the connection was closed.
    assert!((IMAGE_BYTES_MAX..IMAGE_BYTES_MAX + (32 << 20)).contains(&sent), "{sent} bytes");
}

#[test]
fn memory_bounds_what_is_fetched_at_a_time() {
    // Without a length each may be of the largest size, and there is memory for one.
    let server = Server::start(|_, _| Reply::Chunked(8));
    let urls: Vec<String> = (0..70).map(|row| server.url(&format!("/{row}"))).collect();
    let start = Instant::now();
    let found = scored(&urls, &["--memory-limit", &(64 << 20).to_string()]);
    assert_eq!(ok(&found), 70, "nobody waits for ever: {found:?}");
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
}

#[test]
fn redirects_are_followed_within_limits() {
    let other = Server::start(|path, _| if path == "/image?a=b" { Reply::Image(9) } else { Reply::Status(404) });
    let target = other.url("/image?a=b");
    let server = Server::start(move |path, _| match path {
        "/once" => Reply::Redirect(target.clone()),
        "/relative" => Reply::Redirect("once".to_owned()),
        "/loop?sig=s3cret" => Reply::Redirect("/loop?sig=s3cret".to_owned()),
        "/metadata" => Reply::Redirect("http://169.254.169.254/latest/meta-data/".to_owned()),
        "/file" => Reply::Redirect("file:///etc/passwd".to_owned()),
        _ => Reply::Status(404),
    });
    let start = Instant::now();
    let paths = ["/once", "/relative", "/loop?sig=s3cret", "/metadata", "/file"];
    let found = scored(&paths.map(|path| server.url(path)), &[]);
    assert_eq!(ok(&found[..2]), 2, "{found:?}");
    assert!(reason(&found[2]).ends_with("/loop?... cannot be fetched: it is redirected too often"), "{:?}", found[2]);
    assert!(reason(&found[3]).ends_with("link-local addresses are not fetched"), "{:?}", found[3]);
    reason(&found[4]);
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert!(server.requests().len() <= 3 + 6 + 2, "a loop is not tried again: {:?}", server.requests());
    assert!(other.requests().iter().all(|request| !request.to_lowercase().contains("referer")));
}

#[test]
fn link_local_addresses_are_refused() {
    let urls = ["http://169.254.169.254/latest", "http://[fe80::1]/a.jpg", "http://[::ffff:169.254.169.254]/"];
    for failed in scored(&urls.map(str::to_owned), &[]) {
        assert!(reason(&failed).contains("link-local addresses are not fetched"), "{failed:?}");
    }
}

#[test]
fn a_silent_server_costs_its_row_ten_seconds() {
    let server =
        Server::start(
            |path, _| if path == "/silent" { Reply::Late(Duration::from_secs(60), 1) } else { Reply::Image(1) },
        );
    let start = Instant::now();
    let found = scored(&["/silent", "/well"].map(|path| server.url(path)), &[]);
    assert!(reason(&found[0]).ends_with("it takes longer than 10 s"), "{:?}", found[0]);
    assert_eq!(found[1].0, "ok");
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
}

#[test]
fn a_server_that_is_silent_for_all_is_left_alone() {
    let silent = Server::start(|_, _| Reply::Late(Duration::from_secs(60), 1));
    let well = Server::start(|_, _| Reply::Image(1));
    let url = |row: usize| if row.is_multiple_of(2) { silent.url(&format!("/{row}")) } else { well.url("/") };
    let start = Instant::now();
    let found = scored(&(0..200).map(url).collect::<Vec<_>>(), &[]);
    assert_eq!(ok(&found), 100);
    let alone = found.iter().step_by(2).filter(|row| reason(row).contains("is left alone")).count();
    assert!(alone >= 80, "{alone} of 100 rows");
    // Eight at a time, ten seconds each, all of them would take two minutes.
    assert!(start.elapsed() < 3 * SOON, "{:?}", start.elapsed());
}

#[test]
fn addresses_beside_web_servers_keep_their_way() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("1.png"), picture(1)).unwrap();
    let there = folder.path().join("1.png").display().to_string();
    let found =
        scored(&[there.clone(), format!("file://{there}"), "none.png".to_owned(), "ftp://host/1.png".to_owned()], &[]);
    assert_eq!(ok(&found), 2, "{found:?}");
    assert!(reason(&found[2]).contains("none.png does not exist"), "{found:?}");
    assert!(reason(&found[3]).contains("its scheme is unknown"), "{found:?}");
}

#[test]
fn no_web_server_is_open_to_calls() {
    let folder = tempfile::tempdir().unwrap();
    let access = Access::only(&[folder.path().display().to_string()]).unwrap();
    for url in ["http://127.0.0.1:1/1.jpg?x", "https://host/1.jpg"] {
        let error = access.address(None, url).unwrap_err().to_string();
        assert!(error.contains("--allow-uri"), "{error}");
    }
    assert!(access.address(None, "HTTPS://host/1.jpg").is_err());
    assert!(matches!(Access::everything().address(None, "HTTPS://host/1.jpg?x"), Ok(Address::Web(_))));
}

#[test]
fn a_name_that_leads_to_nobody_is_no_other_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = Server::start(|_, _| Reply::Announced(2000));
    let get = |url: &str| {
        let address = WebAddress::parse(url).unwrap();
        runtime.block_on(async { WebClient::new().unwrap().get(&address).await?.read(1000).await })
    };
    let port = server.url("").rsplit_once(':').unwrap().1.to_owned();
    // The system's own names go through our resolution.
    let error = get(&format!("http://localhost:{port}/")).unwrap_err();
    assert!(matches!(error, WebError::TooLarge { limit: 1000 }), "{error:?}");
    let error = get(&format!("{}/?s3cret", dead())).unwrap_err();
    assert!(error.is_transient() && !format!("{error:?}").contains("s3cret"), "{error:?}");
}

#[test]
fn rows_that_are_not_scored_again_are_not_fetched_again() {
    let mended = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&mended);
    let server = Server::start(move |path, _| match path {
        "/3" | "/5" if !seen.load(Ordering::Relaxed) => Reply::Status(404),
        _ => Reply::Image(2),
    });
    let urls: Vec<String> = (0..8).map(|row| server.url(&format!("/{row}"))).collect();
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.parquet"), folder.path().join("out.parquet"));
    write_parquet(&input, &rows(&urls), 1000);
    let path = |path: &Path| path.display().to_string();
    let fixed = ["score", "--model", "synthetic:tiny", "--input", &path(&input), "--output", &path(&output)];
    assert_eq!(run(program().args(fixed)).code, Some(3));
    assert_eq!(server.requests().len(), 8);
    mended.store(true, Ordering::Relaxed);
    let ran = run(program().args(fixed).args(["--retry-status", "fetch_failed"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(server.requests().len(), 8 + 2);
}

#[cfg(unix)]
#[test]
fn a_pipe_is_no_image() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe.png").display().to_string();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(reason(&scored(&[pipe], &[])[0]).contains("it is no regular file"));
}
