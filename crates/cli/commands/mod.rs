//! One file a command: options to a job of the worker, its result to text.

mod bench;
mod demo;
mod inspect;
mod score;
mod serve;
mod submit;
mod synth;

use std::process::ExitCode;

use anyhow::{Context, bail};
use capsieve_rpc::Traces;
use capsieve_worker::ColumnOptions;

use crate::args::{ColumnArgs, Command, LogArgs};
use crate::log;

/// Done, but some rows have no score.
const ROWS_WITHOUT_SCORE: u8 = 3;

/// Runs a command to its end, or until the user interrupts it.
pub(crate) fn run(command: Command, log: &LogArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("cannot start the threads that read and write")?;
    let traces = runtime.block_on(async { traces(&command) });
    log::init(log, traces.as_ref().ok().and_then(Option::as_ref));
    let traces = traces?;
    let interruption = interruption(&command);
    let ended = runtime.block_on(async {
        // A worker that is told to end finishes its calls first.
        if let Command::Serve(args) = command {
            return serve::run(*args).await;
        }
        tokio::select! {
            ended = one(command) => ended,
            signal = interrupted() => signal.and_then(|()| bail!(interruption)),
        }
    });
    if let Some(traces) = traces {
        traces.end();
    }
    runtime.block_on(capsieve_worker::uploads_settled());
    // The engine may still be in a batch that nobody waits for.
    runtime.shutdown_background();
    ended
}

/// What an interruption leaves behind.
fn interruption(command: &Command) -> &'static str {
    match command {
        Command::Submit(args) if args.output.is_none() => {
            "interrupted: the lines that were printed stay, the same command scores and prints everything anew"
        }
        Command::Submit(args) if args.output_rows.overwrite => {
            "interrupted: the shards that the worker has finished stay, the same command without --overwrite goes on \
             with the others"
        }
        Command::Submit(_) => {
            "interrupted: the shards that the worker has finished stay, the same command goes on with the others"
        }
        Command::Score(args) if args.output_rows.overwrite => {
            "interrupted: the outputs that are there are whole, the same command scores all shards anew, without \
             --overwrite those that have none"
        }
        Command::Score(_) => "interrupted: the outputs that are there are whole, the same command scores what is left",
        _ => "interrupted, no output was written",
    }
}

/// Where the command's spans go, if anywhere.
fn traces(command: &Command) -> anyhow::Result<Option<Traces>> {
    let Command::Serve(args) = command else { return Ok(None) };
    let traces = args.otlp_endpoint.as_ref().map(|endpoint| {
        Traces::to(endpoint).with_context(|| format!("--otlp-endpoint {endpoint}: expected http://HOST:4317"))
    });
    traces.transpose()
}

async fn one(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(&args).await,
        Command::Score(args) => score::run(*args).await,
        Command::Serve(args) => serve::run(*args).await,
        Command::Submit(args) => submit::run(*args).await,
        Command::Inspect(args) => inspect::run(args).await,
        Command::Synth(args) => synth::run(args).await,
        Command::Bench(args) => bench::run(args).await,
    }
}

/// Ends with Ctrl-C or a polite request to stop. Not with a hangup: who listens for that undoes `nohup`.
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

/// Returns when the program is told to end.
async fn terminated() {
    if let Err(error) = interrupted().await {
        tracing::error!("{error:#}");
    }
}

fn columns(args: ColumnArgs) -> ColumnOptions {
    ColumnOptions { image: args.image_column, caption: args.caption_column, key: args.key_column }
}
