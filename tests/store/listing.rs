//! What the URIs of a call name: every shard below a prefix by a URI that leads back to it, or an error.

use std::path::Path;

use capsieve_store::{Access, Error, ListLimits, Listing, Location, Result, below, is_below, is_pattern};

use super::{at, wait};

const LIMITS: ListLimits = ListLimits { shards: 100, name_bytes: 100_000, entries: 1000 };

/// Names that mean something else as a part of a URI, or look as if they did.
const NASTY: [&str; 20] = [
    "x!.parquet",
    "x%21.parquet",
    "x%2521.parquet",
    "h#z.parquet",
    "h#1.parquet",
    "q?r.parquet",
    "sp ace .parquet",
    " first.parquet",
    "ünï-日本.parquet",
    "a%2Fb.parquet",
    "%2e%2e.parquet",
    "dots...parquet",
    "100%.parquet",
    "%zz.parquet",
    "back\\slash.parquet",
    "a;b=c&d+e,f@g:h$i.parquet",
    "[b]{r}|^`\"<>'(s)*.parquet",
    "~home.parquet",
    "file:.parquet",
    "C|.parquet",
];

fn list(access: &Access, limits: ListLimits, uris: &[&str]) -> Result<Vec<Location>> {
    wait(async {
        let mut listing = Listing::new(access.clone(), limits);
        for uri in uris {
            listing = listing.add(uri).await?;
        }
        Ok(listing.into_shards())
    })
}

fn prefix(folder: &Path) -> String {
    format!("{}/", folder.display())
}

fn shard(folder: &Path, name: &str) {
    std::fs::write(folder.join(name), name).unwrap();
}

/// The folder of a test by its real name, and everything in it allowed.
fn folder() -> (tempfile::TempDir, std::path::PathBuf, Access) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    let access = Access::only(&[path.display().to_string()]).unwrap();
    (folder, path, access)
}

#[test]
fn every_listed_uri_leads_back_to_its_file() {
    let (_folder, path, access) = folder();
    for inner in ["", "f%41", "f#1", "g?h", "a b ", "year=2020", "%2e%2e", "x.parquet"] {
        std::fs::create_dir_all(path.join(inner)).unwrap();
        NASTY.iter().for_each(|name| shard(&path.join(inner), name));
    }
    let count = 8 * NASTY.len();
    for prefix in [prefix(&path), format!("file://{}", prefix(&path))] {
        let limits = ListLimits { shards: count, ..LIMITS };
        for access in [&access, &Access::everything()] {
            let shards = list(access, limits, &[&prefix]).unwrap();
            assert_eq!(shards.len(), count);
            for shard in shards {
                let uri = shard.to_string();
                assert!(uri.starts_with(&prefix), "{uri}");
                let again = access.open(&uri).unwrap_or_else(|error| panic!("{uri}: {error}"));
                assert_eq!(again.as_file(), shard.as_file(), "{uri}");
                let bytes = wait(async { again.get(&again.head().await?).await }).unwrap();
                assert_eq!(bytes, shard.file_name(), "{uri}");
                // What lies beside it, and below a prefix of outputs, is named by the same rule.
                let beside = shard.sibling("y%21 #.json");
                assert_eq!(beside.as_file(), Some(&*shard.as_file().unwrap().with_file_name("y%21 #.json")));
                assert_eq!(access.open(&beside.to_string()).unwrap().as_file(), beside.as_file(), "{beside}");
                let output = access.open(&below(&prefix, shard.file_name())).unwrap();
                assert_eq!(output.as_file(), Some(&*path.join(shard.file_name())));
            }
        }
    }
}

#[test]
fn uris_of_files_say_everything_or_nothing() {
    for uri in ["/a?b.parquet", "/a#b.parquet", "/a?/b.parquet", "/a\\b.parquet", "/a%2Fb", "/a%2fb", "/a\nb", "/a "] {
        let error = Location::parse(&format!("file://{uri}")).unwrap_err();
        assert!(matches!(error, Error::Uri { .. }) && error.to_string().contains("%3F"), "{uri}: {error}");
    }
}

#[test]
fn a_prefix_with_a_shard_that_no_uri_can_say_is_refused() {
    let (_folder, path, access) = folder();
    shard(&path, "a.parquet");
    shard(&path, "_b\nc.parquet");
    std::fs::create_dir(path.join("inner")).unwrap();
    let inner = path.join("inner");
    assert_eq!(list(&access, LIMITS, &[&prefix(&path)]).unwrap().len(), 1, "hidden entries are ignored");
    shard(&inner, "b\nc.parquet");
    let error = list(&access, LIMITS, &[&prefix(&path)]).unwrap_err();
    let words = format!(
        "{} holds \"inner/b\\nc.parquet\", which has a name that no URI can say: rename or remove it, or name the \
         shards one by one",
        prefix(&path)
    );
    assert_eq!(error.to_string(), words);
}

#[cfg(unix)]
#[test]
fn a_prefix_with_an_entry_that_is_no_shard_is_refused() {
    use std::os::unix::{ffi::OsStrExt, fs::symlink};
    type Make = fn(&Path);
    let unusable: [(Make, &str, &str); 6] = [
        (|at| std::fs::write(at.join(std::ffi::OsStr::from_bytes(b"b\xFF.parquet")), b"").unwrap(), "b\\xFF", "a name"),
        (
            |at| {
                let inner = at.join(std::ffi::OsStr::from_bytes(b"b\xFF"));
                std::fs::create_dir(&inner).unwrap();
                std::fs::write(inner.join("b.parquet"), b"").unwrap();
            },
            "b\\xFF/b.parquet",
            "a name",
        ),
        (|at| symlink("none", at.join("b.parquet")).unwrap(), "b.parquet", "leads to no file"),
        (|at| symlink("b.parquet", at.join("b.parquet")).unwrap(), "b.parquet", "leads to no file"),
        (
            |at| {
                std::fs::create_dir(at.join("inner")).unwrap();
                symlink("inner", at.join("b.parquet")).unwrap();
            },
            "b.parquet",
            "a link to a folder",
        ),
        (pipe, "b.parquet", "no regular file"),
    ];
    for (make, entry, reason) in unusable {
        let (_folder, path, access) = folder();
        shard(&path, "a.parquet");
        make(&path);
        let error = list(&Access::everything(), LIMITS, &[&prefix(&path)]).unwrap_err();
        assert!(matches!(&error, Error::Unusable { uri, .. } if *uri == prefix(&path)), "{entry}: {error}");
        assert!(error.to_string().contains(entry) && error.to_string().contains(reason), "{entry}: {error}");
        let error = list(&access, LIMITS, &[&prefix(&path)]).unwrap_err();
        // Of a link, others learn nothing.
        let is_link = reason == "leads to no file";
        assert!(matches!(&error, Error::NotAllowed { .. }) == is_link, "{entry}: {error}");
        assert!(error.to_string().contains(if is_link { "b.parquet is not within" } else { reason }), "{error}");
        // By its own name, the other one can be used.
        assert_eq!(list(&access, LIMITS, &[at(&path, "a.parquet").to_string().as_str()]).unwrap().len(), 1);
    }
}

#[cfg(unix)]
fn pipe(folder: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(folder.join("b.parquet")).status().unwrap().success());
}

#[cfg(unix)]
#[test]
fn links_are_shards_where_they_lead_to_shards_that_are_allowed() {
    use std::os::unix::fs::symlink;
    let (_folder, path, access) = folder();
    let inner = path.join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::create_dir(path.join("secret")).unwrap();
    shard(&path.join("secret"), "a.parquet");
    shard(&inner, "a.parquet");
    symlink("a.parquet", inner.join("b.parquet")).unwrap();
    // The name that stands for any below the prefix.
    symlink("../secret/a.parquet", inner.join("shard.parquet")).unwrap();
    let inside = Access::only(&[inner.display().to_string()]).unwrap();
    assert_eq!(list(&access, LIMITS, &[&prefix(&inner)]).unwrap().len(), 2, "a.parquet and its link are one");
    for uri in [prefix(&inner), format!("{}/../inner/", inner.display())] {
        let error = list(&inside, LIMITS, &[&uri]).unwrap_err();
        assert!(matches!(&error, Error::NotAllowed { uri } if uri.ends_with("/shard.parquet")), "{error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
    // A folder that is not there is no way round the links of one that is.
    symlink("../secret", inner.join("out")).unwrap();
    for name in ["none/../out/", "none/../out/a.parquet", "none/../out/new.parquet"] {
        let uri = format!("{}/{name}", inner.display());
        let error = list(&inside, LIMITS, &[&uri]).unwrap_err();
        assert!(matches!(error, Error::NotAllowed { .. }), "{uri}: {error}");
    }
}

#[test]
fn a_folder_is_looked_at_once_and_a_call_has_limits() {
    let (_folder, path, access) = folder();
    std::fs::create_dir(path.join("inner")).unwrap();
    for name in ["a.parquet", "b.parquet", "inner/c.parquet", "notes.txt"] {
        std::fs::write(path.join(name), b"").unwrap();
    }
    let (plain, uri) = (prefix(&path), format!("file://{}", prefix(&path)));
    let (dotted, one) = (format!("{}/inner/../", path.display()), format!("{plain}a.parquet"));
    let all = [plain.as_str(), &uri, &dotted, &plain, &one];
    // A folder that is looked at twice passes this limit.
    let exact =
        ListLimits { shards: 3, name_bytes: 3 * plain.len() + "a.parquetb.parquetinner/c.parquet".len(), entries: 5 };
    let shards = list(&access, exact, &all).unwrap();
    assert_eq!(
        shards.iter().map(|shard| shard.file_name()).collect::<Vec<_>>(),
        ["a.parquet", "b.parquet", "c.parquet"]
    );
    for (limits, words) in [
        (ListLimits { shards: 2, ..exact }, "more than 2 shards in one call"),
        (ListLimits { name_bytes: exact.name_bytes - 1, ..exact }, "bytes of names in one call"),
        (ListLimits { entries: 4, ..exact }, "more than 4 files and folders in one call"),
    ] {
        let error = list(&access, limits, &all).unwrap_err();
        assert!(matches!(error, Error::TooManyShards { .. }), "{error}");
        assert!(error.to_string().contains(words) && error.to_string().contains("make several calls"), "{error}");
    }
    let (none, file) = (format!("{plain}none/"), format!("{plain}notes.txt/"));
    assert!(matches!(list(&access, LIMITS, &[&none]), Err(Error::NotFound { .. })));
    assert!(matches!(list(&access, LIMITS, &[&file]), Err(Error::NotFound { .. })));
}

#[test]
fn web_servers_are_told_apart() {
    let uris = ["http://127.0.0.1:1/a.parquet", "http://127.0.0.1:2/a.parquet", "https://127.0.0.1:1/a.parquet"];
    let found =
        list(&Access::everything(), LIMITS, &[uris[0], uris[1], uris[2], "http://127.0.0.1:1/%61.parquet"]).unwrap();
    assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), uris);
    assert!(!found[0].same_object(&found[1]) && found[0].same_object(&found[0]));
    assert!(!is_below("http://127.0.0.1:1/in/a/", "http://127.0.0.1:2/in/"));
    assert!(is_below("http://127.0.0.1:1/in/a/", "http://127.0.0.1:1/in/"));
    // A folder may be called as they are.
    assert!(is_pattern("httpd/*.parquet") && !is_pattern("http://host/*.parquet"));
}
