//! A batch: images and, for each, its captions.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Info};

/// Images and their captions, ready for the engine.
///
/// Letters: B images of `[S, S, 3]` u8 (rows top to bottom, RGB), C captions of token ids `[CLS] ... [SEP]` without
/// padding. A caption belongs to the image pushed last before it; a pair is one caption with its image.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Another one whenever the images change.
    images_id: u64,
    image_size: usize,
    /// `[B, S, S, 3]`
    pixels: Vec<u8>,
    /// All captions' tokens.
    tokens: Vec<u32>,
    /// Where each caption's tokens end.
    ends: Vec<usize>,
    /// Image of each caption; never decreases.
    images: Vec<usize>,
}

impl Batch {
    /// An empty batch for images of `image_size` x `image_size` pixels.
    pub fn new(image_size: usize) -> Self {
        let images_id = next_id();
        Self { images_id, image_size, pixels: Vec::new(), tokens: Vec::new(), ends: Vec::new(), images: Vec::new() }
    }

    /// Forgets the content, keeps the memory.
    pub fn clear(&mut self) {
        self.images_id = next_id();
        self.pixels.clear();
        self.tokens.clear();
        self.ends.clear();
        self.images.clear();
    }

    /// Adds an image, `pixels.len() == S * S * 3`.
    pub fn push_image(&mut self, pixels: &[u8]) {
        assert_eq!(pixels.len(), self.image_bytes(), "an image is [{0}, {0}, 3]", self.image_size);
        self.images_id = next_id();
        self.pixels.extend_from_slice(pixels);
    }

    /// Adds a caption of the image pushed last.
    pub fn push_caption(&mut self, tokens: &[u32]) {
        let image = self.images().checked_sub(1).expect("a caption follows its image");
        self.tokens.extend_from_slice(tokens);
        self.ends.push(self.tokens.len());
        self.images.push(image);
    }

    /// Number of images.
    pub fn images(&self) -> usize {
        self.pixels.len() / self.image_bytes()
    }

    /// Number of captions: of pairs.
    pub fn captions(&self) -> usize {
        self.ends.len()
    }

    /// Number of tokens of all captions.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Batches with the same id have the same images.
    pub(crate) fn images_id(&self) -> u64 {
        self.images_id
    }

    fn image_bytes(&self) -> usize {
        self.image_size * self.image_size * 3
    }

    pub(crate) fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    pub(crate) fn caption(&self, caption: usize) -> &[u32] {
        let start = caption.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tokens[start..self.ends[caption]]
    }

    pub(crate) fn image_of(&self, caption: usize) -> usize {
        self.images[caption]
    }

    /// Checks the batch against what the scorer was loaded for.
    pub(crate) fn check(&self, info: &Info) -> Result<(), Error> {
        let (config, bad) = (&info.config, |reason: String| Err(Error::Batch { reason }));
        if self.image_size != config.vision.image_size {
            return bad(format!("images of {} px for a model of {} px", self.image_size, config.vision.image_size));
        }
        if self.images() > info.images_max {
            return bad(format!("{} images, the scorer was loaded for {}", self.images(), info.images_max));
        }
        for caption in 0..self.captions() {
            let tokens = self.caption(caption);
            if tokens.is_empty() || tokens.len() > config.text.positions {
                let (count, max) = (tokens.len(), config.text.positions);
                return bad(format!("caption {caption} has {count} tokens, the model takes 1 to {max}"));
            }
            if let Some(id) = tokens.iter().find(|id| **id as usize >= config.text.vocab) {
                return bad(format!("caption {caption} has token {id}, the vocabulary {} rows", config.text.vocab));
            }
        }
        Ok(())
    }
}

fn next_id() -> u64 {
    static IDS: AtomicU64 = AtomicU64::new(0);
    IDS.fetch_add(1, Ordering::Relaxed)
}
