//! What can be wrong with a model folder's preprocessing files. Bad images have their own type, [`crate::ImageError`].

/// An unusable preprocessor_config.json, tokenizer.json or vocab.txt, or a caption the tokenizer refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is not JSON of the expected shape.
    #[error("preprocessor_config.json cannot be read, fetch the model again")]
    SpecJson(#[from] serde_json::Error),
    /// A setting asks for preprocessing that BLIP models do not use.
    #[error("preprocessor_config.json: {field} = {value} is not supported, expected {expected}")]
    SpecField {
        /// The key.
        field: &'static str,
        /// Its value, as JSON.
        value: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// The tokenizers crate refused the file.
    #[error("the tokenizer cannot be built from {file}, fetch the model again")]
    Tokenizer {
        /// tokenizer.json or vocab.txt.
        file: &'static str,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The vocabulary is not a BERT one.
    #[error("the vocabulary in {file} has no {token} entry, is this a BERT tokenizer?")]
    MissingToken {
        /// tokenizer.json or vocab.txt.
        file: &'static str,
        /// The missing entry.
        token: &'static str,
    },
    /// The tokenizers crate failed on a text.
    #[error("the caption cannot be tokenized")]
    Encode {
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
