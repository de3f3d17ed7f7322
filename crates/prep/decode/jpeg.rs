//! JPEG, including the CMYK flavours.
//!
//! The reference is defined by libjpeg-turbo's arithmetic (inverse transform, chroma filter, rounding), so its code does
//! the work here too, by way of mozjpeg, a fork with the same decoder. The pure Rust decoders follow other recipes: with
//! zune-jpeg 15% of the samples of 4:2:0 files were off, typically by 1 to 4 levels and at image borders by up to 128.

use super::samples::{cmyk_to_rgb, from_grey, in_place};
use super::{DecodeLimits, ImageError};
use crate::RgbImage;
use mozjpeg::{ColorSpace, Decompress};

const FORMAT: &str = "JPEG";

pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    if !is_complete(bytes) {
        return Err(ImageError::Truncated { format: FORMAT });
    }
    let damaged = |e| ImageError::damaged(FORMAT, e);
    let decoder = Decompress::new_mem(bytes).map_err(damaged)?;
    let (width, height) = limits.check(decoder.width() as u32, decoder.height() as u32)?; // both are 16 bits in the file
    let output = match decoder.components().len() {
        1 => ColorSpace::JCS_GRAYSCALE,
        3 => ColorSpace::JCS_RGB,
        4 => ColorSpace::JCS_CMYK,
        _ => return Err(ImageError::unsupported(FORMAT, "its number of colour channels")),
    };
    let mut decoder = decoder.to_colorspace(output).map_err(damaged)?;
    let samples: Vec<u8> = decoder.read_scanlines().map_err(damaged)?;
    decoder.finish().map_err(damaged)?;
    Ok(match output {
        ColorSpace::JCS_GRAYSCALE => from_grey(width, height, samples.into_iter()),
        // Every CMYK JPEG is taken as Adobe's, which stores 255 - ink.
        ColorSpace::JCS_CMYK => in_place(width, height, samples, |inks: [u8; 4]| cmyk_to_rgb(inks.map(|v| 255 - v))),
        _ => RgbImage { width, height, pixels: samples },
    })
}

/// True when the end marker follows a scan. Decoders paint what is missing grey; Pillow refuses such a file, and it does
/// read one whose data is merely damaged, so this is the test that separates the two.
fn is_complete(bytes: &[u8]) -> bool {
    const RESTART: std::ops::RangeInclusive<u8> = 0xD0..=0xD7;
    let mut seen_scan = false;
    let mut at = 2; // behind the start marker
    // Entropy-coded data and junk between segments look the same here: skip to the next byte pair that is a marker.
    while let Some(step) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xFF)) {
        at += step + 1;
        let Some(&marker) = bytes.get(at) else { return false };
        match marker {
            0xFF => continue, // padding: this byte may open the marker
            0 | 1 => {}
            marker if RESTART.contains(&marker) => {}
            0xD9 => return seen_scan,
            marker => {
                seen_scan |= marker == 0xDA;
                let Some(&[high, low]) = bytes.get(at + 1..).and_then(|rest| rest.first_chunk::<2>()) else {
                    return false;
                };
                at += usize::from(u16::from_be_bytes([high, low]));
            }
        }
        at += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_marker_counts_only_behind_a_scan_and_outside_segments() {
        let scan = b"\xFF\xD8\xFF\xE1\x00\x04\xFF\xD9\xFF\xDA\x00\x02data\xFF\x00\xFF\xD0data";
        assert!(!is_complete(scan), "the marker inside the segment is not the file's");
        assert!(is_complete(&[scan.as_slice(), b"\xFF\xD9"].concat()));
        assert!(is_complete(&[scan.as_slice(), b"\xFF\xFF\xD9junk"].concat()), "padding, and junk behind the end");
        assert!(!is_complete(b"\xFF\xD8\xFF\xD9"));
        assert!(!is_complete(&[scan.as_slice(), b"\xFF"].concat()));
    }
}
