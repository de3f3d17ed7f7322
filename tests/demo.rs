//! The bundled model on the bundled shard: transformers' scores, and noise that is really found.

use std::collections::HashMap;

use capsieve_worker::{DemoReport, Progress};

/// Probability; measured 2.1e-7 against transformers in float32.
const PROBABILITY_TOLERANCE: f32 = 5e-5;
/// Cosine; measured 4.2e-7.
const COSINE_TOLERANCE: f32 = 1e-5;
/// ROC AUC of the matching head; measured 0.9951.
const ITM_AUC_MIN: f64 = 0.97;

fn run() -> (tempfile::TempDir, DemoReport) {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let report = runtime.block_on(capsieve_worker::demo(folder.path(), 2, &Progress::default())).unwrap();
    (folder, report)
}

#[test]
fn demo_scores_equal_transformers_and_find_the_noise() {
    let (_folder, report) = run();
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
