//! Models of buckets: fetched once, anew when they are replaced, and never half.

use std::path::Path as FsPath;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use capsieve_store::{Error, FileProgress, Location, fetch_stored_model};
use object_store::memory::InMemory;
use object_store::path::Path;

use super::{listed, wait};

/// A model in a bucket.
fn model(files: &[File<'_>]) -> Location {
    let config = Location::in_store(Arc::new(InMemory::new()), Path::from("m/config.json"), "memory://m/config.json");
    files.iter().for_each(|(name, bytes)| put(&config, name, bytes));
    config
}

fn put(config: &Location, name: &str, bytes: &[u8]) {
    wait(config.sibling(name).put(Bytes::copy_from_slice(bytes))).unwrap();
}

fn fetch(cache: &FsPath, config: &Location) -> Result<(std::path::PathBuf, Vec<String>), Error> {
    let fetched = std::sync::Mutex::new(Vec::new());
    let progress = |progress: FileProgress| {
        if progress.bytes == progress.bytes_total {
            fetched.lock().unwrap().push(progress.file);
        }
    };
    let folder = wait(fetch_stored_model(cache, config, progress))?;
    Ok((folder, fetched.into_inner().unwrap()))
}

/// Name and content.
type File<'a> = (&'a str, &'a [u8]);

const CONFIG: File<'_> = ("config.json", b"{}");

#[test]
fn a_model_is_fetched_once_and_a_replaced_one_anew() {
    let cache = tempfile::tempdir().unwrap();
    let weights: Vec<u8> = (0..40_000_000_u32).map(|byte| byte as u8).collect();
    let other = ("pytorch_model.bin", b"not wanted".as_slice());
    let config = model(&[CONFIG, ("vocab.txt", b"a"), ("model.safetensors", &weights), other]);
    let (folder, fetched) = fetch(cache.path(), &config).unwrap();
    assert_eq!(fetched, ["config.json", "vocab.txt", "model.safetensors"]);
    assert_eq!(listed(&folder), ["config.json", "model.safetensors", "vocab.txt"]);
    assert!(std::fs::read(folder.join("model.safetensors")).unwrap() == weights, "pieces in their order");
    assert_eq!(fetch(cache.path(), &config).unwrap(), (folder.clone(), Vec::new()), "nothing is fetched again");
    // What is not whole is fetched again, and nothing else.
    std::fs::write(folder.join("vocab.txt"), b"").unwrap();
    assert_eq!(fetch(cache.path(), &config).unwrap(), (folder.clone(), vec!["vocab.txt".to_owned()]));
    // The same size: another version all the same.
    put(&config, "config.json", b"[]");
    let (new, fetched) = fetch(cache.path(), &config).unwrap();
    assert_eq!(fetched.len(), 3);
    assert_ne!(new, folder);
    assert_eq!(std::fs::read(new.join("config.json")).unwrap(), b"[]");
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{}", "who uses the old one keeps it");
}

#[test]
fn weights_in_every_layout() {
    let index = br#"{"weight_map": {"a": "w-2.safetensors", "b": "w-1.safetensors", "c": "w-2.safetensors"}}"#;
    let sharded =
        [("w-1.safetensors", b"1".as_slice()), ("w-2.safetensors", b"2"), ("model.safetensors.index.json", index)];
    for (files, expected) in [
        (&sharded[..], vec!["config.json", "model.safetensors.index.json", "w-1.safetensors", "w-2.safetensors"]),
        (&[("pytorch_model.bin", b"p".as_slice())], vec!["config.json", "pytorch_model.bin"]),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let config = model(&[&[CONFIG], files].concat());
        let (folder, _) = fetch(cache.path(), &config).unwrap();
        assert_eq!(listed(&folder), expected);
    }
}

#[test]
fn what_is_no_model_is_named() {
    let index = |name: &str| format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#).into_bytes();
    let (absent, outside) = (index("w.safetensors"), index("../w.safetensors"));
    let list = "model.safetensors.index.json";
    let cases: [(&[File<'_>], &str); 5] = [
        (&[], "config.json"),
        (&[CONFIG], "pytorch_model.bin"),
        (&[CONFIG, (list, &absent)], "w.safetensors"),
        (&[CONFIG, (list, &outside)], "no usable weight file \"../w.safetensors\""),
        (&[CONFIG, (list, b"{")], "does not say which weight files"),
    ];
    for (files, words) in cases {
        let cache = tempfile::tempdir().unwrap();
        let error = fetch(cache.path(), &model(files)).unwrap_err().to_string();
        assert!(error.starts_with("memory://m/") && error.contains(words), "{error}");
        assert!(listed(cache.path()).is_empty(), "nothing is begun");
    }
    let cache = tempfile::tempdir().unwrap();
    let file = cache.path().join("file");
    std::fs::write(&file, b"not a folder").unwrap();
    let error = fetch(&file, &model(&[CONFIG, ("model.safetensors", b"w")])).unwrap_err();
    assert!(matches!(error, Error::ModelCache { .. }) && error.to_string().contains("XDG_CACHE_HOME"), "{error}");
}

#[test]
fn a_model_that_is_replaced_meanwhile_is_no_mix() {
    let cache = tempfile::tempdir().unwrap();
    let config = model(&[CONFIG, ("vocab.txt", b"a"), ("model.safetensors", b"old weights")]);
    // Once the first file is here, the last one, which was looked at, is another one; or the first.
    for name in ["model.safetensors", "config.json"] {
        let times = AtomicUsize::new(0);
        let progress = |_: FileProgress| {
            if times.fetch_add(1, Ordering::Relaxed) == 0 {
                // The store is in memory: its futures are ready at once.
                let put = config.sibling(name);
                futures::executor::block_on(put.put(Bytes::from_static(b"new content"))).unwrap();
            }
        };
        let error = wait(fetch_stored_model(cache.path(), &config, progress)).unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{name}: {error}");
    }
    let (folder, _) = fetch(cache.path(), &config).unwrap();
    for name in ["model.safetensors", "config.json"] {
        assert_eq!(std::fs::read(folder.join(name)).unwrap(), b"new content");
    }
}

#[test]
fn several_at_once_agree() {
    let cache = tempfile::tempdir().unwrap();
    let weights = vec![7; 20_000_000];
    let config = model(&[CONFIG, ("model.safetensors", &weights)]);
    let found: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| fetch(cache.path(), &config).unwrap().0)).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert!(found.iter().all(|folder| *folder == found[0]));
    assert_eq!(listed(&found[0]), ["config.json", "model.safetensors"], "and leave nothing else");
    assert!(std::fs::read(found[0].join("model.safetensors")).unwrap() == weights);
}

#[test]
fn what_a_killed_process_left_goes_when_it_is_old() {
    let cache = tempfile::tempdir().unwrap();
    let config = model(&[CONFIG, ("model.safetensors", b"w")]);
    let (folder, _) = fetch(cache.path(), &config).unwrap();
    for (name, hours) in [("model.safetensors#1", 25), ("config.json#2", 1)] {
        std::fs::write(folder.join(name), b"half").unwrap();
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(hours * 3600);
        std::fs::File::options().write(true).open(folder.join(name)).unwrap().set_modified(time).unwrap();
    }
    fetch(cache.path(), &config).unwrap();
    assert_eq!(listed(&folder), ["config.json", "config.json#2", "model.safetensors"]);
}
