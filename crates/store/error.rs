//! What can go wrong between a URI and its rows, and what to try then. One enum for the crate; sources are kept.

use parquet::errors::ParquetError;

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed job, never a failed row: rows that cannot be used are data, see [`crate::ImageCell`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not a URI this crate can make sense of.
    #[error("{uri:?} is not a usable URI: {reason}")]
    Uri {
        /// As given.
        uri: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A folder where one object is needed.
    #[error("{uri} is a folder, name a Parquet file, for example {uri}/00000.parquet")]
    Folder {
        /// As given.
        uri: String,
    },
    /// The folder of an output does not exist.
    #[error("{uri} cannot be written: the folder {folder} does not exist, create it first")]
    NoFolder {
        /// The output.
        uri: String,
        /// Its folder.
        folder: String,
    },
    /// No such object.
    #[error("{uri} does not exist")]
    NotFound {
        /// The object.
        uri: String,
        /// The store's answer.
        source: object_store::Error,
    },
    /// The store or the file system said no.
    #[error(
        "{uri}: permission denied, check the owner and the mode of the file and of its folder, or the credentials and the bucket's policy"
    )]
    Permission {
        /// The object.
        uri: String,
        /// The store's answer.
        source: object_store::Error,
    },
    /// No space for the output.
    #[error(
        "{uri} cannot be written: the disk is full or a quota is reached, free some space and run the same command"
    )]
    StorageFull {
        /// The output.
        uri: String,
        /// The store's answer.
        source: object_store::Error,
    },
    /// Somebody replaced the input while it was read.
    #[error("{uri} was replaced while it was read, run the same command again")]
    Changed {
        /// The input.
        uri: String,
        /// The store's answer.
        source: object_store::Error,
    },
    /// A footer that takes too much memory.
    #[error("{uri} has a footer of more than {limit} bytes, write it with fewer columns or larger row groups")]
    LongFooter {
        /// The shard.
        uri: String,
        /// The most that is read.
        limit: u64,
    },
    /// Any other answer of a store.
    #[error("{uri} cannot be reached")]
    Store {
        /// The object.
        uri: String,
        /// The store's answer.
        source: object_store::Error,
    },
    /// More bytes than the caller allows.
    #[error("{uri} has {size} bytes, more than the limit of {limit}")]
    TooLarge {
        /// The object.
        uri: String,
        /// Its size.
        size: u64,
        /// The most that is read.
        limit: u64,
    },
    /// The output is already there.
    #[error("{uri} exists already, pass --overwrite to replace it")]
    Exists {
        /// The output.
        uri: String,
    },
    /// Another run was faster.
    #[error("another run wrote {uri} at the same time and finished first, its output stands")]
    Superseded {
        /// The output.
        uri: String,
    },

    /// The reader or writer is confined, see [`crate::Access`].
    #[error("{uri} is not within what this worker may read and write (--allow-uri)")]
    NotAllowed {
        /// As it was given.
        uri: String,
    },
    /// A prefix of `--allow-uri` that is no folder and no bucket's.
    #[error("--allow-uri {prefix}: expected a folder that exists, or a bucket's prefix such as s3://bucket/data/")]
    AllowedPrefix {
        /// As it was given.
        prefix: String,
    },
    /// A prefix without a shard.
    #[error("{uri} holds no *.parquet, check the spelling")]
    NoShards {
        /// The prefix.
        uri: String,
    },
    /// Something below a prefix that looks like a shard and cannot be one.
    #[error("{uri} holds {entry}, which {reason}: rename or remove it, or name the shards one by one")]
    Unusable {
        /// The prefix.
        uri: String,
        /// Its name from there on.
        entry: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More shards than one call takes.
    #[error(
        "more than {limit} {what} in one call, at {uri}: make several calls, name a deeper prefix, or start the worker with a larger --memory-limit"
    )]
    TooManyShards {
        /// The prefix or shard with which there were too many.
        uri: String,
        /// The most that are taken.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
    /// A pattern that nothing matches.
    #[error("no file matches {uri}")]
    NoMatch {
        /// The pattern.
        uri: String,
    },
    /// Not a pattern.
    #[error("{uri} is no pattern; *, ?, [ab], {{a,b}} and ** are known")]
    Pattern {
        /// What was given.
        uri: String,
        /// Why.
        source: globset::Error,
    },
    /// Whoever asked is gone.
    #[error("nobody waits for what {uri} names any more")]
    Unwanted {
        /// The prefix or shard.
        uri: String,
    },
    /// The bytes are something else.
    #[error("{uri} is not a Parquet file")]
    NotParquet {
        /// The input.
        uri: String,
    },
    /// Begins as a Parquet file and ends too early.
    #[error("{uri} is cut off: it begins as a Parquet file but has no footer, copy or download it again")]
    Cut {
        /// The input.
        uri: String,
    },
    /// Encrypted columns or footer.
    #[error("{uri} is an encrypted Parquet file, decrypt it first")]
    Encrypted {
        /// The input.
        uri: String,
    },
    /// Bytes inside do not make sense.
    #[error("{uri} is a damaged Parquet file or uses a feature that is not supported, write it again")]
    Corrupt {
        /// The input.
        uri: String,
        /// The reader's answer.
        source: ParquetError,
    },
    /// Bytes inside are so wrong that the Parquet library gave up (its panic was contained).
    #[error("{uri} is a damaged Parquet file: its pages contradict each other, write it again")]
    Malformed {
        /// The input.
        uri: String,
        /// The contained panic.
        source: tokio::task::JoinError,
    },

    /// An output whose scores are to be carried over, and are none of ours.
    #[error("the scores of {uri} cannot be carried over: pass --overwrite to score all of its rows")]
    NoScores {
        /// The output.
        uri: String,
    },

    /// img2dataset's side file.
    #[error(
        "{uri} holds img2dataset's metadata without images (its tar and files modes write such a file beside each \
         shard): run img2dataset with --output_format parquet, or pass --image-column {column} to fetch the URLs instead"
    )]
    MetadataOnly {
        /// The input.
        uri: String,
        /// The column of addresses.
        column: String,
    },
    /// Nothing in the schema looks like an image or a caption.
    #[error("{uri} has no {role} column among {tried}, pass {option} NAME; its columns are: {columns}")]
    NoColumn {
        /// The input.
        uri: String,
        /// "image" or "caption".
        role: &'static str,
        /// The names that are looked for.
        tried: String,
        /// The option that decides.
        option: &'static str,
        /// Names and types.
        columns: Box<str>,
    },
    /// The named column is missing.
    #[error("{uri} has no column {name:?} ({option}); its columns are: {columns}")]
    MissingColumn {
        /// The input.
        uri: String,
        /// As given by the option.
        name: String,
        /// The option that named it.
        option: &'static str,
        /// Names and types.
        columns: Box<str>,
    },
    /// Two columns of one name.
    #[error("{uri} has {count} columns named {name:?}, rename them or pass {option} NAME; its columns are: {columns}")]
    AmbiguousColumn {
        /// The input.
        uri: String,
        /// The name they share.
        name: String,
        /// How many there are.
        count: usize,
        /// The option that decides.
        option: &'static str,
        /// Names and types.
        columns: Box<str>,
    },
    /// The named column cannot be used.
    #[error(
        "{uri}: column {name:?} is {data_type}, which cannot be read as {role} ({wanted}); its columns are: {columns}"
    )]
    ColumnType {
        /// The input.
        uri: String,
        /// The column.
        name: String,
        /// Its type.
        data_type: Box<str>,
        /// "image" or "caption".
        role: &'static str,
        /// Usable types.
        wanted: &'static str,
        /// Names and types.
        columns: Box<str>,
    },
    /// Columns of one shard used on the rows of another.
    #[error("the columns were detected in a shard of another schema, this is a bug")]
    ForeignColumns,
    /// A threshold on a score that is not computed.
    #[error("a threshold on {head} needs that head, add it to --heads")]
    ThresholdWithoutHead {
        /// "itm" or "cosine".
        head: &'static str,
    },
    /// The Parquet library refused to encode the output.
    #[error("{uri} cannot be encoded")]
    Encode {
        /// The output.
        uri: String,
        /// The writer's answer.
        source: ParquetError,
    },
    /// The encoder panicked.
    #[error("{uri} cannot be encoded, this is a bug")]
    EncodePanic {
        /// The output.
        uri: String,
        /// The contained panic.
        source: tokio::task::JoinError,
    },
    /// Statistics that are not JSON.
    #[error("{uri}: the statistics cannot be written as JSON")]
    Stats {
        /// The statistics file.
        uri: String,
        /// The serializer's answer.
        source: serde_json::Error,
    },

    /// A prefix that is not a model we can load.
    #[error("{uri} has no {missing}, is it a model in Hugging Face's layout?")]
    ModelIncomplete {
        /// The prefix.
        uri: String,
        /// What was looked for.
        missing: String,
    },
    /// The list of a model's weight files makes no sense.
    #[error("{uri} does not say which weight files there are, upload the model again")]
    ModelIndex {
        /// The list.
        uri: String,
        /// The parser's answer.
        source: serde_json::Error,
    },
    /// The folder for models of buckets cannot be used.
    #[error(
        "the model cache {path} cannot be used: free some space, or set XDG_CACHE_HOME to a folder that can be written"
    )]
    ModelCache {
        /// The folder.
        path: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A model id that the hub cannot have.
    #[error("{id:?} is not a hub id (OWNER/NAME or OWNER/NAME@REVISION)")]
    HubId {
        /// As given.
        id: String,
    },
    /// A variable that names no server.
    #[error("HF_ENDPOINT is {endpoint:?}, expected an address such as https://huggingface.co")]
    HubEndpoint {
        /// As given.
        endpoint: String,
    },
    /// Offline and not in the cache.
    #[error(
        "{id}: {missing} is not in the hub cache {cache} and HF_HUB_OFFLINE is set, unset it or fetch the model first on \
         a machine that has a network"
    )]
    HubOffline {
        /// The model.
        id: String,
        /// The file that is missing.
        missing: String,
        /// Where was looked.
        cache: String,
    },
    /// No such model or revision.
    #[error(
        "{id} is not on {endpoint}: check the spelling and the revision; a local folder must exist and is best given as \
         a path such as ./{id}"
    )]
    HubNotFound {
        /// The model.
        id: String,
        /// The server.
        endpoint: String,
        /// The client's answer.
        source: Box<hf_hub::HFError>,
    },
    /// The hub wants to know who asks.
    #[error(
        "{id}: {endpoint} refused access: check the spelling, and if the model is private or gated accept its terms there \
         and set HF_TOKEN to a token that may read it"
    )]
    HubAccess {
        /// The model.
        id: String,
        /// The server.
        endpoint: String,
        /// The client's answer.
        source: Box<hf_hub::HFError>,
    },
    /// The repository is not a model we can load.
    #[error("{id} on {endpoint} has no {missing}, is it a model in Hugging Face's layout?")]
    HubIncomplete {
        /// The model.
        id: String,
        /// The server.
        endpoint: String,
        /// What was looked for.
        missing: String,
    },
    /// A file arrived with fewer or more bytes than announced.
    #[error("{id}: {file} came with {size} of {expected} bytes from {endpoint}, run the same command again")]
    HubCut {
        /// The model.
        id: String,
        /// The file.
        file: String,
        /// The server.
        endpoint: String,
        /// Bytes received.
        size: u64,
        /// Bytes announced.
        expected: u64,
    },
    /// Everything else between us and the hub.
    #[error(
        "{id}: {file} cannot be fetched from {endpoint}: check the network, or set HF_ENDPOINT to a mirror, or pass a \
         local folder as the model"
    )]
    Hub {
        /// The model.
        id: String,
        /// The file.
        file: String,
        /// The server.
        endpoint: String,
        /// The client's answer.
        source: Box<hf_hub::HFError>,
    },
    /// The cache folder cannot be used.
    #[error("the hub cache {path} cannot be used: free some space, or set HF_HOME to a folder that can be written")]
    HubCache {
        /// The folder or file.
        path: String,
        /// The system's answer.
        source: std::io::Error,
    },
}
