//! `capsieve bench`.

use std::process::ExitCode;

use capsieve_worker::{BenchOptions, BenchReport, LoadedModel, StageReport};

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
    let (engine, gflops, ceiling) = (report.engine_pairs_per_second, report.engine_gflops, report.ceiling_gflops);
    let share = 100.0 * gflops / ceiling;
    let summary = text::pairs(&[
        ("model", report.model.clone()),
        ("device", format!("{}, {}", report.device, report.precision)),
        ("batch", format!("{batch_size} images, {captions} captions each, {tokens:.1} tokens a caption")),
        ("load", format!("{:.2} s", report.load_seconds)),
        ("engine", format!("{engine:.2} pairs/s: {}, {share:.0}% of the {} it can reach", rate(gflops), rate(ceiling))),
        ("preparation", format!("{:.1} images/s beside the engine", report.prepare_images_per_second)),
        ("pipeline", format!("{:.2} pairs/s from Parquet to Parquet", report.pipeline_pairs_per_second)),
        ("peak memory", memory),
    ]);
    summary + &stages(&report.stages)
}

fn rate(gflops: f64) -> String {
    if gflops >= 10_000.0 { format!("{:.1} TFLOP/s", gflops / 1e3) } else { format!("{gflops:.0} GFLOP/s") }
}

/// Where the time of a batch goes.
fn stages(stages: &[StageReport]) -> String {
    let total: f64 = stages.iter().map(|stage| stage.milliseconds).sum();
    let mut table = format!("\n{:<40} {:>6} {:>11} {:>6}\n", "operations of a batch", "calls", "ms", "share");
    for stage in stages {
        let StageReport { name, calls, milliseconds, gflops } = stage;
        let (share, rate) = (100.0 * milliseconds / total, if *gflops > 0.0 { rate(*gflops) } else { String::new() });
        let line = format!("{name:<40} {calls:>6} {milliseconds:>11.3} {share:>5.1}% {rate}");
        table += line.trim_end();
        table.push('\n');
    }
    table
}
