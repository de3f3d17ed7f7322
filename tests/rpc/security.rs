//! What a client must not reach: paths outside of `--allow-uri`, a worker without its token. TLS is in `tls.rs`.

use std::io::{Read, Write};
use std::net::TcpStream;

use capsieve_rpc::v1;
use capsieve_rpc::v1::score_batch_request::Source;
use capsieve_rpc::v1::scoring_service_client::ScoringServiceClient;
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::server::{Server, Shards, call, entries, of_pairs, of_shards, pairs, wait};
use crate::support::{capsieve, shard, write_parquet};

/// Attempts to read outside of `<root>/in/allowed`, by `uri`. Links are made by the test.
fn escapes(root: &str) -> Vec<String> {
    let inside = format!("{root}/in/allowed");
    let plain = [
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/fd/0",
        "/dev/zero",
        "/dev/stdin",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "file:///proc/self/mem",
        "../../etc/passwd",
        "~/.ssh/id_rsa",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/latest/meta-data/a",
        "http://localhost:22/a",
        "https://metadata.google.internal/computeMetadata/v1/",
        "s3://bucket/secret.parquet",
        "gs://bucket/secret.parquet",
        "az://container/secret.parquet",
        "abfs://c@a.dfs.core.windows.net/s",
        "ftp://host/a.parquet",
        "data:,abc",
        "//etc/passwd",
        "FILE:///etc/passwd",
        "file:/etc/passwd",
        "file://host/etc/passwd",
        "memory:///a.parquet",
    ];
    let mut uris: Vec<String> = plain.map(str::to_owned).to_vec();
    let below = [
        "/../secret.parquet",
        "/./../secret.parquet",
        "/sub/../../secret.parquet",
        "/../allowed-not/x.parquet",
        "/link.parquet",
        "/folder-link/secret.parquet",
        "/chain.parquet",
        "/sub/../link.parquet",
        "/dangling.parquet",
        "/pipe",
        "/absolute-link.parquet",
        "/../../in/secret.parquet",
        "/%2e%2e/secret.parquet",
        "/..%2fsecret.parquet",
    ];
    uris.extend(below.iter().map(|path| format!("{inside}{path}")));
    uris.extend(below.iter().map(|path| format!("file://{inside}{path}")));
    uris.extend([
        format!("{inside}-not/x.parquet"),
        format!("{root}/in/"),
        format!("{inside}/../"),
        format!("{root}/in/secret.parquet"),
    ]);
    uris
}

#[test]
#[cfg(unix)]
fn nothing_outside_of_the_allowed_prefixes_is_read_or_written() {
    let shards = Shards::new(&[4]);
    let root = shards.root();
    let secret = shards.text("in/secret.parquet");
    std::fs::rename(shards.path("in/a.parquet"), &secret).unwrap();
    for folder in ["in/allowed", "in/allowed/sub", "in/allowed-not"] {
        std::fs::create_dir(shards.path(folder)).unwrap();
    }
    std::fs::copy(&secret, shards.path("in/allowed-not/x.parquet")).unwrap();
    std::fs::copy(&secret, shards.path("in/allowed/good.parquet")).unwrap();
    let link = |target: &str, name: &str| {
        std::os::unix::fs::symlink(target, shards.path(&format!("in/allowed/{name}"))).unwrap();
    };
    link("../secret.parquet", "link.parquet");
    link(&secret, "absolute-link.parquet");
    link("link.parquet", "chain.parquet");
    link("..", "folder-link");
    link("../nothing.parquet", "dangling.parquet");
    assert!(std::process::Command::new("mkfifo").arg(shards.path("in/allowed/pipe")).status().unwrap().success());
    let server = Server::start(&["--allow-uri", &shards.text("in/allowed")]);
    wait(async {
        let mut client = server.client().await;
        let tried = escapes(&root);
        assert!(tried.len() > 50);
        for uri in tried {
            let answer = call(&mut client, of_shards(&[&uri])).await;
            let code = answer.end.as_ref().map_or(Code::Ok, tonic::Status::code);
            let refused = [Code::PermissionDenied, Code::InvalidArgument, Code::NotFound];
            assert!(refused.contains(&code), "{uri}: {:?}", answer.end);
            assert_eq!(entries(&answer.events), [], "{uri}");
            // As an image, a refusal is a row's error.
            let mut request = of_pairs(&pairs(1, 0));
            let Some(Source::Pairs(given)) = &mut request.source else { unreachable!() };
            given.items[0].image = Some(v1::image_captions::Image::ImageUri(uri.clone()));
            let image = call(&mut client, request).await.entries();
            assert_eq!(image[0].5, "fetch_failed", "{uri}");
            // As an output; a path with '%' in it is a name inside.
            if uri.contains("%2f") && !uri.contains("://") {
                continue;
            }
            let sink = v1::ParquetSink { uri: uri.clone(), overwrite: true, ..Default::default() };
            let good = shards.text("in/allowed/good.parquet");
            let answer = call(&mut client, v1::ScoreBatchRequest { sink: Some(sink), ..of_shards(&[good]) }).await;
            let code = answer.end.as_ref().map(tonic::Status::code);
            assert!(code.is_some_and(|code| refused.contains(&code)), "to {uri}: {:?}", answer.end);
        }
        // A prefix lists what is inside; a link that leads outside is refused, for no row may be lost in silence.
        let answer = call(&mut client, of_shards(&[shards.text("in/allowed") + "/"])).await;
        assert_eq!(answer.status().code(), Code::PermissionDenied);
        for name in ["link", "absolute-link", "chain", "dangling"] {
            std::fs::remove_file(shards.path(&format!("in/allowed/{name}.parquet"))).unwrap();
        }
        let answer = call(&mut client, of_shards(&[shards.text("in/allowed") + "/"])).await;
        assert_eq!(answer.summary().shards, 1, "{:?}", answer.events);
    });
    assert_eq!(std::fs::read_dir(shards.path("out")).unwrap().count(), 0);
    assert!(!shards.path("in/nothing.parquet").exists());
}

#[test]
fn by_default_nothing_is_read() {
    let shards = Shards::new(&[4]);
    let server = Server::start(&[]);
    wait(async {
        let mut client = server.client().await;
        for uri in [shards.text("in/a.parquet"), shards.text("in") + "/", "Cargo.toml".to_owned()] {
            assert_eq!(call(&mut client, of_shards(&[uri])).await.status().code(), Code::PermissionDenied);
        }
    });
    let ran = capsieve(&["serve", "--model", "synthetic:tiny", "--allow-uri", "/no/such/folder"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("/no/such/folder: expected a folder that exists"), "{ran:?}");
}

/// Addresses in a shard are confined as those of a request.
#[test]
fn a_shard_cannot_name_files_outside() {
    let shards = Shards::new(&[1]);
    let urls = ["/etc/passwd", "../secret.png", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "inside.png"];
    std::fs::write(shards.path("secret.png"), crate::support::picture(1)).unwrap();
    std::fs::write(shards.path("in/inside.png"), crate::support::picture(2)).unwrap();
    let texts: arrow::array::StringArray = urls.iter().map(|url| Some(*url)).collect();
    let captions: arrow::array::StringArray = urls.iter().map(|_| Some("a caption")).collect();
    let batch = arrow::array::RecordBatch::try_from_iter([
        ("image_path", std::sync::Arc::new(texts) as arrow::array::ArrayRef),
        ("caption", std::sync::Arc::new(captions)),
    ]);
    write_parquet(&shards.path("in/urls.parquet"), &batch.unwrap(), 2);
    let server = Server::start(&["--allow-uri", &shards.text("in")]);
    wait(async {
        let answer = call(&mut server.client().await, of_shards(&[shards.text("in/urls.parquet")])).await;
        let statuses: Vec<String> = answer.entries().into_iter().map(|entry| entry.5).collect();
        assert_eq!(statuses, ["fetch_failed", "fetch_failed", "fetch_failed", "fetch_failed", "ok"]);
    });
}

#[test]
fn every_endpoint_asks_for_the_token() {
    let shards = Shards::new(&[1]);
    let (file, loose) = (shards.text("tokens"), shards.text("submit-token"));
    std::fs::write(&file, "# people\nfirst-token\n\nsecond-token\n").unwrap();
    std::fs::write(&loose, "second-token\n").unwrap();
    let server =
        Server::start(&["--token-file", &file, "--metrics-listen", "127.0.0.1:0", "--allow-uri", &shards.root()]);
    wait(async {
        let channel = Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
        let wrong = [
            None,
            Some("Bearer"),
            Some("Bearer "),
            Some("Bearer first-toke"),
            Some("Bearer first-tokenx"),
            Some("bearer first-token"),
            Some("Basic first-token"),
            Some("first-token"),
            Some("Bearer # people"),
            Some("Bearer FIRST-TOKEN"),
            Some("Bearer  first-token"),
        ];
        for header in wrong {
            let with = |request: &mut tonic::metadata::MetadataMap| {
                if let Some(header) = header {
                    request.insert("authorization", header.parse().unwrap());
                }
            };
            let mut client = ScoringServiceClient::new(channel.clone());
            let mut request = Request::new(of_pairs(&pairs(1, 0)));
            with(request.metadata_mut());
            assert_eq!(client.score_batch(request).await.unwrap_err().code(), Code::Unauthenticated, "{header:?}");
            let mut request = Request::new(v1::GetModelInfoRequest {});
            with(request.metadata_mut());
            assert_eq!(client.get_model_info(request).await.unwrap_err().code(), Code::Unauthenticated, "{header:?}");
            let mut request = Request::new(HealthCheckRequest::default());
            with(request.metadata_mut());
            let answer = HealthClient::new(channel.clone()).check(request).await;
            assert_eq!(answer.unwrap_err().code(), Code::Unauthenticated, "{header:?}");
            assert!(http(&server, header).starts_with("HTTP/1.1 401"), "{header:?}");
        }
        for token in ["Bearer first-token", "Bearer second-token"] {
            let mut request = Request::new(of_pairs(&pairs(1, 0)));
            request.metadata_mut().insert("authorization", token.parse().unwrap());
            assert!(ScoringServiceClient::new(channel.clone()).score_batch(request).await.is_ok());
            let metrics = http(&server, Some(token));
            assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("capsieve_build_info{"), "{metrics}");
        }
        // A token that is taken out of the file is refused soon after.
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        std::fs::write(&file, "third-token\n").unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        let mut request = Request::new(v1::GetModelInfoRequest {});
        request.metadata_mut().insert("authorization", "Bearer first-token".parse().unwrap());
        let answer = ScoringServiceClient::new(channel.clone()).get_model_info(request).await;
        assert_eq!(answer.unwrap_err().code(), Code::Unauthenticated);
    });
    let (endpoint, input) = (server.endpoint(), shards.text("in/a.parquet"));
    let ran = capsieve(&["submit", "--endpoint", &endpoint, "--input", &input, "--token-file", &loose]);
    assert!(ran.code == Some(1) && ran.stderr.contains("UNAUTHENTICATED"), "{ran:?}");
    std::fs::write(&loose, "third-token\n").unwrap();
    let ran = capsieve(&["submit", "--endpoint", &endpoint, "--input", &input, "--token-file", &loose]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

/// The answer of the metrics' endpoint.
fn http(server: &Server, authorization: Option<&str>) -> String {
    let url = server.metrics.as_ref().unwrap();
    let address = url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics")).unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    let header = authorization.map(|value| format!("Authorization: {value}\r\n")).unwrap_or_default();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n{header}Connection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn settings_that_protect_nothing_are_errors() {
    let shards = Shards::new(&[1]);
    std::fs::write(shards.path("empty"), "# nobody\n").unwrap();
    write_parquet(&shards.path("in/x.parquet"), &shard(&pairs(1, 0)), 1);
    let serve = |arguments: &[&str]| capsieve(&[&["serve", "--model", "synthetic:tiny"], arguments].concat());
    let (empty, none) = (shards.text("empty"), shards.text("none"));
    for (arguments, words) in [
        (&["--token-file", &empty][..], "holds no token"),
        (&["--token-file", &none], "No such file"),
        (&["--tls-cert", &empty, "--tls-key", &empty], "empty"),
        (&["--allow-uri", &empty], "expected a folder"),
        (&["--allow-uri", ""], "expected a folder"),
        (&["--allow-uri", " "], "expected a folder"),
        (&["--allow-uri", &format!("{},", shards.root())], "expected a folder"),
        (&["--allow-uri", "http://host/data/"], "http://host/data/"),
    ] {
        let ran = serve(arguments);
        assert!(ran.code == Some(1) && ran.stderr.contains(words), "{arguments:?}: {ran:?}");
    }
    for arguments in [&["--tls-cert", &empty][..], &["--tls-client-ca", &empty], &["--listen", "nowhere"]] {
        assert_eq!(serve(arguments).code, Some(2), "{arguments:?}");
    }
}
