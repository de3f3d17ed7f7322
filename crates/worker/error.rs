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
    /// The output is there and is not what this job would write.
    #[error(
        "{uri} exists and was made from another input, model or options: choose another output, or pass --overwrite"
    )]
    Foreign {
        /// The output.
        uri: String,
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
    /// The processor computes in f32 only.
    #[error("--precision {precision}: the device cpu has only f32")]
    CpuPrecision {
        /// What was asked for.
        precision: &'static str,
    },
    /// The pool that prepares images cannot be started.
    #[error("cannot start the threads that prepare images")]
    Threads {
        /// Why.
        source: rayon::ThreadPoolBuildError,
    },
}
