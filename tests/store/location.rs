//! URIs: what they name, what they refuse, and when two of them are one object.

use std::sync::Arc;

use capsieve_store::{
    Access, Error, FoundStats, Location, is_below, read_stats, remove_stats, stats_location, write_stats,
};
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use object_store::path::Path;

use super::{at, listed, wait};

fn whole(location: &Location, limit: u64) -> capsieve_store::Result<bytes::Bytes> {
    wait(async { location.get(&location.head_within(limit).await?).await })
}

#[test]
fn spellings_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a b%20ü.parquet");
    std::fs::write(&file, b"12345").unwrap();
    let plain = Location::parse(file.to_str().unwrap()).unwrap();
    let uri = format!("file://{}/a%20b%2520%C3%BC.parquet", folder.path().display());
    let dotted = format!("{}/./x/../a b%20ü.parquet", folder.path().display());
    std::fs::create_dir(folder.path().join("x")).unwrap();
    for spelling in [uri.as_str(), dotted.as_str()] {
        let other = Location::parse(spelling).unwrap();
        assert!(plain.same_object(&other), "{spelling}");
        assert_eq!(other.to_string(), spelling);
        assert_eq!(whole(&other, 5).unwrap(), "12345");
    }
    let info = wait(plain.head()).unwrap();
    assert_eq!(info.size, 5);
    assert!(info.e_tag.is_some() && info.modified.elapsed().unwrap().as_secs() < 3600);
    assert!(matches!(whole(&plain, 4), Err(Error::TooLarge { size: 5, limit: 4, .. })));
    assert_eq!(plain.file_name(), "a b%20ü.parquet");
}

#[test]
fn relative_paths_count_from_the_working_directory() {
    let here = Location::parse("Cargo.toml").unwrap();
    let full = std::env::current_dir().unwrap().join("Cargo.toml");
    assert!(here.same_object(&Location::parse(full.to_str().unwrap()).unwrap()));
    assert_eq!(here.to_string(), "Cargo.toml");
    assert!(wait(here.exists()).unwrap());
}

#[cfg(unix)]
#[test]
fn links_lead_to_the_same_object() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path();
    std::fs::create_dir(base.join("real")).unwrap();
    std::fs::write(base.join("real/a.parquet"), b"x").unwrap();
    std::fs::write(base.join("real/b.parquet"), b"x").unwrap();
    std::os::unix::fs::symlink(base.join("real"), base.join("folder")).unwrap();
    std::os::unix::fs::symlink(base.join("real/a.parquet"), base.join("link.parquet")).unwrap();
    std::fs::hard_link(base.join("real/a.parquet"), base.join("hard.parquet")).unwrap();
    let real = at(base, "real/a.parquet");
    for same in ["folder/a.parquet", "link.parquet", "hard.parquet", "real/../real/a.parquet"] {
        assert!(real.same_object(&at(base, same)), "{same}");
    }
    for other in ["real/b.parquet", "real/none.parquet"] {
        assert!(!real.same_object(&at(base, other)), "{other}");
    }
    let identity = |name: &str| at(base, name).identity();
    assert_eq!(identity("link.parquet"), identity("real/./a.parquet"));
    assert_ne!(identity("real/a.parquet"), identity("real/b.parquet"));
    assert_eq!(identity("real/b.parquet"), at(base, "folder/any").folder_identity() + "b.parquet");
    let object = |uri: &str| Location::parse(uri).unwrap();
    for (any, name) in [
        ("http://host/any", "b.parquet"),
        ("http://host/a/any", "c/b.parquet"),
        ("http://host/a%20b/any", "\u{fc}.parquet"),
    ] {
        let uri = any.replace("any", name);
        assert_eq!(object(&uri).identity(), object(any).folder_identity() + name, "{uri}");
    }
    assert_eq!(identity("folder/new.parquet"), identity("real/new.parquet"));
    // A folder that is missing below a link to one that is there.
    let (below, real) = (base.join("folder/x/y/"), base.join("real/"));
    assert!(is_below(below.to_str().unwrap(), real.to_str().unwrap()));
    assert_eq!(identity("folder/x/y/new.parquet"), identity("real/x/y/new.parquet"));
    // Neither exists, the folder behind both is one.
    assert!(at(base, "folder/new.parquet").same_object(&at(base, "real/new.parquet")));
}

#[test]
fn what_cannot_be_a_shard_is_refused() {
    let odd = [
        "s3://b/a?x",
        "s3://b/a#x",
        "https://user:password@host/a.parquet",
        "s3://b/a/../c.parquet",
        "s3:///a.parquet",
    ];
    for uri in ["", "sftp://host/a", "hf://b/a", "file://relative.parquet", "a.parquet#12"].into_iter().chain(odd) {
        assert!(matches!(Location::parse(uri), Err(Error::Uri { .. })), "{uri}");
    }
    for uri in ["/", "data/", "file:///data/", "s3://bucket/", "s3://bucket/data/", "https://host/"] {
        assert!(matches!(Location::parse(uri), Err(Error::Folder { .. })), "{uri}");
    }
    let folder = tempfile::tempdir().unwrap();
    let location = Location::parse(folder.path().to_str().unwrap()).unwrap();
    assert!(matches!(wait(location.head()), Err(Error::Folder { .. })));
    let missing = at(folder.path(), "none.parquet");
    assert!(!wait(missing.exists()).unwrap());
    let error = wait(missing.head()).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }));
    assert_eq!(error.to_string(), format!("{missing} does not exist"));
    // A file where a folder should be is an absence too, not a crash.
    std::fs::write(folder.path().join("file"), b"").unwrap();
    assert!(wait(at(folder.path(), "file/a.parquet").head()).is_err());
}

#[test]
fn errors_tell_no_secrets() {
    for uri in ["https://me:s3cret@host/a.parquet", "https://s3cret@host/a.parquet", "https://host/a.jpg?sig=s3cret"] {
        let error = Location::parse(uri).unwrap_err().to_string();
        assert!(error.contains("host/a.") && !error.contains("s3cret"), "{error}");
    }
}

#[test]
fn a_bucket_is_open_below_its_prefix_only() {
    let access = Access::only(&["s3://data/in/".to_owned()]).unwrap();
    assert!(!access.is_nothing());
    for uri in ["s3://data/in/a.parquet", "s3://data/in/b/c%20d.parquet"] {
        assert_eq!(access.open(uri).unwrap_or_else(|error| panic!("{error}")).to_string(), uri);
    }
    for uri in [
        "s3://data/a.parquet",
        "s3://data/inner/a.parquet",
        "s3://data/in%2Fa/../../b.parquet",
        "s3://data/in/%2e%2e/a.parquet",
        "s3://data-x/in/a.parquet",
        "s3://other/in/a.parquet",
        "s3a://data/in/a.parquet",
        "gs://data/in/a.parquet",
        "az://box@other/a.parquet",
        "http://data/in/a.parquet",
        "/data/in/a.parquet",
    ] {
        let error = access.open(uri).unwrap_err();
        assert!(matches!(error, Error::NotAllowed { .. } | Error::Uri { .. }), "{uri}: {error}");
    }
    let inside = access.open("s3://data/in/a.parquet").unwrap();
    assert_eq!(access.resolve(Some(&inside), "images/1.jpg").unwrap().to_string(), "images/1.jpg");
    assert!(access.resolve(Some(&inside), "https://host/1.jpg").is_err(), "no web server is open");
    for prefix in ["http://host/", "https://host/data/", "s3://"] {
        assert!(Access::only(&[prefix.to_owned()]).is_err(), "{prefix}");
    }
}

#[test]
fn siblings_and_references() {
    let shard = Location::parse("data/00000.parquet").unwrap();
    assert_eq!(shard.sibling("x.json").to_string(), "data/x.json");
    assert_eq!(Location::parse("00000.parquet").unwrap().sibling("x").to_string(), "x");
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("images")).unwrap();
    std::fs::write(folder.path().join("images/1.jpg"), b"one").unwrap();
    let shard = at(folder.path(), "00000.parquet");
    let absolute = folder.path().join("images/1.jpg");
    let uri = format!("file://{}", absolute.display());
    for reference in ["images/1.jpg", "./images/1.jpg", absolute.to_str().unwrap(), &uri] {
        assert_eq!(whole(&shard.resolve(reference).unwrap(), 10).unwrap(), "one", "{reference}");
    }
    assert_eq!(shard.resolve("https://host/1.jpg").unwrap().to_string(), "https://host/1.jpg");
    assert!(shard.resolve("").is_err());
}

#[test]
fn stores_that_are_not_files_work_alike() {
    let store = Arc::new(InMemory::new());
    let shard = Location::in_store(Arc::clone(&store) as _, Path::from("data/0.parquet"), "memory://data/0.parquet");
    wait(shard.put(bytes::Bytes::from_static(b"abc"))).unwrap();
    assert_eq!(whole(&shard, 3).unwrap(), "abc");
    assert_eq!(shard.sibling("1.parquet").to_string(), "memory://data/1.parquet");
    let odd = Path::parse("data/\u{fc}%20{a}.parquet").unwrap();
    let statistics = stats_location(&Location::in_store(Arc::clone(&store) as _, odd, "memory://data/odd"));
    wait(statistics.put(bytes::Bytes::from_static(b"{}"))).unwrap();
    let found = wait(store.head(&Path::parse("data/\u{fc}%20{a}.stats.json").unwrap()));
    assert!(found.is_ok(), "names stay as they are: {found:?}");
    wait(shard.sibling("1.jpg").put(bytes::Bytes::from_static(b"jpg"))).unwrap();
    assert_eq!(whole(&shard.resolve("1.jpg").unwrap(), 3).unwrap(), "jpg");
    assert!(shard.same_object(&shard.sibling("0.parquet")));
    wait(shard.delete()).unwrap();
    assert!(!wait(shard.exists()).unwrap());
}

#[test]
fn statistics_lie_beside_the_shard() {
    let folder = tempfile::tempdir().unwrap();
    let shard = at(folder.path(), "00000.parquet");
    for rows in [1, 2] {
        let location = wait(write_stats(&shard, &serde_json::json!({ "rows": rows }))).unwrap();
        assert_eq!(location.file_name(), "00000.stats.json");
        let read: serde_json::Value = serde_json::from_slice(&whole(&location, 1000).unwrap()).unwrap();
        assert_eq!(read["rows"], rows);
    }
    assert_eq!(listed(folder.path()), ["00000.stats.json"]);
    assert_eq!(stats_location(&at(folder.path(), "scored")).file_name(), "scored.stats.json");
    let missing = at(folder.path(), "none/0.parquet");
    assert!(matches!(wait(write_stats(&missing, &1)), Err(Error::NoFolder { .. })));
}

#[cfg(unix)]
#[test]
fn links_that_lead_to_each_other_lead_to_nothing() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("b", folder.path().join("a")).unwrap();
    std::os::unix::fs::symlink("a", folder.path().join("b")).unwrap();
    for name in ["a", "a/x.parquet"] {
        let error = wait(at(folder.path(), name).head()).unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{name}: {error:?}");
    }
}

#[test]
fn only_statistics_of_ours_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let shard = at(folder.path(), "a.parquet");
    let stats = folder.path().join("a.stats.json");
    assert_eq!(wait(read_stats(&shard)).unwrap(), FoundStats::Absent);
    let ours = r#"{ "version": "0.1.0", "input": "a", "output": "b", "rows": 1 }"#;
    std::fs::write(&stats, ours).unwrap();
    assert_eq!(wait(read_stats(&shard)).unwrap(), FoundStats::Ours(ours.into()));
    let is_foreign = |what: &str| {
        let found = wait(read_stats(&shard)).unwrap();
        assert!(matches!(&found, FoundStats::Foreign(uri) if uri.ends_with("/a.stats.json")), "{what}: {found:?}");
    };
    let long = format!("{}{ours}", " ".repeat(2 << 20));
    let broken = ["mine", "", "[1]", r#"{ "version": "0.1.0", "rows": 1 }"#, r#"{ "version": 1, "input": [] }"#];
    for foreign in broken.into_iter().chain([&*long]) {
        std::fs::write(&stats, foreign).unwrap();
        is_foreign(&foreign[..foreign.len().min(100)]);
    }
    wait(remove_stats(&shard)).unwrap();
    wait(remove_stats(&shard)).unwrap();
    std::fs::create_dir(&stats).unwrap();
    is_foreign("a folder");
}
