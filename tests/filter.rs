//! Kept rows, rejected rows, selected captions: every row of the input is in one place, with the scores of a run that keeps all.

use std::path::PathBuf;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int32Type;
use tempfile::TempDir;

use crate::support::{
    Ran, capsieve, floats, list_shard, names, picture, program, read_parquet, shard, texts, write_parquet,
};

const ROWS: usize = 60;
/// One worker, other batches: the same scores.
const BATCHING_TOLERANCE: f32 = 2e-5;
/// Every fifteenth image is none, and every twentieth row has the image of another one.
const BROKEN: usize = 15;

/// A folder with `in/a.parquet` and `in/b/c.parquet`.
struct Filtered {
    folder: TempDir,
    /// A threshold that some rows pass.
    least: String,
}

/// What a row is known by, and its score.
type Row = (Option<String>, Option<f32>, Option<String>);

impl Filtered {
    fn new(shards: [&RecordBatch; 2]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("in/b")).unwrap();
        write_parquet(&folder.path().join("in/a.parquet"), shards[0], 25);
        write_parquet(&folder.path().join("in/b/c.parquet"), shards[1], 25);
        let filtered = Self { folder, least: String::new() };
        assert_eq!(filtered.score("all/", &[]).code, Some(3), "broken images have no score");
        let mut scores: Vec<f32> = ["all/a.parquet", "all/b/c.parquet"]
            .into_iter()
            .flat_map(|name| floats(&filtered.read(name), "itm_score"))
            .flatten()
            .collect();
        scores.sort_by(f32::total_cmp);
        // In the middle of the widest gap: a score may differ by rounding from run to run.
        let middle = &scores[scores.len() / 3..2 * scores.len() / 3];
        let gap = middle.windows(2).max_by(|a, b| (a[1] - a[0]).total_cmp(&(b[1] - b[0]))).unwrap();
        assert!(gap[1] - gap[0] > 4.0 * BATCHING_TOLERANCE);
        Self { least: f32::midpoint(gap[0], gap[1]).to_string(), ..filtered }
    }

    fn single() -> Self {
        let rows = |seed: u64| -> Vec<(Option<Vec<u8>>, Option<String>)> {
            let image = |row: usize| match row % BROKEN {
                0 => b"no image".to_vec(),
                _ => picture(seed + (row % 20) as u64),
            };
            (0..ROWS).map(|row| (Some(image(row)), Some(format!("{seed} caption {row}")))).collect()
        };
        Self::new([&shard(&rows(0)), &shard(&rows(100))])
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments(&self, output: &str, more: &[&str]) -> Vec<String> {
        let text = |name: &str| self.path(name).display().to_string();
        let model = if more.contains(&"--model") { &[][..] } else { &["--model", "synthetic:tiny"] };
        let fixed = ["score", "--threads", "2"].iter().chain(model).chain(&["--input"]).map(|text| (*text).to_owned());
        let more = more.iter().map(|option| option.strip_prefix("to:").map_or((*option).to_owned(), text));
        fixed.chain([text("in"), "--output".to_owned(), text(output)]).chain(more).collect()
    }

    fn score(&self, output: &str, more: &[&str]) -> Ran {
        capsieve(&self.arguments(output, more))
    }

    fn read(&self, name: &str) -> RecordBatch {
        read_parquet(&self.path(name))
    }

    fn stats(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }
}

fn rows(batch: &RecordBatch) -> Vec<Row> {
    let (captions, scores, status) =
        (texts(batch, "caption"), floats(batch, "itm_score"), texts(batch, "score_status"));
    captions.into_iter().zip(scores).zip(status).map(|((caption, score), status)| (caption, score, status)).collect()
}

fn assert_same(found: &[Row], expected: &[Row], context: &str) {
    assert_eq!(found.len(), expected.len(), "{context}");
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!((&found.0, &found.2), (&expected.0, &expected.2), "{context}");
        assert!(is_close(found.1, expected.1), "{context}: {found:?} {expected:?}");
    }
}

fn is_close(found: Option<f32>, expected: Option<f32>) -> bool {
    match (found, expected) {
        (Some(found), Some(expected)) => (found - expected).abs() < BATCHING_TOLERANCE,
        (found, expected) => found == expected,
    }
}

fn keep(batch: &RecordBatch) -> Vec<bool> {
    batch.column_by_name("keep").unwrap().as_boolean().values().iter().collect()
}

#[test]
fn every_row_is_kept_or_rejected() {
    let filtered = Filtered::single();
    let options = ["--min-itm", &filtered.least];
    let rejected = [&options[..], &["--rejected", "to:no/"]].concat();
    for (output, more) in [("marked/", &options[..]), ("yes/", &rejected[..])] {
        let ran = filtered.score(output, more);
        assert_eq!(ran.code, Some(3), "{ran:?}");
        assert!(ran.stdout.contains("2: 2 scored") && ran.stdout.contains("decode_failed 8"), "{ran:?}");
    }
    for (name, stats) in [("a.parquet", "a.stats.json"), ("b/c.parquet", "b/c.stats.json")] {
        let read = |output: &str| filtered.read(&format!("{output}/{name}"));
        let (marked, yes, no) = (read("marked"), read("yes"), read("no"));
        let least: f32 = filtered.least.parse().unwrap();
        for (row, keep) in rows(&marked).into_iter().zip(keep(&marked)) {
            assert_eq!(row.1.is_some_and(|score| score >= least), keep, "{row:?}");
        }
        let split = |kept: bool| -> Vec<Row> {
            rows(&marked).into_iter().zip(keep(&marked)).filter(|(_, keep)| *keep == kept).map(|(row, _)| row).collect()
        };
        // Rows with the image of another one are in batches with other rows: the scores are the same ones.
        assert_same(&rows(&yes), &split(true), name);
        assert_same(&rows(&no), &split(false), name);
        assert!(yes.num_rows() > 5 && no.num_rows() > 5 && yes.num_rows() + no.num_rows() == ROWS);
        assert!(keep(&yes).iter().all(|keep| *keep) && !keep(&no).iter().any(|keep| *keep));
        assert_eq!((yes.schema().fields(), no.schema().fields()), (marked.schema().fields(), marked.schema().fields()));
        let stats = filtered.stats(&format!("yes/{stats}"));
        assert_eq!(
            (&stats["rows"], &stats["failed"], &stats["errors"]["decode_failed"]),
            (&60.into(), &4.into(), &4.into())
        );
        let counts = [&stats["kept"], &stats["written"], &stats["rejected"]["rows"]].map(|rows| rows.as_u64().unwrap());
        assert_eq!(counts, [yes.num_rows(), yes.num_rows(), no.num_rows()].map(|rows| rows as u64));
        assert_eq!(stats["rejected"]["output"], filtered.path(&format!("no/{name}")).display().to_string());
    }
    // Without another place they are just left out.
    let ran = filtered.score("only/", &[&options[..], &["--kept-only"]].concat());
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert_same(&rows(&filtered.read("only/a.parquet")), &rows(&filtered.read("yes/a.parquet")), "only");
    // A threshold that nothing passes.
    let ran = filtered.score("none/", &["--min-itm", "1", "--rejected", "to:every/"]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert_eq!(filtered.read("none/a.parquet").num_rows(), 0);
    assert_same(&rows(&filtered.read("every/a.parquet")), &rows(&filtered.read("all/a.parquet")), "every");
}

#[test]
fn what_is_missing_of_two_outputs_is_made_again() {
    let filtered = Filtered::single();
    let options = ["--min-itm", &filtered.least, "--rejected", "to:no/"];
    let run = |expected: &str| {
        let ran = filtered.score("yes/", &options);
        assert!(ran.code == Some(3) && ran.stdout.contains(expected), "{expected}: {ran:?}");
    };
    run("2: 2 scored, 0 complete already");
    let files = ["yes/a.parquet", "yes/a.stats.json", "no/a.parquet"];
    let whole = (rows(&filtered.read("yes/a.parquet")), rows(&filtered.read("no/a.parquet")), filtered.stats(files[1]));
    run("2: 0 scored, 2 complete already");
    // As a run leaves it that is killed before, between and after the objects of a shard.
    for (missing, expected) in [
        (vec![0], "1 scored, 1 complete"),
        (vec![0, 1], "1 scored, 1 complete"),
        (vec![0, 1, 2], "1 scored, 1 complete"),
        (vec![2], "1 scored, 1 complete"),
        (vec![1, 2], "1 scored, 1 complete"),
        (vec![1], "0 scored, 2 complete"),
    ] {
        missing.iter().for_each(|file| std::fs::remove_file(filtered.path(files[*file])).unwrap());
        run(expected);
        assert_same(&rows(&filtered.read(files[0])), &whole.0, &format!("without {missing:?}"));
        assert_same(&rows(&filtered.read(files[2])), &whole.1, &format!("without {missing:?}"));
        let stats = filtered.stats(files[1]);
        for field in ["fingerprint", "rows", "failed", "errors", "pairs", "kept", "written", "output"] {
            assert_eq!(stats[field], whole.2[field], "{field}, without {missing:?}");
        }
        assert_eq!(stats["rejected"]["rows"], whole.2["rejected"]["rows"]);
        assert_eq!(names(&filtered.path("yes")), ["a.parquet", "a.stats.json", "b"]);
        assert_eq!(names(&filtered.path("no")), ["a.parquet", "b"]);
    }
    // It stays where its output is not replaced after all.
    let strict = filtered.score("yes/", &[&options[..], &["--overwrite", "--on-error", "fail"]].concat());
    assert!(strict.code == Some(1) && strict.stderr.contains("decode_failed"), "{strict:?}");
    assert_eq!(names(&filtered.path("yes")), ["a.parquet", "a.stats.json", "b"]);
    run("2: 0 scored, 2 complete already");
    // A manifest speaks for the output that it was written for, and no other.
    let output = std::fs::read(filtered.path(files[0])).unwrap();
    std::fs::write(filtered.path(files[0]), &output[..output.len() / 2]).unwrap();
    let cut = filtered.score("yes/", &options);
    assert!(cut.code == Some(1) && cut.stderr.contains("it is no Parquet file"), "{cut:?}");
    std::fs::write(filtered.path(files[0]), &output).unwrap();
    run("2: 0 scored, 2 complete already");
    // Also where that is as large: another run's, whose statistics came first.
    let manifest = filtered.stats(files[1]);
    std::fs::write(filtered.path("copy"), &output).unwrap();
    std::fs::rename(filtered.path("copy"), filtered.path(files[0])).unwrap();
    run("2: 0 scored, 2 complete already");
    let renewed = filtered.stats(files[1]);
    assert!(renewed["bytes"] == manifest["bytes"] && renewed["etag"] != manifest["etag"], "{renewed}");
    // Another job's rejected rows are not replaced, and its outputs are named.
    std::fs::remove_file(filtered.path("no/a.parquet")).unwrap();
    let other = filtered.score("else/", &["--min-itm", "0.9", "--rejected", "to:no/"]);
    assert!(
        other.code == Some(1) && other.stderr.contains("no/b/c.parquet") && other.stderr.contains("--overwrite"),
        "{other:?}"
    );
    assert!(!filtered.path("else/b/c.parquet").exists(), "nothing of a shard whose rejected rows cannot be written");
    let other = filtered.score("else/", &["--min-itm", "0.9", "--rejected", "to:no/", "--overwrite"]);
    assert_eq!(other.code, Some(3), "{other:?}");
}

#[test]
fn kept_rows_and_rejected_ones_are_never_taken_for_each_other() {
    let filtered = Filtered::single();
    let options = ["--min-itm", &filtered.least];
    let score = |output: &str, more: &[&str]| filtered.score(output, &[&options[..], more].concat());
    assert_eq!(score("yes/", &["--kept-only"]).code, Some(3));
    let kept = rows(&filtered.read("yes/a.parquet"));
    // Two names that are swapped by mistake.
    let swapped = score("other/", &["--rejected", "to:yes/"]);
    assert!(swapped.code == Some(1) && swapped.stderr.contains("yes/a.parquet exists"), "{swapped:?}");
    assert_same(&rows(&filtered.read("yes/a.parquet")), &kept, "swapped");
    // A copy of the kept rows where the rejected ones are to be.
    for name in ["a.parquet", "b/c.parquet"] {
        std::fs::create_dir_all(filtered.path("copy/b")).unwrap();
        std::fs::copy(filtered.path(&format!("yes/{name}")), filtered.path(&format!("copy/{name}"))).unwrap();
    }
    let copied = score("yes/", &["--rejected", "to:copy/"]);
    assert!(copied.code == Some(1) && copied.stderr.contains("kept rows there, rejected rows here"), "{copied:?}");
    // Rejected rows of a run in which another row was as good as the threshold.
    assert_eq!(score("yes/", &["--rejected", "to:no/"]).code, Some(3));
    let (rejected, manifest) = (filtered.path("no/a.parquet"), filtered.path("yes/a.stats.json"));
    let whole = filtered.read("no/a.parquet");
    write_parquet(&rejected, &whole.slice(0, whole.num_rows() - 1), 25);
    std::fs::remove_file(&manifest).unwrap();
    let ran = score("yes/", &["--rejected", "to:no/"]);
    assert!(ran.stdout.contains("2: 1 scored, 1 complete"), "{ran:?}");
    assert_same(&rows(&filtered.read("no/a.parquet")), &rows(&whole), "made again");
    // What would be replaced by the statistics.
    let input = filtered.path("in/a.parquet").display().to_string();
    let (one, its) = (filtered.path("one.parquet"), filtered.path("one.stats.json"));
    let (one, its) = (one.display().to_string(), its.display().to_string());
    let fixed = ["score", "--model", "synthetic:tiny", "--input", &input, "--output", &one];
    let ran = capsieve(&[&fixed[..], &options, &["--rejected", &its]].concat());
    assert!(ran.code == Some(1) && ran.stderr.contains("one.stats.json"), "{ran:?}");
}

#[test]
fn a_mismatch_shows_both_sides() {
    let filtered = Filtered::single();
    std::fs::create_dir(filtered.path("mine")).unwrap();
    std::fs::write(filtered.path("mine/a.parquet"), "mine").unwrap();
    let copy = || std::fs::copy(filtered.path("in/a.parquet"), filtered.path("mine/a.parquet")).unwrap();
    let score = |output: &str, more: &[&str]| filtered.score(output, more).stderr;
    assert!(score("mine/", &[]).contains("it is no Parquet file"));
    copy();
    assert!(score("mine/", &[]).contains("it is no output of this program"));
    let error = score("all/", &["--min-itm", "0.25", "--max-caption-tokens", "9", "--heads", "itm"]);
    for words in [
        "all/a.parquet exists",
        "min-itm nothing there, 0.25 here",
        "max-caption-tokens nothing there, 9 here",
        "cosine true there, nothing here",
        "--overwrite",
    ] {
        assert!(error.contains(words), "{words}: {error}");
    }
    let error = score("all/", &["--model", "synthetic:tiny:7"]);
    assert!(error.contains("model ") && error.contains(" there, ") && !error.contains("min-itm"), "{error}");
    // Another version of the input.
    write_parquet(&filtered.path("in/a.parquet"), &filtered.read("in/b/c.parquet"), 25);
    let error = score("all/", &[]);
    assert!(error.contains("input's size ") || error.contains("input's etag "), "{error}");
}

/// Captions and scores of a row.
type ListRow = (Vec<Option<String>>, Vec<Option<f32>>);

fn is_same(found: &ListRow, expected: &ListRow) -> bool {
    let close = found.1.iter().zip(&expected.1).all(|(found, expected)| is_close(*found, *expected));
    found.0 == expected.0 && found.1.len() == expected.1.len() && close
}

fn lists(batch: &RecordBatch) -> Vec<ListRow> {
    let lists = |name: &str| batch.column_by_name(name).unwrap().as_list::<i32>().clone();
    let (captions, scores) = (lists("caption"), lists("itm_score"));
    let row = |row: usize| {
        let texts = captions.value(row).as_string::<i32>().iter().map(|text| text.map(str::to_owned)).collect();
        let floats =
            |list: arrow::array::ArrayRef| list.as_primitive::<arrow::datatypes::Float32Type>().iter().collect();
        (texts, if scores.is_null(row) { vec![] } else { floats(scores.value(row)) })
    };
    (0..batch.num_rows()).map(row).collect()
}

#[test]
fn captions_are_selected_by_their_scores() {
    let rows = |seed: u64| -> Vec<_> {
        let captions = |row: usize| -> Vec<Option<String>> {
            (0..row % 6).map(|i| (i != 2).then(|| format!("{seed} caption {} of {row}", i * 7))).collect()
        };
        (0..ROWS).map(|row| (Some(picture(seed + row as u64)), Some(captions(row)))).collect()
    };
    let filtered = Filtered::new([&list_shard(&rows(0)), &list_shard(&rows(100))]);
    let least: f32 = filtered.least.parse().unwrap();
    let all = lists(&filtered.read("all/a.parquet"));
    for (select, threshold) in [("best", true), ("best", false), ("matching", true)] {
        let options = ["--select", select, "--min-itm", &filtered.least];
        let more = if threshold { &options[..] } else { &options[..2] };
        let output = format!("{select}{threshold}/");
        assert_eq!(filtered.score(&output, more).code, Some(3), "rows without a caption have no score");
        let batch = filtered.read(&format!("{output}a.parquet"));
        let best = batch.column_by_name("best_caption").unwrap().as_primitive::<Int32Type>().clone();
        let mut shorter = 0;
        for (row, ((captions, scores), found)) in all.iter().zip(lists(&batch)).enumerate() {
            let passes = |score: &Option<f32>| score.is_some_and(|score| !threshold || score >= least);
            let mut selected: Vec<usize> = (0..scores.len()).filter(|i| passes(&scores[*i])).collect();
            if select == "best" && !selected.is_empty() {
                let top = |best: usize, i: &usize| if scores[*i] > scores[best] { *i } else { best };
                selected = vec![selected.iter().fold(selected[0], top)];
            }
            if selected.is_empty() {
                // Not kept, or without a score: as it was.
                assert!(is_same(&found, &(captions.clone(), scores.clone())), "row {row}: {found:?}");
                continue;
            }
            shorter += usize::from(selected.len() < captions.len());
            let expected: (Vec<_>, Vec<_>) = selected.iter().map(|i| (captions[*i].clone(), scores[*i])).unzip();
            assert!(is_same(&found, &expected), "{select}, row {row}: {found:?} {expected:?}");
            let highest =
                (0..expected.1.len()).fold(0, |best, i| if expected.1[i] > expected.1[best] { i } else { best });
            assert_eq!(best.value(row), highest as i32, "{select}, row {row}");
        }
        assert!(shorter > 10, "{select}: {shorter} lists are shorter");
    }
    // Rows that are kept have their selection, the others all of their captions.
    let more = ["--select", "best", "--min-itm", &filtered.least, "--rejected", "to:no/"];
    assert_eq!(filtered.score("yes/", &more).code, Some(3));
    let (yes, no) = (lists(&filtered.read("yes/a.parquet")), lists(&filtered.read("no/a.parquet")));
    assert!(yes.iter().all(|(captions, _)| captions.len() == 1) && yes.len() + no.len() == ROWS);
    assert!(
        no.iter().all(|row| all.iter().any(|all| is_same(row, all)))
            && no.iter().any(|(captions, _)| captions.len() > 1)
    );
}

#[test]
fn filters_without_a_threshold_are_wrong_usage() {
    let filtered = Filtered::single();
    for more in [&["--kept-only"][..], &["--rejected", "to:no/"], &["--select", "matching"]] {
        let ran = filtered.score("out/", more);
        assert!(ran.code == Some(2) && ran.stderr.contains("--min-itm or --min-cosine"), "{ran:?}");
    }
    for (rejected, words) in [
        ("to:out/", "would be read together"),
        ("to:out/no/", "would be read together"),
        ("to:./", "would be read together"),
        ("to:in/no/", "lies below the input prefix"),
        ("to:no", "name a prefix that ends in '/'"),
        ("to:none/none/", "none"),
        ("https://host/no/", "a web server is read"),
    ] {
        let ran = filtered.score("out/", &["--min-itm", "0.5", "--rejected", rejected]);
        assert!(ran.code == Some(1) && ran.stderr.contains(words), "{rejected}: {ran:?}");
    }
    let single = |rejected: &str| {
        let path = |name: &str| filtered.path(name).display().to_string();
        let (input, output, rejected) = (path("in/a.parquet"), path("one.parquet"), path(rejected));
        let fixed = ["score", "--model", "synthetic:tiny", "--min-itm", "0.5", "--input", &input, "--output", &output];
        capsieve(&[&fixed[..], &["--rejected", &rejected]].concat())
    };
    for rejected in ["in/a.parquet", "one.parquet"] {
        let ran = single(rejected);
        assert!(ran.code == Some(1) && ran.stderr.contains("is the input or the output"), "{ran:?}");
    }
    assert!(!filtered.path("one.parquet").exists());
    assert_eq!(single("two.parquet").code, Some(3));
    assert_eq!(filtered.read("one.parquet").num_rows() + filtered.read("two.parquet").num_rows(), ROWS);
}

/// Killed at any moment, a filtered run ends with every row in one of the two places.
#[cfg(unix)]
#[test]
fn killed_at_any_moment_no_row_is_in_both_places_or_none() {
    let filtered = Filtered::single();
    let options = ["--min-itm", &filtered.least, "--rejected", "to:no/", "--batch-size", "1"];
    let arguments = filtered.arguments("yes/", &options);
    let start = std::time::Instant::now();
    assert_eq!(capsieve(&arguments).code, Some(3));
    let whole = start.elapsed();
    let all = |name: &str| {
        let mut all = rows(&filtered.read(&format!("yes/{name}")));
        all.extend(rows(&filtered.read(&format!("no/{name}"))));
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    let expected = [all("a.parquet"), all("b/c.parquet")];
    for kill in 0..40 {
        if kill % 4 == 0 {
            ["yes", "no"].iter().for_each(|folder| std::fs::remove_dir_all(filtered.path(folder)).unwrap());
        }
        let mut child = program().args(&arguments).spawn().unwrap();
        std::thread::sleep(whole.mul_f64(f64::from(kill % 13) / 13.0));
        drop(child.kill());
        child.wait().unwrap();
        if kill % 4 == 3 {
            let ran = capsieve(&arguments);
            assert_eq!(ran.code, Some(3), "{ran:?}");
            assert_same(&all("a.parquet"), &expected[0], &format!("after {kill} kills"));
            assert_same(&all("b/c.parquet"), &expected[1], &format!("after {kill} kills"));
            assert_eq!(names(&filtered.path("yes")), ["a.parquet", "a.stats.json", "b"]);
            assert_eq!(names(&filtered.path("no")), ["a.parquet", "b"]);
        } else {
            ["yes", "no"].iter().for_each(|folder| std::fs::create_dir_all(filtered.path(folder)).unwrap());
        }
    }
}
