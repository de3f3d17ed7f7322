//! `capsieve demo`.

use std::fmt::Write;
use std::process::ExitCode;

use capsieve_worker::{DemoReport, DemoRow, Progress};

use crate::args::DemoArgs;
use crate::progress::shown;
use crate::text::{self, share, shortened};

/// Captions shown of each end.
const SHOWN: usize = 5;
const CAPTION_COLUMNS: usize = 64;

pub(super) async fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let progress = Progress::default();
    let report = shown(&progress, capsieve_worker::demo(&args.out, args.threads, &progress)).await?;
    text::print(&summary(&report)?)?;
    Ok(ExitCode::SUCCESS)
}

fn summary(report: &DemoReport) -> Result<String, std::fmt::Error> {
    let DemoReport { output, stats, rows, noise, precision_recall } = report;
    let mut out = String::new();
    let total = stats.seconds.get("total").copied().unwrap_or_default();
    let matching = rows.iter().filter(|row| row.is_match).count();
    writeln!(out, "{} pairs, {matching} of them true, the others with a caption that is wrong on purpose", rows.len())?;
    writeln!(
        out,
        "scored in {total:.1} s ({:.1} pairs/s) on {}\n",
        stats.pairs_per_second.unwrap_or_default(),
        stats.device
    )?;
    writeln!(out, "how well the scores tell the true captions from the others (ROC AUC, 1 is perfect, 0.5 is chance)")?;
    writeln!(out, "  {:<18} {:>5}  {:>11}  {:>12}", "noise", "rows", "itm_score", "cosine_score")?;
    for kind in noise {
        let (itm, cosine) = (share(kind.itm_auc), share(kind.cosine_auc));
        writeln!(out, "  {:<18} {:>5}  {itm:>11}  {cosine:>12}", kind.noise, kind.rows)?;
    }
    let (precision, recall) = precision_recall;
    writeln!(out, "\nkeeping itm_score >= 0.5: precision {}, recall {}\n", share(*precision), share(*recall))?;
    writeln!(out, "worst captions")?;
    rows.iter().take(SHOWN).try_for_each(|row| line(&mut out, row))?;
    writeln!(out, "best captions")?;
    rows.iter().rev().take(SHOWN).try_for_each(|row| line(&mut out, row))?;
    writeln!(out, "\nthe scored shard: {}", output.display())?;
    Ok(out)
}

fn line(out: &mut String, row: &DemoRow) -> std::fmt::Result {
    let caption = shortened(&row.caption, CAPTION_COLUMNS);
    let noise = if row.is_match { "true" } else { &row.noise };
    writeln!(out, "  {:.4}  {:>7.4}  {noise:<16} {caption}", row.itm, row.cosine)
}
