//! `capsieve synth`.

use std::process::ExitCode;

use anyhow::Context;

use crate::args::SynthArgs;
use crate::text;

pub(super) async fn run(args: SynthArgs) -> anyhow::Result<ExitCode> {
    let (size, seed, folder) = (args.size, args.seed, args.out.clone());
    let writing = move || capsieve_worker::synth(size.into(), seed, &folder, args.overwrite);
    tokio::task::spawn_blocking(writing).await.context("writing the checkpoint broke off")??;
    let size = format!("{size:?}").to_lowercase();
    text::print(&format!("{}: synthetic:{size}:{seed} in Hugging Face's layout\n", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}
