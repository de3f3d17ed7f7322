//! The bundled model on the bundled shard: transformers' scores, and noise that is really found.

use std::collections::HashMap;

use arrow::array::AsArray;
use capsieve_engine::Precision;
use capsieve_engine::testing::Isa;
use capsieve_worker::{DemoReport, Progress, roc_auc};

use crate::support::{floats, program, read_parquet, run};

/// Probability; measured 2.1e-7 against transformers in float32.
const PROBABILITY_TOLERANCE: f32 = 5e-5;
/// Cosine; measured 4.2e-7.
const COSINE_TOLERANCE: f32 = 1e-5;
/// ROC AUC of the matching head; measured 0.9951.
const ITM_AUC_MIN: f64 = 0.97;

fn demo() -> (tempfile::TempDir, DemoReport) {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let report = runtime.block_on(capsieve_worker::demo(folder.path(), 2, &Progress::default())).unwrap();
    (folder, report)
}

#[test]
fn demo_scores_equal_transformers_and_find_the_noise() {
    let (_folder, report) = demo();
    let expected = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/expected.json")).unwrap();
    let expected: Vec<serde_json::Value> = serde_json::from_slice(&expected).unwrap();
    let number = |row: &serde_json::Value, key: &str| row[key].as_f64().unwrap() as f32;
    let want: HashMap<&str, _> = expected.iter().map(|row| (row["key"].as_str().unwrap(), row)).collect();
    assert!(report.rows.len() >= 256 && report.rows.len() == want.len());
    let (mut itm, mut cosine) = (0.0_f32, 0.0_f32);
    for row in &report.rows {
        let want = want[row.key.as_str()];
        itm = itm.max((row.itm - number(want, "itm_score")).abs());
        cosine = cosine.max((row.cosine - number(want, "cosine_score")).abs());
    }
    println!("probability {itm:.1e}, cosine {cosine:.1e}");
    assert!(itm <= PROBABILITY_TOLERANCE, "probability off by {itm:e}");
    assert!(cosine <= COSINE_TOLERANCE, "cosine off by {cosine:e}");
    let noisy = report.rows.iter().filter(|row| !row.is_match).count();
    assert!(noisy * 4 >= report.rows.len() && noisy * 2 <= report.rows.len(), "about a third is noise: {noisy}");
    let all = &report.noise[0];
    assert!(all.itm_auc.unwrap() >= ITM_AUC_MIN, "ITM AUC {:?}", all.itm_auc);
    assert!(report.noise.len() > 4, "several kinds of noise");
}

/// Share of the decisions at 0.5 that differ from those in f32, at most; measured 0 in both.
const FLIPS_MAX: [(Precision, f64); 2] = [(Precision::Bf16, 0.005), (Precision::Int8, 0.02)];
/// Difference of the ROC AUC; measured 1e-4.
const AUC_TOLERANCE: f64 = 0.01;

/// What is scored by an instruction set in a precision, in the shard's order, and whether the captions match.
fn scored(isa: Isa, precision: Precision) -> (Vec<f32>, Vec<bool>) {
    let folder = tempfile::tempdir().unwrap();
    let (root, output) = (concat!(env!("CARGO_MANIFEST_DIR"), "/demo"), folder.path().join("scored.parquet"));
    let mut command = program();
    command.args(["score", "--model", &format!("{root}/model"), "--input", &format!("{root}/shard.parquet")]);
    command.args(["--precision", precision.name(), "--output"]).arg(&output).env("CAPSIEVE_CPU_ISA", isa.name());
    let ran = run(&mut command);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let rows = read_parquet(&output);
    let itm: Vec<f32> = floats(&rows, "itm_score").into_iter().flatten().collect();
    let matches: Vec<bool> = rows.column_by_name("is_match").unwrap().as_boolean().iter().flatten().collect();
    assert!(itm.len() >= 256 && itm.len() == matches.len());
    (itm, matches)
}

#[test]
fn fewer_bits_decide_as_f32_does() {
    let (exact, matches) = scored(Isa::available()[0], Precision::F32);
    let auc = roc_auc(&exact, &matches).unwrap();
    for (precision, flips_max) in FLIPS_MAX {
        for isa in Isa::available_for(precision) {
            let (itm, _) = scored(isa, precision);
            let flips = itm.iter().zip(&exact).filter(|(a, b)| (**a >= 0.5) != (**b >= 0.5)).count();
            let moved = itm.iter().zip(&exact).map(|(a, b)| (a - b).abs());
            let (mean, most) = (moved.clone().sum::<f32>() / itm.len() as f32, moved.fold(0.0, f32::max));
            let change = roc_auc(&itm, &matches).unwrap() - auc;
            let name = format!("{} {}", isa.name(), precision.name());
            println!("{name}: {flips} flips, ITM {mean:.4} and {most:.4}, AUC {change:+.5}");
            assert!(itm.iter().all(|score| score.is_finite()), "{name}");
            assert!(flips as f64 <= flips_max * itm.len() as f64, "{name}: {flips} flips");
            assert!(change.abs() <= AUC_TOLERANCE, "{name}: {change}");
        }
    }
}
