//! What a program can check of the rules in CONTRIBUTING.md: crate walls, file and function sizes, `unsafe`, leftovers.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Lines of a source file at most: a reader should see what belongs in it.
const FILE_LINES_MAX: usize = 450;
/// Lines of a function at most.
const FUNCTION_LINES_MAX: usize = 70;

/// Which of our crates each may depend on; the root package is the command line.
const WALLS: [(&str, &[&str]); 6] = [
    ("capsieve", &["capsieve-rpc", "capsieve-worker"]),
    ("capsieve-rpc", &["capsieve-worker"]),
    ("capsieve-worker", &["capsieve-engine", "capsieve-prep", "capsieve-store"]),
    ("capsieve-engine", &[]),
    ("capsieve-prep", &[]),
    ("capsieve-store", &[]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut folders = vec![root().join("crates"), root().join("tests"), root().join("benches"), root().join("demo")];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs" || e == "py") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    assert!(found.len() > 20, "the sources are where this test looks");
    found
}

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO")).args(arguments).arg("--offline").current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Names in the dependency tree of a package, itself excluded.
fn tree(package: &str, depth: &str) -> Vec<String> {
    let arguments = ["tree", "-p", package, "-e", "normal,build", "--prefix", "none", "--depth", depth];
    let text = cargo(&arguments);
    let name = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    text.lines().skip(1).map(name).filter(|name| !name.is_empty()).collect()
}

#[test]
fn crates_see_only_what_they_may() {
    for (package, allowed) in WALLS {
        let ours: Vec<String> = tree(package, "1").into_iter().filter(|name| name.starts_with("capsieve")).collect();
        let mut want: Vec<&str> = allowed.to_vec();
        want.sort_unstable();
        let mut ours: Vec<&str> = ours.iter().map(String::as_str).collect();
        ours.sort_unstable();
        ours.dedup();
        assert_eq!(ours, want, "{package} depends on these crates of ours");
    }
}

#[test]
fn engine_and_prep_have_no_async_runtime_and_no_network() {
    for package in ["capsieve-engine", "capsieve-prep"] {
        for banned in ["tokio", "reqwest", "hyper", "object_store", "parquet", "tonic"] {
            assert!(!tree(package, "99").iter().any(|name| name == banned), "{package} must not see {banned}");
        }
    }
}

#[test]
fn only_the_edge_speaks_grpc() {
    for package in ["capsieve-worker", "capsieve-store"] {
        assert!(!tree(package, "99").iter().any(|name| name == "tonic"), "{package} must not see tonic");
    }
}

#[test]
fn unsafe_stays_in_the_engine() {
    for (path, text) in sources() {
        let rust = path.extension().is_some_and(|e| e == "rs");
        if !rust || path.starts_with("crates/engine") || path.ends_with("tidy.rs") {
            continue;
        }
        assert!(!text.contains("unsafe {") && !text.contains("unsafe fn"), "{} has unsafe code", path.display());
        if path.ends_with("lib.rs") {
            assert!(text.contains("#![forbid(unsafe_code)]"), "{} forbids unsafe code", path.display());
        }
    }
}

#[test]
fn files_are_short_and_say_what_they_own() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= FILE_LINES_MAX, "{} has {lines} lines", path.display());
        let opening = if path.extension().is_some_and(|e| e == "py") { "\"\"\"" } else { "//! " };
        assert!(text.starts_with(opening), "{} begins with what it is for", path.display());
    }
}

#[test]
fn functions_fit_a_screen() {
    for (path, text) in sources().into_iter().filter(|(path, _)| path.extension().is_some_and(|e| e == "rs")) {
        let mut open: Option<(usize, usize, String)> = None;
        for (number, line) in text.lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let words = line.trim_start();
            let starts = words.starts_with("fn ") || words.starts_with("pub ") && words.contains(" fn ");
            if starts && words.contains('(') {
                open = Some((number, indent, words.to_owned()));
            }
            if let Some((first, depth, name)) = &open
                && words == "}"
                && indent == *depth
            {
                let length = number - first + 1;
                assert!(length <= FUNCTION_LINES_MAX, "{}: {name} has {length} lines", path.display());
                open = None;
            }
        }
    }
}

#[test]
fn nothing_is_left_over() {
    for (path, text) in sources().into_iter().filter(|(path, _)| !path.ends_with("tidy.rs")) {
        for leftover in ["todo!", "unimplemented!", "FIXME", "XXX", "dbg!("] {
            assert!(!text.contains(leftover), "{} contains {leftover}", path.display());
        }
    }
}
