//! `--retry-status`: rows that failed are scored again, the others are carried over.

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Float64Array, ListBuilder, RecordBatch, StringArray, StringBuilder};
use arrow::datatypes::DataType;
use tempfile::TempDir;

use crate::support::{Ran, capsieve, floats, names, picture, read_parquet, write_parquet};

const ROWS: usize = 70;
/// One worker, other batches: the same scores.
const BATCHING_TOLERANCE: f32 = 2e-5;

/// A folder with shards of paths to images, of which some are missing.
struct Paths(TempDir);

impl Paths {
    fn new(captions: &ArrayRef) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("in/images")).unwrap();
        for row in 0..ROWS {
            let image = if row % 7 == 3 { b"no image".to_vec() } else { picture(row as u64) };
            std::fs::write(folder.path().join(format!("in/images/{row}.png")), image).unwrap();
        }
        let paths: StringArray = (0..ROWS).map(|row| (row % 10 != 0).then(|| format!("images/{row}.png"))).collect();
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("image_path", Arc::new(paths) as ArrayRef, true),
            ("caption", Arc::clone(captions), true),
        ]);
        write_parquet(&folder.path().join("in/a.parquet"), &batch.unwrap(), 30);
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The images that are missing for a while.
    fn hide(&self, hide: bool) {
        for row in (0..ROWS).filter(|row| row % 4 == 1) {
            let (shown, hidden) =
                (self.path(&format!("in/images/{row}.png")), self.path(&format!("in/images/{row}.hidden")));
            if hide { std::fs::rename(shown, hidden) } else { std::fs::rename(hidden, shown) }.unwrap();
        }
    }

    fn score(&self, output: &str, more: &[&str]) -> Ran {
        let path = |name: &str| self.path(name).display().to_string();
        let (input, output) = (path("in/"), path(output));
        let fixed = ["score", "--model", "synthetic:tiny", "--threads", "2", "--input", &input, "--output", &output];
        capsieve(&[&fixed[..], more].concat())
    }

    fn stats(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }
}

fn single() -> ArrayRef {
    Arc::new((0..ROWS).map(|row| (row % 9 != 2).then(|| format!("caption {row}"))).collect::<StringArray>())
}

fn lists() -> ArrayRef {
    let mut lists = ListBuilder::new(StringBuilder::new());
    for row in 0..ROWS {
        (0..row % 4).for_each(|i| lists.values().append_option((i != 1).then(|| format!("caption {i} of {row}"))));
        lists.append(row % 9 != 2);
    }
    Arc::new(lists.finish())
}

/// Metadata has the counts of a run.
fn assert_same(found: &RecordBatch, whole: &RecordBatch) {
    assert_eq!(found.schema().fields(), whole.schema().fields());
    for (name, (found, whole)) in
        found.schema().fields().iter().map(|field| field.name()).zip(found.columns().iter().zip(whole.columns()))
    {
        assert!(name.ends_with("_score") || found == whole, "{name}");
    }
    for name in ["itm_score", "cosine_score"] {
        let (found, whole) = (floats(found, name), floats(whole, name));
        let close = |(found, whole): (&Option<f32>, &Option<f32>)| match (found, whole) {
            (Some(found), Some(whole)) => (found - whole).abs() < BATCHING_TOLERANCE,
            (found, whole) => found == whole,
        };
        assert!(found.len() == whole.len() && found.iter().zip(&whole).all(close), "{name}");
    }
}

#[test]
fn rows_that_failed_are_scored_again_and_no_others() {
    for captions in [single(), lists()] {
        let paths = Paths::new(&captions);
        assert_eq!(paths.score("whole/", &[]).code, Some(3));
        let (whole, stats) = (read_parquet(&paths.path("whole/a.parquet")), paths.stats("whole/a.stats.json"));
        assert!(stats["errors"].get("fetch_failed").is_none());
        paths.hide(true);
        let first = paths.score("out/", &[]);
        assert_eq!(first.code, Some(3), "{first:?}");
        let failed = paths.stats("out/a.stats.json");
        let missing = failed["errors"]["fetch_failed"].as_u64().unwrap();
        assert!(missing > 10, "{failed}");
        // What is missing still is asked for again, and no other row is.
        let retry = ["--retry-status", "fetch_failed,not_finite"];
        assert_eq!(paths.score("out/", &retry).code, Some(3));
        let again = paths.stats("out/a.stats.json");
        assert_eq!((&again["errors"], &again["pairs"]), (&failed["errors"], &0.into()));
        paths.hide(false);
        let dry = paths.score("out/", &[&retry[..], &["--dry-run"]].concat());
        assert!(dry.stdout.contains("1 to score (70 rows"), "{dry:?}");
        let ran = paths.score("out/", &retry);
        assert!(ran.code == Some(3) && ran.stdout.contains("1: 1 scored, 0 complete already"), "{ran:?}");
        let mended = paths.stats("out/a.stats.json");
        assert_eq!((&mended["errors"], &mended["scored"]), (&stats["errors"], &stats["scored"]));
        let new = stats["pairs"].as_u64().unwrap() - failed["pairs"].as_u64().unwrap();
        assert_eq!(mended["pairs"], new, "only what was missing is scored: {mended}");
        let found = read_parquet(&paths.path("out/a.parquet"));
        assert_same(&found, &whole);
        assert_eq!(names(&paths.path("out")), ["a.parquet", "a.stats.json"]);
        // Nothing is left of that status.
        let ran = paths.score("out/", &retry);
        assert!(ran.stdout.contains("1: 0 scored, 1 complete already"), "{ran:?}");
        let ran = paths.score("out/", &["--retry-status", "decode_failed"]);
        assert!(ran.stdout.contains("1: 1 scored, 0 complete already"), "{ran:?}");
        assert_same(&read_parquet(&paths.path("out/a.parquet")), &whole);
    }
}

#[test]
fn a_score_column_of_the_users_own_is_no_score() {
    let paths = Paths::new(&single());
    let batch = read_parquet(&paths.path("in/a.parquet"));
    let own: ArrayRef = Arc::new((0..ROWS).map(|row| row as f64).collect::<Float64Array>());
    let schema = batch.schema();
    let columns = schema.fields().iter().map(|field| field.name().clone()).zip(batch.columns().to_vec());
    let batch = columns.map(|(name, column)| (name, column, true)).chain([("cosine_score".to_owned(), own, true)]);
    write_parquet(&paths.path("in/a.parquet"), &RecordBatch::try_from_iter_with_nullable(batch).unwrap(), 30);
    let column = || Arc::clone(read_parquet(&paths.path("out/a.parquet")).column_by_name("cosine_score").unwrap());
    let ran = paths.score("out/", &["--heads", "itm"]);
    assert!(ran.code == Some(3) && !ran.stderr.contains("left out"), "{ran:?}");
    let before = column();
    let ran = paths.score("out/", &["--heads", "itm", "--retry-status", "decode_failed"]);
    assert!(ran.code == Some(3) && ran.stdout.contains("1: 1 scored, 0 complete already"), "{ran:?}");
    assert!(before == column() && *before.data_type() == DataType::Float64);
    // Where ours has the name, that is said.
    let ran = paths.score("both/", &[]);
    assert!(ran.code == Some(3) && ran.stderr.contains(r#"its column "cosine_score" is left out"#), "{ran:?}");
    // And no word of the columns of an earlier output.
    std::fs::rename(paths.path("both/a.parquet"), paths.path("in/a.parquet")).unwrap();
    let ran = paths.score("again/", &[]);
    assert!(ran.code == Some(3) && !ran.stderr.contains("left out"), "{ran:?}");
}

#[test]
fn what_cannot_be_retried_is_wrong_usage() {
    let paths = Paths::new(&single());
    for (more, words) in [
        (&["--retry-status", "fetch_fail"][..], "possible values"),
        (&["--retry-status", "ok"], "possible values"),
        (&["--retry-status", "fetch_failed", "--overwrite"], "cannot be used with --overwrite"),
        (&["--retry-status", "fetch_failed", "--kept-only", "--min-itm", "0.1"], "cannot be used with --kept-only"),
        (&["--retry-status", "fetch_failed", "--select", "best"], "cannot be used with --select"),
    ] {
        let ran = paths.score("out/", more);
        assert!(ran.code == Some(2) && ran.stderr.contains(words), "{more:?}: {ran:?}");
    }
    // Without an output there is nothing to be carried over.
    let ran = paths.score("out/", &["--retry-status", "fetch_failed"]);
    assert!(ran.code == Some(3) && ran.stdout.contains("1: 1 scored"), "{ran:?}");
}
