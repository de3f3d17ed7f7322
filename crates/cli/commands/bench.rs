//! `capsieve bench`.

use std::process::ExitCode;

use capsieve_worker::{BenchOptions, BenchReport, LoadedModel};

use crate::args::{BenchArgs, heads};
use crate::text;

pub(super) async fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let model = LoadedModel::open(&args.model).await?;
    let options = BenchOptions {
        engine: args.engine.clone().into(),
        captions: args.captions_per_image,
        seconds: args.seconds,
        heads: heads(&args.heads),
    };
    let report = capsieve_worker::bench(&model, &options).await?;
    text::print(&if args.json { format!("{:#}\n", serde_json::to_value(&report)?) } else { table(&report) })?;
    Ok(ExitCode::SUCCESS)
}

fn table(report: &BenchReport) -> String {
    let BenchReport { batch_size, captions, tokens, .. } = report;
    let memory = report.peak_memory_bytes.map_or_else(|| "unknown".to_owned(), text::bytes);
    let (engine, gflops) = (report.engine_pairs_per_second, report.engine_gflops);
    text::pairs(&[
        ("model", report.model.clone()),
        ("device", format!("{}, {}", report.device, report.precision)),
        ("batch", format!("{batch_size} images, {captions} captions each, {tokens:.1} tokens a caption")),
        ("load", format!("{:.2} s", report.load_seconds)),
        ("engine", format!("{engine:.2} pairs/s ({gflops:.0} GFLOP/s)")),
        ("preparation", format!("{:.1} images/s beside the engine", report.prepare_images_per_second)),
        ("pipeline", format!("{:.2} pairs/s from Parquet to Parquet", report.pipeline_pairs_per_second)),
        ("peak memory", memory),
    ])
}
