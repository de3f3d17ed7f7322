//! What an output shard holds: the input's columns, then the scores. Decides the schema and builds the score columns.
//!
//! ```text
//! input columns, as they were    itm_score  cosine_score  [best_caption]  [keep]  score_status  score_error
//! ```
//!
//! A head that is off has no column. Where the caption is a list, the scores are lists of the same length and
//! `best_caption` is the position of the best one by `itm_score` (by `cosine_score` where that is the only head). `keep`
//! is true where at least one caption passes every threshold that is set, so a row without a score is never kept. Of captions
//! that are selected, the list is the shorter one, and so are those of the scores.
//!
//! Scores of an earlier run are replaced: every column of ours where the input is an output of ours, else only columns
//! of the names that are written now.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::builder::{Float32Builder, ListBuilder};
use arrow_array::{ArrayRef, BooleanArray, Float32Array, Int32Array, RecordBatch, StringArray};
use arrow_cast::cast;
use arrow_schema::{ArrowError, DataType, Field, FieldRef, Schema, SchemaRef};
use parquet::file::metadata::KeyValue;

use crate::selection::{self, Select, Selected};
use crate::{CaptionKind, Columns, Error, Footer, Location, Result, features, views};

pub(crate) const ITM_SCORE: &str = "itm_score";
pub(crate) const COSINE_SCORE: &str = "cosine_score";
const BEST_CAPTION: &str = "best_caption";
/// Whether a row passes the thresholds.
const KEEP: &str = "keep";
/// Of each row: "ok", or why it has no score.
pub(crate) const SCORE_STATUS: &str = "score_status";
pub(crate) const SCORE_ERROR: &str = "score_error";
/// Every column an output of ours can have.
const OURS: [&str; 6] = [ITM_SCORE, COSINE_SCORE, BEST_CAPTION, KEEP, SCORE_STATUS, SCORE_ERROR];
/// Key of the metadata that names the work: outputs of one work have the same rows.
pub const FINGERPRINT: &str = "capsieve.fingerprint";
/// Key of the metadata that says which rows of the work are there, see [`OutputRows`].
const ROWS: &str = "capsieve.rows";
/// Its values: all of the input's, ...
pub const ROWS_ALL: &str = "all";
/// ... those that are kept, ...
pub const ROWS_KEPT: &str = "kept";
/// ... those that are not.
pub const ROWS_REJECTED: &str = "rejected";
/// Begins the keys of our file metadata.
const METADATA_PREFIX: &str = "capsieve.";
/// Arrow's own note of its schema, written anew by the Parquet library.
const ARROW_SCHEMA_KEY: &str = "ARROW:schema";
const HUGGINGFACE_KEY: &str = "huggingface";

/// Which scores there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputHeads {
    /// `itm_score`.
    pub itm: bool,
    /// `cosine_score`.
    pub cosine: bool,
}

/// What the output holds besides the input's columns.
#[derive(Clone, Debug)]
pub struct OutputOptions {
    /// Which scores there are.
    pub heads: OutputHeads,
    /// Leaves the image column out.
    pub drop_images: bool,
    /// The least `itm_score` to keep a row.
    pub min_itm: Option<f32>,
    /// The least `cosine_score` to keep a row.
    pub min_cosine: Option<f32>,
    /// Which captions of its list a kept row is written with.
    pub select: Select,
    /// Which rows are written.
    pub rows: OutputRows,
    /// File metadata: `capsieve.model` and so on.
    pub metadata: Vec<(String, String)>,
    /// Replaces an output that is there; otherwise that is an error.
    pub overwrite: bool,
}

impl OutputOptions {
    /// All rows with these scores, where nothing is yet.
    pub fn new(heads: OutputHeads) -> Self {
        let (select, rows, metadata) = (Select::All, OutputRows::All, Vec::new());
        Self { heads, drop_images: false, min_itm: None, min_cosine: None, select, rows, metadata, overwrite: false }
    }
}

/// Which rows an output has.
#[derive(Clone, Debug, Default)]
pub enum OutputRows {
    /// All of the input's.
    #[default]
    All,
    /// Those that are kept; the others go there, if anywhere.
    Kept {
        /// Another shard of the same columns.
        rejected: Option<Location>,
    },
}

/// Which rows of its work an output has, as it says itself.
pub fn rows_of(output: &Footer) -> &str {
    output.schema().metadata().get(ROWS).map_or(ROWS_ALL, String::as_str)
}

/// The entry of an output's metadata that says so.
pub(crate) fn rows_entry(rows: &str) -> KeyValue {
    KeyValue { key: ROWS.to_owned(), value: Some(rows.to_owned()) }
}

/// The scores of one caption; none where the head is off or the caption is null.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CaptionScore {
    /// The probability that the caption describes the image.
    pub itm: Option<f32>,
    /// The cosine of the two feature vectors.
    pub cosine: Option<f32>,
    /// Why neither is there, where another caption of the row has its scores: a status as a row's.
    pub fault: Option<&'static str>,
}

/// What became of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct RowScore {
    /// "ok" or a stable reason.
    pub status: &'static str,
    /// Why there is no score, in one line.
    pub error: Option<String>,
    /// One for each caption of the row, so at most one where the caption is no list; empty when the row failed.
    pub scores: Vec<CaptionScore>,
}

/// The layout of one output shard.
pub(crate) struct Layout {
    schema: SchemaRef,
    /// The same as it is encoded: what is carried over comes as views.
    encoded: SchemaRef,
    /// Input columns that are carried over.
    carried: Vec<usize>,
    /// Names of input columns that are no scores of ours, and give way to columns of ours.
    covered: Vec<String>,
    /// The input's column of captions, where they are selected.
    selected: Option<usize>,
    lists: bool,
    options: OutputOptions,
}

impl Layout {
    pub(crate) fn new(input: &Schema, columns: &Columns, options: &OutputOptions) -> Result<Self> {
        columns.check(input)?;
        check_thresholds(options)?;
        let lists = columns.caption_kind == CaptionKind::List;
        let scores = score_fields(options, lists);
        let rescored = input.metadata().keys().any(|key| key.starts_with(METADATA_PREFIX));
        let replaced = |name: &String| {
            scores.iter().any(|field| field.name() == name) || (rescored && OURS.contains(&name.as_str()))
        };
        let dropped = |index: usize| options.drop_images && index == columns.image;
        let carried: Vec<usize> = (0..input.fields().len())
            .filter(|index| !dropped(*index) && !replaced(input.field(*index).name()))
            .collect();
        let names = input.fields().iter().map(|field| field.name());
        let covered = names.filter(|name| !rescored && replaced(name)).cloned().collect();
        let selected = (lists && options.select != Select::All).then_some(columns.caption);
        let plain = |index: &usize| match input.fields().get(*index) {
            Some(captions) if selected == Some(*index) => selection::field(captions),
            _ => Arc::clone(&input.fields()[*index]),
        };
        let fields: Vec<FieldRef> = carried.iter().map(plain).chain(scores.iter().cloned()).collect();
        // A list of another length than before is another feature.
        let fixed = |index: &usize| matches!(input.field(*index).data_type(), DataType::FixedSizeList(..));
        let shorter = selected.filter(fixed).map(|index| selection::field(&input.fields()[index]));
        let stated: Vec<FieldRef> = shorter.into_iter().chain(scores.iter().cloned()).collect();
        let metadata = metadata(input, &fields, &stated, options);
        let (plain, scores) = fields.split_at(carried.len());
        let encoded: Vec<FieldRef> = plain.iter().map(views::field).chain(scores.iter().cloned()).collect();
        let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
        let encoded = Arc::new(Schema::new(encoded));
        Ok(Self { schema, encoded, carried, covered, selected, lists, options: options.clone() })
    }

    pub(crate) fn has_thresholds(&self) -> bool {
        has_thresholds(&self.options)
    }

    pub(crate) fn covered(&self) -> &[String] {
        &self.covered
    }

    pub(crate) fn encoded(&self) -> &SchemaRef {
        &self.encoded
    }

    pub(crate) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The output rows, and which of them are kept.
    pub(crate) fn build(
        &self,
        input: &RecordBatch,
        rows: &[RowScore],
    ) -> Result<(RecordBatch, BooleanArray), ArrowError> {
        assert_eq!(input.num_rows(), rows.len(), "one score for each row");
        let selected: Option<Selected> = self.selected.map(|_| rows.iter().map(|row| self.select(row)).collect());
        let carried = self.carried.iter().zip(self.encoded.fields());
        // A file that could not be read as views, or a caller with rows of its own.
        let viewed = |(index, field): (&usize, &FieldRef)| {
            let column = match &selected {
                Some(selected) if self.selected == Some(*index) => {
                    &selection::captions(input.column(*index), selected)?
                }
                _ => input.column(*index),
            };
            let plain = column.data_type() != field.data_type();
            if plain && views::data_type(column.data_type()) == *field.data_type() {
                return cast(column, field.data_type());
            }
            Ok(Arc::clone(column))
        };
        let mut arrays = carried.map(viewed).collect::<Result<Vec<ArrayRef>, _>>()?;
        let keep = BooleanArray::from_iter(rows.iter().map(|row| Some(self.keeps(row))));
        let rows = &*selected.map_or(Cow::Borrowed(rows), |selected| Cow::Owned(scores_of(rows, &selected)));
        let heads = self.options.heads;
        if heads.itm {
            arrays.push(self.scores(rows, |score| score.itm));
        }
        if heads.cosine {
            arrays.push(self.scores(rows, |score| score.cosine));
        }
        if self.lists {
            arrays.push(Arc::new(rows.iter().map(|row| best_caption(row, heads)).collect::<Int32Array>()));
        }
        if self.has_thresholds() {
            arrays.push(Arc::new(keep.clone()));
        }
        arrays.push(Arc::new(rows.iter().map(|row| Some(row.status)).collect::<StringArray>()));
        arrays.push(Arc::new(rows.iter().map(|row| row.error.as_deref()).collect::<StringArray>()));
        let batch = RecordBatch::try_new(Arc::clone(&self.encoded), arrays)?;
        Ok((batch, keep))
    }

    /// Without a threshold every row with a score counts as kept.
    fn keeps(&self, row: &RowScore) -> bool {
        row.scores.iter().any(|score| self.passes(score))
    }

    fn passes(&self, score: &CaptionScore) -> bool {
        let passes = |score: Option<f32>, least: Option<f32>| {
            least.is_none_or(|least| score.is_some_and(|score| score >= least))
        };
        let scored = score.itm.or(score.cosine).is_some();
        scored && passes(score.itm, self.options.min_itm) && passes(score.cosine, self.options.min_cosine)
    }

    /// The captions that a row is written with; none: all.
    fn select(&self, row: &RowScore) -> Option<Vec<usize>> {
        let passing = || row.scores.iter().enumerate().filter(|(_, score)| self.passes(score));
        match self.options.select {
            Select::Matching => Some(passing().map(|(caption, _)| caption).collect()).filter(|_| self.keeps(row)),
            Select::Best => best(passing(), self.options.heads).map(|caption| vec![caption]),
            Select::All => None,
        }
    }

    fn scores(&self, rows: &[RowScore], head: fn(&CaptionScore) -> Option<f32>) -> ArrayRef {
        if !self.lists {
            let single = |row: &RowScore| {
                assert!(row.scores.len() <= 1, "the caption is no list, so a row has one score");
                row.scores.first().and_then(head)
            };
            return Arc::new(rows.iter().map(single).collect::<Float32Array>());
        }
        let mut lists = ListBuilder::new(Float32Builder::new()).with_field(element());
        for row in rows {
            row.scores.iter().for_each(|score| lists.values().append_option(head(score)));
            lists.append(!row.scores.is_empty());
        }
        Arc::new(lists.finish())
    }
}

fn check_thresholds(options: &OutputOptions) -> Result<()> {
    if options.min_itm.is_some() && !options.heads.itm {
        return Err(Error::ThresholdWithoutHead { head: "itm" });
    }
    if options.min_cosine.is_some() && !options.heads.cosine {
        return Err(Error::ThresholdWithoutHead { head: "cosine" });
    }
    Ok(())
}

fn has_thresholds(options: &OutputOptions) -> bool {
    options.min_itm.is_some() || options.min_cosine.is_some()
}

/// Named as the Parquet specification asks, so that other readers see a list of the same name.
fn element() -> Field {
    Field::new("element", DataType::Float32, true)
}

fn score_fields(options: &OutputOptions, lists: bool) -> Vec<FieldRef> {
    let score = if lists { DataType::List(Arc::new(element())) } else { DataType::Float32 };
    let mut fields = Vec::new();
    if options.heads.itm {
        fields.push(Field::new(ITM_SCORE, score.clone(), true));
    }
    if options.heads.cosine {
        fields.push(Field::new(COSINE_SCORE, score, true));
    }
    if lists {
        fields.push(Field::new(BEST_CAPTION, DataType::Int32, true));
    }
    if has_thresholds(options) {
        fields.push(Field::new(KEEP, DataType::Boolean, false));
    }
    fields.push(Field::new(SCORE_STATUS, DataType::Utf8, false));
    fields.push(Field::new(SCORE_ERROR, DataType::Utf8, true));
    fields.into_iter().map(Arc::new).collect()
}

/// The first of the best captions.
fn best_caption(row: &RowScore, heads: OutputHeads) -> Option<i32> {
    best(row.scores.iter().enumerate(), heads).and_then(|index| i32::try_from(index).ok())
}

fn best<'a>(scores: impl Iterator<Item = (usize, &'a CaptionScore)>, heads: OutputHeads) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (index, score) in scores {
        let score = if heads.itm { score.itm } else { score.cosine };
        if let Some(score) = score.filter(|score| !score.is_nan())
            && best.is_none_or(|(_, least)| score > least)
        {
            best = Some((index, score));
        }
    }
    best.map(|(index, _)| index)
}

/// The scores of the captions that are selected.
fn scores_of(rows: &[RowScore], selected: &Selected) -> Vec<RowScore> {
    let scores = |(row, selected): (&RowScore, &Option<Vec<usize>>)| match selected {
        Some(captions) => {
            let scores = captions.iter().map(|caption| row.scores[*caption]).collect();
            RowScore { scores, error: row.error.clone(), ..*row }
        }
        None => row.clone(),
    };
    rows.iter().zip(selected).map(scores).collect()
}

/// The input's key-value metadata, less what a Parquet writer or an earlier run of ours put there, and ours.
fn metadata(
    input: &Schema,
    fields: &[FieldRef],
    scores: &[FieldRef],
    options: &OutputOptions,
) -> HashMap<String, String> {
    let foreign = |key: &String| key != ARROW_SCHEMA_KEY && !key.starts_with(METADATA_PREFIX);
    let mut metadata: HashMap<String, String> =
        input.metadata().iter().filter(|(key, _)| foreign(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
    if let Some(text) = metadata.get_mut(HUGGINGFACE_KEY)
        && let Some(updated) = features::update(text, fields, scores)
    {
        *text = updated;
    }
    metadata.extend(options.metadata.iter().cloned());
    metadata
}
