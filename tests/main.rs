//! One test binary: every area is a module, shared data is read by `oracle`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests stop at the first surprise and may print")]

mod bench;
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod card;
mod checkpoint;
mod cli;
mod cli_errors;
mod dataset;
mod demo;
mod fetch;
mod filter;
mod model;
mod ops;
mod oracle;
mod pipeline;
mod prep;
mod retry;
mod rpc;
mod store;
mod support;
mod tidy;
