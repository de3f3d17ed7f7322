//! `capsieve`: what a person types, sees and scripts. Owns options, terminals and exit codes; the work is the worker's.
//!
//! Results go to standard output; progress, logs and the one line of an error to standard error. Exit status: 0 done, 1
//! the job failed, 2 wrong usage, 3 done but some rows have no score.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod log;
mod progress;
mod text;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = args::Args::parse();
    match commands::run(args.command, &args.log) {
        Ok(code) => code,
        Err(error) => {
            log::error(&error, args.log.log_format);
            ExitCode::FAILURE
        }
    }
}
