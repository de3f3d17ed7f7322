//! Stores that are reached over HTTP: buckets and web servers. Which one a URI names, and how it is reached: each cloud's standard
//! environment variables say that, as they do for its other tools.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use percent_encoding::percent_decode_str;
use url::{Position, Url};

use crate::{Error, Result};

/// Schemes of URIs that are no files.
const SCHEMES: [&str; 10] = ["s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https"];
/// Until a connection is there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Until a request and its answer are through: the largest are row groups.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(300);
/// Without a byte.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests that failed in a way that may pass are made again for so long at most ...
const RETRY_TIMEOUT: Duration = Duration::from_secs(180);
/// ... and so often, after a pause of this at least and of twice the one before at most, by chance. Chance keeps them short, so
/// that the least one decides: an outage of six seconds always passes, one of half a minute seldom.
const RETRIES_MAX: usize = 12;
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Stores that are kept open; who names more buckets than this pays for new connections.
const STORES_MAX: usize = 256;
/// Ends the URI's path for every parser but not for the store.
const ENCODE: &str = "'?' and '#' are written as %3F and %23";

/// By the part of a URI before the path: connections are kept.
static STORES: LazyLock<Mutex<HashMap<String, Arc<dyn ObjectStore>>>> = LazyLock::new(Mutex::default);

/// An object, or a prefix of objects.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) path: Path,
    /// The URI's part before the path: "s3://bucket".
    pub(crate) root: Arc<str>,
}

impl Object {
    /// Tells its store from all others, by whatever scheme it is named.
    pub(crate) fn store_name(&self) -> String {
        // Buckets say which they are, web servers do not.
        if self.root.starts_with("http") { self.root.to_string() } else { self.store.to_string() }
    }
}

/// Whether a scheme is one of a bucket or a web server.
pub(crate) fn is_scheme(scheme: &str) -> bool {
    SCHEMES.contains(&scheme)
}

/// Whether a URI is one of a bucket or a web server.
pub fn is_remote(uri: &str) -> bool {
    uri.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme))
}

/// What `uri` names. Nothing is asked of the store.
pub(crate) fn find(uri: &str) -> Result<Object> {
    let bad = |reason| Error::Uri { uri: redacted(uri), reason };
    let dots = |part: &str| percent_decode_str(part).decode_utf8().is_ok_and(|part| part == "." || part == "..");
    if uri.split('/').any(dots) {
        return Err(bad("names in stores have no parts . and .."));
    }
    let url = Url::parse(uri).map_err(|_| bad("it cannot be parsed"))?;
    let web = matches!(url.scheme(), "http" | "https");
    if web && url.query().is_some() {
        return Err(bad("addresses of shards have no query: of images alone they may have one"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad(ENCODE));
    }
    // An Azure URI names its account there, and no other has anything to say.
    if url.password().is_some() || (web && !url.username().is_empty()) {
        return Err(bad("it holds a name or a password, which would end up in logs: use environment variables"));
    }
    // Addresses of buckets are taken as they are: which part of them names the bucket is each provider's own.
    let found = match web {
        true => Path::from_url_path(url.path()).map(|path| (ObjectStoreScheme::Http, path)).ok(),
        false => ObjectStoreScheme::parse(&url).ok(),
    };
    let (scheme, path) = found.ok_or_else(|| bad("it is no name of an object, which has no empty parts"))?;
    let root = &url[..Position::BeforePath];
    let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
    let store = match stores.get(root) {
        Some(store) => Arc::clone(store),
        None => {
            let store = open(&scheme, &url).map_err(|source| Error::store(uri, source))?;
            if stores.len() >= STORES_MAX {
                stores.clear();
            }
            stores.insert(root.to_owned(), Arc::clone(&store));
            store
        }
    };
    Ok(Object { store, path, root: root.into() })
}

/// A URI without what may be secret.
pub(crate) fn redacted(uri: &str) -> String {
    let (whole, query) = uri.split_once('?').map_or((uri, ""), |(whole, _)| (whole, "?..."));
    let Some((scheme, rest)) = whole.split_once("://") else { return format!("{whole}{query}") };
    let authority = rest.find('/').unwrap_or(rest.len());
    let rest = rest[..authority].rfind('@').map_or_else(|| rest.to_owned(), |at| format!("...{}", &rest[at..]));
    format!("{scheme}://{rest}{query}")
}

fn open(scheme: &ObjectStoreScheme, url: &Url) -> object_store::Result<Arc<dyn ObjectStore>> {
    let backoff = BackoffConfig { init_backoff: PAUSE_MIN, ..BackoffConfig::default() };
    let retry = RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_TIMEOUT };
    let client = ClientOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_timeout(REQUEST_TIMEOUT)
        .with_read_timeout(READ_TIMEOUT);
    // Whoever names an endpoint without TLS means it, as for the clouds' own tools.
    let plain = |names: &[&str]| {
        names.iter().filter_map(|name| std::env::var(name).ok()).any(|endpoint| endpoint.starts_with("http://"))
    };
    Ok(match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let client = client.with_allow_http(plain(&["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"]));
            let builder = AmazonS3Builder::from_env().with_url(url.as_str()).with_retry(retry);
            Arc::new(builder.with_client_options(client).build()?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            // Google's endpoint has TLS; another is named by the service account's key or GOOGLE_BASE_URL alone.
            let client = client.with_allow_http(true);
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url.as_str()).with_retry(retry);
            Arc::new(builder.with_client_options(client).build()?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let emulated = std::env::var("AZURE_STORAGE_USE_EMULATOR").is_ok_and(|value| value != "false");
            let client = client.with_allow_http(emulated || plain(&["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"]));
            let builder = MicrosoftAzureBuilder::from_env().with_url(url.as_str()).with_retry(retry);
            Arc::new(builder.with_client_options(client).build()?)
        }
        _ => {
            let client = client.with_allow_http(url.scheme() == "http");
            let builder = HttpBuilder::new().with_url(&url[..Position::BeforePath]).with_retry(retry);
            Arc::new(builder.with_client_options(client).build()?)
        }
    })
}
