//! `submit` against a worker that does what a test tells it: cuts, silence, refusals, lists of any length.

mod fake;
mod program;

use std::collections::HashSet;
use std::time::Duration;

use capsieve_rpc::v1::score_batch_response::Event;
use capsieve_rpc::{Submission, SubmitError, Update, v1};
use tonic::{Code, Status};

use self::fake::{Fake, Turn, all, chunk, cut, done, progress, started, summary, tokens, turn, uris};
use super::server::{of_pairs, of_shards, pairs, wait};

fn submission(endpoint: String, request: v1::ScoreBatchRequest) -> Submission {
    Submission {
        endpoint,
        root: None,
        identity: None,
        token: None,
        request,
        patience: Duration::from_secs(20),
        delay_max: Duration::from_millis(5),
    }
}

fn with_sink(request: v1::ScoreBatchRequest, uri: &str) -> v1::ScoreBatchRequest {
    let sink = v1::ParquetSink { uri: uri.to_owned(), ..Default::default() };
    v1::ScoreBatchRequest { sink: Some(sink), ..request }
}

async fn submit(submission: &Submission) -> Result<v1::ScoreSummary, SubmitError> {
    capsieve_rpc::submit(submission, |_| Ok(())).await
}

#[test]
fn a_sign_of_life_renews_patience() {
    wait(async {
        // Five calls of 0.6 s each, far beyond the patience in all, and no scores; then the shard is done.
        let fake = Fake::new(|call, _| {
            let alive = (0..6).map(|_| progress(0, 0));
            let events: Vec<Event> = std::iter::once(started(&["/a"])).chain(alive).collect();
            let last = vec![started(&["/a"]), done(0, 60), summary(60)];
            let turn = if call < 5 { turn(events, cut()) } else { turn(last, None) };
            Turn { pause: Duration::from_millis(100), ..turn }
        });
        let request = with_sink(of_shards(&["/a"]), "/out.parquet");
        let submission = Submission { patience: Duration::from_secs(1), ..submission(fake.serve().await, request) };
        let total = submit(&submission).await.unwrap();
        assert_eq!((total.rows, total.shards, fake.requests().len()), (60, 1, 6));
        assert!(total.seconds > 3.0, "it took longer than the patience: {}", total.seconds);
    });
}

#[test]
fn a_worker_that_gets_nowhere_is_given_up() {
    wait(async {
        // It lives, but comes no farther than before.
        let fake = Fake::new(|_, _| turn(vec![started(&["/a"]), progress(0, 0), progress(7, 7)], cut()));
        let request = with_sink(of_shards(&["/a"]), "/out.parquet");
        let error = submit(&submission(fake.serve().await, request.clone())).await.unwrap_err();
        assert!(matches!(error, SubmitError::Stuck { attempts: 20, code: Code::Unavailable, .. }), "{error:?}");
        let words = error.to_string();
        assert!(words.contains("http://127.0.0.1") && words.contains("UNAVAILABLE: cut"), "{words}");
        assert_eq!(fake.requests().len(), 21, "the first came farther than none");
        // Accepted, and not even alive.
        let fake = Fake::new(|_, _| turn(vec![started(&["/a"])], cut()));
        let error = submit(&submission(fake.serve().await, request.clone())).await.unwrap_err();
        assert!(matches!(error, SubmitError::Stuck { attempts: 20, .. }), "{error:?}");
        let (patience, delay_max) = (Duration::from_millis(500), Duration::from_millis(100));
        let impatient = Submission { patience, delay_max, ..submission(fake.serve().await, request.clone()) };
        let error = submit(&impatient).await.unwrap_err();
        assert!(matches!(error, SubmitError::Lost { .. }), "to accept is no sign of life: {error:?}");
        // One that comes a row farther each time is not.
        let fake = Fake::new(|call, _| match call {
            0..40 => turn(vec![started(&["/a"]), progress(call as u64 + 1, 0)], cut()),
            _ => turn(vec![started(&["/a"]), done(0, 50), summary(0)], None),
        });
        assert_eq!(submit(&submission(fake.serve().await, request)).await.unwrap().rows, 50);
    });
}

#[test]
fn only_steps_make_the_delays_short_again() {
    wait(async {
        let fake = Fake::new(|call, _| match call {
            0..5 => turn(vec![started(&["/a"]), progress(0, 0)], cut()),
            5 => turn(vec![started(&["/a"]), chunk(0, &[(0, 0)])], cut()),
            _ => turn(vec![started(&["/a"]), done(0, 0), summary(0)], None),
        });
        let delay_max = Duration::from_secs(10);
        let submission = Submission { delay_max, ..submission(fake.serve().await, of_shards(&["/a"])) };
        submit(&submission).await.unwrap();
        let times = fake.times.lock().unwrap().clone();
        let waits: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(waits[4] > Duration::from_secs(3), "they grow: {waits:?}");
        assert!(waits[5] < Duration::from_secs(1), "a step makes them short: {waits:?}");
    });
}

#[test]
fn what_is_left_is_asked_for_by_name() {
    wait(async {
        let fake = Fake::new(|call, request| match call {
            // Before the whole list is there, nothing is known.
            0 => turn(vec![started(&["/in/a", "/in/b"])], cut()),
            // The list in two parts; the second shard is cut within its second row.
            1 => {
                let list = [started(&["/in/a", "/in/b"]), started(&["/in/c", "/in/d"])];
                let a = [chunk(0, &[(0, 0), (1, 0), (1, 1)]), done(0, 2)];
                let b = [chunk(1, &[(0, 0), (1, 0)])];
                turn([&list[..], &a, &b].concat(), Some(Status::deadline_exceeded("a proxy has enough")))
            }
            // The indices are others here.
            2 => {
                turn(vec![started(uris(request)), chunk(0, &[(1, 1), (2, 0)]), done(0, 2), chunk(1, &[(0, 0)])], cut())
            }
            _ => turn(
                vec![started(uris(request)), done(0, 0), chunk(1, &[(0, 0), (0, 1)]), done(1, 1), summary(3)],
                None,
            ),
        });
        let mut request = of_shards(&["/in/"]);
        request.request_id = "mine".to_owned();
        let (mut seen, mut last) = (Vec::new(), v1::ScoreProgress::default());
        let on = |update: &Update<'_>| {
            if let Event::Chunk(chunk) = update.event {
                let uri = &update.shards[chunk.shard_index as usize];
                seen.extend(chunk.row.iter().zip(&chunk.caption).map(|(row, caption)| (uri.clone(), *row, *caption)));
            }
            assert!(update.so_far.rows >= last.rows && update.so_far.shards_done >= last.shards_done);
            last = update.so_far;
            Ok(())
        };
        let total = capsieve_rpc::submit(&submission(fake.serve().await, request.clone()), on).await.unwrap();
        let requests = fake.requests();
        assert_eq!((&requests[0], &requests[1]), (&request, &request), "until the list is known: the user's request");
        assert_eq!(
            (uris(&requests[2]), tokens(&requests[2])),
            (&["/in/b", "/in/c", "/in/d"].map(str::to_owned)[..], vec![&b"1:1"[..]])
        );
        assert_eq!(
            (uris(&requests[3]), tokens(&requests[3])),
            (&["/in/c", "/in/d"].map(str::to_owned)[..], vec![&b"1:0"[..]])
        );
        assert!(requests.iter().all(|request| request.request_id == "mine"));
        assert_eq!((total.rows, total.scored, total.failed, total.pairs, total.shards), (7, 7, 0, 10, 4));
        assert_eq!((last.rows, last.shards_done, last.shards_total), (7, 4, 4));
        assert_eq!(seen.len(), seen.iter().collect::<HashSet<_>>().len(), "nothing twice");
        assert_eq!(seen.len(), 10);
    });
}

#[test]
fn totals_of_a_sink_are_over_all_attempts() {
    wait(async {
        let fake = Fake::new(|call, request| match call {
            // Pairs 20 are said when the first shard is done; 33 are of the second too, which is cut.
            0 => turn(
                vec![started(&["/a", "/b", "/c"]), progress(5, 9), done(0, 10), progress(10, 20), progress(16, 33)],
                cut(),
            ),
            // An earlier run has written the second.
            _ => {
                let there = v1::ShardDone { shard_index: 0, rows: 8, scored: 7, skipped: true, ..Default::default() };
                let there = v1::ShardDone { errors: [("earlier".to_owned(), 1)].into(), ..there };
                turn(
                    vec![started(uris(request)), Event::ShardDone(there), progress(2, 3), done(1, 4), summary(6)],
                    None,
                )
            }
        });
        let request = with_sink(of_shards(&["/in/"]), "/out/");
        let mut last = v1::ScoreProgress::default();
        let on = |update: &Update<'_>| {
            assert!(update.so_far.rows >= last.rows && update.so_far.pairs >= last.pairs, "the bar never falls back");
            last = update.so_far;
            Ok(())
        };
        let total = capsieve_rpc::submit(&submission(fake.serve().await, request), on).await.unwrap();
        assert_eq!((total.rows, total.scored, total.failed, total.pairs, total.shards), (22, 21, 1, 26, 3));
        assert_eq!(total.errors.get("earlier"), Some(&1));
        assert_eq!((last.rows, last.shards_done, last.shards_total), (22, 3, 3));
        assert_eq!(fake.requests()[1].sink, fake.requests()[0].sink);
    });
}

#[test]
fn what_one_request_cannot_name_goes_in_several() {
    wait(async {
        let names = |count: usize, length: usize| -> Vec<String> {
            (0..count).map(|shard| format!("/in/{shard:0length$}.parquet")).collect()
        };
        for (count, length, want) in [(150_002, 8, vec![100_000, 50_000]), (5_000, 4_000, vec![2_084, 2_084, 830])] {
            let list = names(count, length);
            let first = list.clone();
            let fake = Fake::new(move |call, request| match call {
                0 => {
                    let head = first.chunks(1_000).map(started).collect::<Vec<_>>();
                    turn([head, vec![done(0, 1), done(1, 1)]].concat(), cut())
                }
                _ => all(request),
            });
            let request = with_sink(of_shards(&["/in/"]), "/out/");
            let total = submit(&submission(fake.serve().await, request)).await.unwrap();
            let requests = fake.requests();
            let asked: Vec<usize> = requests[1..].iter().map(|request| uris(request).len()).collect();
            assert_eq!(asked, want, "{count} shards");
            assert!(requests.iter().all(|request| uris(request).iter().map(String::len).sum::<usize>() <= 8 << 20));
            let named: Vec<&String> = requests[1..].iter().flat_map(uris).collect();
            assert!(named.iter().zip(&list[2..]).all(|(named, want)| *named == want));
            assert_eq!((total.rows, total.shards), (count as u64, u32::try_from(count).unwrap()));
        }
    });
}

#[test]
fn a_worker_that_takes_less_gets_smaller_requests() {
    wait(async {
        let list: Vec<String> = (0..2000).map(|shard| format!("/in/{shard:0100}.parquet")).collect();
        let first = list.clone();
        let script = move |call, request: &v1::ScoreBatchRequest| match call {
            0 => turn(vec![started(&first), done(0, 1)], cut()),
            _ => all(request),
        };
        let mut fake = Fake::new(script);
        fake.shard_bytes = 64 << 10;
        let total = submit(&submission(fake.serve().await, of_shards(&["/in/"]))).await.unwrap();
        assert_eq!(total.shards, 2000);
        assert!(fake.requests().len() > 4, "{}", fake.requests().len());
    });
}

#[test]
fn what_another_attempt_mends_is_tried_again() {
    let deadline = || Some(Status::deadline_exceeded("a proxy has enough"));
    wait(async move {
        let fake = Fake::new(move |call, _| match call {
            0 => turn(Vec::new(), deadline()),
            1 => turn(vec![started(&["/a"]), progress(0, 0)], deadline()),
            // No summary, and no error either.
            2 => turn(vec![started(&["/a"]), progress(0, 0)], None),
            3 => turn(vec![started(&["/a"])], Some(Status::unknown("h2 protocol error"))),
            4 => turn(vec![started(&["/a"])], Some(Status::cancelled("by somebody"))),
            _ => turn(vec![started(&["/a"]), chunk(0, &[(0, 0)]), done(0, 1), summary(1)], None),
        });
        fake.proxied.lock().unwrap().extend([500, 502, 503]);
        let total = submit(&submission(fake.serve().await, of_shards(&["/a"]))).await.unwrap();
        assert_eq!((total.rows, fake.requests().len()), (1, 6));
        assert!(fake.proxied.lock().unwrap().is_empty(), "the proxy's answers came first");
    });
}

#[test]
fn a_connection_that_is_told_to_go_costs_no_row() {
    wait(async {
        let rows = 30;
        let mut fake = Fake::new(move |_, request| {
            let next = tokens(request).first().map_or(0, |token| {
                let (_, row) = std::str::from_utf8(token).unwrap().split_once(':').unwrap();
                row.parse::<u64>().unwrap() + 1
            });
            let chunks = (next..rows).map(|row| chunk(0, &[(row, 0)]));
            let events = std::iter::once(started(&["/a"])).chain(chunks).chain([done(0, rows), summary(rows)]);
            Turn { pause: Duration::from_millis(30), ..turn(events.collect(), None) }
        });
        fake.connection_age = Some(Duration::from_millis(300));
        let mut seen = Vec::new();
        let on = |update: &Update<'_>| {
            if let Event::Chunk(chunk) = update.event {
                seen.extend(&chunk.row);
            }
            Ok(())
        };
        let endpoint = fake.serve().await;
        let total = capsieve_rpc::submit(&submission(endpoint, of_shards(&["/a"])), on).await.unwrap();
        assert_eq!((total.rows, seen), (rows, (0..rows).collect::<Vec<_>>()));
        assert!(fake.requests().len() > 1, "it was cut");
    });
}

#[test]
fn a_worker_that_comes_late_is_waited_for() {
    wait(async {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let fake = Fake::new(|_, request| all(request));
        let submission = submission(format!("http://{address}"), of_shards(&["/a"]));
        let submitting = tokio::spawn(async move { submit(&submission).await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        fake.serve_at(&address).await;
        assert_eq!(submitting.await.unwrap().unwrap().shards, 1);
    });
}

#[test]
fn errors_say_who_what_and_what_to_do() {
    wait(async {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let patience = Duration::from_millis(300);
        let absent = Submission { patience, ..submission(format!("http://{nobody}"), of_shards(&["/a"])) };
        let error = submit(&absent).await.unwrap_err();
        assert!(matches!(error, SubmitError::Unreachable { .. }), "{error:?}");
        let words = error.to_string();
        for part in [&nobody.to_string(), "could not be reached for 300ms", "refused", "check the address"] {
            assert!(words.contains(part), "no {part:?} in {words}");
        }
        let fake = Fake::new(|_, _| turn(Vec::new(), Some(Status::permission_denied("/a is not allowed"))));
        let endpoint = fake.serve().await;
        let words = submit(&submission(endpoint.clone(), of_shards(&["/a"]))).await.unwrap_err().to_string();
        assert_eq!(fake.requests().len(), 1, "asked once");
        for part in [&endpoint, "PERMISSION_DENIED", "/a is not allowed", "--allow-uri"] {
            assert!(words.contains(part), "no {part:?} in {words}");
        }
        // It answers, but with nothing that brings the work on.
        let fake = Fake::new(|_, _| turn(vec![started(&["/a"])], cut()));
        let lost = Submission { patience: Duration::ZERO, ..submission(fake.serve().await, of_shards(&["/a"])) };
        let error = submit(&lost).await.unwrap_err();
        assert!(matches!(error, SubmitError::Lost { code: Code::Unavailable, .. }), "{error:?}");
        let pairs = submit(&submission(endpoint, of_pairs(&pairs(1, 0)))).await.unwrap_err();
        assert!(matches!(pairs, SubmitError::Pairs), "{pairs:?}");
    });
}

#[test]
fn messages_that_contradict_each_other_lose_no_row_in_silence() {
    wait(async {
        let other = |uri: &str, hash: &str| {
            let shards = vec![uri.to_owned()];
            Event::Started(v1::ScoreStarted { model_hash: hash.to_owned(), shards, ..Default::default() })
        };
        let uneven = v1::ScoreChunk { row: vec![0, 1], caption: vec![0], ..Default::default() };
        let turns: Vec<(Vec<Event>, &str)> = vec![
            (vec![started(&["/a"]), summary(0)], "not of each shard"),
            (vec![started(&["/a"]), chunk(1, &[(0, 0)])], "has not listed"),
            (vec![started(&["/a"]), done(0, 1), chunk(0, &[(1, 0)])], "is done"),
            (vec![started(&["/a"]), Event::Chunk(uneven)], "different lengths"),
            (vec![started(&["/a"]), progress(0, 0), started(&["/b"])], "behind other messages"),
            (vec![other("/b", "model"), progress(0, 0)], "not asked for"),
            (vec![other("/a", "another"), progress(0, 0)], "its model"),
        ];
        for (events, words) in turns {
            let fake = Fake::new(move |call, _| match call {
                0 => turn(vec![started(&["/a"]), progress(0, 0)], cut()),
                _ => turn(events.clone(), None),
            });
            let error = submit(&submission(fake.serve().await, of_shards(&["/"]))).await.unwrap_err();
            assert!(matches!(error, SubmitError::Contract { .. }) && error.to_string().contains(words), "{error}");
        }
    });
}
