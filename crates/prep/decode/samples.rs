//! Sample arithmetic shared by the formats: what Pillow's `convert("RGB")` does to one pixel.

use crate::RgbImage;

/// Grey to three equal channels.
pub(super) fn from_grey(width: usize, height: usize, grey: impl Iterator<Item = u8>) -> RgbImage {
    from_pixels(width, height, grey.map(|value| [value; 3]))
}

pub(super) fn from_pixels(width: usize, height: usize, pixels: impl Iterator<Item = [u8; 3]>) -> RgbImage {
    RgbImage { width, height, pixels: pixels.collect::<Vec<_>>().into_flattened() }
}

/// The first three of every `channels` samples: drops alpha and other extra samples without looking at them.
pub(super) fn drop_extra(width: usize, height: usize, samples: &[u8], channels: usize) -> RgbImage {
    match samples.as_chunks::<4>().0 {
        quads if channels == 4 => from_pixels(width, height, quads.iter().map(|&[r, g, b, _]| [r, g, b])),
        _ => from_pixels(width, height, samples.chunks_exact(channels).map(|pixel| [pixel[0], pixel[1], pixel[2]])),
    }
}

/// Looks colours up. An index behind the palette is black.
pub(super) fn from_palette(
    width: usize,
    height: usize,
    indices: &[u8],
    palette: impl Iterator<Item = [u8; 3]>,
) -> RgbImage {
    let mut table = [[0; 3]; 256];
    for (entry, colour) in table.iter_mut().zip(palette) {
        *entry = colour;
    }
    from_pixels(width, height, indices.iter().map(|&index| table[usize::from(index)]))
}

/// The fewer than 8 bits of one channel stretched to 0..=255, truncated.
pub(super) fn stretch(value: u8, value_max: u8) -> u8 {
    (u32::from(value) * 255 / u32::from(value_max)) as u8
}

/// High byte of 16-bit colour: no rounding, no scaling.
pub(super) fn high_byte(sample: u16) -> u8 {
    (sample >> 8) as u8
}

/// 16-bit and wider grey is clipped, not scaled: most 16-bit photographs turn almost white, and the reference wants it so.
pub(super) fn clip(sample: i64) -> u8 {
    sample.clamp(0, 255) as u8
}

/// Multiplicative CMYK, 0 = no ink.
pub(super) fn cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let paper = 255 - k;
    [c, m, y].map(|ink| paper.saturating_sub(multiply(ink, paper)))
}

/// round(a * b / 255)
fn multiply(a: u8, b: u8) -> u8 {
    let t = u32::from(a) * u32::from(b) + 128;
    (((t >> 8) + t) >> 8) as u8
}

/// Undoes premultiplied alpha as Pillow does: truncating, clipped, black where alpha is 0.
pub(super) fn unpremultiply([r, g, b, a]: [u8; 4]) -> [u8; 3] {
    [r, g, b].map(|value| match a {
        0 => 0,
        255 => value,
        _ => (255 * u32::from(value) / u32::from(a)).min(255) as u8,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cmyk_corners() {
        assert_eq!(cmyk_to_rgb([0, 0, 0, 0]), [255, 255, 255]);
        assert_eq!(cmyk_to_rgb([0, 0, 0, 255]), [0, 0, 0]);
        assert_eq!(cmyk_to_rgb([255, 0, 0, 0]), [0, 255, 255]);
        assert_eq!(cmyk_to_rgb([128, 64, 0, 127]), [64, 96, 128]);
    }

    #[test]
    fn wide_grey_is_clipped_and_wide_colour_is_cut() {
        assert_eq!([-5, 0, 255, 256, 65535].map(clip), [0, 0, 255, 255, 255]);
        assert_eq!([0, 255, 256, 65535].map(high_byte), [0, 0, 1, 255]);
    }
}
