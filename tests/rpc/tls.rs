//! TLS and certificates, of the worker and of its metrics.

use std::sync::Arc;

use capsieve_rpc::v1;
use capsieve_rpc::v1::scoring_service_client::ScoringServiceClient;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use super::server::{Server, Shards, wait};
use crate::support::capsieve;

/// A root, and a certificate of it with its key, in PEM.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    fn issue(&self) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }
}

#[test]
fn tls_and_client_certificates() {
    let shards = Shards::new(&[3]);
    let (ours, theirs) = (Authority::new(), Authority::new());
    let write = |name: &str, text: &str| {
        std::fs::write(shards.path(name), text).unwrap();
        shards.text(name)
    };
    let (certificate, key) = ours.issue();
    let files = [write("cert.pem", &certificate), write("key.pem", &key), write("ca.pem", &ours.pem())];
    let arguments = ["--tls-cert", &files[0], "--tls-key", &files[1], "--tls-client-ca", &files[2]];
    let server = Server::start(&[&arguments[..], &["--allow-uri", &shards.root()]].concat());
    let endpoint = format!("https://localhost:{}", server.address.rsplit_once(':').unwrap().1);
    let connect = async |root: &Authority, identity: Option<(String, String)>| {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root.pem()));
        if let Some((certificate, key)) = identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let channel = Channel::from_shared(endpoint.clone()).unwrap().tls_config(tls).unwrap().connect().await;
        let info = ScoringServiceClient::new(channel.map_err(|_| ())?).get_model_info(v1::GetModelInfoRequest {}).await;
        info.map(drop).map_err(|_| ())
    };
    wait(async {
        assert!(connect(&ours, Some(ours.issue())).await.is_ok());
        assert!(connect(&ours, None).await.is_err(), "no certificate");
        assert!(connect(&ours, Some(theirs.issue())).await.is_err(), "another root's certificate");
        assert!(connect(&theirs, Some(ours.issue())).await.is_err(), "the client asks for another root");
        let plain = Channel::from_shared(server.endpoint()).unwrap().connect().await;
        let plain = match plain {
            Ok(channel) => ScoringServiceClient::new(channel).get_model_info(v1::GetModelInfoRequest {}).await.is_ok(),
            Err(_) => false,
        };
        assert!(!plain, "no encryption");
    });
    let (certificate, key) = ours.issue();
    let (certificate, key) = (write("client.pem", &certificate), write("client.key", &key));
    let input = shards.text("in/a.parquet");
    let submit = ["submit", "--endpoint", &endpoint, "--input", &input, "--patience", "0"];
    let identified = ["--tls-ca", &files[2], "--tls-cert", &certificate, "--tls-key", &key];
    let ran = capsieve(&[&submit[..], &identified[..]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(capsieve(&[&submit[..], &identified[..2]].concat()).code, Some(1));
    // New files are taken without a restart; a broken one is left aside.
    std::fs::write(&files[0], "rubbish").unwrap();
    server.wait_for("the new TLS files are not used");
    wait(async { assert!(connect(&ours, Some(ours.issue())).await.is_ok(), "the old ones go on") });
    let (certificate, key) = theirs.issue();
    std::fs::write(&files[1], key).unwrap();
    std::fs::write(&files[0], certificate).unwrap();
    server.wait_for("new TLS files are in use");
    wait(async {
        assert!(connect(&theirs, Some(ours.issue())).await.is_ok(), "the new certificate");
        assert!(connect(&ours, Some(ours.issue())).await.is_err(), "the old one is gone");
    });
}

#[test]
fn client_roots_that_are_taken_away_let_nobody_in() {
    let shards = Shards::new(&[]);
    let ca = Authority::new();
    let ((certificate, key), identity) = (ca.issue(), ca.issue());
    let files = [("cert.pem", certificate), ("key.pem", key), ("ca.pem", ca.pem())].map(|(name, text)| {
        std::fs::write(shards.path(name), text).unwrap();
        shards.text(name)
    });
    let server = Server::start(&["--tls-cert", &files[0], "--tls-key", &files[1], "--tls-client-ca", &files[2]]);
    let endpoint = format!("https://localhost:{}", server.address.rsplit_once(':').unwrap().1);
    let ask = async |client: &mut ScoringServiceClient<Channel>| {
        client.get_model_info(v1::GetModelInfoRequest {}).await.map(drop).map_err(drop)
    };
    let connect = async || {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.pem()));
        let tls = tls.identity(Identity::from_pem(&identity.0, &identity.1));
        let channel = Channel::from_shared(endpoint.clone()).unwrap().tls_config(tls).unwrap().connect().await;
        let mut client = ScoringServiceClient::new(channel.map_err(drop)?);
        ask(&mut client).await.map(|()| client)
    };
    wait(async {
        let mut early = connect().await.unwrap();
        std::fs::write(&files[2], "").unwrap();
        server.wait_for("the new TLS files are not used");
        assert!(connect().await.is_ok(), "they may be on their way");
        server.wait_for("no connection is taken until the TLS files can be used");
        assert!(connect().await.is_err());
        assert!(ask(&mut early).await.is_ok(), "who is in stays");
        std::fs::write(&files[2], ca.pem()).unwrap();
        server.wait_for("new TLS files are in use");
        assert!(connect().await.is_ok());
    });
}

/// A TLS connection to `address` by a client that knows the root `ca`.
async fn encrypted(address: &str, ca: &Authority) -> TlsStream<tokio::net::TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    TlsConnector::from(Arc::new(config)).connect("localhost".try_into().unwrap(), stream).await.unwrap()
}

#[test]
fn tls_hides_nobody_and_covers_the_metrics() {
    let shards = Shards::new(&[]);
    let ca = Authority::new();
    let (certificate, key) = ca.issue();
    let paths = [("cert.pem", certificate), ("key.pem", key), ("tokens", "secret\n".to_owned())].map(|(name, text)| {
        std::fs::write(shards.path(name), text).unwrap();
        shards.text(name)
    });
    let files = ["--tls-cert", &paths[0], "--tls-key", &paths[1], "--token-file", &paths[2]];
    let limits = ["--metrics-listen", "127.0.0.1:0", "--handshake-timeout", "0.5", "--keepalive", "600"];
    let server = Server::start(&[&files[..], &limits[..]].concat());
    let metrics = server.metrics.clone().unwrap();
    let metrics = metrics.strip_prefix("https://").and_then(|rest| rest.strip_suffix("/metrics")).unwrap();
    wait(async {
        // Silent after the handshake, and something else than HTTP/2.
        for words in [&b""[..], b"GET / HTTP/1.1\r\n\r\n"] {
            let mut stream = encrypted(&server.address, &ca).await;
            stream.write_all(words).await.unwrap();
            stream.flush().await.unwrap();
            // Closed, with TLS's goodbye or without.
            drop(stream.read_to_end(&mut Vec::new()).await);
        }
        // The metrics: as many connections as there may be that ask for nothing, and some that have no token.
        let mut silent = Vec::new();
        for i in 0..70 {
            let mut stream = tokio::net::TcpStream::connect(metrics).await.unwrap();
            if i % 2 == 0 {
                stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            }
            silent.push(stream);
        }
        let ask = async |header: &str| {
            let mut stream = encrypted(metrics, &ca).await;
            let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{header}Connection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            drop(stream.read_to_end(&mut answer).await);
            String::from_utf8(answer).unwrap()
        };
        assert!(ask("").await.starts_with("HTTP/1.1 401"));
        let answer = ask("Authorization: Bearer secret\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("capsieve_build_info{"), "{answer}");
        assert!(answer.contains("content-type: text/plain; version=0.0.4\r\n"), "{answer}");
        // What does not speak TLS got no word of HTTP.
        for mut stream in silent {
            let mut bytes = Vec::new();
            drop(stream.read_to_end(&mut bytes).await);
            assert!(!bytes.starts_with(b"HTTP"), "{bytes:?}");
        }
        // An authorised request is the condition for staying.
        let mut stream = encrypted(metrics, &ca).await;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer).await);
        assert!(answer.starts_with(b"HTTP/1.1 401"), "{answer:?}");
    });
}
