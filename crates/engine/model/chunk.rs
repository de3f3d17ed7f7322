//! The captions of one pass of the text encoder, packed row by row, each once: a caption that comes again (spam does, and so do the
//! captions of an image that comes again) costs nothing but its place in the results.
//!
//! The matching head needs a caption once for each image, the cosine head once.

use crate::backend::Span;
use crate::{Batch, Heads};

/// What the text encoder needs on the host; all of it is allocated at load. A pass has the captions from some one on.
pub(super) struct Chunk {
    /// Token and position of each row: the matching rows, then the cosine rows.
    pub(super) ids: Vec<u32>,
    pub(super) places: Vec<u32>,
    /// Rows of each caption that is encoded.
    pub(super) captions: Vec<Span>,
    /// Matching rows of each image, against its tokens.
    pub(super) images: Vec<Span>,
    /// The same with the tokens counted from those of the pass's first image.
    pub(super) images_alone: Vec<Span>,
    /// First row of each caption that is encoded.
    pub(super) first_rows: Vec<usize>,
    /// Rows that see an image.
    pub(super) cross_rows: usize,
    /// Captions of the matching head: pairs that differ.
    pub(super) pairs: usize,
    /// Which of these pairs is each caption of the pass.
    pub(super) pair_of: Vec<usize>,
    /// Which of the cosine head's captions.
    pub(super) text_of: Vec<usize>,
    /// Captions of the pass by their tokens.
    order: Vec<usize>,
    /// For each caption the first one with its tokens, and the first one with its image, too.
    same: Vec<(usize, usize)>,
}

impl Chunk {
    pub(super) fn new(rows_max: usize, captions_max: usize, images_max: usize) -> Self {
        Self {
            ids: Vec::with_capacity(rows_max),
            places: Vec::with_capacity(rows_max),
            captions: Vec::with_capacity(rows_max),
            images: Vec::with_capacity(images_max),
            images_alone: Vec::with_capacity(images_max),
            first_rows: Vec::with_capacity(rows_max.max(images_max)),
            cross_rows: 0,
            pairs: 0,
            pair_of: Vec::with_capacity(captions_max),
            text_of: Vec::with_capacity(captions_max),
            order: Vec::with_capacity(captions_max),
            same: Vec::with_capacity(captions_max),
        }
    }

    /// First row of each image.
    pub(super) fn image_rows(&mut self, images: usize, image_tokens: usize) -> &[usize] {
        self.first_rows.clear();
        self.first_rows.extend((0..images).map(|image| image * image_tokens));
        &self.first_rows
    }

    /// Packs as many captions from `first` on as have `tokens_max` tokens together; returns the first that did not fit.
    /// `itm_token` replaces the first token of matching rows.
    pub(super) fn pack(
        &mut self,
        batch: &Batch,
        first: usize,
        (heads, itm_token): (Heads, Option<u32>),
        (tokens_max, image_tokens): (usize, usize),
    ) -> usize {
        let (mut last, mut tokens) = (first, 0);
        while last < batch.captions() && tokens + batch.caption(last).len() <= tokens_max {
            tokens += batch.caption(last).len();
            last += 1;
        }
        self.clear();
        self.find_repeats(batch, first, last - first);
        if heads.itm {
            for caption in 0..last - first {
                self.push_pair(batch, (first, caption), itm_token, image_tokens);
            }
        }
        let first_tokens = self.images.first().map_or(0, |span| span.kv);
        self.images_alone.extend(self.images.iter().map(|span| Span { kv: span.kv - first_tokens, ..*span }));
        (self.pairs, self.cross_rows) = (self.captions.len(), self.ids.len());
        if heads.cosine {
            for caption in 0..last - first {
                let (same, _) = self.same[caption];
                if same == caption {
                    self.push(batch.caption(first + caption), None);
                }
                let text = if same == caption { self.captions.len() - 1 - self.pairs } else { self.text_of[same] };
                self.text_of.push(text);
            }
        }
        last
    }

    fn clear(&mut self) {
        [&mut self.ids, &mut self.places].into_iter().for_each(Vec::clear);
        [&mut self.captions, &mut self.images, &mut self.images_alone].into_iter().for_each(Vec::clear);
        [&mut self.first_rows, &mut self.pair_of, &mut self.text_of, &mut self.order].into_iter().for_each(Vec::clear);
        self.same.clear();
    }

    /// Captions with equal tokens stand side by side once they are sorted, those of one image too: images never decrease.
    fn find_repeats(&mut self, batch: &Batch, first: usize, count: usize) {
        let tokens = |caption: usize| batch.caption(first + caption);
        self.order.extend(0..count);
        // Sorting in place allocates nothing.
        self.order.sort_unstable_by(|a, b| tokens(*a).cmp(tokens(*b)).then(a.cmp(b)));
        self.same.extend((0..count).map(|caption| (caption, caption)));
        for i in 1..count {
            let (before, caption) = (self.order[i - 1], self.order[i]);
            if tokens(before) == tokens(caption) {
                let (text, pair) = self.same[before];
                let pair =
                    if batch.image_of(first + before) == batch.image_of(first + caption) { pair } else { caption };
                self.same[caption] = (text, pair);
            }
        }
    }

    fn push_pair(&mut self, batch: &Batch, (first, caption): (usize, usize), token: Option<u32>, image_tokens: usize) {
        let (_, same) = self.same[caption];
        if same != caption {
            self.pair_of.push(self.pair_of[same]);
            return;
        }
        self.pair_of.push(self.captions.len());
        let span = self.push(batch.caption(first + caption), token);
        let kv = batch.image_of(first + caption) * image_tokens;
        match self.images.last_mut() {
            Some(image) if image.kv == kv => image.q_len += span.q_len,
            _ => self.images.push(Span { kv, kv_len: image_tokens, ..span }),
        }
    }

    /// Appends a caption's rows; `first` replaces its first token.
    fn push(&mut self, tokens: &[u32], first: Option<u32>) -> Span {
        let row = self.ids.len();
        let span = Span { q: row, q_len: tokens.len(), kv: row, kv_len: tokens.len() };
        self.first_rows.push(row);
        self.captions.push(span);
        self.ids.extend_from_slice(tokens);
        self.places.extend((0..).take(tokens.len()));
        if let Some(id) = first {
            self.ids[row] = id;
        }
        span
    }
}
