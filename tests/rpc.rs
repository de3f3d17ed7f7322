//! The worker over gRPC, from outside: the program is started and called by real clients.

mod calls;
mod limits;
mod operations;
mod resume;
mod security;
mod server;
mod stress;
mod submit;
