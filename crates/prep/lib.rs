//! Encoded images and caption text to model input.
//!
//! ```text
//! bytes --decode--> RgbImage --resize--> S x S x 3 u8 --ImageSpec::pixel_lut--> pixels (the engine applies the table)
//! text  --Tokenizer--> [CLS] ids [SEP]
//! ```
//!
//! Everything here is a pure function of its arguments: no files, no network, no clock, no threads, no async, so that the
//! worker may call it from as many threads as it likes. The results are defined by two programs that are not ours: images
//! equal Pillow up to version 12 ("open, convert to RGB, resize bicubic"), captions equal the tokenizer of
//! BERT uncased. Where a rule looks odd (clipped 16-bit grey, dropped alpha), the model was published with it.
//!
//! Bad input is an error of one row ([`ImageError`]); a bad model folder is an error of the job ([`Error`]).
#![forbid(unsafe_code)]

mod decode;
mod error;
mod resize;
mod spec;
mod tokenizer;

pub use decode::{DecodeLimits, ImageError, decode_rgb};
pub use error::Error;
pub use resize::resize_bicubic;
pub use spec::ImageSpec;
pub use tokenizer::Tokenizer;

/// Decoded pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Rows from top to bottom, pixels from left to right, red green blue: `height * width * 3` bytes.
    pub pixels: Vec<u8>,
}

/// The whole image path: `spec.size * spec.size * 3` bytes, laid out as in [`RgbImage`].
///
/// # Errors
/// When `bytes` are not a picture within the limits, see [`ImageError`].
pub fn prepare_image(bytes: &[u8], spec: &ImageSpec, limits: &DecodeLimits) -> Result<Vec<u8>, ImageError> {
    let image = decode_rgb(bytes, limits)?;
    Ok(resize_bicubic(&image, spec.size, spec.size).pixels)
}
