//! crates/prep against its two references: stored Pillow results and tokenizer cases (tests/golden), and a slow, plain
//! version of the resize. CAPSIEVE_GOLDEN points to another set of the same layout.

use capsieve_prep::{DecodeLimits, ImageSpec, RgbImage, Tokenizer, decode_rgb, prepare_image, resize_bicubic};
use proptest::prelude::*;
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

fn golden(path: &str) -> PathBuf {
    let root = std::env::var_os("CAPSIEVE_GOLDEN").map(PathBuf::from);
    root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")).join(path)
}

fn read(path: &str) -> Vec<u8> {
    let path = golden(path);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn read_json(path: &str) -> Value {
    serde_json::from_slice(&read(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decode(bytes: &[u8]) -> Result<RgbImage, capsieve_prep::ImageError> {
    decode_rgb(bytes, &DecodeLimits::default())
}

/// A stored u8 image [H, W, 3].
fn image(tensor: &TensorView) -> RgbImage {
    let &[height, width, 3] = tensor.shape() else { panic!("not an image: {:?}", tensor.shape()) };
    RgbImage { width, height, pixels: tensor.data().to_vec() }
}

#[test]
fn images_equal_pillow() {
    let expected = read_json("images.json");
    let spec = ImageSpec::blip(384);
    for (name, case) in expected.as_object().expect("images.json is an object") {
        let bytes = read(&format!("images/{name}"));
        if !case["error"].is_null() {
            let error = decode(&bytes).err().unwrap_or_else(|| panic!("{name} must be refused"));
            assert_eq!(error.status(), "decode_failed", "{name}: {error}");
            continue;
        }
        let decoded = decode(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(
            (Some(decoded.width as u64), Some(decoded.height as u64)),
            (case["width"].as_u64(), case["height"].as_u64())
        );
        assert_eq!(sha256(&decoded.pixels), case["rgb_sha256"], "{name}: decoded pixels");
        let resized = prepare_image(&bytes, &spec, &DecodeLimits::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(sha256(&resized), case["resized384_sha256"], "{name}: resized pixels");
    }
}

#[test]
fn stored_pixels_decode_and_resize() {
    let bytes = read("images.safetensors");
    for (name, tensor) in SafeTensors::deserialize(&bytes).expect("images.safetensors").tensors() {
        let Some((kind, file)) = name.split_once('.') else { continue };
        let decoded = decode(&read(&format!("images/{file}"))).unwrap_or_else(|e| panic!("{file}: {e}"));
        match kind {
            "rgb" => assert!(decoded == image(&tensor), "{file}: decoded pixels"),
            "u8_48" => assert!(resize_bicubic(&decoded, 48, 48) == image(&tensor), "{file}: 48x48"),
            other => panic!("a tensor of unknown kind {other}"),
        }
    }
}

#[test]
fn portrait_page_shows_the_pass_order() {
    let expected = decode(&read("resized384.page_tall.png")).expect("the stored result decodes");
    let resized = prepare_image(&read("images/page_tall.png"), &ImageSpec::blip(384), &DecodeLimits::default());
    assert_eq!(resized.expect("page_tall.png decodes"), expected.pixels);
}

#[test]
fn pixel_lut_is_exact() {
    let bytes = read("images.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("images.safetensors");
    let stored = tensors.tensor("pixel_lut").expect("pixel_lut");
    let stored: Vec<f32> = stored.data().as_chunks::<4>().0.iter().map(|&v| f32::from_le_bytes(v)).collect();
    let spec = ImageSpec::from_json(&read("tiny/preprocessor_config.json")).expect("published style");
    assert_eq!(spec, ImageSpec::blip(384));
    assert_eq!(spec.pixel_lut().as_flattened(), stored);
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("ids {value}: {e}"))
}

/// A long case stores its first and last ids around a "..." and the count, and a digest of what 512 tokens keep.
fn check_case(tokenizer: &Tokenizer, case: &Value) {
    let text = case["text"].as_str().expect("text");
    let label: String = text.chars().take(40).collect();
    let encoded = tokenizer.encode(text).unwrap_or_else(|e| panic!("{label}: {e}"));
    let stored = case["ids"].as_array().expect("ids");
    match stored.iter().position(|id| id == "...") {
        None => assert_eq!(encoded, ids(&case["ids"]), "{label}"),
        Some(gap) => {
            let (first, last) = (ids(&stored[..gap].into()), ids(&stored[gap + 1..].into()));
            assert!(encoded.starts_with(&first) && encoded.ends_with(&last), "{label}");
            assert_eq!(Some(encoded.len() as u64), case["n_ids"].as_u64(), "{label}");
        }
    }
    let truncated = |max| tokenizer.encode_truncated(text, max).unwrap_or_else(|e| panic!("{label}: {e}"));
    match case.get("ids_max35") {
        Some(stored) => assert_eq!(truncated(35), ids(stored), "{label}"),
        None => assert_eq!(truncated(35), encoded, "{label}"),
    }
    if let Some(digest) = case.get("ids_max512_sha256") {
        let listed: Vec<_> = truncated(512).iter().map(u32::to_string).collect();
        assert_eq!(sha256(format!("[{}]", listed.join(", ")).as_bytes()), *digest, "{label}");
    }
}

#[test]
fn captions_equal_transformers() {
    let cases = read_json("tokenizer/cases.json");
    let json = read("tokenizer/tokenizer.json");
    let from_json = Tokenizer::from_json(&json).expect("tokenizer.json");
    let from_vocab = Tokenizer::from_vocab(from_json.vocab_txt().as_bytes()).expect("its vocabulary");
    let cases = cases.as_array().expect("cases.json is a list");
    assert!(cases.len() > 60, "only {} cases", cases.len());
    for tokenizer in [&from_json, &from_vocab, &Tokenizer::bert_uncased()] {
        cases.iter().for_each(|case| check_case(tokenizer, case));
    }
    let stored: Value = serde_json::from_slice(&json).expect("JSON");
    let written: Value = serde_json::from_str(&from_vocab.to_json().expect("serialises")).expect("JSON");
    assert_eq!(written, stored, "what is written for a synthetic model is the published file");
}

#[test]
fn renumbered_vocabulary_keeps_its_own_special_ids() {
    let expected = read_json("tiny/expected.json");
    let from_json = Tokenizer::from_json(&read("tiny/tokenizer.json")).expect("tokenizer.json");
    let from_vocab = Tokenizer::from_vocab(&read("tiny/vocab.txt")).expect("vocab.txt");
    let bytes = read("tiny/expected.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("expected.safetensors");
    let padded = tensors.tensor("input_ids").expect("input_ids");
    let row_bytes = padded.data().len() / padded.shape()[0];
    let captions = expected["captions"].as_array().expect("captions");
    for (caption, row) in captions.iter().zip(padded.data().chunks_exact(row_bytes)) {
        let caption = caption.as_str().expect("a caption");
        let mut row: Vec<u32> = row.as_chunks::<8>().0.iter().map(|&id| i64::from_le_bytes(id) as u32).collect();
        for tokenizer in [&from_json, &from_vocab] {
            let encoded = tokenizer.encode(caption).unwrap_or_else(|e| panic!("{caption}: {e}"));
            row.truncate(encoded.len()); // the rest is padding
            assert_eq!(encoded, row, "{caption}");
            assert_eq!((encoded.first(), encoded.last()), (Some(&2), Some(&3)), "{caption}");
        }
    }
}

/// Pillow's algorithm as its description reads, one sample at a time, sums in i64.
fn resize_reference(img: &RgbImage, width: usize, height: usize) -> RgbImage {
    let narrowed = if img.width == width { img.clone() } else { resize_axis(img, width, true) };
    if img.height == height { narrowed } else { resize_axis(&narrowed, height, false) }
}

fn resize_axis(img: &RgbImage, n_out: usize, horizontal: bool) -> RgbImage {
    let n_in = if horizontal { img.width } else { img.height };
    let (width, height) = if horizontal { (n_out, img.height) } else { (img.width, n_out) };
    let scale = n_in as f64 / n_out as f64;
    let fs = scale.max(1.0);
    let kernel = |x: f64| match x.abs() {
        x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
        _ => 0.0,
    };
    let mut out = RgbImage { width, height, pixels: vec![0; width * height * 3] };
    for i in 0..n_out {
        let centre = (i as f64 + 0.5) * scale;
        let lo = (centre - 2.0 * fs + 0.5).trunc().max(0.0) as usize;
        let hi = ((centre + 2.0 * fs + 0.5).trunc() as usize).min(n_in);
        let weights: Vec<f64> = (lo..hi).map(|k| kernel((k as f64 - centre + 0.5) * (1.0 / fs))).collect();
        let sum: f64 = weights.iter().sum();
        let fixed =
            weights.iter().map(|w| w / sum * f64::from(1 << 22)).map(|w| (w + 0.5f64.copysign(w)).trunc() as i64);
        let fixed: Vec<i64> = fixed.collect();
        for other in 0..if horizontal { height } else { width } {
            for channel in 0..3 {
                let at = |k: usize| if horizontal { (other * img.width + k) * 3 } else { (k * img.width + other) * 3 };
                let total: i64 = (lo..hi).zip(&fixed).map(|(k, w)| i64::from(img.pixels[at(k) + channel]) * w).sum();
                let (x, y) = if horizontal { (i, other) } else { (other, i) };
                out.pixels[(y * width + x) * 3 + channel] = ((total + (1 << 21)) >> 22).clamp(0, 255) as u8;
            }
        }
    }
    out
}

/// Reproducible noise; `contrast` keeps only black and white, which drives the sums to their limits.
fn noise(width: usize, height: usize, seed: u64, contrast: bool) -> RgbImage {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = (state >> 32) as u8;
        if contrast { if value > 127 { 255 } else { 0 } } else { value }
    };
    RgbImage { width, height, pixels: (0..width * height * 3).map(|_| next()).collect() }
}

#[test]
fn resize_equals_the_plain_version_at_awkward_sizes() {
    let sizes = [1, 2, 3, 15, 16, 17, 31, 47, 48, 49, 64, 100, 257];
    for (&width, seed) in sizes.iter().zip(1..) {
        for &height in &sizes {
            for (to_width, to_height) in
                [(16, 16), (17, 5), (48, 33), (width, 7), (7, height), (width, height), (1, 1), (130, 131)]
            {
                let img = noise(width, height, seed, seed % 2 == 0);
                let (ours, plain) =
                    (resize_bicubic(&img, to_width, to_height), resize_reference(&img, to_width, to_height));
                assert!(ours == plain, "{width}x{height} -> {to_width}x{to_height}");
            }
        }
    }
}

/// Small files of every kind that the goldens contain, and one of each other format made here.
fn samples() -> &'static [Vec<u8>] {
    static SAMPLES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SAMPLES.get_or_init(|| {
        let names =
            ["cup.jpg", "cmyk.jpg", "progressive.jpg", "palette_trns.png", "gray16.png", "onebit.png", "rgb16.png"];
        let mut files: Vec<_> = names.iter().map(|name| read(&format!("images/{name}"))).collect();
        files.extend(TINY_FILES.iter().map(|hex| from_hex(hex)));
        files
    })
}

fn from_hex(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        hex.bytes().filter_map(|digit| (digit as char).to_digit(16).map(|digit| digit as u8)).collect();
    digits.as_chunks::<2>().0.iter().map(|[high, low]| high << 4 | low).collect()
}

/// 7 x 5 pixels each, written by Pillow.
const TINY_FILES: [&str; 7] = [
    // WebP, lossless
    "524946462c000000574542505650384c200000002f06000100cd6544ff038a19498230e63922e34f76ed1a8cf3c8c4046862c10b",
    // WebP, lossy
    "524946466600000057454250565038205a000000f001009d012a0700050002c04c25b002747f0015cb64b30000ce3eb7f0d8fe725e80293c14fe8b1bf6ff4cf6dc4f0145ff4ffb7dfbb19cff74f9df73fb3e5edb2fc4efe0867b8ccbf93f4fa2451479b2092231efcfff83719000",
    // GIF
    "47494638376107000500820000bdef2182b4e6699bcd4f81b3295b8de2144607396b0000002c000000000700050000081e000d10182020000000030b1e2c303080c10205081a0450c080428a020302003b",
    // BMP, 24 bits
    "424dae0000000000000036000000280000000700000005000000010018000000000078000000c40e0000c40e00000000000000000000ca9866e9b78508d6a427f5c34614e2653301845220000000b3814fd2a06ef1bf8d10deac2ffdcb4e1cea6d3b090000009c6a38bb8957daa876f9c79518e6b43705d35624f2000000855321a47240c3915fe2b07e01cf9d20eebc3f0ddb0000006e3c0a8d5b29ac7a48cb9967eab88609d7a528f6c4000000",
    // BMP, palette
    "424d7e0000000000000056000000280000000700000005000000010008000000000028000000c40e0000c40e0000080000000800000021efbd0043d19f00e6b48200cd9b6900b3814f008d5b29004614e2006b39070003020000060705000403020000060700050402020006060005040302000006000705040302000000",
    // TIFF, LZW
    "49492a008200000080028786e1496d1a483d2b0ce9965a1970ea52b5c12c47b0a0425342900e4a42fa45867e583893acf00af1dc206d8347e3835270ae895d9d950da4ab1df2b473061a6051bbc8485627a05666e503491abf78ab1bc1065bf45eea0e138123b3699930ca42addd2a46b02186f513b882846008ccca2029212020000a000001030001000000070000000101030001000000050000000201030003000000000100000301030001000000050000000601030001000000020000001101040001000000080000001501030001000000030000001601030001000000050000001701040001000000790000001c010300010000000100000000000000080008000800",
    // TIFF, 16-bit grey
    "49492a0008000000090000010400010000000700000001010400010000000500000002010300010000001000000003010300010000000100000006010300010000000100000011010400010000007a0000001601040001000000050000001701040001000000460000001c01030001000000010000000000000064008200a000be00dc00fa0018013601540172019001ae01cc01ea01080226024402620280029e02bc02da02f80216033403520370038e03ac03ca03e8030604240442046004",
];
/// Their first pixels, from Pillow.
const TINY_CORNERS: [[u8; 3]; 7] =
    [[10, 60, 110], [25, 63, 123], [7, 57, 107], [10, 60, 110], [7, 57, 107], [10, 60, 110], [100, 100, 100]];

#[test]
fn small_files_of_the_other_formats_decode() {
    for (hex, corner) in TINY_FILES.iter().zip(TINY_CORNERS) {
        let image = decode(&from_hex(hex)).unwrap_or_else(|e| panic!("{}: {e}", &hex[..16]));
        assert_eq!((image.width, image.height, &image.pixels[..3]), (7, 5, corner.as_slice()), "{}", &hex[..16]);
    }
}

#[test]
fn every_cut_is_refused() {
    for file in samples() {
        // The last bytes of a PNG (end chunk) and of a GIF (end codes) hold no pixels.
        let harmless = match file[..] {
            [0x89, ..] => 16,
            [b'G', ..] => 4,
            _ => 0,
        };
        for keep in (0..file.len() - harmless).step_by(1 + file.len() / 300).chain([file.len() - harmless - 1]) {
            assert!(decode(&file[..keep]).is_err(), "{:?} cut to {keep} of {} bytes", &file[..4], file.len());
        }
    }
}

#[test]
fn size_is_checked_before_decoding() {
    let limits = DecodeLimits { pixels_max: 6 };
    for file in samples() {
        let error = decode_rgb(file, &limits).expect_err("over 6 pixels");
        assert_eq!(error.status(), "image_too_large", "{error}");
    }
    let one = decode_rgb(&read("images/one_pixel.png"), &limits).expect("one pixel is within the limit");
    assert_eq!((one.width, one.height), (1, 1));
    // A PNG header that promises 2^31 x 2^31 pixels and has no data.
    let bomb = from_hex("89504e470d0a1a0a0000000d49484452 7fffffff 7fffffff 0802000000 3ad40abd");
    assert!(decode(&bomb).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn resize_equals_the_plain_version(
        from in (1usize..220, 1usize..220), to in (1usize..120, 1usize..120), seed: u64, contrast: bool,
    ) {
        let img = noise(from.0, from.1, seed, contrast);
        prop_assert!(resize_bicubic(&img, to.0, to.1) == resize_reference(&img, to.0, to.1));
    }

    /// Damaged files give pixels or an error, and never more pixels than allowed.
    #[test]
    fn damaged_files_do_no_harm(which: prop::sample::Index, edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), cut: Option<prop::sample::Index>) {
        let mut bytes = samples()[which.index(samples().len())].clone();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let limits = DecodeLimits { pixels_max: 1 << 20 };
        match decode_rgb(&bytes, &limits) {
            Ok(image) => {
                prop_assert!(image.width * image.height <= 1 << 20);
                prop_assert_eq!(image.pixels.len(), image.width * image.height * 3);
            }
            Err(error) => prop_assert!(["decode_failed", "image_too_large"].contains(&error.status())),
        }
    }
}

/// Four floats a pixel, in strips that are not there: what the file says of its samples is enough to refuse it.
#[test]
fn samples_that_are_not_supported_are_refused_before_they_are_decoded() {
    let entry = |tag: u16, kind: u16, count: u32, value: u32| {
        [&tag.to_le_bytes()[..], &kind.to_le_bytes(), &count.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let (samples, entries) = (4u32, 10u16);
    let after = 8 + 2 + 12 * u32::from(entries) + 4;
    let mut file = [&b"II*\0"[..], &8u32.to_le_bytes(), &entries.to_le_bytes()].concat();
    for (tag, kind, count, value) in [
        (256, 4, 1, 1000),
        (257, 4, 1, 1000),
        (258, 3, samples, after),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 1 << 30),
        (277, 3, 1, samples),
        (278, 4, 1, 1000),
        (279, 4, 1, 16_000_000),
        (339, 3, samples, after + 8),
    ] {
        file.extend(entry(tag, kind, count, value));
    }
    file.extend([0; 4]);
    for value in [32u16, 32, 32, 32, 3, 3, 3, 3] {
        file.extend(value.to_le_bytes());
    }
    let error = decode(&file).expect_err("floats");
    assert!(matches!(error, capsieve_prep::ImageError::Unsupported { .. }), "{error:?}");
}
