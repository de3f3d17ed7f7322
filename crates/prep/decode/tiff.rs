//! TIFF. Rare in caption data, but Pillow's table of kinds is long, so this file is too.

use super::samples::{
    beside, clip, cmyk_to_rgb, from_grey, from_palette, high_byte, in_place, keep_high_bytes, opaque, stretch,
    unpremultiply,
};
use super::{DecodeLimits, ImageError};
use crate::RgbImage;
use std::borrow::Cow;
use std::io::Cursor;
use tiff::ColorType;
use tiff::decoder::{BufferLayoutPreference, Decoder, DecodingResult, DecodingSampleType, Limits};
use tiff::tags::Tag;
use tiff::{TiffError, TiffResult};

const FORMAT: &str = "TIFF";

type Reader<'a> = Decoder<Cursor<Cow<'a, [u8]>>>;

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
    let layout = decoder.image_buffer_layout().map_err(refused)?;
    check_kind(color, &layout, &tags)?;
    if layout.complete_len > bytes_max {
        return Err(unsupported("its memory layout"));
    }
    let size = (width, height);
    let image = match color {
        ColorType::Gray(_) => grey(&mut decoder, size, color, &tags)?,
        _ => colour(&mut decoder, size, color, &layout, &tags)?,
    };
    Ok(oriented(filled(image)?, tags.orientation))
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

/// Whether there is anything to be made of the samples, before any of them is decoded.
fn check_kind(color: ColorType, layout: &BufferLayoutPreference, tags: &Tags) -> Result<(), ImageError> {
    use DecodingSampleType::{F32, I8, I16, I32, U8, U16, U32};
    match (color, layout.sample_type) {
        (ColorType::Gray(1 | 2 | 4 | 8), Some(U8)) => Ok(()),
        _ if tags.palette.is_some() => Err(unsupported("a palette with this sample type")),
        (ColorType::Gray(8 | 16 | 32), Some(I8 | U16 | I16 | U32 | I32 | F32)) => Ok(()),
        (ColorType::Gray(_), _) => Err(unsupported("its sample type")),
        (ColorType::YCbCr(_), _) => Err(unsupported("YCbCr samples")),
        (ColorType::Lab(_), _) => Err(unsupported("Lab colour")),
        (ColorType::Multiband { bit_depth: 8, num_samples: 2 }, Some(U8)) if !tags.is_jpeg => Ok(()),
        (ColorType::RGB(8) | ColorType::RGBA(8) | ColorType::CMYK(8), Some(U8)) => Ok(()),
        (ColorType::RGB(16) | ColorType::RGBA(16) | ColorType::CMYK(16), Some(U16)) => Ok(()),
        (ColorType::RGB(_) | ColorType::RGBA(_) | ColorType::CMYK(_), _) => Err(unsupported("its sample type")),
        _ => Err(unsupported("its combination of channels")),
    }
}

/// Grey samples, also the indices of a palette.
fn grey(
    decoder: &mut Reader,
    (width, height): (usize, usize),
    color: ColorType,
    tags: &Tags,
) -> Result<RgbImage, ImageError> {
    let mut samples = DecodingResult::U8(Vec::new());
    let layout = decoder.read_image_to_buffer(&mut samples).map_err(refused)?;
    let (ColorType::Gray(bits), DecodingResult::U8(packed)) = (color, &samples) else {
        return wide_grey(width, height, samples, tags);
    };
    let row_bytes = layout.row_stride.map_or(packed.len(), |stride| stride.get());
    let values = packed.chunks_exact(row_bytes.max(1)).flat_map(|row| unpack(row, bits).take(width));
    let value_max = 0xFF >> (8 - bits);
    Ok(match &tags.palette {
        Some(palette) => from_palette(width, height, &values.collect::<Vec<_>>(), colours(palette)),
        None => from_grey(width, height, values.map(|value| stretch(value, value_max))),
    })
}

/// Colours and grey with alpha, of 8 or 16 bits. All that becomes of the decoder's samples does so in their own memory.
fn colour(
    decoder: &mut Reader,
    (width, height): (usize, usize),
    color: ColorType,
    layout: &BufferLayoutPreference,
    tags: &Tags,
) -> Result<RgbImage, ImageError> {
    let mut samples = vec![0; layout.complete_len];
    decoder.read_image_bytes(&mut samples).map_err(refused)?;
    if color.bit_depth() == 16 {
        keep_high_bytes(&mut samples);
    }
    let (channels, pixels) = (usize::from(color.num_samples()), width * height);
    if layout.planes > 1 {
        samples = beside(samples, channels * pixels, |planes, out| interleave(planes, out, channels));
    }
    Ok(match color {
        ColorType::RGB(_) => RgbImage { width, height, pixels: samples },
        ColorType::RGBA(_) if tags.premultiplied => in_place(width, height, samples, unpremultiply),
        ColorType::RGBA(_) => in_place(width, height, samples, opaque),
        ColorType::CMYK(_) => in_place(width, height, samples, cmyk_to_rgb),
        _ => from_grey(width, height, samples.iter().step_by(channels).copied()),
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
fn interleave(planes: &[u8], out: &mut [u8], channels: usize) {
    let pixels = out.len() / channels;
    for (channel, plane) in planes.chunks_exact(pixels).take(channels).enumerate() {
        for (pixel, &sample) in out.chunks_exact_mut(channels).zip(plane) {
            pixel[channel] = sample;
        }
    }
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
    let pixels = beside(image.pixels, w * h * 3, |from, to| {
        for (at, to) in to.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let (from_x, from_y) = source(at % width, at / width);
            to.copy_from_slice(&from[(from_y * w + from_x) * 3..][..3]);
        }
    });
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
