//! Every bound of the pipeline. Together they bound the memory of a job: a chunk has at most [`CHUNK_ROWS`] rows, and at most
//! [`chunks_max`] chunks exist between reading and whoever takes the scores; a batch or two more are in each engine's hands.
//! Jobs that share a worker also share a budget in bytes.

use std::time::Duration;

pub use capsieve_store::URI_BYTES_MAX;

/// Rows that travel together: enough to keep every core decoding, few enough that their pixels (0.44 MB each at 384 px)
/// stay small beside the model.
pub const CHUNK_ROWS: usize = 32;
/// Shards of a call.
pub const SHARDS_MAX: usize = 100_000;
/// Bytes of the names of a call's shards.
pub const SHARD_NAMES_BYTES_MAX: usize = 16 << 20;
/// A call has each name as the user gave it, as a file's, and in its answer.
pub const NAME_COPIES: usize = 3;
/// What a shard takes beside its name.
pub const SHARD_BYTES: usize = 256;
/// Calls that list folders at a time: how much a folder holds is known only then.
pub const LISTINGS_MAX: usize = 2;
/// Bytes of the reason why a row has no score.
pub const REASON_BYTES_MAX: usize = 1024;
/// Files and folders that a call looks at for its shards.
pub const SHARD_ENTRIES_MAX: usize = 1_000_000;
/// Shards of a dataset at a time: while one ends, which takes an upload, and one is scored, the next is opened.
pub const SHARDS_IN_FLIGHT: usize = 3;
/// Shards that a dry run looks at, at a time.
pub const SHARDS_LOOKED_AT: usize = 16;
/// Chunks read and not yet prepared.
pub const CHUNKS_READ: usize = 1;
/// Chunks prepared and not yet scored: preparation runs this far ahead of the engine.
pub const CHUNKS_PREPARED: usize = 1;
/// Chunks scored and not yet written, or not yet taken by who asked for them.
pub const CHUNKS_SCORED: usize = 4;
/// Chunks that wait for their last score, beside those a batch spans: rows without a score fill no batch, and must not
/// pile up behind one that waits for it.
pub const CHUNKS_OPEN: usize = 8;
/// Chunks of a job at a time, from the moment they are read to the moment their scores are written or taken: one in each of
/// four stages' hands, those between them, and those of two batches. Whoever does not take scores stops the reading by this
/// and holds nothing but scores: every chunk that was read goes through the engine all the same.
pub const fn chunks_max(batch_images: usize) -> usize {
    4 + CHUNKS_READ + CHUNKS_PREPARED + CHUNKS_SCORED + chunks_open(batch_images)
}

/// Chunks of a job whose rows wait for an engine.
pub const fn chunks_open(batch_images: usize) -> usize {
    CHUNKS_OPEN + 2 * (batch_images / CHUNK_ROWS + 1)
}

/// How long the rows of a job wait for others to fill their batch: an engine that waits longer has nothing better to do.
pub const COMPANY: Duration = Duration::from_millis(250);
/// Pairs that a call may add to a batch before it is another call's turn: about an image and its captions.
pub const QUANTUM_PAIRS: usize = 4;
/// Captions of a row that go through the engine with one pass of its image: so many that the pass is a small part of the work.
pub const PART_PAIRS: usize = 256;
/// Captions of a row: more are a mistake, and an error of the row.
pub const CAPTIONS_MAX: usize = 4096;
/// Caption tokens of a batch at most: it goes to the engine though it has room for images.
pub const BATCH_TOKENS: usize = 4096;
/// Bytes of an encoded image that is fetched by its address.
pub const IMAGE_BYTES_MAX: u64 = 64 << 20;
/// Images fetched at a time, by all jobs of a worker.
pub const FETCHES: usize = 64;
/// Of these from one web server or bucket, unless the user says otherwise.
pub const FETCHES_PER_HOST: usize = 8;
/// Chunks whose images are fetched at a time: with [`CHUNK_ROWS`] enough for all requests that are made at a time, twice.
pub const CHUNKS_FETCHED: usize = 4;
/// Memory that a chunk reserves for images whose size is not known: the largest one, and what a budget keeps for small ones.
pub const FETCH_BYTES: usize = (IMAGE_BYTES_MAX / 7 * 8) as usize + 8192;
/// An image of a web server: this long on the network, all tries together ...
pub const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// ... of which there are so many after the first, ...
pub const FETCH_RETRIES: usize = 2;
/// ... with a pause of about so long, then three times as long, ...
pub const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// ... or as the server says, if that is no longer than this.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
/// A host is taken to be down after so many failed connections or silences in a row ...
pub const HOST_FAILURES: u32 = 5;
/// ... that took so long, from the beginning of the first to the end of the last, ...
pub const HOST_FAILURES_SPAN: Duration = Duration::from_secs(1);
/// ... and is then left alone for so long.
pub const HOST_DOWN: Duration = Duration::from_secs(30);
/// Hosts that are remembered while nobody asks them.
pub const HOSTS_KNOWN: usize = 4096;
/// Pixels of an image, unless the user says otherwise.
pub const IMAGE_PIXELS_MAX: u64 = 64 << 20;
/// Bytes of a caption: the tokenizer is linear, but a caption of megabytes is a mistake and never fits the model.
pub const CAPTION_BYTES_MAX: usize = 1 << 20;
/// The memory of a row group that others wait for is given up, and the rest of it read again later, when nobody has taken scores
/// for so long ...
pub const READER_STALLS: Duration = Duration::from_millis(500);
/// ... or when a call has had rows of it for so long, ...
pub const ROW_GROUP_TURN: Duration = Duration::from_secs(5);
/// ... and for so many times what it took to have the first ones: reading it again costs as much.
pub const ROW_GROUP_TURN_FETCHES: u32 = 4;
/// Memory of an output while it is written, at most: a row group, and the parts on their way.
pub const OUTPUT_BYTES: usize = 96 << 20;
/// The same of a small shard, beside what it holds itself twice: once as encoded and once on its way.
pub const OUTPUT_BYTES_MIN: usize = 64 << 10;
/// Captions that travel together, on the average of a row group: rows of many captions travel in smaller chunks.
pub const CHUNK_CAPTIONS: usize = 4096;
/// Tokens of a caption that are counted: no model takes more, and longer captions are errors of their rows.
pub const TOKENS_MAX: usize = 4096;
/// What a caption takes beside its tokens: its place in lists, the reason why it has no score, the score.
pub const CAPTION_BYTES: usize = 160;
/// Bytes of a tokenizer or preprocessor file.
pub const MODEL_JSON_BYTES_MAX: u64 = 64 << 20;
