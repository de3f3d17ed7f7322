//! TLS from files that are read again when they change, so that certificates are renewed without a restart.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs::default_provider;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

use crate::tokens::GRACE;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// What is spoken inside of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// gRPC.
    Http2,
    /// The metrics.
    Http1,
}

/// PEM files of a server.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Its certificate and those that lead to the root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Roots of the clients' certificates; with them a client without a certificate is refused.
    pub client_roots: Option<PathBuf>,
}

/// Files that are no TLS server.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or is no PEM.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// Why.
        reason: String,
    },
    /// The files do not fit together.
    #[error("the TLS certificate and its key cannot be used together")]
    Config(#[from] rustls::Error),
    /// The clients' roots cannot be used.
    #[error("the client roots cannot be used")]
    Roots(#[from] rustls::server::VerifierBuilderError),
}

/// The server's side of TLS as the files are now.
pub(crate) struct Tls {
    files: TlsFiles,
    current: Mutex<Current>,
}

struct Current {
    /// None when the files have been unusable for too long: roots and keys that were taken away must not be valid for ever.
    configs: Option<Configs>,
    /// The files that they are from.
    written: Vec<Written>,
    /// Since when the files cannot be used.
    unusable: Option<Instant>,
}

/// When a file was written, and its length.
type Written = Option<(SystemTime, u64)>;

/// The same but for the protocol.
struct Configs {
    http2: Arc<ServerConfig>,
    http1: Arc<ServerConfig>,
}

impl Tls {
    pub(crate) fn open(files: &TlsFiles) -> Result<Arc<Self>, TlsError> {
        // First, so that what changes meanwhile is seen.
        let written = written(files);
        let current = Mutex::new(Current { configs: Some(configs(files)?), written, unusable: None });
        Ok(Arc::new(Self { files: files.clone(), current }))
    }

    /// For the next connection; none: it is refused.
    pub(crate) fn acceptor(&self, protocol: Protocol) -> Option<TlsAcceptor> {
        let current = self.current();
        let configs = current.configs.as_ref()?;
        let config = match protocol {
            Protocol::Http2 => &configs.http2,
            Protocol::Http1 => &configs.http1,
        };
        Some(Arc::clone(config).into())
    }

    /// Takes new files as they come.
    pub(crate) async fn renew(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.look(Instant::now());
        }
    }

    /// The rule of [`crate::tokens`]: files that cannot be used are left aside for a while, for they may be on their way.
    fn look(&self, now: Instant) {
        let written = written(&self.files);
        let unusable = self.current().unusable;
        if unusable.is_none() && written == self.current().written {
            return;
        }
        let configs = configs(&self.files);
        let mut current = self.current();
        match (configs, unusable) {
            (Ok(configs), _) => {
                tracing::info!("new TLS files are in use");
                *current = Current { configs: Some(configs), written, unusable: None };
            }
            (Err(error), None) => {
                current.unusable = Some(now);
                let seconds = GRACE.as_secs();
                tracing::warn!("the new TLS files are not used, the old ones for {seconds} seconds more: {error}");
            }
            (Err(error), Some(since)) if current.configs.is_some() && now.duration_since(since) >= GRACE => {
                current.configs = None;
                tracing::warn!("no connection is taken until the TLS files can be used: {error}");
            }
            (Err(_), Some(_)) => {}
        }
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn written(files: &TlsFiles) -> Vec<Written> {
    let TlsFiles { certificate, key, client_roots } = files;
    let look = |path: &PathBuf| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.modified().ok()?, meta.len()))
    };
    [Some(certificate), Some(key), client_roots.as_ref()].into_iter().flatten().map(look).collect()
}

fn configs(files: &TlsFiles) -> Result<Configs, TlsError> {
    let provider = Arc::new(default_provider());
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| unreadable(&files.key, &error))?;
    let chain = certificates(&files.certificate)?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match &files.client_roots {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(path)? {
                roots.add(root)?;
            }
            builder
                .with_client_cert_verifier(WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build()?)
        }
    };
    let config = builder.with_single_cert(chain, key)?;
    let speaks = |name: &[u8]| {
        let mut config = config.clone();
        config.alpn_protocols = vec![name.to_vec()];
        Arc::new(config)
    };
    Ok(Configs { http2: speaks(b"h2"), http1: speaks(b"http/1.1") })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    let found = read().map_err(|error| unreadable(path, &error))?;
    if found.is_empty() {
        return Err(TlsError::File { path: path.display().to_string(), reason: "it holds no certificate".to_owned() });
    }
    Ok(found)
}

fn unreadable(path: &Path, error: &rustls_pki_types::pem::Error) -> TlsError {
    TlsError::File { path: path.display().to_string(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertifiedKey, generate_simple_self_signed};

    use super::*;

    #[test]
    fn files_that_cannot_be_used_any_more_end_handshakes_after_a_grace() {
        let folder = tempfile::tempdir().unwrap();
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let texts = [("cert", cert.pem()), ("key", signing_key.serialize_pem()), ("ca", cert.pem())];
        let paths = texts.each_ref().map(|(name, _)| folder.path().join(name));
        let write = |i: usize| std::fs::write(&paths[i], &texts[i].1).unwrap();
        (0..3).for_each(write);
        let [certificate, key, client_roots] = paths.clone();
        let files = TlsFiles { certificate, key, client_roots: Some(client_roots) };
        let end: [fn(&Path); 3] = [
            |path| std::fs::remove_file(path).unwrap(),
            |path| std::fs::write(path, "").unwrap(),
            |path| std::fs::write(path, "# nobody\n").unwrap(),
        ];
        for (i, path) in paths.iter().enumerate() {
            for end in end {
                let (tls, opened) = (Tls::open(&files).unwrap(), Instant::now());
                let accepts = |seconds: u64| {
                    tls.look(opened + Duration::from_secs(seconds));
                    let [http2, http1] = [Protocol::Http2, Protocol::Http1].map(|one| tls.acceptor(one).is_some());
                    assert_eq!(http2, http1);
                    http2
                };
                assert!(accepts(2));
                end(path);
                assert!(accepts(4), "it may be on its way");
                assert!(accepts(13));
                assert!(!accepts(14), "the grace is over");
                assert!(!accepts(600));
                write(i);
                assert!(accepts(602), "it is back");
            }
        }
    }
}
