//! The scores that an output has, row by row: for rows that are not scored again.

use std::collections::VecDeque;

use arrow_array::cast::AsArray;
use arrow_array::types::Float32Type;
use arrow_array::{Array, ArrayRef, RecordBatch};

use crate::output::{COSINE_SCORE, FINGERPRINT, ITM_SCORE, OutputHeads, SCORE_ERROR, SCORE_STATUS};
use crate::reader::Batches;
use crate::{CaptionScore, Error, Footer, Location, Result, RowScore, key_texts};

/// Rows that are read together: they have no images and no captions.
const BATCH_ROWS: usize = 1024;

/// See the module.
pub struct EarlierScores {
    batches: Batches,
    /// Read, and not yet given.
    rows: VecDeque<Option<RowScore>>,
    /// Status of rows whose scores stand.
    standing: Vec<&'static str>,
    uri: String,
}

impl EarlierScores {
    /// Of the output `location`, which the work of this fingerprint made with these heads. Rows of another status than those of
    /// `standing` are to be scored again.
    ///
    /// # Errors
    /// When it cannot be read, or is another output.
    pub async fn open(
        location: &Location,
        (fingerprint, heads): (&str, OutputHeads),
        standing: Vec<&'static str>,
    ) -> Result<Self> {
        let footer = Footer::read(location).await?;
        if footer.schema().metadata().get(FINGERPRINT).map(String::as_str) != Some(fingerprint) {
            return Err(Error::changed(location.uri()));
        }
        // A head that is off has no scores of ours, but may have a column of the user's.
        let columns = [(ITM_SCORE, heads.itm), (COSINE_SCORE, heads.cosine), (SCORE_STATUS, true), (SCORE_ERROR, true)];
        let ours = columns.into_iter().filter_map(|(name, is_ours)| is_ours.then_some(name));
        let mut roots: Vec<usize> = ours.filter_map(|name| footer.schema().index_of(name).ok()).collect();
        roots.sort_unstable();
        let batches = Batches::of(footer, roots, BATCH_ROWS);
        Ok(Self { batches, rows: VecDeque::new(), standing, uri: location.uri().to_owned() })
    }

    /// The scores of the next `count` rows; none where they do not stand.
    ///
    /// # Errors
    /// When the output cannot be read, or has no more rows.
    pub async fn next(&mut self, count: usize) -> Result<Vec<Option<RowScore>>> {
        while self.rows.len() < count {
            let foreign = || Error::NoScores { uri: self.uri.clone() };
            let batch = self.batches.next().await?.ok_or_else(foreign)?;
            self.rows.extend(scores(&batch, &self.standing).ok_or_else(foreign)?);
        }
        Ok(self.rows.drain(..count).collect())
    }
}

/// The rows of a batch; none where its columns have other types than ours.
fn scores(batch: &RecordBatch, standing: &[&'static str]) -> Option<Vec<Option<RowScore>>> {
    let (statuses, errors) = (batch.column_by_name(SCORE_STATUS)?, batch.column_by_name(SCORE_ERROR)?);
    let heads = [batch.column_by_name(ITM_SCORE), batch.column_by_name(COSINE_SCORE)];
    let rows = key_texts(statuses).into_iter().zip(key_texts(errors)).enumerate();
    rows.map(|(row, (status, error))| {
        let Some(status) = standing.iter().find(|known| **known == status) else { return Some(None) };
        let head = |head: Option<&ArrayRef>| head.map_or(Some(None), |head| captions(head, row).map(Some));
        let (itm, cosine) = (head(heads[0])?, head(heads[1])?);
        let count = itm.as_ref().or(cosine.as_ref()).map_or(0, Vec::len);
        let of = |head: &Option<Vec<Option<f32>>>, i: usize| head.as_ref().and_then(|head| *head.get(i)?);
        let score = |i| CaptionScore { itm: of(&itm, i), cosine: of(&cosine, i), fault: None };
        let scores = if *status == "ok" { (0..count).map(score).collect() } else { Vec::new() };
        Some(Some(RowScore { status, error: (*status != "ok").then_some(error), scores }))
    })
    .collect()
}

/// The scores of a row's captions.
fn captions(column: &ArrayRef, row: usize) -> Option<Vec<Option<f32>>> {
    if let Some(single) = column.as_primitive_opt::<Float32Type>() {
        return Some(vec![single.is_valid(row).then(|| single.value(row))]);
    }
    let lists = column.as_list_opt::<i32>()?;
    if lists.is_null(row) {
        return Some(Vec::new());
    }
    Some(lists.value(row).as_primitive_opt::<Float32Type>()?.iter().collect())
}
