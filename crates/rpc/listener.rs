//! Connections: accepted up to a limit, and handed on once they have shown that a client is there: a finished TLS handshake,
//! or the opening bytes of HTTP/2. What says nothing in time is closed.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::tls::Tls;

/// Bytes that every HTTP/2 client sends first.
const PREFACE_BYTES: usize = 24;
/// Between two looks at a connection that has sent a part of them.
const PREFACE_LOOK: Duration = Duration::from_millis(20);
/// After a failed accept, for example without file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A client's connection.
pub(crate) struct Connection {
    io: Box<dyn Io>,
    _room: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// Accepts until it is aborted. The stream gives connections that are ready.
pub(crate) fn accept(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    connections: usize,
    timeout: Duration,
) -> (tokio::task::JoinHandle<()>, ReceiverStream<io::Result<Connection>>) {
    let (ready, receiver): (Sender<io::Result<Connection>>, Receiver<_>) = channel(16);
    let room = Arc::new(Semaphore::new(connections));
    let accepting = tokio::spawn(async move {
        loop {
            let Ok(room) = Arc::clone(&room).acquire_owned().await else { return };
            let (stream, _) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("a connection cannot be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (tls, ready) = (tls.clone(), ready.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(timeout, open(stream, tls)).await {
                    Ok(Ok(io)) => drop(ready.send(Ok(Connection { io, _room: room })).await),
                    Ok(Err(error)) => tracing::debug!("a connection was closed: {error}"),
                    Err(_) => tracing::debug!("a connection was closed: it said nothing in time"),
                }
            });
        }
    });
    (accepting, ReceiverStream::new(receiver))
}

async fn open(stream: TcpStream, tls: Option<Arc<Tls>>) -> io::Result<Box<dyn Io>> {
    stream.set_nodelay(true)?;
    match tls {
        Some(tls) => Ok(Box::new(tls.acceptor().accept(stream).await?)),
        None => {
            let mut preface = [0; PREFACE_BYTES];
            loop {
                match stream.peek(&mut preface).await? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    PREFACE_BYTES => return Ok(Box::new(stream)),
                    _ => tokio::time::sleep(PREFACE_LOOK).await,
                }
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
