//! TIFF. Rare in caption data, but Pillow's table of kinds is long, so this file is too.

use super::samples::{
    clip, cmyk_to_rgb, drop_extra, from_grey, from_palette, from_pixels, high_byte, stretch, unpremultiply,
};
use super::{DecodeLimits, ImageError};
use crate::RgbImage;
use std::borrow::Cow;
use std::io::Cursor;
use tiff::ColorType;
use tiff::decoder::{BufferLayoutPreference, Decoder, DecodingResult, Limits};
use tiff::tags::Tag;
use tiff::{TiffError, TiffResult};

const FORMAT: &str = "TIFF";

pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let mut allocation = Limits::default();
    let bytes_max = usize::try_from(limits.bytes_max()).unwrap_or(usize::MAX);
    allocation.decoding_buffer_size = bytes_max;
    allocation.intermediate_buffer_size = bytes_max;
    let mut decoder = Decoder::new(Cursor::new(Cow::Borrowed(bytes))).map_err(refused)?.with_limits(allocation.clone());
    let (width, height) = decoder.dimensions().map_err(refused)?;
    let (width, height) = limits.check(width, height)?;
    let tags = Tags::read(&mut decoder).map_err(refused)?;
    if tags.bits_reversed {
        return Err(unsupported("reversed bit order"));
    }
    if let Some(indices) = tags.palette.as_ref().and_then(|_| palette_as_grey(bytes)) {
        // The decoder does not read palette images, but their indices are stored like grey values.
        decoder = Decoder::new(Cursor::new(indices)).map_err(refused)?.with_limits(allocation);
    }
    let color = decoder.colortype().map_err(refused)?;
    let mut samples = DecodingResult::U8(Vec::new());
    let layout = decoder.read_image_to_buffer(&mut samples).map_err(refused)?;
    let image = to_rgb(width, height, color, samples, &layout, &tags)?;
    Ok(oriented(image, tags.orientation))
}

/// The tags that change what a sample means.
struct Tags {
    white_is_zero: bool,
    bits_reversed: bool,
    is_jpeg: bool,
    premultiplied: bool,
    palette: Option<Vec<u16>>, // all reds, all greens, all blues
    orientation: u16,
}

impl Tags {
    fn read(decoder: &mut Decoder<Cursor<Cow<[u8]>>>) -> TiffResult<Self> {
        const PALETTE: u16 = 3;
        const JPEG: u16 = 7;
        let extra = decoder.find_tag_unsigned_vec::<u16>(Tag::ExtraSamples)?.unwrap_or_default();
        let photometric = decoder.find_tag_unsigned::<u16>(Tag::PhotometricInterpretation)?;
        let palette = if photometric == Some(PALETTE) { decoder.find_tag_unsigned_vec(Tag::ColorMap)? } else { None };
        Ok(Self {
            white_is_zero: photometric == Some(0),
            bits_reversed: decoder.find_tag_unsigned::<u16>(Tag::FillOrder)? == Some(2),
            is_jpeg: decoder.find_tag_unsigned::<u16>(Tag::Compression)? == Some(JPEG),
            premultiplied: extra.first() == Some(&1),
            palette,
            orientation: decoder.find_tag_unsigned::<u16>(Tag::Orientation)?.unwrap_or(1),
        })
    }
}

/// A copy of a classic TIFF whose first directory says "black is zero" instead of "palette".
fn palette_as_grey(bytes: &[u8]) -> Option<Cow<'static, [u8]>> {
    const ENTRY_BYTES: usize = 12;
    const PHOTOMETRIC: u16 = 262;
    let big_endian = bytes.first() == Some(&b'M');
    let u16_at = |at: usize| {
        let pair = *bytes.get(at..)?.first_chunk()?;
        Some(if big_endian { u16::from_be_bytes(pair) } else { u16::from_le_bytes(pair) })
    };
    let offset = *bytes.get(4..)?.first_chunk()?;
    let directory = (if big_endian { u32::from_be_bytes(offset) } else { u32::from_le_bytes(offset) }) as usize;
    let first = directory.checked_add(2)?;
    let entries = (0..usize::from(u16_at(directory)?)).map(|i| first + i * ENTRY_BYTES);
    let value = entries.into_iter().find(|&at| u16_at(at) == Some(PHOTOMETRIC))? + 8;
    let mut copy = bytes.to_vec();
    copy.get_mut(value..value + 2)?.copy_from_slice(&if big_endian { [0, 1] } else { [1, 0] });
    Some(Cow::Owned(copy))
}

fn to_rgb(
    width: usize,
    height: usize,
    color: ColorType,
    samples: DecodingResult,
    layout: &BufferLayoutPreference,
    tags: &Tags,
) -> Result<RgbImage, ImageError> {
    if let (ColorType::Gray(bits @ (1 | 2 | 4 | 8)), DecodingResult::U8(packed)) = (color, &samples) {
        let row_bytes = layout.row_stride.map_or(packed.len(), |stride| stride.get());
        let values = packed.chunks_exact(row_bytes.max(1)).flat_map(|row| unpack(row, bits).take(width));
        let value_max = 0xFF >> (8 - bits);
        return filled(match &tags.palette {
            Some(palette) => from_palette(width, height, &values.collect::<Vec<_>>(), colours(palette)),
            None => from_grey(width, height, values.map(|value| stretch(value, value_max))),
        });
    }
    if tags.palette.is_some() {
        return Err(unsupported("a palette with this sample type"));
    }
    if let ColorType::Gray(_) = color {
        return filled(wide_grey(width, height, samples, tags)?);
    }
    let bytes = match samples {
        DecodingResult::U8(samples) => samples,
        DecodingResult::U16(samples) => samples.into_iter().map(high_byte).collect(),
        _ => return Err(unsupported("its sample type")),
    };
    let channels = usize::from(color.num_samples());
    let bytes = if layout.planes > 1 { interleave(&bytes, channels, width * height) } else { bytes };
    let quads = || bytes.as_chunks::<4>().0.iter();
    filled(match color {
        ColorType::RGBA(_) if tags.premultiplied => {
            from_pixels(width, height, quads().map(|&pixel| unpremultiply(pixel)))
        }
        ColorType::RGB(_) | ColorType::RGBA(_) => drop_extra(width, height, &bytes, channels),
        ColorType::CMYK(_) => from_pixels(width, height, quads().map(|&pixel| cmyk_to_rgb(pixel))),
        ColorType::Multiband { bit_depth: 8, num_samples: 2 } if !tags.is_jpeg => {
            from_grey(width, height, bytes.iter().step_by(2).copied())
        }
        ColorType::YCbCr(_) => return Err(unsupported("YCbCr samples")),
        ColorType::Lab(_) => return Err(unsupported("Lab colour")),
        _ => return Err(unsupported("its combination of channels")),
    })
}

/// The entries of a colour map, high bytes only.
fn colours(palette: &[u16]) -> impl Iterator<Item = [u8; 3]> {
    let count = palette.len() / 3;
    (0..count).map(move |i| [palette[i], palette[count + i], palette[2 * count + i]].map(high_byte))
}

/// Grey of more than 8 bits. In Pillow's eyes it is never stored inverted; the decoder has undone an inversion.
fn wide_grey(width: usize, height: usize, samples: DecodingResult, tags: &Tags) -> Result<RgbImage, ImageError> {
    let invert = tags.white_is_zero;
    Ok(match samples {
        DecodingResult::I8(v) => from_grey(width, height, v.into_iter().map(|v| v as u8)),
        DecodingResult::U16(v) => {
            from_grey(width, height, v.into_iter().map(|v| clip(if invert { !v } else { v }.into())))
        }
        DecodingResult::I16(v) => from_grey(width, height, v.into_iter().map(|v| clip(v.into()))),
        // Pillow's 32-bit integers are signed: what does not fit is negative.
        DecodingResult::U32(v) => from_grey(width, height, v.into_iter().map(|v| clip((v as i32).into()))),
        DecodingResult::I32(v) => from_grey(width, height, v.into_iter().map(|v| clip(v.into()))),
        DecodingResult::F32(v) => {
            from_grey(width, height, v.into_iter().map(|v| if invert { 1.0 - v } else { v } as u8))
        }
        _ => return Err(unsupported("its sample type")),
    })
}

/// Samples of 1, 2, 4 or 8 bits.
fn unpack(row: &[u8], bits: u8) -> impl Iterator<Item = u8> {
    let (per_byte, mask) = (8 / bits, 0xFF >> (8 - bits));
    row.iter().flat_map(move |byte| (0..per_byte).map(move |i| (byte >> (8 - bits * (i + 1))) & mask))
}

/// Planes one after another to pixels.
fn interleave(planes: &[u8], channels: usize, pixels: usize) -> Vec<u8> {
    let mut out = vec![0; channels * pixels];
    for (channel, plane) in planes.chunks_exact(pixels).take(channels).enumerate() {
        for (pixel, &sample) in out.chunks_exact_mut(channels).zip(plane) {
            pixel[channel] = sample;
        }
    }
    out
}

/// Pillow turns TIFF files (and no others) by their orientation tag.
fn oriented(image: RgbImage, orientation: u16) -> RgbImage {
    let (w, h) = (image.width, image.height);
    let source: Box<dyn Fn(usize, usize) -> (usize, usize)> = match orientation {
        2 => Box::new(|x, y| (w - 1 - x, y)),
        3 => Box::new(|x, y| (w - 1 - x, h - 1 - y)),
        4 => Box::new(|x, y| (x, h - 1 - y)),
        5 => Box::new(|x, y| (y, x)),
        6 => Box::new(|x, y| (y, h - 1 - x)),
        7 => Box::new(|x, y| (w - 1 - y, h - 1 - x)),
        8 => Box::new(|x, y| (w - 1 - y, x)),
        _ => return image,
    };
    let (width, height) = if orientation > 4 { (h, w) } else { (w, h) };
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for y in 0..height {
        for x in 0..width {
            let (from_x, from_y) = source(x, y);
            pixels.extend_from_slice(&image.pixels[(from_y * w + from_x) * 3..][..3]);
        }
    }
    drop(source);
    RgbImage { width, height, pixels }
}

/// The buffer came from a file's own description of itself: refuse a contradiction before it reaches the resize.
fn filled(image: RgbImage) -> Result<RgbImage, ImageError> {
    if image.pixels.len() == image.width * image.height * 3 { Ok(image) } else { Err(unsupported("its memory layout")) }
}

fn unsupported(what: &'static str) -> ImageError {
    ImageError::unsupported(FORMAT, what)
}

fn refused(error: TiffError) -> ImageError {
    match error {
        TiffError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated { format: FORMAT }
        }
        TiffError::UnsupportedError(e) => ImageError::unsupported(FORMAT, TiffError::UnsupportedError(e)),
        error => ImageError::damaged(FORMAT, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orientation_moves_the_first_pixel() {
        // 2 x 3 pixels numbered row by row; the corner that comes first for each of the eight orientations.
        let first = [0, 1, 5, 4, 0, 4, 5, 1];
        for (orientation, first) in (1..).zip(first) {
            let image = from_grey(2, 3, 0..6);
            let turned = oriented(image, orientation);
            assert_eq!(turned.pixels[0], first, "orientation {orientation}");
            assert_eq!((turned.width, turned.height), if orientation > 4 { (3, 2) } else { (2, 3) });
        }
    }

    #[test]
    fn small_samples_are_unpacked() {
        assert_eq!(unpack(&[0b1010_0000], 1).take(4).collect::<Vec<_>>(), [1, 0, 1, 0]);
        assert_eq!(unpack(&[0b0001_1011], 2).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(unpack(&[0x0F], 4).collect::<Vec<_>>(), [0, 15]);
        assert_eq!(unpack(&[7], 8).collect::<Vec<_>>(), [7]);
    }
}
