//! GIF: the first frame on its canvas, as palette colours.

use super::samples::{from_grey, from_palette};
use super::{DecodeLimits, ImageError};
use crate::RgbImage;
use gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};
use std::num::NonZeroU64;

const FORMAT: &str = "GIF";

pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.set_memory_limit(MemoryLimit::Bytes(NonZeroU64::new(limits.bytes_max()).unwrap_or(NonZeroU64::MIN)));
    let mut decoder = options.read_info(bytes).map_err(refused)?;
    let screen = (u32::from(decoder.width()), u32::from(decoder.height()));
    let Some(frame) = decoder.next_frame_info().map_err(refused)? else {
        return Err(ImageError::Truncated { format: FORMAT });
    };
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (frame_width, frame_height) = (usize::from(frame.width), usize::from(frame.height));
    // A frame that sticks out grows the canvas.
    let right = u32::from(frame.left) + u32::from(frame.width);
    let bottom = u32::from(frame.top) + u32::from(frame.height);
    let (width, height) = limits.check(screen.0.max(right), screen.1.max(bottom))?;
    // What the frame does not cover has the transparent index, or 0; transparency itself is ignored.
    let mut canvas = vec![frame.transparent.unwrap_or(0); width * height];
    let mut indices = vec![0; frame_width * frame_height];
    let palette = frame.palette.clone();
    decoder.read_into_buffer(&mut indices).map_err(refused)?;
    if frame_width > 0 {
        for (row, y) in indices.chunks_exact(frame_width).zip(top..) {
            canvas[y * width + left..][..frame_width].copy_from_slice(row);
        }
    }
    let palette = palette.as_deref().or(decoder.global_palette()).unwrap_or_default().as_chunks::<3>().0;
    // A palette that is a grey ramp makes a grey image, where an index behind the palette means itself.
    let is_grey = palette.iter().zip(0..=u8::MAX).all(|(&colour, value)| colour == [value; 3]);
    Ok(match is_grey {
        true => from_grey(width, height, canvas.into_iter()),
        false => from_palette(width, height, &canvas, palette.iter().copied()),
    })
}

fn refused(error: DecodingError) -> ImageError {
    match error {
        DecodingError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated { format: FORMAT }
        }
        error => ImageError::damaged(FORMAT, error),
    }
}
