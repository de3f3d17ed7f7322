//! Encoded bytes to RGB pixels, by Pillow's "open, convert to RGB" rules.
//!
//! Owns the choice of decoder, the limits that are checked before anything is decoded, and the error type. One file per
//! family of formats below; none of them composites, rotates (except TIFF, as Pillow does) or manages colour:
//! alpha and colour keys are thrown away, the first frame is taken, EXIF orientation and ICC profiles are ignored.
//! A file that Pillow refuses is refused here, a cut one above all: a half-grey picture would get a score that looks real.

mod gif;
mod jpeg;
mod raster;
mod samples;
mod tiff;

use crate::RgbImage;
use std::error::Error as StdError;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a single image may cost.
#[derive(Clone, Copy, Debug)]
pub struct DecodeLimits {
    /// Width x height, checked against the header before any pixel is decoded.
    pub pixels_max: u64,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { pixels_max: 64 << 20 }
    }
}

impl DecodeLimits {
    fn check(&self, width: u32, height: u32) -> Result<(usize, usize), ImageError> {
        if width == 0 || height == 0 {
            return Err(ImageError::NoPixels { width, height });
        }
        if u64::from(width) * u64::from(height) > self.pixels_max {
            return Err(ImageError::TooLarge { width, height, pixels_max: self.pixels_max });
        }
        Ok((width as usize, height as usize))
    }

    /// Bytes a decoder may allocate for one buffer: the widest pixel is four 32-bit samples.
    fn bytes_max(&self) -> u64 {
        self.pixels_max.saturating_mul(16).saturating_add(1 << 20)
    }
}

/// Why an image could not be turned into pixels. [`ImageError::status`] is the word for the output file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Zero bytes.
    #[error("the image is empty (0 bytes), check the column or the download that filled it")]
    Empty,
    /// The header promises more pixels than the limit.
    #[error("the image has {width}x{height} pixels, over the limit of {pixels_max}; shrink it or raise the limit")]
    TooLarge {
        /// From the header.
        width: u32,
        /// From the header.
        height: u32,
        /// The limit it was checked against.
        pixels_max: u64,
    },
    /// The header promises no pixels.
    #[error("the image has no pixels ({width}x{height})")]
    NoPixels {
        /// From the header.
        width: u32,
        /// From the header.
        height: u32,
    },
    /// No decoder knows these bytes.
    #[error("not a known image format, it looks like {looks_like}; JPEG, PNG, WebP, GIF, BMP and TIFF can be read")]
    UnknownFormat {
        /// A guess from the first bytes.
        looks_like: &'static str,
    },
    /// The file ends before the picture does.
    #[error("the {format} file is cut off, fetch it again")]
    Truncated {
        /// The format by its first bytes.
        format: &'static str,
    },
    /// A valid file of a kind that is not read.
    #[error("this kind of {format} is not supported, convert it to PNG")]
    Unsupported {
        /// The format by its first bytes.
        format: &'static str,
        /// The feature.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The decoder refused the bytes.
    #[error("the {format} file is damaged, fetch it again")]
    Damaged {
        /// The format by its first bytes.
        format: &'static str,
        /// The decoder's own words.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The decoder panicked.
    #[error("the {format} decoder gave up on a damaged file, fetch it again")]
    Panicked {
        /// The format by its first bytes.
        format: &'static str,
    },
}

impl ImageError {
    /// `image_too_large` or `decode_failed`.
    #[must_use]
    pub fn status(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "image_too_large",
            _ => "decode_failed",
        }
    }

    fn unsupported(format: &'static str, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Unsupported { format, source: source.into() }
    }

    fn damaged(format: &'static str, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Damaged { format, source: source.into() }
    }
}

/// Decodes the first frame of `bytes` to RGB.
///
/// # Errors
/// Every way in which the bytes are not a picture within the limits, see [`ImageError`].
pub fn decode_rgb(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let format = Format::guess(bytes)?;
    // The decoders are other people's code fed with strangers' bytes, and the release profile checks integer overflow
    // inside them too: a panic there must cost one row, not the worker. libjpeg's fatal errors come as unwinding by design,
    // with the message as payload. Nothing that the decoders touch survives it.
    catch_unwind(AssertUnwindSafe(|| match format {
        Format::Jpeg => jpeg::decode(bytes, limits),
        Format::Png => raster::decode_png(bytes, limits),
        Format::Webp => raster::decode_webp(bytes, limits),
        Format::Bmp => raster::decode_bmp(bytes, limits),
        Format::Gif => gif::decode(bytes, limits),
        Format::Tiff => tiff::decode(bytes, limits),
    }))
    .unwrap_or_else(|payload| {
        let format = format.name();
        Err(payload
            .downcast::<String>()
            .map_or(ImageError::Panicked { format }, |words| ImageError::damaged(format, *words)))
    })
}

#[derive(Clone, Copy)]
enum Format {
    Jpeg,
    Png,
    Webp,
    Gif,
    Bmp,
    Tiff,
}

impl Format {
    fn guess(bytes: &[u8]) -> Result<Self, ImageError> {
        match bytes {
            [] => Err(ImageError::Empty),
            [0xFF, 0xD8, 0xFF, ..] => Ok(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => Ok(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok(Self::Webp),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Ok(Self::Gif),
            [b'B', b'M', ..] => Ok(Self::Bmp),
            [b'I', b'I', 42 | 43, 0, ..] | [b'M', b'M', 0, 42 | 43, ..] => Ok(Self::Tiff),
            _ => Err(ImageError::UnknownFormat { looks_like: looks_like(bytes) }),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::Webp => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
            Self::Tiff => "TIFF",
        }
    }
}

/// Names what is usually found where an image should be. A hint for the person who reads the error, nothing depends on it.
fn looks_like(bytes: &[u8]) -> &'static str {
    let head = &bytes[..bytes.len().min(1024)];
    let text = String::from_utf8_lossy(head).trim_start_matches('\u{feff}').trim_start().to_ascii_lowercase();
    match head {
        [b'%', b'P', b'D', b'F', ..] => "a PDF document",
        [0x1F, 0x8B, ..] => "gzip data",
        [b'P', b'K', 3, 4, ..] => "a zip archive",
        [0xFF, 0x0A, ..] | [0, 0, 0, 12, b'J', b'X', b'L', ..] => "a JPEG XL image",
        [0, 0, 0, 12, b'j', b'P', ..] | [0xFF, 0x4F, 0xFF, 0x51, ..] => "a JPEG 2000 image",
        [_, _, _, _, b'f', b't', b'y', b'p', b'a', b'v', b'i', ..] => "an AVIF image",
        [_, _, _, _, b'f', b't', b'y', b'p', b'h' | b'm', ..] => "a HEIC image or a video",
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "a video",
        [0, 0, 1 | 2, 0, ..] => "an icon file",
        [b'8', b'B', b'P', b'S', ..] => "a Photoshop file",
        _ if text.starts_with("<svg") || (text.starts_with("<?xml") && text.contains("<svg")) => "an SVG drawing",
        _ if text.starts_with("<!doctype html") || text.starts_with("<html") || text.contains("<head") => {
            "an HTML page"
        }
        _ if text.starts_with("<?xml") => "an XML document (perhaps a storage service's error)",
        _ if text.starts_with('{') || text.starts_with('[') => "JSON",
        _ if text.starts_with("http://") || text.starts_with("https://") => "a URL instead of the bytes behind it",
        _ if text.starts_with("data:") => "a data: URL instead of the bytes inside it",
        _ if text.starts_with("/9j/") || text.starts_with("ivborw0kggo") => {
            "base64 text instead of the bytes it encodes"
        }
        _ if head.iter().all(|&byte| byte == 0) => "zeros only",
        _ if head.iter().all(|&byte| byte >= b' ' || byte.is_ascii_whitespace())
            && std::str::from_utf8(head).is_ok() =>
        {
            "text"
        }
        _ => "unknown binary data",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(bytes: &[u8]) -> &'static str {
        match decode_rgb(bytes, &DecodeLimits::default()) {
            Err(ImageError::UnknownFormat { looks_like }) => looks_like,
            other => panic!("expected an unknown format, got {:?}", other.map(|image| (image.width, image.height))),
        }
    }

    #[test]
    fn says_what_it_found_instead_of_an_image() {
        assert_eq!(hint(b"<!DOCTYPE html><html><body>404</body></html>"), "an HTML page");
        assert_eq!(hint(b"\n  <html lang=\"en\">"), "an HTML page");
        assert_eq!(hint(b"<svg xmlns=\"http://www.w3.org/2000/svg\"/>"), "an SVG drawing");
        assert_eq!(hint(b"\xEF\xBB\xBF<?xml version=\"1.0\"?><!-- x --><svg/>"), "an SVG drawing");
        assert_eq!(hint(b"<?xml version=\"1.0\"?><Error/>"), "an XML document (perhaps a storage service's error)");
        assert_eq!(hint(b"https://example.org/cat.jpg"), "a URL instead of the bytes behind it");
        assert_eq!(hint(b"/9j/4AAQSkZJRg"), "base64 text instead of the bytes it encodes");
        assert_eq!(hint(b"{\"error\": 404}"), "JSON");
        assert_eq!(hint(b"\0\0\0\x20ftypavif"), "an AVIF image");
        assert_eq!(hint(b"not found"), "text");
        assert_eq!(hint(&[0; 64]), "zeros only");
        assert_eq!(hint(b"\x01\x02\x03"), "unknown binary data");
    }

    #[test]
    fn headers_alone_are_refused_in_every_format() {
        let heads: [&[u8]; 6] =
            [b"\xFF\xD8\xFF\xE0", b"\x89PNG\r\n\x1A\n", b"RIFF\0\0\0\0WEBPVP8 ", b"GIF89a", b"BM", b"II*\0"];
        for head in heads {
            let error = decode_rgb(head, &DecodeLimits::default()).expect_err("a header is not an image");
            assert_eq!(error.status(), "decode_failed", "{head:?}: {error}");
        }
        assert!(matches!(decode_rgb(b"", &DecodeLimits::default()), Err(ImageError::Empty)));
    }
}
