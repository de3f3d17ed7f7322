//! One file a command: options to a job of the worker, its result to text.

mod bench;
mod demo;
mod inspect;
mod score;
mod synth;

use std::process::ExitCode;

use anyhow::{Context, bail};
use capsieve_worker::ColumnOptions;

use crate::args::{ColumnArgs, Command};

/// Done, but some rows have no score.
const ROWS_WITHOUT_SCORE: u8 = 3;

/// Runs a command to its end, or until the user interrupts it.
pub(crate) fn run(command: Command) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("cannot start the threads that read and write")?;
    let ended = runtime.block_on(async {
        tokio::select! {
            ended = one(command) => ended,
            signal = interrupted() => signal.and_then(|()| bail!("interrupted, no output was written")),
        }
    });
    // The engine may still be in a batch that nobody waits for.
    runtime.shutdown_background();
    ended
}

async fn one(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(&args).await,
        Command::Score(args) => score::run(*args).await,
        Command::Inspect(args) => inspect::run(args).await,
        Command::Synth(args) => synth::run(args).await,
        Command::Bench(args) => bench::run(&args).await,
    }
}

/// Ends with Ctrl-C or a polite request to stop.
async fn interrupted() -> anyhow::Result<()> {
    let context = "cannot listen for Ctrl-C";
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut stop = signal(SignalKind::terminate()).context(context)?;
        tokio::select! {
            pressed = tokio::signal::ctrl_c() => pressed.context(context),
            _ = stop.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await.context(context)
}

fn columns(args: ColumnArgs) -> ColumnOptions {
    ColumnOptions { image: args.image_column, caption: args.caption_column, key: args.key_column }
}
