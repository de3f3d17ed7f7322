//! What ends a job. A bad row is no error of this type: it is a row's status (see [`crate::prepare`]).

/// Result of a job.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a job failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading, writing or fetching failed.
    #[error(transparent)]
    Store(#[from] capsieve_store::Error),
    /// The checkpoint or the engine failed.
    #[error(transparent)]
    Engine(#[from] capsieve_engine::Error),
    /// An engine failed on a batch, and with it all calls that had rows in it.
    #[error(transparent)]
    Scoring(std::sync::Arc<capsieve_engine::Error>),
    /// An engine panicked or lost its device; what it said is in the log.
    #[error("an engine broke down, its own message stands above: this is a bug or a broken device")]
    EngineGone,
    /// A stage of a call panicked; what it said is in the log.
    #[error("the call broke down, its own message is in the worker's log: this is a bug")]
    BrokeDown,
    /// A file of the model's preprocessing cannot be used.
    #[error("model {model}")]
    Preprocessing {
        /// The model as the user named it.
        model: String,
        /// What is wrong.
        source: capsieve_prep::Error,
    },
    /// The parts of a model do not belong together.
    #[error("model {model}: {reason}")]
    Model {
        /// The model as the user named it.
        model: String,
        /// What does not fit, and what to do.
        reason: String,
    },
    /// MODEL is none of its forms.
    #[error("--model {model}: {reason}")]
    ModelName {
        /// What the user gave.
        model: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A local file cannot be read or written.
    #[error("{path}")]
    File {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Input and output are one object.
    #[error("the output {uri} is the input: choose another name for the output")]
    SameObject {
        /// The object.
        uri: String,
    },
    /// Rejected rows would go where something else is.
    #[error("the rejected rows' {uri} is the input or the output: choose another name for them")]
    SameRejected {
        /// The object.
        uri: String,
    },
    /// The output is there and is not what this job would write.
    #[error(
        "{uri} exists and was made from another input, model or options ({difference}): choose another output, or pass --overwrite"
    )]
    Foreign {
        /// The output.
        uri: String,
        /// What differs, there and here.
        difference: String,
    },
    /// A resume token that none of our workers gave for this call.
    #[error("a resume token cannot be used: {reason}")]
    Token {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A resume token of other work.
    #[error("the resume token of {uri} {what}: begin the shard anew")]
    Stale {
        /// The shard.
        uri: String,
        /// What differs.
        what: &'static str,
    },
    /// The call asks for a score that the worker was not started for.
    #[error("the worker was started without that head (--heads)")]
    HeadNotLoaded,
    /// The call's sink makes no sense.
    #[error("the sink cannot be used: {reason}")]
    Sink {
        /// Why.
        reason: &'static str,
    },
    /// The call's sink is nowhere that it could be.
    #[error("the sink")]
    SinkUri(#[source] Box<capsieve_store::Error>),
    /// The call's sink lies where its inputs are looked for.
    #[error(
        "the output {sink} lies below the input prefix {input}, whose next reader would take the outputs for inputs: choose another place"
    )]
    SinkInside {
        /// The sink.
        sink: String,
        /// The prefix.
        input: String,
    },
    /// Many shards cannot have one output.
    #[error("{output} is one file and the inputs may be many shards: name a prefix that ends in '/'")]
    OutputPrefix {
        /// The output.
        output: String,
    },
    /// Whoever reads the outputs would read the rejected rows, too.
    #[error(
        "the rejected rows of {rejected} and the outputs of {output} would be read together, for one lies below the other: \
         choose another prefix"
    )]
    RejectedInside {
        /// Where rejected rows would go.
        rejected: String,
        /// Where the others go.
        output: String,
    },
    /// Two shards of different inputs have the same name.
    #[error("the output of {input} would be {output}, where another shard or its output is: choose another prefix")]
    SameOutput {
        /// The second shard.
        input: String,
        /// The output.
        output: String,
    },
    /// Other calls have the memory for names of shards.
    #[error("the calls in flight have too many shards together: ask again, or raise --memory-limit")]
    NamesMemory,
    /// A row group larger than the memory for it.
    #[error(
        "a row group of {uri} takes {bytes} bytes, the worker holds at most {limit}: write it with smaller ones, or raise --memory-limit"
    )]
    RowGroup {
        /// The shard.
        uri: String,
        /// What reading it takes.
        bytes: u64,
        /// The most.
        limit: u64,
    },
    /// A row failed and the job asked to fail then.
    #[error("row {row} has no score ({status}): {reason}; --on-error null goes on without it")]
    Row {
        /// Its number in the shard, from 0.
        row: u64,
        /// Its status.
        status: &'static str,
        /// Its error.
        reason: String,
    },
    /// A complete output has rows without a score, and the job asked to fail then.
    #[error("{failed} rows of {uri} have no score; --on-error null accepts them")]
    RowsFailed {
        /// The output.
        uri: String,
        /// How many.
        failed: u64,
    },
    /// The demo would replace a file that it did not write.
    #[error("{path} was not written by the demo: choose another folder with --out")]
    NotOurs {
        /// The file.
        path: String,
    },
    /// The folder of `synth` holds something.
    #[error("{path} is not empty: choose another folder, or pass --overwrite")]
    FolderInUse {
        /// The folder.
        path: String,
    },
    /// An output, or what was written of it, was removed meanwhile.
    #[error("{uri} is gone: somebody removed it, or what was written of it, meanwhile; run the same command again")]
    Gone {
        /// The output.
        uri: String,
    },
    /// The device does not compute in this precision.
    #[error("--precision {precision}: the device {device} has {has}")]
    DevicePrecision {
        /// What was asked for.
        precision: &'static str,
        /// What was to compute.
        device: &'static str,
        /// What it has.
        has: String,
    },
    /// The shard of `bench` has nothing that an engine could score.
    #[error("{uri} has {what}: name a shard of image-caption pairs, or leave --input out for the bundled one")]
    NothingToMeasure {
        /// The shard.
        uri: String,
        /// What it has instead.
        what: &'static str,
    },
    /// The pool that prepares images cannot be started.
    #[error("cannot start the threads that prepare images")]
    Threads {
        /// Why.
        source: std::io::Error,
    },
}
