//! The job `demo`: the bundled shard through the bundled model, by the same road as any other shard, and then how well
//! the scores found the noise that was put in.

use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::types::Float32Type;
use arrow_array::{Array, RecordBatch};
use capsieve_engine::{Heads, ItmToken};
use capsieve_store::{ColumnOptions, Footer, Location, ShardReader};
use futures::{StreamExt, pin_mut};

use crate::{
    CaptionPolicy, DeviceChoice, EngineChoice, Error, LoadedModel, Outcome, Progress, Result, ScoreJob, Select, Stats,
    Thresholds, precision_recall, roc_auc, score,
};

/// The bundled shard, see demo/README.md.
pub(crate) const SHARD: &[u8] = include_bytes!("../../demo/shard.parquet");
/// What is not noise in the shard's column `noise`.
const CLEAN: &str = "none";
/// Rows read back at a time.
const ROWS: usize = 256;

/// A row of the scored shard.
#[derive(Clone, Debug)]
pub struct DemoRow {
    /// Its key.
    pub key: String,
    /// Its caption.
    pub caption: String,
    /// True if the caption really describes the image.
    pub is_match: bool,
    /// What was done to the caption, "none" if nothing.
    pub noise: String,
    /// The score of the matching head.
    pub itm: f32,
    /// The score of the cosine head.
    pub cosine: f32,
}

/// How well one kind of noise was told from the clean rows.
#[derive(Clone, Debug)]
pub struct NoiseReport {
    /// The kind.
    pub noise: String,
    /// Its rows.
    pub rows: usize,
    /// ROC AUC of the matching head.
    pub itm_auc: Option<f64>,
    /// ROC AUC of the cosine head.
    pub cosine_auc: Option<f64>,
}

/// What the demo found.
#[derive(Clone, Debug)]
pub struct DemoReport {
    /// The scored shard.
    pub output: PathBuf,
    /// The job's own numbers.
    pub stats: Stats,
    /// All rows, worst ITM score first.
    pub rows: Vec<DemoRow>,
    /// All noise together, then each kind.
    pub noise: Vec<NoiseReport>,
    /// Precision and recall of `itm_score >= 0.5` for the captions that match.
    pub precision_recall: (Option<f64>, Option<f64>),
}

/// Scores the bundled shard to `folder/scored.parquet`, which may be an earlier one of ours.
///
/// # Errors
/// The folder cannot be written, or holds somebody else's `scored.parquet`.
pub async fn demo(folder: &Path, threads: usize, progress: &Progress) -> Result<DemoReport> {
    let output = folder.join("scored.parquet");
    let fail = |path: &Path| {
        let path = path.display().to_string();
        move |source| Error::File { path, source }
    };
    std::fs::create_dir_all(folder).map_err(fail(folder))?;
    if !ours(&output).await? {
        return Err(Error::NotOurs { path: output.display().to_string() });
    }
    let bundled = tempfile::tempdir().map_err(fail(&std::env::temp_dir()))?;
    let input = bundled.path().join("shard.parquet");
    std::fs::write(&input, SHARD).map_err(fail(&input))?;
    let job = ScoreJob {
        input: input.display().to_string(),
        output: output.display().to_string(),
        columns: ColumnOptions { image: None, caption: None, key: None },
        heads: Heads { itm: true, cosine: true },
        itm_token: ItmToken::Cls,
        thresholds: Thresholds { min_itm: Some(0.5), min_cosine: None },
        policy: CaptionPolicy::default(),
        rejected: None,
        kept_only: false,
        select: Select::All,
        drop_images: false,
        fail_on_row: true,
        overwrite: true,
        retry: Vec::new(),
        engine: EngineChoice { device: DeviceChoice::Cpu, threads, ..EngineChoice::default() },
    };
    let outcome = score(&LoadedModel::bundled()?, &job, progress).await?;
    let Outcome::Done(stats) = outcome else { unreachable!("overwrite always scores") };
    let mut rows = read(&output).await?;
    rows.sort_by(|a, b| a.itm.total_cmp(&b.itm));
    Ok(report(output, *stats, rows))
}

/// True where nothing is, or something we scored: a file of the user must not go without being asked for.
async fn ours(output: &Path) -> Result<bool> {
    let location = Location::parse(&output.display().to_string())?;
    if !location.exists().await? {
        return Ok(true);
    }
    let footer = Footer::read(&location).await;
    Ok(footer.is_ok_and(|footer| footer.schema().metadata().keys().any(|key| key.starts_with("capsieve."))))
}

fn report(output: PathBuf, stats: Stats, rows: Vec<DemoRow>) -> DemoReport {
    let mut kinds: Vec<&str> = rows.iter().map(|row| row.noise.as_str()).filter(|noise| *noise != CLEAN).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let auc = |name: &str, included: &dyn Fn(&DemoRow) -> bool| {
        let rows: Vec<&DemoRow> = rows.iter().filter(|row| row.noise == CLEAN || included(row)).collect();
        let matches: Vec<bool> = rows.iter().map(|row| row.is_match).collect();
        let area =
            |score: fn(&DemoRow) -> f32| roc_auc(&rows.iter().map(|row| score(row)).collect::<Vec<_>>(), &matches);
        NoiseReport {
            noise: name.to_owned(),
            rows: rows.iter().filter(|row| row.noise != CLEAN).count(),
            itm_auc: area(|row| row.itm),
            cosine_auc: area(|row| row.cosine),
        }
    };
    let all = auc("all", &|_| true);
    let noise = std::iter::once(all).chain(kinds.iter().map(|kind| auc(kind, &|row| row.noise == *kind))).collect();
    let (scores, matches): (Vec<f32>, Vec<bool>) = rows.iter().map(|row| (row.itm, row.is_match)).unzip();
    let precision_recall = precision_recall(&scores, &matches, 0.5);
    DemoReport { output, stats, rows, noise, precision_recall }
}

async fn read(output: &Path) -> Result<Vec<DemoRow>> {
    let location = Location::parse(&output.display().to_string())?;
    let columns = ColumnOptions { image: None, caption: None, key: None };
    let batches = ShardReader::open(&location, &columns).await?.into_stream(ROWS);
    pin_mut!(batches);
    let mut rows = Vec::new();
    while let Some(batch) = batches.next().await.transpose()? {
        rows.extend(demo_rows(&batch));
    }
    Ok(rows)
}

/// The shard is our own, so its columns are known.
fn demo_rows(batch: &RecordBatch) -> Vec<DemoRow> {
    let column = |name: &str| batch.column_by_name(name).expect("a column of the bundled shard or of our output");
    let text = |name: &str| column(name).as_string_view();
    let (keys, captions, noise) = (text("key"), text("caption"), text("noise"));
    let matches = column("is_match").as_boolean();
    let score = |name: &str| column(name).as_primitive::<Float32Type>().clone();
    let (itm, cosine) = (score("itm_score"), score("cosine_score"));
    let row = |i: usize| DemoRow {
        key: keys.value(i).to_owned(),
        caption: captions.value(i).to_owned(),
        is_match: matches.value(i),
        noise: if noise.is_null(i) { CLEAN.to_owned() } else { noise.value(i).to_owned() },
        itm: itm.value(i),
        cosine: cosine.value(i),
    };
    (0..batch.num_rows()).map(row).collect()
}
