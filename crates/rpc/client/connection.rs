//! The way to the worker: address, TLS, keep-alive. Connects when the first call is made, and again after each loss.

use std::time::Duration;

use tonic::codec::CompressionEncoding;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::{Submission, SubmitError};
use crate::v1::scoring_service_client::ScoringServiceClient;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A silent connection is asked for a sign of life this often: a worker that vanished is noticed.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Bytes of a message from the worker: a chunk has two million at most.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

pub(super) fn client(submission: &Submission) -> Result<ScoringServiceClient<Channel>, SubmitError> {
    let bad = |source| SubmitError::Endpoint { endpoint: submission.endpoint.clone(), source };
    let endpoint = Endpoint::from_shared(submission.endpoint.clone()).map_err(bad)?;
    let mut endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    if submission.endpoint.starts_with("https://") {
        let mut tls = ClientTlsConfig::new();
        tls = match &submission.root {
            Some(root) => tls.ca_certificate(Certificate::from_pem(root)),
            None => tls.with_enabled_roots(),
        };
        if let Some((certificate, key)) = &submission.identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        endpoint = endpoint.tls_config(tls).map_err(bad)?;
    }
    if submission.token.as_ref().is_some_and(|token| AsciiMetadataValue::try_from(token.as_str()).is_err()) {
        return Err(SubmitError::Token);
    }
    let client = ScoringServiceClient::new(endpoint.connect_lazy())
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .accept_compressed(CompressionEncoding::Zstd);
    Ok(client)
}
