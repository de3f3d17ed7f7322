//! `capsieve inspect`.

use std::process::ExitCode;

use capsieve_worker::{CheckpointReport, Inspection, ShardReport};

use super::columns;
use crate::args::InspectArgs;
use crate::text;

pub(super) async fn run(args: InspectArgs) -> anyhow::Result<ExitCode> {
    let report = match capsieve_worker::inspect(&args.target, &columns(args.columns)).await? {
        Inspection::Checkpoint(report) => checkpoint(&report),
        Inspection::Shard(report) => shard(&report),
    };
    text::print(&report)?;
    Ok(ExitCode::SUCCESS)
}

fn checkpoint(report: &CheckpointReport) -> String {
    let (vision, words) = (&report.config.vision, &report.config.text);
    let mut lines = vec![
        ("checkpoint", report.name.clone()),
        ("format", report.format.clone()),
        (
            "image encoder",
            format!(
                "{} layers of {} (mlp {}, {} heads), {} px in patches of {}",
                vision.layers, vision.hidden, vision.intermediate, vision.heads, vision.image_size, vision.patch_size
            ),
        ),
        (
            "text encoder",
            format!(
                "{} layers of {} (mlp {}, {} heads), {} positions, {} words",
                words.layers, words.hidden, words.intermediate, words.heads, words.positions, words.vocab
            ),
        ),
        ("shared width", report.config.projection.to_string()),
        (
            "weights",
            format!(
                "{:.1} M values in {} tensors, {} ({})",
                report.parameters as f64 / 1e6,
                report.tensors,
                text::bytes(report.bytes),
                report.dtypes.join(", ")
            ),
        ),
        ("tokenizer", format!("{} entries", report.vocabulary)),
        ("preparation", format!("{0} x {0} px, bicubic", vision.image_size)),
        ("sha256", report.hash.clone()),
    ];
    lines.extend(report.notes.iter().map(|note| ("note", note.clone())));
    text::pairs(&lines)
}

fn shard(report: &ShardReport) -> String {
    let groups = text::count(report.row_groups as u64, "row group");
    let mut lines = vec![
        ("shard", report.uri.clone()),
        ("rows", format!("{} in {groups}, {}", report.rows, text::bytes(report.bytes))),
        ("written by", report.created_by.clone().unwrap_or_else(|| "unknown".to_owned())),
    ];
    lines.extend(report.schema.iter().map(|(name, kind)| ("column", format!("{name}: {kind}"))));
    match &report.detected {
        Ok(found) => lines.extend(found.iter().map(|(role, what)| (*role, what.clone()))),
        Err(reason) => lines.push(("not scorable", reason.clone())),
    }
    text::pairs(&lines)
}
