//! The code that talks to a card, without one: the program runs against `kernels/emulator/driver.cpp`, built here as
//! libcuda.so.1 and libcublasLt.so.13. What a card may refuse or lose, and what users then get.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use arrow::array::RecordBatch;
use tempfile::TempDir;

use crate::support::{Ran, floats, names, picture, program, read_parquet, run, shard, texts, write_parquet};

const MODEL: &str = "synthetic:tiny";
/// Largest difference of a score to the CPU's; measured 3.0e-7 in f32, 1.1e-3 in f16.
const F32_TOLERANCE: f32 = 5e-6;
const F16_TOLERANCE: f32 = 4e-3;

/// The folder of the two libraries.
fn libraries() -> &'static Path {
    static BUILT: OnceLock<TempDir> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let home = std::env::var_os("CUDA_HOME").map_or_else(|| root.join(".cuda/nvidia/cu13"), PathBuf::from);
        let (kernels, emulator) = (root.join("kernels"), root.join("kernels/emulator"));
        let mut command = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "g++".into()));
        command.args(["-shared", "-fPIC", "-O2", "-std=c++17", "-w", "-fvisibility=hidden", "-isystem"]);
        command.arg(home.join("include")).arg("-include").arg(emulator.join("emu.h")).arg("-xc++");
        for (from, extension) in [(&kernels, "cu"), (&emulator, "cpp")] {
            let files = std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path());
            command.args(files.filter(|path| path.extension().is_some_and(|e| e == extension)));
        }
        let done = command.arg("-o").arg(folder.path().join("libcuda.so.1")).status().unwrap();
        assert!(done.success(), "the emulated driver compiles");
        std::os::unix::fs::symlink("libcuda.so.1", folder.path().join("libcublasLt.so.13")).unwrap();
        folder
    });
    built.path()
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let captions = ["a dog", "a cat on a mat", "", "two red cubes left of a green ball"];
        let row = |i: u64| (Some(picture(i)), Some(captions[i as usize % captions.len()]));
        let rows: Vec<_> = (0..9).map(row).collect();
        write_parquet(&folder.0.path().join("in.parquet"), &shard(&rows), 4);
        folder
    }

    /// Scores the shard in batches of two: more batches of one size than it takes to record and replay one.
    fn score(&self, device: &str, settings: &[(&str, &str)], more: &[&str]) -> Ran {
        let arguments = [&["--model", MODEL, "--device", device, "--batch-size", "2"], more].concat();
        self.score_as(&arguments, settings)
    }

    fn score_as(&self, arguments: &[&str], settings: &[(&str, &str)]) -> Ran {
        let path = |name: &str| self.0.path().join(name).display().to_string();
        let (input, output) = (path("in.parquet"), path("out.parquet"));
        let mut command = program();
        command.args(["score", "--input", &input, "--output", &output, "--overwrite"]).args(arguments);
        self.card(&mut command, settings)
    }

    fn card(&self, command: &mut Command, settings: &[(&str, &str)]) -> Ran {
        let cache = self.0.path().join("cache");
        command.env("LD_LIBRARY_PATH", libraries()).env("XDG_CACHE_HOME", cache).envs(settings.iter().copied());
        run(command)
    }

    fn output(&self) -> RecordBatch {
        read_parquet(&self.0.path().join("out.parquet"))
    }

    fn scores(&self) -> Vec<f32> {
        let batch = self.output();
        let columns = ["itm_score", "cosine_score"].map(|name| floats(&batch, name));
        columns.into_iter().flatten().map(Option::unwrap).collect()
    }

    fn scored(&self, device: &str, settings: &[(&str, &str)], more: &[&str]) -> Vec<f32> {
        let ran = self.score(device, settings, more);
        assert_eq!(ran.code, Some(0), "{device} {settings:?} {more:?}: {ran:?}");
        self.scores()
    }
}

fn assert_near(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    let far: Vec<f32> = got.iter().zip(want).map(|(a, b)| (a - b).abs()).collect();
    println!("{what}: {:.1e}", far.iter().copied().fold(0.0, f32::max));
    assert!(got.len() == want.len() && far.iter().all(|far| *far <= tolerance), "{what}: {got:?}, wanted {want:?}");
}

#[test]
fn a_card_gives_the_processors_scores() {
    let folder = Folder::new();
    let cpu = folder.scored("cpu", &[], &[]);
    for (precision, tolerance) in [("f32", F32_TOLERANCE), ("f16", F16_TOLERANCE)] {
        let more = ["--precision", precision];
        assert_near(&folder.scored("cuda", &[], &more), &cpu, tolerance, precision);
        let two = folder.scored("cuda:0,1", &[("FAKE_CARD_COUNT", "2")], &more);
        assert_near(&two, &cpu, tolerance, "two cards");
        for operations in ["0", "20"] {
            let unrecorded = folder.scored("cuda", &[("FAKE_CARD_RECORDS", operations)], &more);
            assert_near(&unrecorded, &cpu, tolerance, "a card that cannot record");
        }
    }
    // Without a word about precision a card computes in 16 bits, and auto finds it.
    assert_near(&folder.scored("auto", &[], &[]), &cpu, F16_TOLERANCE, "auto");
    let metadata = folder.output().schema().metadata().clone();
    assert!(metadata.values().any(|value| value.contains("f16")), "{metadata:?}");
}

/// What `scripts/gpu-check` runs on a card of single operations, here against the emulated driver.
#[test]
fn operations_on_a_card_equal_naive() {
    for early in ["0", "1"] {
        let mut tests = Command::new(std::env::current_exe().unwrap());
        tests.args(["--ignored", "ops::card::"]).env("FAKE_CARD_EARLY", early);
        let ran = Folder::new().card(&mut tests, &[]);
        assert!(ran.code == Some(0) && !ran.stdout.contains(" 0 passed"), "{}", ran.stdout);
    }
}

#[test]
fn a_card_that_cannot_be_used_is_an_error_or_for_auto_one_line() {
    let folder = Folder::new();
    let cases = [
        ("FAKE_CARD_COUNT", "0", "no card"),
        ("FAKE_CARD_VERSION", "12040", "supports CUDA 12.4, this build needs 13.0: update it"),
        ("FAKE_CARD_COMPUTE", "75", "compute capability 7.5, 8.0 or later"),
        ("FAKE_CUBLAS_VERSION", "120900", "libcublasLt 120900"),
    ];
    for (setting, value, why) in cases {
        let ran = folder.score("cuda", &[(setting, value)], &[]);
        assert_eq!(ran.code, Some(1), "{setting}: {ran:?}");
        assert!(ran.stderr.contains(why) && ran.stderr.contains("--device cpu"), "{setting}: {ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{setting}: {ran:?}");
        let ran = folder.score("auto", &[(setting, value)], &[]);
        assert_eq!(ran.code, Some(0), "{setting}: {ran:?}");
        assert_eq!(ran.stderr.lines().filter(|line| line.contains(why)).count(), 1, "{setting}: {ran:?}");
    }
    let ran = folder.score("cuda:5", &[], &[]);
    assert!(ran.code == Some(1) && ran.stderr.contains("the driver sees 1 card"), "{ran:?}");
}

#[test]
fn a_card_without_memory_takes_smaller_batches_or_says_what_is_needed() {
    let folder = Folder::new();
    let cpu = folder.scored("cpu", &[], &[]);
    let ran = folder.score("cuda", &[("FAKE_CARD_BYTES", "50000000")], &[]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("of memory free, the model needs") && ran.stderr.lines().count() == 1, "{ran:?}");
    // Room for some images, not for all of 512; the tables of captions and cuBLASLt's workspace stay.
    let arguments = ["--model", MODEL, "--device", "cuda", "--precision", "f32", "--batch-size", "512"];
    let ran = folder.score_as(&arguments, &[("FAKE_CARD_BYTES", "140000000")]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains("has memory for batches of"), "{ran:?}");
    assert_near(&folder.scores(), &cpu, F32_TOLERANCE, "smaller batches");
}

#[test]
fn a_card_that_is_lost_ends_the_job_and_leaves_nothing() {
    let folder = Folder::new();
    let cpu = folder.scored("cpu", &[], &[]);
    // After so many launches the job is lost, after so many it is done: by halves to the very last one.
    let (mut lost, mut done) = (0_u32, 4096);
    while done - lost > 1 {
        let launches = if lost == 0 { 30 } else { lost.midpoint(done) };
        for output in names(folder.0.path()).iter().filter(|name| name.contains("out")) {
            std::fs::remove_file(folder.0.path().join(output)).unwrap();
        }
        let ran = folder.score("cuda", &[("FAKE_CARD_LOST_AFTER", &launches.to_string())], &["--precision", "f32"]);
        if ran.code == Some(0) {
            assert_near(&folder.scores(), &cpu, F32_TOLERANCE, "a card lost afterwards");
            done = launches;
            continue;
        }
        assert_eq!(ran.code, Some(1), "after {launches}: {ran:?}");
        assert!(ran.stderr.contains("the emulated card was lost") && !ran.stderr.contains("panicked"), "{ran:?}");
        assert_eq!(names(folder.0.path()).iter().filter(|name| name.contains("out")).count(), 0, "after {launches}");
        lost = launches;
    }
    assert!((31..4096).contains(&done), "{done} launches");
}

/// The residual stream of a damaged or wild model leaves f16: those rows say so, and other precisions score them.
#[test]
fn an_overflow_in_sixteen_bits_is_a_status_and_never_a_score() {
    let folder = Folder::new();
    let model = folder.0.path().join("model");
    let made = run(program().args(["synth", "--size", "tiny", "--out"]).arg(&model));
    assert_eq!(made.code, Some(0), "{made:?}");
    blow_up(&model.join("model.safetensors"), "vision_model.encoder.layers.0.mlp.fc2.weight", 4e5);
    let model = model.display().to_string();
    let score = |precision| folder.score_as(&["--model", &model, "--device", "cuda", "--precision", precision], &[]);
    let ran = score("f16");
    assert_eq!(ran.code, Some(3), "{ran:?}");
    let batch = folder.output();
    assert!(texts(&batch, "score_status").iter().all(|status| status.as_deref() == Some("not_finite")), "{ran:?}");
    assert!(floats(&batch, "itm_score").iter().chain(&floats(&batch, "cosine_score")).all(Option::is_none));
    assert!(texts(&batch, "score_error").iter().all(|why| why.as_ref().is_some_and(|why| why.contains("bf16"))));
    for precision in ["bf16", "f32"] {
        let ran = score(precision);
        assert_eq!(ran.code, Some(0), "{precision}: {ran:?}");
        assert!(folder.scores().iter().all(|score| score.is_finite()));
    }
}

/// Multiplies a float32 tensor of a safetensors file.
fn blow_up(path: &Path, name: &str, factor: f32) {
    let mut bytes = std::fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    assert_eq!(json[name]["dtype"], "F32");
    let offset = |i: usize| 8 + header + json[name]["data_offsets"][i].as_u64().unwrap() as usize;
    for value in bytes[offset(0)..offset(1)].as_chunks_mut::<4>().0 {
        *value = (f32::from_le_bytes(*value) * factor).to_le_bytes();
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn bench_shows_the_cards_ceiling_and_stages() {
    let folder = Folder::new();
    let mut command = program();
    command.args(["bench", "--model", MODEL, "--device", "cuda", "--precision", "f16", "--batch-size", "2"]);
    let ran = folder.card(command.args(["--seconds", "0.2", "--json"]), &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(report["device"].as_str().unwrap().contains("Emulated card") && report["precision"] == "f16", "{report}");
    assert!(report["ceiling_gflops"].as_f64().unwrap() > 0.0 && report["stages"].as_array().unwrap().len() > 8);
}
