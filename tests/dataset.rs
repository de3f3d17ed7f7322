//! `capsieve score` over many shards: every row of every shard once, whatever happens meanwhile.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use tempfile::TempDir;

use crate::support::{Ran, capsieve, floats, names, picture, program, read_parquet, run, shard, texts, write_parquet};

/// One worker, other batches: the same scores.
const BATCHING_TOLERANCE: f32 = 2e-5;

/// A folder with shards below `in/`.
struct Dataset {
    folder: TempDir,
    /// Name below `in/`, and rows.
    shards: Vec<(String, usize)>,
}

impl Dataset {
    fn new(shards: &[(&str, usize)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (number, (name, rows)) in shards.iter().enumerate() {
            let path = folder.path().join("in").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let row = |row: usize| {
                let seed = (number * 1000 + row) as u64;
                (Some(picture(seed)), Some(format!("shard {number} row {row}")))
            };
            write_parquet(&path, &shard(&(0..*rows).map(row).collect::<Vec<_>>()), 20);
        }
        Self { folder, shards: shards.iter().map(|(name, rows)| ((*name).to_owned(), *rows)).collect() }
    }

    /// Twenty shards of different sizes.
    fn twenty() -> Self {
        let names: Vec<String> = (0..20).map(|number| format!("{number:05}.parquet")).collect();
        let shards: Vec<(&str, usize)> =
            names.iter().enumerate().map(|(number, name)| (name.as_str(), 10 + 7 * (number % 5))).collect();
        Self::new(&shards)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn arguments(&self, inputs: &[&str], output: &str, more: &[&str]) -> Vec<String> {
        let inputs = inputs.iter().map(|input| self.text(input));
        let fixed = ["score", "--model", "synthetic:tiny", "--threads", "2", "--output"].map(str::to_owned);
        let more = more.iter().map(|option| (*option).to_owned());
        fixed.into_iter().chain([self.text(output), "--input".to_owned()]).chain(inputs).chain(more).collect()
    }

    fn score(&self, inputs: &[&str], output: &str, more: &[&str]) -> Ran {
        capsieve(&self.arguments(inputs, output, more))
    }

    /// Every caption below `output` with its score; every row must be there once.
    fn rows(&self, output: &str) -> BTreeMap<String, f32> {
        let mut rows = BTreeMap::new();
        for (name, count) in &self.shards {
            let batch = read_parquet(&self.path(output).join(name));
            assert_eq!(batch.num_rows(), *count, "{name}");
            for (caption, score) in texts(&batch, "caption").into_iter().zip(floats(&batch, "itm_score")) {
                assert!(rows.insert(caption.unwrap(), score.unwrap()).is_none(), "a row is there twice");
            }
        }
        assert_eq!(rows.len(), self.shards.iter().map(|(_, rows)| rows).sum::<usize>());
        rows
    }
}

fn assert_same(found: &BTreeMap<String, f32>, expected: &BTreeMap<String, f32>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (caption, score) in found {
        assert!((score - expected[caption]).abs() < BATCHING_TOLERANCE, "{caption}: {score} {}", expected[caption]);
    }
}

/// Files below a folder, by name from there, with what would show a new one.
fn files(folder: &Path) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let meta = entry.metadata().unwrap();
        match meta.is_dir() {
            true => found.extend(files(&entry.path())),
            false => drop(found.insert(entry.path(), (meta.len(), meta.modified().unwrap()))),
        }
    }
    found
}

#[test]
fn shards_below_a_folder_keep_their_names_and_are_scored_once() {
    let dataset = Dataset::new(&[("b.parquet", 30), ("a/b.parquet", 5), ("a/c d.parquet", 41), ("z/y/x%.parquet", 1)]);
    let ran = dataset.score(&["in"], "out/", &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("4: 4 scored, 0 complete already, 0 failed"), "{ran:?}");
    assert!(ran.stdout.contains("77: 77 scored, 0 without a score"), "{ran:?}");
    let rows = dataset.rows("out");
    let before = files(&dataset.path("out"));
    assert_eq!(before.len(), 8, "a shard and its statistics each: {before:?}");
    let again = dataset.score(&["in/"], "out/", &[]);
    assert_eq!(again.code, Some(0), "{again:?}");
    assert!(again.stdout.contains("4: 0 scored, 4 complete already, 0 failed"), "{again:?}");
    assert_eq!(files(&dataset.path("out")), before, "nothing is written again");
    // One by one they are the same.
    for (name, _) in &dataset.shards {
        let flat = format!("alone/{}", name.replace('/', "-"));
        std::fs::create_dir_all(dataset.path("alone")).unwrap();
        assert_eq!(dataset.score(&[&format!("in/{name}")], &flat, &[]).code, Some(0));
        let alone = read_parquet(&dataset.path(&flat));
        for (caption, score) in texts(&alone, "caption").into_iter().zip(floats(&alone, "itm_score")) {
            assert!((rows[&caption.unwrap()] - score.unwrap()).abs() < BATCHING_TOLERANCE);
        }
    }
    // Other options are another job: both fingerprints' owners are named, and nothing is replaced.
    let other = dataset.score(&["in"], "out/", &["--min-itm", "0.5"]);
    assert_eq!(other.code, Some(1), "{other:?}");
    assert!(other.stderr.contains("4 of 4 shards failed") && other.stderr.contains("--overwrite"), "{other:?}");
    assert_eq!(files(&dataset.path("out")), before);
    let replaced = dataset.score(&["in"], "out/", &["--min-itm", "0.5", "--overwrite"]);
    assert_eq!(replaced.code, Some(0), "{replaced:?}");
    assert!(replaced.stdout.contains("kept"), "{replaced:?}");
    assert_same(&dataset.rows("out"), &rows);
}

#[test]
fn patterns_and_shares_take_every_shard_once() {
    let dataset = Dataset::twenty();
    for folder in ["whole", "shares", "some"] {
        std::fs::create_dir(dataset.path(folder)).unwrap();
    }
    assert_eq!(dataset.score(&["in"], "whole", &[]).code, Some(0));
    for worker in 0..3 {
        let mut command = program();
        command.args(dataset.arguments(&["in/*.parquet"], "shares/", &["--partition", "auto/3"]));
        let ran = run(command.env("JOB_COMPLETION_INDEX", worker.to_string()));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let count = if worker < 2 { 7 } else { 6 };
        assert!(ran.stdout.contains(&format!("{count}: {count} scored, 0 complete")), "{ran:?}");
    }
    assert_same(&dataset.rows("shares"), &dataset.rows("whole"));
    let ran = dataset.score(&["in/0000[135].parquet", "in/{00007,00009,0001*}.parquet"], "some", &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let shards: Vec<String> =
        names(&dataset.path("some")).into_iter().filter(|name| name.ends_with("parquet")).collect();
    let expected: Vec<String> = [1, 3, 5, 7, 9].into_iter().chain(10..20).map(|n| format!("{n:05}.parquet")).collect();
    assert_eq!(shards, expected);
}

#[test]
fn a_pattern_names_what_it_says_and_no_more() {
    let dataset = Dataset::new(&[("a.parquet", 2), ("b.parquet", 2), ("c/a.parquet", 2), ("c/d/a.parquet", 2)]);
    let outputs = |output: &str| -> Vec<String> {
        let found = files(&dataset.path(output)).into_keys().filter(|path| path.extension().unwrap() == "parquet");
        found.map(|path| path.strip_prefix(dataset.path(output)).unwrap().display().to_string()).collect()
    };
    for (pattern, expected) in [
        ("in/*.parquet", vec!["a.parquet", "b.parquet"]),
        ("in/*/a.parquet", vec!["c/a.parquet"]),
        ("in/**/a.parquet", vec!["a.parquet", "c/a.parquet", "c/d/a.parquet"]),
        ("in/[!a].parquet", vec!["b.parquet"]),
    ] {
        assert_eq!(dataset.score(&[pattern], "out/", &[]).code, Some(0), "{pattern}");
        assert_eq!(outputs("out"), expected, "{pattern}");
        std::fs::remove_dir_all(dataset.path("out")).unwrap();
    }
    // What lies below the folder of a flat pattern is not named by it; nor does a bare one begin with a dot.
    let here = |arguments: &[&str]| {
        let arguments = [&["score", "--model", "synthetic:tiny"], arguments].concat();
        run(program().current_dir(dataset.path("in")).args(arguments))
    };
    for output in ["scored/", "../out/"] {
        let ran = here(&["--input", "*.parquet", "--output", output]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_eq!(outputs(&format!("in/{output}")), ["a.parquet", "b.parquet"], "{output}");
    }
    let both = here(&["--input", "c/*.parquet", "*.parquet", "--output", "../both/"]);
    assert!(both.code == Some(1) && both.stderr.contains("where another shard or its output is"), "{both:?}");
}

#[test]
fn an_output_replaces_no_shard() {
    let dataset = Dataset::new(&[("a.parquet", 2), ("in/a.parquet", 3)]);
    let before = files(dataset.folder.path());
    let output = format!("{}/", dataset.folder.path().display());
    let input = dataset.text("in/");
    let ran = capsieve(&["score", "--model", "synthetic:tiny", "--input", &input, "--output", &output, "--overwrite"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("where another shard or its output is"), "{ran:?}");
    assert_eq!(files(dataset.folder.path()), before);
    // However the output is spelt.
    let dataset = Dataset::new(&[("x/c/d.parquet", 2), ("y/c/d.parquet", 3)]);
    let before = files(dataset.folder.path());
    let real = dataset.path("in/y");
    std::os::unix::fs::symlink(&real, dataset.path("link")).unwrap();
    for output in ["in/y/", "in/./y/", "in/x/../y/", "link/"] {
        let ran = dataset.score(&["in/x/", "in/y/c/d.parquet"], output, &["--overwrite"]);
        assert!(ran.code == Some(1) && ran.stderr.contains("where another shard or its output is"), "{ran:?}");
    }
    let from = |output: &str| {
        let inputs = [dataset.text("in/x/"), dataset.text("in/y/c/d.parquet")];
        let fixed = ["score", "--model", "synthetic:tiny", "--overwrite", "--output", output, "--input"];
        run(program().current_dir(dataset.path("in")).args(fixed).args(inputs))
    };
    for output in ["y/", "./y/"] {
        let ran = from(output);
        assert!(ran.code == Some(1) && ran.stderr.contains("where another shard or its output is"), "{ran:?}");
    }
    std::fs::remove_file(dataset.path("link")).unwrap();
    assert_eq!(files(dataset.folder.path()), before);
    // Whatever else lies beside the outputs.
    std::fs::create_dir(dataset.path("out")).unwrap();
    std::os::unix::fs::symlink("/", dataset.path("out/shard.parquet")).unwrap();
    let ran = dataset.score(&["in/"], "out/", &[]);
    assert!(ran.code == Some(0) && ran.stdout.contains("2: 2 scored"), "{ran:?}");
}

#[test]
fn runs_that_do_the_same_at_the_same_time_agree() {
    let dataset = Dataset::twenty();
    let runs: Vec<_> = (0..3)
        .map(|_| {
            program()
                .args(dataset.arguments(&["in/"], "out/", &["--rejected", &dataset.text("no/"), "--min-itm", "0.5"]))
                .spawn()
        })
        .collect();
    for ran in runs {
        let ran = ran.unwrap().wait_with_output().unwrap();
        assert_eq!(ran.status.code(), Some(0), "{}", String::from_utf8_lossy(&ran.stderr));
    }
    let again = dataset.score(&["in/"], "out/", &["--rejected", &dataset.text("no/"), "--min-itm", "0.5"]);
    assert!(again.stdout.contains("20: 0 scored, 20 complete already"), "{again:?}");
    let rows = |folder: &str, (name, _): &(String, usize)| read_parquet(&dataset.path(folder).join(name)).num_rows();
    for shard in &dataset.shards {
        assert_eq!(rows("out", shard) + rows("no", shard), shard.1, "{}", shard.0);
    }
}

#[test]
fn rows_that_hold_the_memory_which_others_need_wait_for_no_company() {
    // Less than a batch of them fits at a time.
    let image = |number: usize| {
        let (width, height) = (640_u32, 480_u32);
        let bytes = 54 + width * height * 3;
        let mut bmp = b"BM".to_vec();
        for field in [bytes, 0, 54, 40, width, height, 1 | 24 << 16, 0, 0, 0, 0, 0, 0] {
            bmp.extend(field.to_le_bytes());
        }
        bmp.resize(bytes as usize, u8::try_from(number).unwrap());
        bmp
    };
    let dataset = Dataset::new(&[]);
    let rows: Vec<_> = (0..30).map(|row| (Some(image(row)), Some(format!("row {row}")))).collect();
    write_parquet(&dataset.path("in.parquet"), &shard(&rows), 7);
    let ran = dataset.score(&["in.parquet"], "out.parquet", &["--memory-limit", &(64 << 20).to_string()]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let found = read_parquet(&dataset.path("out.parquet"));
    assert_eq!(floats(&found, "itm_score").iter().flatten().count(), rows.len());
}

#[test]
fn statistics_come_back_and_what_killed_runs_left_goes() {
    let dataset = Dataset::new(&[("a.parquet", 7)]);
    std::fs::write(dataset.path("in/b.parquet"), std::fs::read(dataset.path("in/a.parquet")).unwrap()).unwrap();
    assert_eq!(dataset.score(&["in"], "out/", &["--min-itm", "0"]).code, Some(0));
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dataset.path("out").join(name)).unwrap()).unwrap()
    };
    let (before, other) = (read("a.stats.json"), read("b.stats.json"));
    std::fs::remove_file(dataset.path("out/a.stats.json")).unwrap();
    // Of an earlier job, that wrote another output here.
    let stale = other.to_string().replace(other["fingerprint"].as_str().unwrap(), &"0".repeat(64));
    std::fs::write(dataset.path("out/b.stats.json"), stale.replace("\"rows\":7", "\"rows\":8")).unwrap();
    for left in [".a.parquet.0123456789abcdef.partial#1", ".a.stats.json.0123456789abcdef.partial", ".a.parquet.mine"] {
        std::fs::write(dataset.path("out").join(left), "left").unwrap();
    }
    let ran = dataset.score(&["in"], "out/", &["--min-itm", "0"]);
    assert!(ran.code == Some(0) && ran.stdout.contains("0 scored, 2 complete already"), "{ran:?}");
    for (name, before) in [("a.stats.json", before), ("b.stats.json", other)] {
        let after = read(name);
        for field in
            ["version", "input", "output", "model", "fingerprint", "precision", "rows", "scored", "failed", "errors"]
        {
            assert_eq!(after[field], before[field], "{field} of {name}");
        }
        assert_eq!(
            (&after["pairs"], &after["kept"], &after["bytes"]),
            (&before["pairs"], &before["kept"], &before["bytes"])
        );
        assert!(after.get("pairs_per_second").is_none() && after["seconds"] == serde_json::json!({}), "{after}");
    }
    let expected = [".a.parquet.mine", "a.parquet", "a.stats.json", "b.parquet", "b.stats.json"];
    assert_eq!(names(&dataset.path("out")), expected);
}

#[test]
fn a_bad_shard_costs_its_own_output_only() {
    let dataset = Dataset::twenty();
    let bad = dataset.path("in/00007.parquet");
    let good = std::fs::read(&bad).unwrap();
    std::fs::write(&bad, &good[..good.len() / 2]).unwrap();
    let ran = dataset.score(&["in"], "out/", &[]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("20: 19 scored, 0 complete already, 1 failed"), "{ran:?}");
    assert!(ran.stdout.lines().any(|line| line.starts_with("failed") && line.ends_with("00007.parquet")), "{ran:?}");
    assert!(ran.stderr.contains("00007.parquet") && ran.stderr.contains("1 of 20 shards failed"), "{ran:?}");
    assert!(!dataset.path("out/00007.parquet").exists());
    let skipped = dataset.score(&["in"], "out/", &["--on-shard-error", "skip"]);
    assert_eq!(skipped.code, Some(3), "{skipped:?}");
    assert!(skipped.stdout.contains("20: 0 scored, 19 complete already, 1 failed"), "{skipped:?}");
    std::fs::write(&bad, &good).unwrap();
    let mended = dataset.score(&["in"], "out/", &[]);
    assert_eq!(mended.code, Some(0), "{mended:?}");
    assert!(mended.stdout.contains("20: 1 scored, 19 complete already, 0 failed"), "{mended:?}");
    dataset.rows("out");
}

#[test]
fn what_cannot_be_a_dataset_is_one_line_and_no_output() {
    let dataset = Dataset::new(&[("a.parquet", 3), ("b/a.parquet", 3)]);
    std::fs::create_dir(dataset.path("empty")).unwrap();
    let path = |name: &str| dataset.text(name);
    let (input, web) = (path("in"), "https://host/out/");
    let ran = capsieve(&["score", "--model", "synthetic:tiny", "--input", &input, "--output", web]);
    assert!(ran.code == Some(1) && ran.stderr.contains("a web server is read, not written to"), "{ran:?}");
    for (inputs, output, more, words) in [
        (vec!["in"], "in/out/", vec![], vec!["lies below the input prefix", "choose another place"]),
        (vec!["in/"], "in", vec![], vec!["lies below the input prefix"]),
        (vec!["in/**/*.parquet"], "in/out/", vec![], vec!["lies below the input prefix"]),
        (vec!["empty"], "out/", vec![], vec!["empty"]),
        (vec!["in/*.pq"], "out/", vec![], vec!["no file matches"]),
        (vec!["in/[.parquet"], "out/", vec![], vec!["is no pattern"]),
        (vec!["in"], "out.parquet", vec![], vec!["name a prefix that ends in '/'"]),
        (
            vec!["in/a.parquet", "in/b/a.parquet"],
            "out/",
            vec![],
            vec!["where another shard or its output is", "a.parquet"],
        ),
        (vec!["in"], "none/none/out/", vec![], vec!["none"]),
        (vec!["in"], "out/", vec!["--partition", "3/3"], vec!["worker 3 of 3"]),
    ] {
        let ran = dataset.score(&inputs, output, &more);
        assert!(matches!(ran.code, Some(1 | 2)), "{inputs:?}: {ran:?}");
        for word in words {
            assert!(ran.stderr.contains(word), "{inputs:?} to {output}: {}", ran.stderr);
        }
        assert!(!ran.stderr.contains("panicked"), "{ran:?}");
        assert_eq!(names(&dataset.path("in")), ["a.parquet", "b"], "{inputs:?}");
        assert!(!Path::new(&path("out")).exists() || files(&dataset.path("out")).is_empty(), "{inputs:?} to {output}");
    }
}

#[test]
fn a_dry_run_says_what_is_left_and_does_nothing() {
    let dataset = Dataset::new(&[("a.parquet", 30), ("b.parquet", 5), ("c.parquet", 7)]);
    std::fs::create_dir(dataset.path("out")).unwrap();
    assert_eq!(dataset.score(&["in/a.parquet"], "out/", &[]).code, Some(0));
    std::fs::write(dataset.path("in/c.parquet"), "no shard").unwrap();
    let before = files(dataset.folder.path());
    let ran = dataset.score(&["in"], "out/", &["--dry-run"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{ran:?}");
    for (line, words) in lines.iter().zip([
        ["in/a.parquet -> ", "complete, 30 rows"],
        ["out/b.parquet: 5 rows, ", "image \"image\", caption \"caption\""],
        ["cannot be scored: ", "not a Parquet file"],
        ["3 shards: 1 to score (5 rows, ", "1 complete already, 1 that cannot be"],
    ]) {
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
    assert_eq!(files(dataset.folder.path()), before);
}

/// Killed at any moment and started again, until it is done, over and over.
#[cfg(unix)]
#[test]
fn killed_two_hundred_times_every_row_is_there_once() {
    const KILLS: usize = 200;
    let dataset = Dataset::twenty();
    let start = Instant::now();
    assert_eq!(dataset.score(&["in"], "whole/", &[]).code, Some(0));
    let whole = start.elapsed();
    let expected = dataset.rows("whole");
    let (mut killed, mut finished, mut state) = (0, 0, 1_u64);
    while killed < KILLS {
        let mut child = program().args(dataset.arguments(&["in"], "out/", &[])).spawn().unwrap();
        // Any moment of a run: a linear congruential generator's upper bits.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let wait = whole.mul_f64((state >> 33) as f64 / f64::from(1_u32 << 31));
        std::thread::sleep(wait.min(Duration::from_secs(2)));
        let ended = child.try_wait().unwrap();
        drop(child.kill());
        child.wait().unwrap();
        match ended {
            None => killed += 1,
            Some(status) => {
                assert_eq!(status.code(), Some(0));
                finished += 1;
                assert_same(&dataset.rows("out"), &expected);
                std::fs::remove_dir_all(dataset.path("out")).unwrap();
            }
        }
        if !dataset.path("out").exists() {
            continue;
        }
        // What is there is whole.
        for (name, rows) in &dataset.shards {
            let output = dataset.path("out").join(name);
            if output.exists() {
                assert_eq!(read_parquet(&output).num_rows(), *rows, "{name}");
            }
        }
    }
    let ran = dataset.score(&["in"], "out/", &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_same(&dataset.rows("out"), &expected);
    // Statistics too, and nothing that killed runs left.
    let mut expected = names(&dataset.path("whole"));
    expected.sort_unstable();
    assert_eq!(names(&dataset.path("out")), expected, "after {killed} kills and {finished} whole runs");
}
