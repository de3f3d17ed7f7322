//! The program as a user meets it: files in, files, text and exit status out. What it must say about bad input is in
//! `cli_errors`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int32Type;
use serde_json::Value;
use tempfile::TempDir;

use crate::oracle::{Oracle, rgb};
use crate::support::{
    Ran, capsieve, floats, list_shard, names, picture, png, program, read_parquet, run, shard, texts, write_parquet,
};

/// Of a probability and a cosine, against PyTorch in float64. Measured 4e-6 and 2e-6.
const ITM_TOLERANCE: f64 = 5e-5;
const COSINE_TOLERANCE: f64 = 1e-5;
/// Between ways through the engine.
const BATCHING_TOLERANCE: f32 = 2e-5;

/// A folder with `in.parquet`.
struct Folder(TempDir);

impl Folder {
    fn new(batch: &RecordBatch) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        write_parquet(&folder.path("in.parquet"), batch, 1000);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `capsieve score` of in.parquet to out.parquet.
    fn score(&self, model: &str, more: &[&str]) -> Ran {
        let (input, output) = (self.text("in.parquet"), self.text("out.parquet"));
        let mut arguments = vec!["score", "--model", model, "--input", &input, "--output", &output];
        arguments.extend(more);
        capsieve(&arguments)
    }

    /// The same, which must succeed; the rows.
    fn scored(&self, model: &str, more: &[&str]) -> RecordBatch {
        let ran = self.score(model, more);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        read_parquet(&self.path("out.parquet"))
    }
}

fn small(count: usize) -> RecordBatch {
    let rows: Vec<_> =
        (0..count).map(|row| (Some(picture(row as u64)), Some(format!("picture {row} of a dog")))).collect();
    shard(&rows)
}

fn column_names(batch: &RecordBatch) -> Vec<String> {
    batch.schema().fields().iter().map(|field| field.name().clone()).collect()
}

/// The oracle's images as files: JPEG pixels as the reference decoded them, so as PNG.
fn images(oracle: &Oracle) -> Vec<Vec<u8>> {
    oracle.image_names.iter().map(|name| png(&rgb(name))).collect()
}

fn assert_golden(oracle: &Oracle, found: &RecordBatch) {
    for (column, expected, tolerance) in
        [("itm_score", "itm_prob_f64", ITM_TOLERANCE), ("cosine_score", "cosine_f64", COSINE_TOLERANCE)]
    {
        let (shape, expected) = oracle.expected.floats(expected);
        assert_eq!(shape, [oracle.image_names.len(), oracle.captions.len()]);
        let found = floats(found, column);
        assert_eq!(found.len(), expected.len());
        for (pair, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let error = (f64::from(found.unwrap()) - expected).abs();
            assert!(error <= tolerance, "{}: {column} of pair {pair} is off by {error:e}", oracle.name);
        }
    }
}

#[test]
fn scores_of_files_are_transformers_scores() {
    for name in ["tiny", "wide"] {
        let oracle = Oracle::load(name);
        let images = images(&oracle);
        let captions: Vec<Option<&str>> = oracle.captions.iter().map(|caption| Some(caption.as_str())).collect();
        let lists: Vec<_> = images.iter().map(|image| (Some(image.clone()), Some(captions.clone()))).collect();
        let singles: Vec<_> =
            images.iter().flat_map(|image| captions.iter().map(|caption| (Some(image.clone()), *caption))).collect();
        let model = oracle.folder.display().to_string();
        let found = Folder::new(&list_shard(&lists)).scored(&model, &["--batch-size", "4"]);
        assert_golden(&oracle, &found);
        let (scores, best) = (floats(&found, "itm_score"), found.column_by_name("best_caption").unwrap());
        for (row, best) in best.as_primitive::<Int32Type>().iter().enumerate() {
            let scores = &scores[row * captions.len()..(row + 1) * captions.len()];
            let most = (0..captions.len()).max_by(|a, b| scores[*a].partial_cmp(&scores[*b]).unwrap());
            assert_eq!(best.and_then(|best| usize::try_from(best).ok()), most);
        }
        assert_golden(&oracle, &Folder::new(&shard(&singles)).scored(&model, &[]));
    }
}

#[test]
fn a_float16_pickle_scores_as_its_weights_in_float32() {
    let tiny = Oracle::load("tiny");
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "preprocessor_config.json"] {
        std::fs::copy(tiny.folder.join(name), folder.path().join(name)).unwrap();
    }
    std::fs::copy(tiny.folder.join("pytorch_model_f16.bin"), folder.path().join("pytorch_model.bin")).unwrap();
    let rows: Vec<_> = images(&tiny).into_iter().map(|image| (Some(image), Some(tiny.captions[0].as_str()))).collect();
    let shard = Folder::new(&shard(&rows));
    let found = floats(&shard.scored(&folder.path().display().to_string(), &[]), "itm_score");
    let (_, expected) = tiny.expected.floats("itm_prob_f64");
    for (row, found) in found.iter().enumerate() {
        // The weights are rounded to 11 bits; the oracle's own float16 run is off by 6e-3.
        assert!((f64::from(found.unwrap()) - expected[row * tiny.captions.len()]).abs() < 2e-2);
    }
}

#[test]
fn the_output_is_the_input_and_the_scores() {
    let batch = small(20);
    let folder = Folder::new(&batch);
    let before = std::fs::read(folder.path("in.parquet")).unwrap();
    let ran = folder.score("synthetic:tiny:1", &["--min-itm", "0.4", "--min-cosine", "-0.9"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("20 scored") && ran.stdout.contains("pairs/s"), "{}", ran.stdout);
    let found = read_parquet(&folder.path("out.parquet"));
    let ours = ["itm_score", "cosine_score", "keep", "score_status", "score_error"];
    assert_eq!(column_names(&found), [&["key", "image", "caption"], &ours[..]].concat());
    for (index, column) in batch.columns().iter().enumerate() {
        assert_eq!(found.column(index), column);
    }
    let (itm, cosine) = (floats(&found, "itm_score"), floats(&found, "cosine_score"));
    let keep: Vec<bool> = found.column_by_name("keep").unwrap().as_boolean().iter().flatten().collect();
    let expected: Vec<bool> = itm.iter().zip(&cosine).map(|(i, c)| i.unwrap() >= 0.4 && c.unwrap() >= -0.9).collect();
    assert_eq!(keep, expected);
    assert!(texts(&found, "score_error").iter().all(Option::is_none));
    assert_eq!(std::fs::read(folder.path("in.parquet")).unwrap(), before, "the input is untouched");
    assert_eq!(names(folder.0.path()), ["in.parquet", "out.parquet", "out.stats.json"]);
    assert_metadata(&found, &folder);
    let stats: Value = serde_json::from_slice(&std::fs::read(folder.path("out.stats.json")).unwrap()).unwrap();
    assert_eq!((&stats["rows"], &stats["scored"], &stats["errors"]), (&20.into(), &20.into(), &serde_json::json!({})));
    assert_eq!(stats["kept"], keep.iter().filter(|keep| **keep).count());
    for stage in ["read", "decode", "engine", "write", "total"] {
        assert!(stats["seconds"][stage].as_f64().is_some_and(|seconds| seconds >= 0.0), "{stats}");
    }
}

fn assert_metadata(found: &RecordBatch, folder: &Folder) {
    let schema = found.schema();
    let entry = |name: &str| schema.metadata().get(&format!("capsieve.{name}")).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(entry("version"), env!("CARGO_PKG_VERSION"));
    assert_eq!(
        (entry("heads").as_str(), entry("itm_token").as_str(), entry("precision").as_str()),
        ("itm,cosine", "cls", "f32")
    );
    assert!(entry("model").len() == 64 && entry("model").bytes().all(|byte| byte.is_ascii_hexdigit()));
    let source: Value = serde_json::from_str(entry("source")).unwrap();
    assert_eq!(source["uri"], folder.text("in.parquet"));
    assert_eq!(source["size"], folder.path("in.parquet").metadata().unwrap().len());
}

#[test]
fn heads_columns_and_tokens_are_chosen() {
    let folder = Folder::new(&small(6));
    let both = folder.scored("synthetic:tiny:1", &[]);
    let cosine = folder.scored("synthetic:tiny:1", &["--heads", "cosine", "--drop-images", "--overwrite"]);
    assert_eq!(column_names(&cosine), ["key", "caption", "cosine_score", "score_status", "score_error"]);
    let itm = folder.scored("synthetic:tiny:1", &["--heads", "itm", "--overwrite"]);
    assert_eq!(column_names(&itm), ["key", "image", "caption", "itm_score", "score_status", "score_error"]);
    for (name, single) in [("cosine_score", &cosine), ("itm_score", &itm)] {
        for (one, two) in floats(single, name).iter().zip(&floats(&both, name)) {
            assert!((one.unwrap() - two.unwrap()).abs() <= BATCHING_TOLERANCE, "{name}");
        }
    }
    let enc = folder.scored("synthetic:tiny:1", &["--itm-token", "enc", "--overwrite"]);
    assert_eq!(enc.schema().metadata()["capsieve.itm_token"], "enc");
    assert_ne!(floats(&enc, "itm_score"), floats(&both, "itm_score"), "another first token");
    assert_eq!(floats(&enc, "cosine_score"), floats(&both, "cosine_score"), "the cosine head always has [CLS]");
}

#[test]
fn images_of_addresses_and_structs_are_found() {
    use arrow::array::{ArrayRef, BinaryArray, StringArray, StructArray};
    use arrow::datatypes::{DataType, Field};
    use std::sync::Arc;
    let expected = floats(&Folder::new(&small(2)).scored("synthetic:tiny:1", &[]), "itm_score");
    let captions: ArrayRef = Arc::new(StringArray::from(vec!["picture 0 of a dog", "picture 1 of a dog", "gone"]));
    let addresses: ArrayRef = Arc::new(StringArray::from(vec!["images/0.png", "images/1.png", "images/2.png"]));
    let folder = Folder::new(&RecordBatch::try_from_iter([("url", addresses), ("text", captions.clone())]).unwrap());
    std::fs::create_dir(folder.path("images")).unwrap();
    (0..2).for_each(|i| std::fs::write(folder.path(&format!("images/{i}.png")), picture(i)).unwrap());
    let ran = folder.score("synthetic:tiny:1", &[]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    let found = read_parquet(&folder.path("out.parquet"));
    assert_eq!(floats(&found, "itm_score"), [expected[0], expected[1], None]);
    assert_eq!(texts(&found, "score_status")[2].as_deref(), Some("fetch_failed"));
    let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![picture(0).as_slice(), &picture(1), &picture(2)]));
    let field = |name: &str, kind| Arc::new(Field::new(name, kind, true));
    let images = StructArray::from(vec![
        (field("bytes", DataType::Binary), bytes),
        (field("path", DataType::Utf8), Arc::new(StringArray::from(vec![None::<&str>; 3])) as ArrayRef),
    ]);
    let images: ArrayRef = Arc::new(images);
    let folder = Folder::new(&RecordBatch::try_from_iter([("image", images), ("text", captions)]).unwrap());
    assert_eq!(floats(&folder.scored("synthetic:tiny:1", &[]), "itm_score")[..2], expected);
}

#[test]
fn a_shard_of_no_rows_gives_a_shard_of_no_rows() {
    let folder = Folder::new(&small(0));
    let found = folder.scored("synthetic:tiny", &["--min-itm", "0.5"]);
    assert_eq!(found.num_rows(), 0);
    assert_eq!(column_names(&found).len(), 8);
    assert!(folder.path("out.stats.json").exists());
}

#[test]
fn rows_without_a_score_are_told_again_by_the_same_command() {
    let folder = Folder::new(&shard(&[(Some(picture(1)), Some("a dog".to_owned())), (None, Some("a cat".to_owned()))]));
    for _ in 0..2 {
        let ran = folder.score("synthetic:tiny", &[]);
        assert_eq!(ran.code, Some(3), "{ran:?}");
        assert!(ran.stdout.contains("1 without a score"), "{ran:?}");
    }
}

#[test]
fn the_same_command_again_does_nothing_another_one_refuses() {
    let folder = Folder::new(&small(5));
    folder.scored("synthetic:tiny:1", &[]);
    let written = |folder: &Folder| folder.path("out.parquet").metadata().unwrap().modified().unwrap();
    let first = written(&folder);
    let again = folder.score("synthetic:tiny:1", &[]);
    assert_eq!(again.code, Some(0), "{again:?}");
    assert!(again.stdout.contains("already complete"), "{again:?}");
    for (model, more) in [
        ("synthetic:tiny:2", &[][..]),
        ("synthetic:tiny:1", &["--heads", "itm"]),
        ("synthetic:tiny:1", &["--min-itm", "0.1"]),
    ] {
        let other = folder.score(model, more);
        assert_eq!(other.code, Some(1), "{other:?}");
        assert!(other.stderr.contains("--overwrite"), "{other:?}");
    }
    assert_eq!(written(&folder), first);
    folder.scored("synthetic:tiny:2", &["--overwrite"]);
    assert_eq!(names(folder.0.path()), ["in.parquet", "out.parquet", "out.stats.json"]);
}

#[test]
fn options_come_from_the_environment_too() {
    let folder = Folder::new(&small(3));
    let mut command = program();
    command.arg("score").env("CAPSIEVE_MODEL", "synthetic:tiny").env("CAPSIEVE_INPUT", folder.text("in.parquet"));
    command.env("CAPSIEVE_OUTPUT", folder.text("out.parquet")).env("CAPSIEVE_HEADS", "cosine");
    let ran = run(command.env("CAPSIEVE_DROP_IMAGES", "1").env("CAPSIEVE_MIN_COSINE", "-0.5"));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let found = column_names(&read_parquet(&folder.path("out.parquet")));
    assert_eq!(found, ["key", "caption", "cosine_score", "keep", "score_status", "score_error"]);
}

#[test]
fn the_demo_finds_the_noise() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("made/for it");
    let ran = capsieve(&["demo", "--out", &out.display().to_string()]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for part in ["ROC AUC", "precision", "recall", "worst captions", "best captions", "pairs/s", "scored.parquet"] {
        assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
    }
    let found = read_parquet(&out.join("scored.parquet"));
    assert!(found.num_rows() >= 256);
    let truth: Vec<bool> = found.column_by_name("is_match").unwrap().as_boolean().iter().flatten().collect();
    let scores: Vec<f32> = floats(&found, "itm_score").into_iter().flatten().collect();
    let area = capsieve_worker::roc_auc(&scores, &truth).unwrap();
    assert!(area >= 0.97, "ROC AUC of the matching head is {area}");
    assert_eq!(capsieve(&["demo", "--out", &out.display().to_string()]).code, Some(0), "again");
    assert_eq!(names(&out), ["scored.parquet", "scored.stats.json"]);
    std::fs::write(out.join("scored.parquet"), "mine").unwrap();
    let ran = capsieve(&["demo", "--out", &out.display().to_string()]);
    assert!(ran.code == Some(1) && ran.stderr.contains("--out"), "{ran:?}");
    assert_eq!(std::fs::read(out.join("scored.parquet")).unwrap(), b"mine");
}

#[test]
fn synth_writes_the_weights_that_its_name_scores_with() {
    let folder = Folder::new(&small(4));
    let model = folder.text("model");
    let arguments = ["synth", "--size", "tiny", "--seed", "7", "--out", &model];
    let ran = capsieve(&arguments);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ] {
        assert!(Path::new(&model).join(name).exists(), "{name}");
    }
    let found = folder.scored(&model, &[]);
    let expected = folder.scored("synthetic:tiny:7", &["--overwrite"]);
    assert_eq!(floats(&found, "itm_score"), floats(&expected, "itm_score"));
    assert_eq!(floats(&found, "cosine_score"), floats(&expected, "cosine_score"));
    let refused = capsieve(&arguments);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("not empty") && refused.stderr.contains("--overwrite"), "{refused:?}");
    assert_eq!(capsieve(&[&arguments[..], &["--overwrite"]].concat()).code, Some(0));
}

#[test]
fn inspect_tells_models_and_shards() {
    let tiny = Oracle::load("tiny").folder.display().to_string();
    let ran = capsieve(&["inspect", &tiny]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for part in ["safetensors", "image encoder", "text encoder", "float32", "sha256", "tokenizer"] {
        assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
    }
    let folder = Folder::new(&small(5));
    let ran = capsieve(&["inspect", &folder.text("in.parquet")]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for part in ["5 in 1 row group", "image: Binary", "image (encoded images)", "caption (one caption a row)"] {
        assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
    }
    let ran = capsieve(&["inspect", &folder.text("nothing.parquet")]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
}

#[test]
fn help_names_every_command() {
    let ran = capsieve(&["--help"]);
    assert_eq!(ran.code, Some(0));
    for command in ["demo", "score", "serve", "submit", "inspect", "synth", "bench"] {
        assert!(ran.stdout.contains(&format!("\n  {command}")), "{}", ran.stdout);
        let help = capsieve(&[command, "--help"]);
        assert_eq!(help.code, Some(0));
        assert!(help.stdout.contains("CAPSIEVE_"), "{command} names its variables");
    }
    assert!(capsieve(&["--version"]).stdout.contains(env!("CARGO_PKG_VERSION")));
}

#[cfg(unix)]
#[test]
fn an_interrupted_job_leaves_nothing() {
    let folder = Folder::new(&small(4000));
    let (input, output) = (folder.text("in.parquet"), folder.text("out.parquet"));
    let child = program()
        .args(["score", "--model", "synthetic:tiny", "--batch-size", "1", "--input", &input, "--output", &output])
        .spawn();
    let child = child.unwrap();
    let start = Instant::now();
    while names(folder.0.path()).len() < 2 {
        assert!(start.elapsed() < Duration::from_secs(60), "the job never began to write");
        std::thread::sleep(Duration::from_millis(2));
    }
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(sent.success());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"), "{output:?}");
    assert_eq!(names(folder.0.path()), ["in.parquet"]);
}
