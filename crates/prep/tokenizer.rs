//! Captions to token ids: BERT uncased WordPiece, by way of the `tokenizers` crate.
//!
//! Owns what the crate leaves to its files: the frame [CLS] ... [SEP] is put around the ids here, with ids looked up in the
//! vocabulary, and truncation and padding that a tokenizer.json may carry are removed. The reference has neither.

use crate::Error;
use serde_json::{Map, Value, json};

const CLS: &str = "[CLS]";
const SEP: &str = "[SEP]";
const UNK: &str = "[UNK]";
const JSON: &str = "tokenizer.json";
const VOCAB: &str = "vocab.txt";

/// A caption tokenizer. Cheap to share between threads, expensive to build (tens of milliseconds).
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    cls: u32,
    sep: u32,
}

impl Tokenizer {
    /// Reads a tokenizer.json.
    ///
    /// # Errors
    /// When it is not one, or its vocabulary lacks a special token of BERT.
    pub fn from_json(json: &[u8]) -> Result<Self, Error> {
        let inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|source| Error::Tokenizer { file: JSON, source })?;
        Self::new(inner, JSON)
    }

    /// Reads a vocab.txt (one entry a line, the line number is the id) and puts the BERT uncased rules around it.
    ///
    /// # Errors
    /// When it is not UTF-8, or lacks a special token of BERT.
    pub fn from_vocab(vocab: &[u8]) -> Result<Self, Error> {
        let text = std::str::from_utf8(vocab).map_err(|e| Error::Tokenizer { file: VOCAB, source: e.into() })?;
        let vocab: Map<String, Value> =
            text.lines().zip(0u32..).map(|(token, id)| (token.to_owned(), id.into())).collect();
        for token in [CLS, SEP, UNK] {
            if !vocab.contains_key(token) {
                return Err(Error::MissingToken { file: VOCAB, token });
            }
        }
        let json = bert_uncased_json(vocab).to_string();
        let inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|source| Error::Tokenizer { file: VOCAB, source })?;
        Self::new(inner, VOCAB)
    }

    /// The published vocabulary (30,522 entries), for models that are made here and not downloaded.
    ///
    /// # Panics
    /// Never: the embedded file is a constant.
    #[must_use]
    pub fn bert_uncased() -> Self {
        Self::from_vocab(include_bytes!("assets/bert_uncased_vocab.txt")).expect("the embedded vocabulary is complete")
    }

    fn new(mut inner: tokenizers::Tokenizer, file: &'static str) -> Result<Self, Error> {
        inner.with_truncation(None).map_err(|source| Error::Tokenizer { file, source })?;
        inner.with_padding(None);
        let id = |token| inner.token_to_id(token).ok_or(Error::MissingToken { file, token });
        let (cls, sep, _) = (id(CLS)?, id(SEP)?, id(UNK)?);
        Ok(Self { inner, cls, sep })
    }

    /// `[CLS] ids [SEP]`, however many there are. The empty caption is legal and gives the frame alone.
    ///
    /// # Errors
    /// When the tokenizers crate fails, which no text is known to cause.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, false).map_err(|source| Error::Encode { source })?;
        let mut ids = Vec::with_capacity(encoding.len() + 2);
        ids.push(self.cls);
        ids.extend_from_slice(encoding.get_ids());
        ids.push(self.sep);
        Ok(ids)
    }

    /// Like [`Tokenizer::encode`], but a longer sequence keeps its first `tokens_max - 1` ids and then ends with `[SEP]`.
    /// The frame itself is never cut: `tokens_max` below 2 counts as 2.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_truncated(&self, text: &str, tokens_max: usize) -> Result<Vec<u32>, Error> {
        let mut ids = self.encode(text)?;
        if ids.len() > tokens_max.max(2) {
            ids.truncate(tokens_max.max(2) - 1);
            ids.push(self.sep);
        }
        Ok(ids)
    }

    /// Entries of the vocabulary, special tokens included.
    #[must_use]
    pub fn vocab_len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The content of a tokenizer.json.
    ///
    /// # Errors
    /// When the tokenizers crate cannot serialise its own state.
    pub fn to_json(&self) -> Result<String, Error> {
        self.inner.to_string(false).map_err(|source| Error::Tokenizer { file: JSON, source })
    }

    /// The content of a vocab.txt: entries in the order of their ids.
    #[must_use]
    pub fn vocab_txt(&self) -> String {
        let mut entries: Vec<_> = self.inner.get_vocab(true).into_iter().collect();
        entries.sort_unstable_by_key(|&(_, id)| id);
        entries.into_iter().flat_map(|(token, _)| [token, "\n".to_owned()]).collect()
    }
}

/// The tokenizer.json of BERT uncased around another vocabulary. Going through the file's own format keeps one way in, and
/// what `synth` writes is what the published models contain.
fn bert_uncased_json(vocab: Map<String, Value>) -> Value {
    let special =
        ["[PAD]", UNK, CLS, SEP, "[MASK]"].into_iter().filter_map(|token| Some((vocab.get(token)?.as_u64()?, token)));
    let mut special: Vec<_> = special.collect();
    special.sort_unstable();
    let added = special.into_iter().map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    let frame_token = |token: &str| json!({"id": token, "ids": [vocab[token]], "tokens": [token]});
    let text = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    let mark = |id: &str, type_id: u32| json!({"SpecialToken": {"id": id, "type_id": type_id}});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [mark(CLS, 0), text("A", 0), mark(SEP, 0)],
            "pair": [mark(CLS, 0), text("A", 0), mark(SEP, 0), text("B", 1), mark(SEP, 1)],
            "special_tokens": {CLS: frame_token(CLS), SEP: frame_token(SEP)},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": UNK, "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": &vocab},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\ncat\n##s\n";

    fn small() -> Tokenizer {
        Tokenizer::from_vocab(SMALL.as_bytes()).expect("valid vocabulary")
    }

    fn ids(text: &str) -> Vec<u32> {
        small().encode(text).expect("encodes")
    }

    #[test]
    fn frame_ids_come_from_the_vocabulary() {
        assert_eq!(ids(""), [2, 3]);
        assert_eq!(ids("A cats dog"), [2, 4, 5, 6, 1, 3]);
        assert_eq!(ids("a [SEP] a[PAD]"), [2, 4, 3, 4, 0, 3]);
    }

    #[test]
    fn truncation_keeps_the_frame() {
        let cut = |max| small().encode_truncated("a cat a cat", max).expect("encodes");
        assert_eq!(cut(6), [2, 4, 5, 4, 5, 3]);
        assert_eq!(cut(5), [2, 4, 5, 4, 3]);
        assert_eq!(cut(2), [2, 3]);
        assert_eq!(cut(0), [2, 3]);
    }

    #[test]
    fn a_tokenizer_survives_its_own_files() {
        assert_eq!(small().vocab_txt(), SMALL);
        let json = small().to_json().expect("serialises");
        let again = Tokenizer::from_json(json.as_bytes()).expect("reads itself");
        assert_eq!(again.to_json().expect("serialises"), json);
        assert_eq!(again.vocab_len(), 7);
    }

    #[test]
    fn truncation_and_padding_in_the_file_are_ignored() {
        let json = small().to_json().expect("serialises");
        let json = json.replace(
            "\"truncation\":null",
            r#""truncation":{"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":0}"#,
        );
        let json = json.replace("\"padding\":null", r#""padding":{"strategy":{"Fixed":16},"direction":"Right","pad_to_multiple_of":null,"pad_id":0,"pad_type_id":0,"pad_token":"[PAD]"}"#);
        assert!(json.contains("max_length") && json.contains("Fixed"), "the file was changed");
        let tokenizer = Tokenizer::from_json(json.as_bytes()).expect("valid");
        assert_eq!(tokenizer.encode("a cat a cat").expect("encodes"), [2, 4, 5, 4, 5, 3]);
    }

    #[test]
    fn a_missing_special_token_is_named() {
        for token in [CLS, SEP, UNK] {
            let vocab = SMALL.replace(token, "x");
            let error = Tokenizer::from_vocab(vocab.as_bytes()).expect_err(token).to_string();
            assert!(error.contains(token) && error.contains(VOCAB), "{error}");
            let json = small().to_json().expect("serialises").replace(token, "x");
            let error = Tokenizer::from_json(json.as_bytes()).expect_err(token).to_string();
            assert!(error.contains(JSON), "{error}");
        }
    }
}
