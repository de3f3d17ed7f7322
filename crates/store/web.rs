//! Objects of web servers, one plain GET each: what any server understands, and nothing is believed of what it says. Tries
//! once; when to try again, and how many at a time, is the caller's business.
//!
//! Whoever wrote the address is a stranger: no credentials go out, no address is named in full where it may hold a secret, and
//! link-local addresses (where clouds keep the credentials of the machine) are refused by name, by number and behind redirects.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::RETRY_AFTER;
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, Response, StatusCode};
use url::{Host, Url};

use crate::buckets::redacted;
use crate::{Error, Location, Result};

/// Until a connection is there, its name's resolution and TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A dataset names millions of servers: connections that nobody uses are not kept for long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1);
const REDIRECTS_MAX: usize = 5;
/// Where Amazon's machines find their credentials over IPv6, which is no link-local address.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
const LINK_LOCAL: &str = "link-local addresses are not fetched";
const CREDENTIALS: &str = "it holds a name or a password, which would end up in logs";

/// Where a cell says that its image is.
#[derive(Clone, Debug)]
pub enum Address {
    /// On a web server.
    Web(WebAddress),
    /// A file, or an object of a bucket.
    Stored(Location),
}

/// An object of a web server. Displays without the query, which may be a signature.
#[derive(Clone, Debug)]
pub struct WebAddress(Url);

/// Why an object of a web server cannot be had. Costs a row, never the job, and is therefore no [`Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WebError {
    /// An answer that is no object.
    #[error("the server answers {status}")]
    Status {
        /// The answer.
        status: StatusCode,
        /// When to ask again, where the server says so.
        retry_after: Option<Duration>,
    },
    /// No connection: no such name, nobody listens, no answer, no TLS.
    #[error("its host cannot be reached")]
    Connect(#[source] reqwest::Error),
    /// The connection broke.
    #[error("the answer broke off")]
    Cut(#[source] reqwest::Error),
    /// Out of time.
    #[error("it takes longer than {seconds} s")]
    Slow {
        /// What was allowed.
        seconds: u64,
    },
    /// More bytes than the caller allows.
    #[error("it has more than {limit} bytes")]
    TooLarge {
        /// The most that is read.
        limit: u64,
    },
    /// The address, or one that it leads to, is not for us.
    #[error("{}", .0.reason())]
    Refused(Refusal),
    /// The host was not to be reached so often that it was not asked.
    #[error("its host could not be reached {failures} times in a row and is left alone for {seconds} s")]
    HostDown {
        /// Of so many tries.
        failures: u32,
        /// From the last of them on.
        seconds: u64,
    },
    /// Anything else.
    #[error("the request cannot be made")]
    Request(#[source] reqwest::Error),
}

/// Why an address is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.reason())]
pub enum Refusal {
    /// It is a link-local one.
    LinkLocal,
    /// One redirect too many.
    Redirects,
}

impl Refusal {
    fn reason(self) -> &'static str {
        match self {
            Self::LinkLocal => LINK_LOCAL,
            Self::Redirects => "it is redirected too often",
        }
    }
}

impl WebError {
    /// Whether the same request may well succeed in a moment.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Cut(_) => true,
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(*status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            }
            _ => false,
        }
    }

    /// When the server wants to be asked again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

impl From<reqwest::Error> for WebError {
    fn from(error: reqwest::Error) -> Self {
        // The client's messages would name the address with its query.
        let error = error.without_url();
        match refusal(&error) {
            Some(refusal) => Self::Refused(refusal),
            None if error.is_connect() => Self::Connect(error),
            None if error.is_request() || error.is_body() || error.is_decode() => Self::Cut(error),
            None => Self::Request(error),
        }
    }
}

/// Our own refusal, wherever in the chain the client has put it.
fn refusal(error: &(dyn std::error::Error + 'static)) -> Option<Refusal> {
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    chain.find_map(|error| error.downcast_ref::<Refusal>().copied())
}

impl WebAddress {
    /// Makes sense of an address; what stands behind a '#' is for browsers.
    ///
    /// # Errors
    /// When it is malformed, holds credentials, or is link-local.
    pub fn parse(uri: &str) -> Result<Self> {
        let bad = |reason| Error::Uri { uri: redacted(uri), reason };
        let mut url = Url::parse(uri).map_err(|_| bad("it cannot be parsed"))?;
        url.set_fragment(None);
        match &url {
            url if !is_web(url.as_str()) => Err(bad("it is no http:// or https:// address")),
            url if !url.username().is_empty() || url.password().is_some() => Err(bad(CREDENTIALS)),
            url if is_link_local(url) => Err(bad(LINK_LOCAL)),
            _ => Ok(Self(url)),
        }
    }

    /// Name and port of the server.
    pub fn host(&self) -> String {
        format!("{}:{}", self.0.host_str().unwrap_or_default(), self.0.port_or_known_default().unwrap_or_default())
    }
}

impl fmt::Display for WebAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&redacted(self.0.as_str()))
    }
}

/// Whether a URI is one of a web server.
pub(crate) fn is_web(uri: &str) -> bool {
    uri.split_once("://")
        .is_some_and(|(scheme, _)| ["http", "https"].iter().any(|web| scheme.eq_ignore_ascii_case(web)))
}

/// Keeps connections. A clone is the same client.
#[derive(Clone, Debug)]
pub struct WebClient(Client);

impl WebClient {
    /// Without a connection yet.
    ///
    /// # Errors
    /// When the system has no roots for TLS.
    pub fn new() -> Result<Self, WebError> {
        let builder = Client::builder()
            .user_agent(concat!("capsieve/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            // When to try again is decided in one place only.
            .retry(reqwest::retry::never())
            .redirect(Policy::custom(redirected))
            // The address that led there, query and all, is not the next server's business.
            .referer(false)
            .dns_resolver(Resolver);
        Ok(Self(builder.build()?))
    }

    /// Asks for an object, and gives what the server says before the object itself comes.
    ///
    /// # Errors
    /// When the server is not there, or has no such object.
    pub async fn get(&self, address: &WebAddress) -> Result<WebAnswer, WebError> {
        let answer = self.0.get(address.0.clone()).send().await?;
        let status = answer.status();
        if status.is_success() {
            return Ok(WebAnswer(answer));
        }
        // Its other form, a date, is what no image server was seen to send.
        let seconds = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        Err(WebError::Status { status, retry_after: seconds.map(Duration::from_secs) })
    }
}

/// An object that begins to arrive.
#[derive(Debug)]
pub struct WebAnswer(Response);

impl WebAnswer {
    /// Bytes, where the server says so.
    pub fn length(&self) -> Option<u64> {
        self.0.content_length()
    }

    /// The object, of at most so many bytes; of what is larger no more than that is read.
    ///
    /// # Errors
    /// When it is larger, or the connection breaks.
    pub async fn read(mut self, bytes_max: u64) -> Result<Bytes, WebError> {
        let too_large = WebError::TooLarge { limit: bytes_max };
        let announced = self.length().unwrap_or_default();
        if announced > bytes_max {
            return Err(too_large);
        }
        let mut bytes = BytesMut::with_capacity(usize::try_from(announced).unwrap_or_default());
        while let Some(piece) = self.0.chunk().await? {
            if bytes.len() as u64 + piece.len() as u64 > bytes_max {
                return Err(too_large);
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }
}

fn redirected(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    // The first is the address itself.
    if attempt.previous().len() > REDIRECTS_MAX {
        return attempt.error(Refusal::Redirects);
    }
    if is_link_local(attempt.url()) {
        return attempt.error(Refusal::LinkLocal);
    }
    attempt.follow()
}

/// The system's resolution of names, without link-local addresses.
struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<_> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let usable: Vec<_> = found.iter().copied().filter(|address| !is_refused(address.ip())).collect();
            match usable.is_empty() && !found.is_empty() {
                true => Err(Refusal::LinkLocal.into()),
                false => Ok(Box::new(usable.into_iter()) as Addrs),
            }
        })
    }
}

/// Whether an address names such a machine by its number; names are looked at when they are resolved.
fn is_link_local(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => is_refused(address.into()),
        Some(Host::Ipv6(address)) => is_refused(address.into()),
        _ => false,
    }
}

fn is_refused(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => {
            // The last four bytes are an IPv4 address: as they are, mapped, or behind a translator (RFC 6052).
            let [first @ .., high, low] = address.segments();
            let embeds = matches!(first, [0, 0, 0, 0, 0, 0 | 0xffff] | [0x64, 0xff9b, 0, 0, 0, 0]);
            let embedded = std::net::Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
            (embeds && embedded.is_link_local()) || address.is_unicast_link_local() || address == METADATA_V6
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn addresses_say_where_and_no_secrets() {
        let address = WebAddress::parse("HTTPS://Host.example/a%20b.jpg?sig=s3cret&x=#part").unwrap();
        assert_eq!(address.0.as_str(), "https://host.example/a%20b.jpg?sig=s3cret&x=");
        assert_eq!(address.to_string(), "https://host.example/a%20b.jpg?...");
        assert_eq!(address.host(), "host.example:443");
        assert_eq!(WebAddress::parse("http://[::1]:8080/a").unwrap().host(), "[::1]:8080");
        for bad in [
            "http://",
            "https://me:s3cret@host/a",
            "https://s3cret@host/a",
            "ftp://host/a?s3cret",
            "http://a b/?s3cret",
        ] {
            let error = WebAddress::parse(bad).unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[tokio::test]
    async fn names_do_not_lead_to_link_local_addresses() {
        let resolve = |name: &str| Resolver.resolve(name.parse().unwrap());
        // A number is a name that the system knows without asking.
        let refused = resolve("169.254.169.254").await.err().unwrap();
        assert_eq!(refused.downcast_ref(), Some(&Refusal::LinkLocal));
        assert_eq!(resolve("127.0.0.1").await.unwrap().count(), 1);
    }

    #[test]
    fn link_local_addresses_are_refused_however_they_are_written() {
        for link_local in [
            "http://169.254.169.254/latest",
            "http://169.254.0.1:8080/",
            "http://2852039166/",
            "http://0xa9.0xfe.0xa9.0xfe/",
            "http://169.254.169.254./",
            "http://[fe80::1]/",
            "http://[febf::1]/",
            "http://[::ffff:169.254.169.254]/",
            "http://[::169.254.169.254]/",
            "http://[64:ff9b::a9fe:a9fe]/",
            "http://[fd00:ec2::254]/",
        ] {
            let error = WebAddress::parse(link_local).unwrap_err().to_string();
            assert!(error.contains(LINK_LOCAL), "{error}");
        }
        for usable in [
            "http://169.253.1.1/",
            "http://127.0.0.1/",
            "http://[::1]/",
            "http://[fec0::1]/",
            "http://[::ffff:10.0.0.1]/",
        ] {
            assert!(WebAddress::parse(usable).is_ok(), "{usable}");
        }
    }
}
