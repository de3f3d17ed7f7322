//! `capsieve bench`.

use std::process::ExitCode;

use capsieve_worker::{BenchOptions, BenchReport, LoadedModel, PreparationReport, StageReport};
use serde_json::{Value, to_value};

use super::columns;
use crate::args::{BenchArgs, heads};
use crate::text;

pub(super) async fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    let model = LoadedModel::open(&args.model).await?;
    let options = BenchOptions {
        engine: args.engine.into(),
        input: args.input,
        columns: columns(args.columns),
        captions: args.captions_per_image,
        seconds: args.seconds,
        heads: heads(&args.heads),
    };
    let report = if args.prepare_only {
        let report = capsieve_worker::bench_preparation(&model, &options).await?;
        if args.json { json(&to_value(&report)?) } else { text::pairs(&[("preparation", preparation(&report))]) }
    } else {
        let report = capsieve_worker::bench(&model, &options).await?;
        if args.json { json(&to_value(&report)?) } else { table(&report) }
    };
    text::print(&report)?;
    Ok(ExitCode::SUCCESS)
}

fn json(report: &Value) -> String {
    format!("{report:#}\n")
}

fn table(report: &BenchReport) -> String {
    let BenchReport { batch_size, tokens, .. } = report;
    let captions = (report.captions * 10.0).round() / 10.0;
    let memory = report.peak_memory_bytes.map_or_else(|| "unknown".to_owned(), text::bytes);
    let (engine, gflops, ceiling) = (report.engine_pairs_per_second, report.engine_gflops, report.ceiling_gflops);
    let share = 100.0 * gflops / ceiling;
    let (beside, alone) = (report.prepare_images_per_second, preparation(&report.preparation));
    let (pipeline, idle) = (report.pipeline_pairs_per_second, 100.0 * report.engine_idle_share);
    let summary = text::pairs(&[
        ("model", report.model.clone()),
        ("device", format!("{}, {}", report.device, report.precision)),
        ("batch", format!("{batch_size} images, {captions} captions each, {tokens:.1} tokens a caption")),
        ("load", format!("{:.2} s", report.load_seconds)),
        ("engine", format!("{engine:.2} pairs/s: {}, {share:.0}% of the {} it can reach", rate(gflops), rate(ceiling))),
        ("preparation", format!("{alone}; {beside:.1} images/s beside the engine")),
        (
            "pipeline",
            format!("{pipeline:.2} pairs/s from Parquet to Parquet, the engine idle for {idle:.1}% of the time"),
        ),
        ("peak memory", memory),
    ]);
    summary + &stages(report)
}

fn preparation(report: &PreparationReport) -> String {
    let PreparationReport { image_size, threads, rows, failed, rows_per_second, .. } = report;
    let core = report.rows_per_second_per_core;
    let core = core.map_or_else(String::new, |core| format!(", {core:.1} a core"));
    let failed = if *failed == 0 { String::new() } else { format!(", {failed} of {rows} without model input") };
    let threads = text::count(*threads as u64, "thread");
    format!("{rows_per_second:.1} rows/s to {image_size} px alone with {threads}{core}{failed}")
}

fn rate(gflops: f64) -> String {
    if gflops >= 10_000.0 { format!("{:.1} TFLOP/s", gflops / 1e3) } else { format!("{gflops:.0} GFLOP/s") }
}

/// Where the time of a batch goes.
fn stages(BenchReport { stages, ceiling_gflops, .. }: &BenchReport) -> String {
    let total: f64 = stages.iter().map(|stage| stage.milliseconds).sum();
    let mut table = format!(
        "\n{:<40} {:>6} {:>11} {:>6}  {}\n",
        "operations of a batch", "calls", "ms", "share", "of what can be reached"
    );
    for stage in stages {
        let StageReport { name, calls, milliseconds, gflops } = stage;
        let share = 100.0 * milliseconds / total;
        let reached = if *gflops > 0.0 {
            format!("{:>3.0}%: {}", 100.0 * gflops / ceiling_gflops, rate(*gflops))
        } else {
            String::new()
        };
        let line = format!("{name:<40} {calls:>6} {milliseconds:>11.3} {share:>5.1}%  {reached}");
        table += line.trim_end();
        table.push('\n');
    }
    table
}
