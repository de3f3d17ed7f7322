//! TLS from files that are read again when they change, so that certificates are renewed without a restart.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs::default_provider;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

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
    current: RwLock<Configs>,
}

/// The same but for the protocol.
struct Configs {
    http2: Arc<ServerConfig>,
    http1: Arc<ServerConfig>,
}

impl Tls {
    pub(crate) fn open(files: &TlsFiles) -> Result<Arc<Self>, TlsError> {
        let current = RwLock::new(configs(files)?);
        Ok(Arc::new(Self { files: files.clone(), current }))
    }

    /// For the next connection.
    pub(crate) fn acceptor(&self, protocol: Protocol) -> TlsAcceptor {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let config = match protocol {
            Protocol::Http2 => &current.http2,
            Protocol::Http1 => &current.http1,
        };
        Arc::clone(config).into()
    }

    /// Takes new files as they come; what cannot be used is said and left aside.
    pub(crate) async fn renew(&self) {
        let mut seen = self.written();
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.written();
            if now == seen {
                continue;
            }
            seen = now;
            match configs(&self.files) {
                Ok(configs) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = configs;
                    tracing::info!("new TLS files are in use");
                }
                Err(error) => tracing::warn!("the new TLS files are not used: {error}"),
            }
        }
    }

    fn written(&self) -> Vec<Option<(SystemTime, u64)>> {
        let TlsFiles { certificate, key, client_roots } = &self.files;
        let look = |path: &PathBuf| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.modified().ok()?, meta.len()))
        };
        [Some(certificate), Some(key), client_roots.as_ref()].into_iter().flatten().map(look).collect()
    }
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
