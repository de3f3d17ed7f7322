//! Every bound of the pipeline. Together they bound the memory of a job: at most [`CHUNKS_READ`] + [`CHUNKS_PREPARED`] +
//! [`CHUNKS_SCORED`] + [`CHUNKS_OPEN`] + 4 chunks exist at a time (one in each stage's hands) and those of two batches, each of
//! at most [`CHUNK_ROWS`] rows; a batch or two more are in each engine's hands. Jobs that share a worker also share a budget
//! in bytes.

/// Rows that travel together: enough to keep every core decoding, few enough that their pixels (0.44 MB each at 384 px)
/// stay small beside the model.
pub const CHUNK_ROWS: usize = 32;
/// Rows that travel together where images are fetched by their addresses: each may have [`IMAGE_BYTES_MAX`] bytes.
pub const CHUNK_URIS: usize = 4;
/// Events of a call that wait for whoever reads them: scores of a chunk each.
pub const EVENTS: usize = 2;
/// Shards of a call.
pub const SHARDS_MAX: usize = 100_000;
/// Chunks read and not yet prepared.
pub const CHUNKS_READ: usize = 1;
/// Chunks prepared and not yet scored: preparation runs this far ahead of the engine.
pub const CHUNKS_PREPARED: usize = 1;
/// Chunks scored and not yet written.
pub const CHUNKS_SCORED: usize = 2;
/// Chunks that wait for their last score, beside those a batch spans: rows without a score fill no batch, and must not
/// pile up behind one that waits for it.
pub const CHUNKS_OPEN: usize = 8;
/// Pairs that a call may add to a batch before it is another call's turn: a row's captions are never torn apart, so this is
/// about an image and its captions.
pub const QUANTUM_PAIRS: usize = 4;
/// Caption tokens after which a batch goes to the engine though it has room for images.
pub const BATCH_TOKENS: usize = 4096;
/// Bytes of an encoded image that is fetched by its address.
pub const IMAGE_BYTES_MAX: u64 = 64 << 20;
/// Images fetched at a time.
pub const FETCHES: usize = 16;
/// Pixels of an image, unless the user says otherwise.
pub const IMAGE_PIXELS_MAX: u64 = 64 << 20;
/// Bytes of a caption: the tokenizer is linear, but a caption of megabytes is a mistake and never fits the model.
pub const CAPTION_BYTES_MAX: usize = 1 << 20;
/// Bytes of a tokenizer or preprocessor file.
pub const MODEL_JSON_BYTES_MAX: u64 = 64 << 20;
