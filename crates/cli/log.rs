//! Log lines and the one line of an error, on standard error.

use std::io::{IsTerminal, Write};

use capsieve_rpc::Traces;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::args::{LogArgs, LogFormat};

/// Begins logging: our information and everyone's warnings, more with -v, or what RUST_LOG says. Spans go to the traces.
pub(crate) fn init(args: &LogArgs, traces: Option<&Traces>) {
    let default = match args.verbose {
        0 => "warn,capsieve=info",
        1 => "info,capsieve=debug",
        _ => "debug,capsieve=trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = lines.with_ansi(std::io::stderr().is_terminal());
    let lines = match args.log_format {
        LogFormat::Text => lines.with_target(args.verbose > 0).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    tracing_subscriber::registry().with(traces.map(Traces::layer)).with(lines.with_filter(filter)).init();
}

/// An error with its causes, in one line.
pub(crate) fn error(error: &anyhow::Error, format: LogFormat) {
    let line = causes(error).replace(['\n', '\r'], " ");
    match format {
        // Nothing is left to do when standard error is closed.
        LogFormat::Text => drop(writeln!(std::io::stderr(), "error: {line}")),
        LogFormat::Json => tracing::error!("{line}"),
    }
}

/// An error and its causes, outermost first. Libraries like to repeat the cause in their own message: said once is enough.
fn causes(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |line, cause| match line.as_str() {
        "" => cause,
        said if said.contains(&cause) => line,
        _ => format!("{line}: {cause}"),
    })
}
