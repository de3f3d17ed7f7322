//! PNG, WebP and BMP: lossless or self-contained formats whose samples come ready from the `image` crate.

use super::samples::{clip, from_grey, high_byte, in_place, keep_high_bytes, opaque, stretch};
use super::{DecodeLimits, ImageError};
use crate::RgbImage;
use image::codecs::{bmp::BmpDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{ColorType, ImageDecoder, Limits};
use std::io::Cursor;

/// Offset of the colour type in a PNG: signature, chunk length, "IHDR", width, height and depth come first.
const PNG_COLOUR_TYPE: usize = 25;

pub(super) fn decode_png(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let decoder = PngDecoder::with_limits(Cursor::new(bytes), allocation(limits)).map_err(|e| refused("PNG", e))?;
    // A colour key turns grey into grey + alpha in the decoder, but only real 16-bit grey is clipped.
    let is_grey = bytes.get(PNG_COLOUR_TYPE) == Some(&0);
    read("PNG", decoder, is_grey, limits)
}

pub(super) fn decode_webp(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    // The container names its own length; the decoder would forgive a missing last byte.
    let promised =
        bytes.get(4..).and_then(|rest| rest.first_chunk()).map_or(0, |&size| u32::from_le_bytes(size) as usize);
    if promised > bytes.len() - 8 {
        return Err(ImageError::Truncated { format: "WebP" });
    }
    let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(|e| refused("WebP", e))?;
    read("WebP", decoder, false, limits)
}

pub(super) fn decode_bmp(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let decoder = BmpDecoder::new(Cursor::new(bytes)).map_err(|e| refused("BMP", e))?;
    let mut image = read("BMP", decoder, false, limits)?;
    if let Some(value_max) = bmp_16_bit_channels(bytes) {
        // The decoder rounds where Pillow truncates. The stored value can be had back from the rounded one.
        for pixel in image.pixels.as_chunks_mut::<3>().0 {
            for (sample, value_max) in pixel.iter_mut().zip(value_max) {
                let value = (u32::from(*sample) * u32::from(value_max) + 127) / 255;
                *sample = stretch(value as u8, value_max);
            }
        }
    }
    Ok(image)
}

/// The largest red, green and blue of a BMP with 16 bits a pixel.
fn bmp_16_bit_channels(bytes: &[u8]) -> Option<[u8; 3]> {
    const BITFIELDS: u8 = 3;
    const GREEN_OF_565: [u8; 4] = 0x07E0u32.to_le_bytes();
    let header_bytes = u32::from_le_bytes(*bytes.get(14..)?.first_chunk()?);
    let bits = u16::from_le_bytes(*bytes.get(28..)?.first_chunk()?);
    if header_bytes < 40 || bits != 16 {
        return None;
    }
    let green_is_wide = bytes.get(30) == Some(&BITFIELDS) && bytes.get(58..62) == Some(GREEN_OF_565.as_slice());
    Some(if green_is_wide { [31, 63, 31] } else { [31; 3] })
}

fn read(
    format: &'static str,
    mut decoder: impl ImageDecoder,
    is_grey: bool,
    limits: &DecodeLimits,
) -> Result<RgbImage, ImageError> {
    let (width, height) = decoder.dimensions();
    let (width, height) = limits.check(width, height)?;
    decoder.set_limits(allocation(limits)).map_err(|e| refused(format, e))?;
    let color = decoder.color_type();
    let mut samples = vec![0; width * height * usize::from(color.bytes_per_pixel())];
    decoder.read_image(&mut samples).map_err(|e| refused(format, e))?;
    let wide = || samples.as_chunks::<2>().0.iter().map(|&sample| u16::from_ne_bytes(sample));
    Ok(match color {
        ColorType::Rgb8 => RgbImage { width, height, pixels: samples },
        ColorType::Rgba8 => in_place(width, height, samples, opaque),
        ColorType::L8 => from_grey(width, height, samples.iter().copied()),
        ColorType::La8 => from_grey(width, height, samples.iter().step_by(2).copied()),
        ColorType::L16 => from_grey(width, height, wide().map(|v| clip(v.into()))),
        ColorType::La16 if is_grey => from_grey(width, height, wide().step_by(2).map(|v| clip(v.into()))),
        ColorType::La16 => from_grey(width, height, wide().step_by(2).map(high_byte)),
        ColorType::Rgb16 | ColorType::Rgba16 => {
            keep_high_bytes(&mut samples);
            match color {
                ColorType::Rgb16 => RgbImage { width, height, pixels: samples },
                _ => in_place(width, height, samples, opaque),
            }
        }
        _ => return Err(ImageError::unsupported(format, "its sample type")),
    })
}

fn allocation(limits: &DecodeLimits) -> Limits {
    let mut allocation = Limits::no_limits();
    allocation.max_alloc = Some(limits.bytes_max());
    allocation
}

fn refused(format: &'static str, error: image::ImageError) -> ImageError {
    match error {
        image::ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated { format }
        }
        image::ImageError::Unsupported(e) => ImageError::unsupported(format, e),
        error => ImageError::damaged(format, error),
    }
}
