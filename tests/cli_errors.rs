//! What bad input gets: a bad row costs its scores, a bad job one clear line and no output, wrong usage status 2.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, Int32Array, RecordBatch, StringArray};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::oracle::golden;
use crate::support::{Ran, capsieve, floats, names, picture, program, read_parquet, run, shard, texts, write_parquet};

const MODEL: &str = "synthetic:tiny";
const SVG: &[u8] = b"<?xml version=\"1.0\"?><svg xmlns=\"http://www.w3.org/2000/svg\" width=\"9\" height=\"9\"/>";
const HTML: &[u8] = b"<!DOCTYPE html><html><body>404 Not Found</body></html>";

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

    fn score(&self, model: &str, input: &str, more: &[&str]) -> Ran {
        let (input, output) = (self.path(input).display().to_string(), self.path("out.parquet").display().to_string());
        let mut arguments = vec!["score", "--model", model, "--input", &input, "--output", &output];
        arguments.extend(more);
        capsieve(&arguments)
    }
}

fn good() -> RecordBatch {
    shard(&[(Some(picture(1)), Some("a dog")), (Some(picture(2)), Some("a cat"))])
}

/// One line that names the object and what to do, status 1.
fn assert_failed(ran: &Ran, parts: &[&str], context: &str) {
    assert_eq!(ran.code, Some(1), "{context}: {ran:?}");
    assert_eq!(ran.stdout, "", "{context}");
    assert!(ran.stderr.starts_with("error: ") && ran.stderr.lines().count() == 1, "{context}: {}", ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{context}: {}", ran.stderr);
    for part in parts {
        assert!(ran.stderr.contains(part), "{context}: no {part:?} in {}", ran.stderr);
    }
}

/// A PNG whose header claims a size that its pixels do not have.
fn huge_png(width: u32, height: u32) -> Vec<u8> {
    let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
    let header = png_chunk(b"IHDR", &[&size[..], &[8, 2, 0, 0, 0]].concat());
    // An empty zlib stream.
    let pixels = png_chunk(b"IDAT", &[0x78, 0x9c, 0x03, 0, 0, 0, 0, 1]);
    [&b"\x89PNG\r\n\x1a\n"[..], &header, &pixels, &png_chunk(b"IEND", &[])].concat()
}

fn png_chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [&name[..], data].concat();
    let crc = body.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
    });
    let length = u32::try_from(data.len()).unwrap();
    [&length.to_be_bytes()[..], &body, &(!crc).to_be_bytes()].concat()
}

/// Name, image, caption, status.
type BadRow = (&'static str, Option<Vec<u8>>, Option<String>, &'static str);

fn bad_rows() -> Vec<BadRow> {
    let caption = || Some("a dog".to_owned());
    let jpeg = std::fs::read(golden().join("images/truncated.jpg")).unwrap();
    let fake = std::fs::read(golden().join("images/not_an_image.png")).unwrap();
    vec![
        ("null image", None, caption(), "null_image"),
        ("empty", Some(Vec::new()), caption(), "decode_failed"),
        ("cut JPEG", Some(jpeg), caption(), "decode_failed"),
        ("cut PNG", Some(picture(3)[..60].to_vec()), caption(), "decode_failed"),
        ("not an image", Some(fake), caption(), "decode_failed"),
        ("unknown bytes", Some(vec![7; 300]), caption(), "decode_failed"),
        ("HTML", Some(HTML.to_vec()), caption(), "decode_failed"),
        ("SVG", Some(SVG.to_vec()), caption(), "decode_failed"),
        ("huge", Some(huge_png(100_000, 100_000)), caption(), "image_too_large"),
        ("null caption", Some(picture(1)), None, "null_caption"),
        ("long caption", Some(picture(1)), Some("word ".repeat(600)), "caption_too_long"),
    ]
}

#[test]
fn a_bad_row_costs_its_own_scores_only() {
    let mut rows = vec![(Some(picture(1)), Some("a dog".to_owned()))];
    for (_, image, caption, _) in bad_rows() {
        rows.push((image, caption));
        rows.push((Some(picture(1)), Some("a dog".to_owned())));
    }
    rows.push((Some(picture(1)), Some(String::new())));
    let folder = Folder::new(&shard(&rows));
    let ran = folder.score(MODEL, "in.parquet", &[]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.stdout.contains(&format!("{} without a score", bad_rows().len())), "{}", ran.stdout);
    let found = read_parquet(&folder.path("out.parquet"));
    let (scores, statuses, errors) =
        (floats(&found, "itm_score"), texts(&found, "score_status"), texts(&found, "score_error"));
    for (index, (name, _, _, status)) in bad_rows().iter().enumerate() {
        let row = 2 * index + 1;
        assert_eq!(statuses[row].as_deref(), Some(*status), "{name}: {:?}", errors[row]);
        assert!(errors[row].as_deref().is_some_and(|error| error.len() > 5 && error.lines().count() == 1), "{name}");
        assert_eq!((scores[row], floats(&found, "cosine_score")[row]), (None, None), "{name}");
        assert_eq!(statuses[row + 1].as_deref(), Some("ok"), "the row after {name}");
        assert!((scores[row + 1].unwrap() - scores[0].unwrap()).abs() < 2e-5, "the row after {name}");
    }
    assert!(scores[rows.len() - 1].is_some(), "the empty caption is scored");
    let stats: Value = serde_json::from_slice(&std::fs::read(folder.path("out.stats.json")).unwrap()).unwrap();
    let errors =
        json!({ "null_image": 1, "decode_failed": 7, "image_too_large": 1, "null_caption": 1, "caption_too_long": 1 });
    assert_eq!((&stats["errors"], &stats["failed"]), (&errors, &bad_rows().len().into()));
}

#[test]
fn the_limits_of_a_row_can_be_set() {
    let long = "word ".repeat(600);
    let folder = Folder::new(&shard(&[(Some(picture(1)), Some(long.as_str()))]));
    let ran = folder.score(MODEL, "in.parquet", &["--max-caption-tokens", "10"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let ran =
        folder.score(MODEL, "in.parquet", &["--max-caption-tokens", "10", "--max-image-pixels", "50", "--overwrite"]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    let found = read_parquet(&folder.path("out.parquet"));
    assert_eq!(texts(&found, "score_status"), [Some("image_too_large".to_owned())]);
}

#[test]
fn on_error_fail_ends_at_the_first_bad_row() {
    let mut rows: Vec<_> = (0..300).map(|row| (Some(picture(row)), Some("a dog"))).collect();
    (rows[41].0, rows[70].0) = (None, None);
    let folder = Folder::new(&shard(&rows));
    let ran = folder.score(MODEL, "in.parquet", &["--on-error", "fail"]);
    assert_failed(&ran, &["row 41", "null_image"], "--on-error fail");
    assert_eq!(names(folder.0.path()), ["in.parquet"]);
}

/// Breaks the bytes of the file's middle: the pages, not the footer.
fn corrupted(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle..middle + 400].iter_mut().for_each(|byte| *byte ^= 0x5a);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn bad_shards_fail_with_one_line() {
    let rows: Vec<_> = (0..200).map(|row| (Some(picture(row)), Some("a dog"))).collect();
    let folder = Folder::new(&shard(&rows));
    let whole = std::fs::read(folder.path("in.parquet")).unwrap();
    std::fs::write(folder.path("text.parquet"), "key,image,caption\n1,a.jpg,a dog\n").unwrap();
    std::fs::write(folder.path("cut.parquet"), &whole[..whole.len() - 100]).unwrap();
    std::fs::write(folder.path("empty.parquet"), "").unwrap();
    std::fs::write(folder.path("corrupt.parquet"), &whole).unwrap();
    corrupted(&folder.path("corrupt.parquet"));
    let strings = |text: &str| Arc::new(StringArray::from(vec![text; 2])) as ArrayRef;
    let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1, 2]));
    let table = |columns: Vec<(&str, ArrayRef)>| {
        let (names, arrays): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
        let fields: Vec<_> = names
            .iter()
            .zip(&arrays)
            .map(|(name, array)| {
                arrow::datatypes::Field::new(*name, arrow::array::Array::data_type(array).clone(), true)
            })
            .collect();
        RecordBatch::try_new(Arc::new(arrow::datatypes::Schema::new(fields)), arrays).unwrap()
    };
    write_parquet(&folder.path("numbers.parquet"), &table(vec![("a", numbers), ("b", strings("x"))]), 10);
    let twice = vec![("image", strings("a.png")), ("caption", strings("x")), ("caption", strings("y"))];
    write_parquet(&folder.path("twice.parquet"), &table(twice), 10);
    let before = names(folder.0.path());
    let cases: [(&str, &[&str], &[&str]); 9] = [
        ("text.parquet", &[], &["text.parquet", "not a Parquet file"]),
        ("cut.parquet", &[], &["cut.parquet", "cut off"]),
        ("empty.parquet", &[], &["empty.parquet", "not a Parquet file"]),
        ("corrupt.parquet", &[], &["corrupt.parquet", "damaged"]),
        ("numbers.parquet", &[], &["numbers.parquet", "image", "--image-column", "a (Int32)"]),
        ("twice.parquet", &[], &["twice.parquet", "caption", "--caption-column"]),
        ("in.parquet", &["--caption-column", "text"], &["in.parquet", "text", "caption (Utf8)"]),
        ("in.parquet", &["--caption-column", "image"], &["in.parquet", "image", "string"]),
        ("absent.parquet", &[], &["absent.parquet", "does not exist"]),
    ];
    for (input, more, parts) in cases {
        let bytes = std::fs::read(folder.path(input)).ok();
        assert_failed(&folder.score(MODEL, input, more), parts, input);
        assert_eq!(std::fs::read(folder.path(input)).ok(), bytes, "{input} is untouched");
        assert_eq!(names(folder.0.path()), before, "{input}: nothing is written");
    }
}

#[test]
fn bad_outputs_fail_before_anything_is_scored() {
    let folder = Folder::new(&good());
    let input = folder.path("in.parquet");
    let before = std::fs::read(&input).unwrap();
    std::fs::hard_link(&input, folder.path("link.parquet")).unwrap();
    std::fs::create_dir(folder.path("folder")).unwrap();
    std::fs::write(folder.path("foreign.parquet"), "mine").unwrap();
    let text = |name: &str| folder.path(name).display().to_string();
    let cases: [(&str, &[&str]); 8] = [
        ("in.parquet", &["in.parquet", "is the input"]),
        ("./in.parquet", &["in.parquet", "is the input"]),
        ("link.parquet", &["link.parquet", "is the input"]),
        ("foreign.parquet", &["foreign.parquet", "--overwrite"]),
        ("folder", &["folder"]),
        ("no/such/out.parquet", &["no/such", "does not exist"]),
        ("in.parquet/out.parquet", &["in.parquet"]),
        ("s3://bucket/out.parquet", &["s3://bucket/out.parquet"]),
    ];
    for (output, parts) in cases {
        let output = if output.contains("://") { output.to_owned() } else { text(output) };
        for overwrite in [&[][..], &["--overwrite"]] {
            if !overwrite.is_empty() && output.contains("foreign") {
                continue;
            }
            let mut arguments =
                vec!["score", "--model", MODEL, "--input", input.to_str().unwrap(), "--output", &output];
            arguments.extend(overwrite);
            assert_failed(&capsieve(&arguments), parts, &output);
        }
        assert_eq!(std::fs::read(&input).unwrap(), before, "{output}: the input is untouched");
    }
    assert_eq!(std::fs::read(folder.path("foreign.parquet")).unwrap(), b"mine");
    assert_eq!(names(folder.0.path()), ["folder", "foreign.parquet", "in.parquet", "link.parquet"]);
}

/// A copy of the tiny checkpoint, to be broken.
fn checkpoint() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "preprocessor_config.json"] {
        std::fs::copy(golden().join("tiny").join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn edit(folder: &TempDir, name: &str, change: impl Fn(&mut Value)) {
    let path = folder.path().join(name);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// Name of the fault, how to make it, what the error names.
type BadModel = (&'static str, fn(&TempDir), &'static [&'static str]);

const BAD_MODELS: [BadModel; 8] = [
    (
        "cut weights",
        |f| {
            let path = f.path().join("model.safetensors");
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        },
        &["model.safetensors"],
    ),
    (
        "weights of zero bytes",
        |f| std::fs::write(f.path().join("model.safetensors"), "").unwrap(),
        &["model.safetensors"],
    ),
    ("no weights", |f| std::fs::remove_file(f.path().join("model.safetensors")).unwrap(), &["no weights"]),
    ("no config", |f| std::fs::remove_file(f.path().join("config.json")).unwrap(), &["config.json"]),
    (
        "another model's config",
        |f| edit(f, "config.json", |c| *c = json!({ "model_type": "bert", "hidden_size": 768 })),
        &["config.json", "bert"],
    ),
    (
        "another width",
        |f| edit(f, "config.json", |c| c["text_config"]["hidden_size"] = json!(120)),
        &["tensor", "config.json"],
    ),
    (
        "another image size",
        |f| edit(f, "preprocessor_config.json", |c| c["size"] = json!({ "height": 96, "width": 96 })),
        &["preprocessor_config.json", "96"],
    ),
    (
        "another tokenizer",
        |f| {
            let other = golden().join("tokenizer/tokenizer.json");
            std::fs::copy(other, f.path().join("tokenizer.json")).unwrap();
        },
        &["tokenizer", "30522"],
    ),
];

#[test]
fn bad_models_fail_with_one_line() {
    for (name, break_it, parts) in BAD_MODELS {
        let (folder, model) = (Folder::new(&good()), checkpoint());
        break_it(&model);
        let ran = folder.score(&model.path().display().to_string(), "in.parquet", &[]);
        assert_failed(&ran, parts, name);
        assert_eq!(names(folder.0.path()), ["in.parquet"], "{name}: nothing is written");
    }
    let folder = Folder::new(&good());
    for (model, parts) in [
        ("./no/such/folder", &["./no/such/folder", "no such folder"][..]),
        ("synthetic:huge", &["synthetic:huge", "synthetic:tiny"]),
        ("someone/some-model", &["someone/some-model", "HF_HUB_OFFLINE"]),
    ] {
        assert_failed(&folder.score(model, "in.parquet", &[]), parts, model);
    }
}

#[test]
fn what_this_build_lacks_is_said() {
    let folder = Folder::new(&good());
    let input = folder.path("in.parquet").display().to_string();
    let here = folder.0.path().display().to_string();
    for precision in ["f16", "tf32"] {
        let words = [precision, "the device cpu has f32, bf16, int8"];
        assert_failed(&folder.score(MODEL, "in.parquet", &["--precision", precision]), &words, precision);
    }
    assert_failed(&folder.score(MODEL, "in.parquet", &["--input", &input]), &["name a prefix"], "two inputs");
    let (below, many) = ("out.parquet lies below the input prefix", "name a prefix");
    let prefixes = [("", below), ("/", below), ("/**/*.parquet", below), ("/*.parquet", many)];
    for (prefix, words) in prefixes.map(|(pattern, words)| (format!("{here}{pattern}"), words)) {
        let ran =
            capsieve(&["score", "--model", MODEL, "--input", &prefix, "--output", &format!("{here}/out.parquet")]);
        assert_failed(&ran, &[words], &prefix);
    }
    assert_eq!(names(folder.0.path()), ["in.parquet"]);
}

#[test]
fn instructions_are_taken_by_name_or_refused() {
    let folder = Folder::new(&good());
    let score = |isa: &str| {
        let (input, output) = (folder.path("in.parquet"), folder.path("out.parquet"));
        let mut command = program();
        command.args(["score", "--model", MODEL, "--input"]).arg(input).arg("--output").arg(output);
        run(command.env("CAPSIEVE_CPU_ISA", isa))
    };
    assert_failed(&score("avx51"), &["CAPSIEVE_CPU_ISA", "avx51", "portable"], "unknown instructions");
    assert_eq!(names(folder.0.path()), ["in.parquet"]);
    for isa in ["portable", ""] {
        assert_eq!(score(isa).code, Some(0));
        std::fs::remove_file(folder.path("out.parquet")).unwrap();
    }
}

#[test]
fn a_missing_card_is_an_error_or_for_auto_one_line() {
    let folder = Folder::new(&good());
    let why = if cfg!(feature = "cuda") { "driver" } else { "this build has no CUDA" };
    if capsieve_engine::check_cuda(0).is_ok() {
        println!("skipped: this machine has a card");
        return;
    }
    for device in ["cuda", "cuda:0", "cuda:7,8"] {
        let ran = folder.score(MODEL, "in.parquet", &["--device", device]);
        assert_failed(&ran, &["cuda:", why, "--device cpu"], device);
    }
    assert_eq!(names(folder.0.path()), ["in.parquet"]);
    let ran = folder.score(MODEL, "in.parquet", &["--device", "auto"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let lines = ran.stderr.lines().filter(|line| line.contains("computing on the CPU")).count();
    assert_eq!(lines, usize::from(cfg!(feature = "cuda")), "{ran:?}");
}

#[test]
fn wrong_usage_has_status_two() {
    let folder = Folder::new(&good());
    let cases: [&[&str]; 13] = [
        &["--no-such-option"],
        &["--heads", "itm,other"],
        &["--heads", ""],
        &["--min-itm", "1.5"],
        &["--min-cosine", "-2"],
        &["--min-itm", "NaN"],
        &["--heads", "cosine", "--min-itm", "0.5"],
        &["--batch-size", "0"],
        &["--threads", "many"],
        &["--on-error", "ignore"],
        &["--max-caption-tokens", "1"],
        &["--device", "tpu"],
        &["--precision", "f8"],
    ];
    for more in cases {
        let ran = folder.score(MODEL, "in.parquet", more);
        assert_eq!(ran.code, Some(2), "{more:?}: {ran:?}");
        assert!(ran.stderr.starts_with("error: ") && ran.stdout.is_empty(), "{more:?}: {ran:?}");
    }
    for arguments in [&["score"][..], &["score", "--model", MODEL], &["frobnicate"], &["synth"], &["inspect"]] {
        assert_eq!(capsieve(arguments).code, Some(2), "{arguments:?}");
    }
    assert_eq!(names(folder.0.path()), ["in.parquet"]);
}
