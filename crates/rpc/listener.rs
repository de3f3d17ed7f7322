//! Connections: accepted up to a limit, and handed on once they have shown that a client is there: a finished TLS handshake,
//! and the opening bytes of HTTP/2 where that is spoken. What says nothing in time is closed, and so is what stays for
//! nothing later on, see [`crate::activity`], or is in the way of others, see [`crate::places`].

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::Sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::activity::{Activity, Patience};
use crate::places::{Place, Places};
use crate::tls::{Protocol, Tls};

/// What every HTTP/2 client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Connections that may wait for a place. One more is dropped by the kernel without a word, and its client tries again after
/// seconds, so that the few of the default (128) would be a way to keep others out.
const WAITING_MAX: u32 = 1024;
/// After a failed accept, for example without file descriptors.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// What clients of a port may take.
#[derive(Clone)]
pub(crate) struct Port {
    pub(crate) protocol: Protocol,
    pub(crate) tls: Option<Arc<Tls>>,
    /// Connections at a time.
    pub(crate) connections: usize,
    pub(crate) patience: Patience,
}

/// A client's connection.
pub(crate) struct Connection {
    io: Box<dyn Io>,
    /// What was read to see that a client is there, as far as the server has not got it yet.
    preface: &'static [u8],
    /// Until the next look at it.
    look: Pin<Box<Sleep>>,
    over: bool,
    place: Place,
}

impl Connected for Connection {
    type ConnectInfo = Arc<Activity>;

    fn connect_info(&self) -> Arc<Activity> {
        Arc::clone(self.place.activity())
    }
}

/// Listens on an address.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // As tokio's own does: a port is free again at once.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(WAITING_MAX)
}

/// Accepts until it is aborted. The stream gives connections that are ready.
pub(crate) fn accept(
    listener: TcpListener,
    port: Port,
) -> (tokio::task::JoinHandle<()>, ReceiverStream<io::Result<Connection>>) {
    let (ready, receiver): (Sender<io::Result<Connection>>, Receiver<_>) = channel(16);
    let places = Places::new(port.connections, port.patience);
    let accepting = tokio::spawn(async move {
        loop {
            let (stream, _) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("a connection cannot be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let place = places.take().await;
            let (port, ready) = (port.clone(), ready.clone());
            tokio::spawn(async move {
                match opened(stream, &port, place.activity()).await {
                    Ok((io, preface)) => {
                        let look = Box::pin(tokio::time::sleep(std::time::Duration::ZERO));
                        let connection = Connection { io, preface, look, over: false, place };
                        drop(ready.send(Ok(connection)).await);
                    }
                    Err(error) => tracing::debug!("a connection was closed: {error}"),
                }
            });
        }
    });
    (accepting, ReceiverStream::new(receiver))
}

/// [`open`] in time, and while nobody else needs the place.
async fn opened(stream: TcpStream, port: &Port, activity: &Activity) -> io::Result<(Box<dyn Io>, &'static [u8])> {
    let given_up = std::future::poll_fn(|context| activity.poll_given_up(context));
    tokio::select! {
        opened = tokio::time::timeout(port.patience.first, open(stream, port)) => {
            opened.unwrap_or_else(|_| Err(io::Error::other("it said nothing in time")))
        }
        () = given_up => Err(io::Error::other("it made no request, and another one came")),
    }
}

/// The stream of a client, and what of it was read already.
async fn open(stream: TcpStream, port: &Port) -> io::Result<(Box<dyn Io>, &'static [u8])> {
    stream.set_nodelay(true)?;
    let mut io: Box<dyn Io> = match &port.tls {
        Some(tls) => {
            let refused = || io::Error::other("the TLS files cannot be used");
            Box::new(tls.acceptor(port.protocol).ok_or_else(refused)?.accept(stream).await?)
        }
        None => Box::new(stream),
    };
    match port.protocol {
        Protocol::Http1 => Ok((io, &[])),
        Protocol::Http2 => {
            preface(&mut io).await?;
            Ok((io, PREFACE))
        }
    }
}

/// Reads the preface. Anything else is an error as soon as it shows.
async fn preface(io: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut left = PREFACE;
    while !left.is_empty() {
        let mut bytes = [0; PREFACE.len()];
        // Never beyond the preface: what follows is the server's to read.
        let read = io.read(&mut bytes[..left.len()]).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left = left.strip_prefix(&bytes[..read]).ok_or_else(|| io::Error::other("it does not speak HTTP/2"))?;
    }
    Ok(())
}

impl Connection {
    /// What the requests of this connection say about it.
    pub(crate) fn activity(&self) -> Arc<Activity> {
        Arc::clone(self.place.activity())
    }

    /// Whether the connection has been there for nothing for too long; if not, the task is woken for the next look.
    fn over(&mut self, context: &mut Context<'_>) -> bool {
        self.over |= self.place.activity().poll_given_up(context).is_ready();
        while !self.over && self.look.as_mut().poll(context).is_ready() {
            match self.place.activity().next_look(Instant::now()) {
                Some(at) => self.look.as_mut().reset(at.into()),
                None => self.over = true,
            }
        }
        self.over
    }

    /// Writing ends as well: a client that does not read must not keep the connection by that.
    fn writable(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.over(context) { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.over(context) {
            // As if the client had closed it.
            return Poll::Ready(Ok(()));
        }
        if !self.preface.is_empty() {
            let (now, later) = self.preface.split_at(self.preface.len().min(buf.remaining()));
            buf.put_slice(now);
            self.preface = later;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(context, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.writable(context)?;
        Pin::new(&mut self.io).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writable(context)?;
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writable(context)?;
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writable(context)?;
        Pin::new(&mut self.io).poll_write_vectored(context, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
