//! The worker over gRPC, from outside: the program is started and called by real clients.

mod calls;
mod limits;
mod names;
mod operations;
mod perimeter;
mod refusals;
mod resume;
mod security;
mod server;
#[cfg(unix)]
mod sinks;
mod strangers;
mod stress;
mod submit;
mod tls;
