//! `capsieve bench`: what it reports is there and can be true. How fast anything is is no test's business.

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{capsieve, picture, shard, write_parquet};

/// A shard of these images, and its name.
fn shard_of(images: &[Vec<u8>]) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<_> =
        images.iter().map(|image| (Some(image.clone()), Some("a picture of a dog".to_owned()))).collect();
    let path = folder.path().join("in.parquet");
    write_parquet(&path, &shard(&rows), 1000);
    (folder, path.display().to_string())
}

fn images(count: u64) -> Vec<Vec<u8>> {
    (0..count).map(picture).collect()
}

#[test]
fn bench_measures() {
    let arguments = ["bench", "--model", "synthetic:tiny", "--seconds", "0.2", "--captions-per-image", "2"];
    let ran = capsieve(&arguments);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("GFLOP/s") && ran.stdout.contains("peak memory"), "{ran:?}");
    let ran = capsieve(&[&arguments[..], &["--json", "--batch-size", "3"]].concat());
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((report["batch_size"].as_u64(), report["captions"].as_f64()), (Some(3), Some(2.0)));
    for name in ["engine_pairs_per_second", "pipeline_pairs_per_second", "prepare_images_per_second", "load_seconds"] {
        assert!(report[name].as_f64().is_some_and(|value| value > 0.0), "{name}: {report}");
    }
    let idle = report["engine_idle_share"].as_f64().unwrap();
    assert!((0.0..1.0).contains(&idle), "{report}");
    let preparation = &report["preparation"];
    assert!(preparation["rows"].as_u64().unwrap() >= 32 && preparation["failed"] == 0, "{report}");
    assert!(preparation["input"].is_null() && preparation["image_size"] == 64, "{report}");
    // The operations' multiply-adds are the model's, and no faster than the device can be.
    let number = |value: &Value, name: &str| value[name].as_f64().unwrap();
    let stages = report["stages"].as_array().unwrap();
    let operations: f64 = stages.iter().map(|s| number(s, "gflops") * number(s, "milliseconds") / 1e3).sum();
    let pass = 6.0 / number(&report, "engine_pairs_per_second") * number(&report, "engine_gflops");
    assert!((operations / pass - 1.0).abs() < 0.001, "{operations} GFLOP in operations, {pass} in a pass");
    assert!(stages.iter().all(|s| number(s, "gflops") < 1.5 * number(&report, "ceiling_gflops")), "{report}");
}

/// Multiply-adds times two of a pass over `images` images with `captions` captions of `tokens` tokens each, both heads: by hand, for
/// the tiny model.
fn operations(images: f64, captions: f64, tokens: f64) -> f64 {
    let (width, between, layers, patches) = (64.0, 128.0, 2.0, 16.0);
    let (patch, image_tokens, projection) = (3.0 * 16.0 * 16.0, 17.0, 32.0);
    let layer = image_tokens * width * (4.0 * width + 2.0 * between) + 2.0 * image_tokens * image_tokens * width;
    let keys_and_values = image_tokens * width * 2.0 * width;
    let image = patches * width * patch + layers * (layer + keys_and_values) + width * projection;
    let own = 4.0 * width * width + 2.0 * width * between + 2.0 * tokens * width;
    let to_image = 2.0 * width * width + 2.0 * image_tokens * width;
    let caption = tokens * layers * (2.0 * own + to_image) + width * (projection + 2.0);
    2.0 * images * (image + captions * caption)
}

#[test]
fn bench_counts_what_is_done() {
    // So many captions that keys and values of the images are worth their making.
    let ran = capsieve(&[
        "bench",
        "--model",
        "synthetic:tiny",
        "--seconds",
        "0.1",
        "--captions-per-image",
        "12",
        "--batch-size",
        "2",
        "--json",
    ]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let number = |name: &str| report[name].as_f64().unwrap();
    let of_a_pair = number("engine_gflops") * 1e9 / number("engine_pairs_per_second");
    let want = operations(1.0, number("captions"), number("tokens")) / number("captions");
    // Captions differ in length, and attention grows with its square; a caption that comes twice is done once.
    assert!((of_a_pair / want - 1.0).abs() < 0.03, "{of_a_pair} operations a pair, {want} by hand");
}

#[test]
fn bench_takes_a_shard_of_the_users() {
    let (folder, input) = shard_of(&images(40));
    let bench = |more: &[&str]| capsieve(&[&["bench", "--model", "synthetic:tiny", "--seconds", "0.1"], more].concat());
    let ran = bench(&["--input", &input, "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(report["preparation"]["input"] == input.as_str() && report["captions"] == 1.0, "{report}");
    assert!(report["pipeline_pairs_per_second"].as_f64().unwrap() > 0.0, "{report}");
    // Alone: whole chunks of the shard, again and again, on so many threads.
    let ran = bench(&["--input", &input, "--prepare-only", "--threads", "3", "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(report["rows"].as_u64().unwrap() > 40 && report["failed"] == 0 && report["threads"] == 3, "{report}");
    let (rate, core) = (report["rows_per_second"].as_f64().unwrap(), report["rows_per_second_per_core"].as_f64());
    assert!(rate > 0.0 && report["engine_gflops"].is_null(), "{report}");
    assert!(cfg!(not(target_os = "linux")) || core.is_some_and(|core| core > 0.0), "{report}");
    let ran = bench(&["--input", &input, "--prepare-only"]);
    assert!(ran.stdout.contains("rows/s to 64 px alone with"), "{ran:?}");
    for (arguments, code, words) in [
        (
            vec!["--input", &folder.path().join("nothing.parquet").display().to_string()],
            1,
            "nothing.parquet does not exist",
        ),
        (vec!["--input", &input, "--caption-column", "texts"], 1, "texts"),
        (vec!["--input", &input, "--captions-per-image", "2"], 2, "--captions-per-image"),
    ] {
        let ran = bench(&arguments);
        assert!(ran.code == Some(code) && ran.stderr.contains(words), "{ran:?}");
    }
}

#[test]
fn bench_says_what_a_shard_lacks() {
    let bad = vec![b"no image".to_vec(); 8];
    for (images, words) in [(Vec::new(), "no rows"), (bad, "no row that can be scored")] {
        let (_folder, input) = shard_of(&images);
        let ran = capsieve(&["bench", "--model", "synthetic:tiny", "--seconds", "0.1", "--input", &input]);
        assert!(ran.code == Some(1) && ran.stderr.contains(words) && ran.stderr.contains("in.parquet"), "{ran:?}");
    }
}
