//! Sample arithmetic shared by the formats: what Pillow's `convert("RGB")` does to one pixel.

use crate::RgbImage;

/// Grey to three equal channels.
pub(super) fn from_grey(width: usize, height: usize, grey: impl Iterator<Item = u8>) -> RgbImage {
    from_pixels(width, height, grey.map(|value| [value; 3]))
}

pub(super) fn from_pixels(width: usize, height: usize, pixels: impl Iterator<Item = [u8; 3]>) -> RgbImage {
    RgbImage { width, height, pixels: pixels.collect::<Vec<_>>().into_flattened() }
}

/// Pixels of `BYTES` bytes become RGB in their own memory, which large images have no second of: none is written over before
/// it is read.
pub(super) fn in_place<const BYTES: usize>(
    width: usize,
    height: usize,
    mut samples: Vec<u8>,
    rgb: impl Fn([u8; BYTES]) -> [u8; 3],
) -> RgbImage {
    const { assert!(BYTES >= 3) };
    let pixels = samples.len() / BYTES;
    for pixel in 0..pixels {
        let mut from = [0; BYTES];
        from.copy_from_slice(&samples[pixel * BYTES..][..BYTES]);
        samples[pixel * 3..][..3].copy_from_slice(&rgb(from));
    }
    samples.truncate(pixels * 3);
    RgbImage { width, height, pixels: samples }
}

/// The colours of a pixel with alpha, which is thrown away without a look.
pub(super) fn opaque([r, g, b, _]: [u8; 4]) -> [u8; 3] {
    [r, g, b]
}

/// 16-bit samples in the machine's order become their high bytes, in the same memory.
pub(super) fn keep_high_bytes(samples: &mut Vec<u8>) {
    let count = samples.len() / 2;
    for at in 0..count {
        samples[at] = high_byte(u16::from_ne_bytes([samples[2 * at], samples[2 * at + 1]]));
    }
    samples.truncate(count);
}

/// Fills `len` bytes from those of `from`: in its own memory, where it has room for both.
pub(super) fn beside(mut from: Vec<u8>, len: usize, fill: impl FnOnce(&[u8], &mut [u8])) -> Vec<u8> {
    let used = from.len();
    if from.capacity() < used + len {
        let mut to = vec![0; len];
        fill(&from, &mut to);
        return to;
    }
    from.resize(used + len, 0);
    let (old, new) = from.split_at_mut(used);
    fill(old, new);
    from.copy_within(used.., 0);
    from.truncate(len);
    from
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
    fn pixels_shrink_in_their_own_memory() {
        let samples: Vec<u8> = (0..24).collect();
        let memory = samples.as_ptr();
        let image = in_place(3, 2, samples, opaque);
        assert_eq!(image.pixels, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22]);
        assert_eq!(image.pixels.as_ptr(), memory);
        let mut wide: Vec<u8> = [0x1234u16, 0xFF00, 0x00FF].iter().flat_map(|v| v.to_ne_bytes()).collect();
        keep_high_bytes(&mut wide);
        assert_eq!(wide, [0x12, 0xFF, 0]);
        let memory = wide.as_ptr();
        let reversed =
            |from: &[u8], to: &mut [u8]| to.iter_mut().zip(from.iter().rev()).for_each(|(to, from)| *to = *from);
        let turned = beside(wide, 3, reversed);
        assert_eq!((turned.as_slice(), turned.as_ptr()), ([0, 0xFF, 0x12].as_slice(), memory), "six bytes hold both");
        assert_eq!(beside(vec![1, 2, 3], 3, reversed), [3, 2, 1]);
    }

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
