//! The oracle sets under tests/golden: inputs and the values PyTorch gave, made by the model's generator (see
//! tests/golden/README.md). `CAPSIEVE_GOLDEN` names another folder of the same layout, made from another seed.

use std::path::PathBuf;

use capsieve_prep::{DecodeLimits, ImageSpec, RgbImage, decode_rgb, resize_bicubic};
use safetensors::SafeTensors;

/// Folder of the sets.
pub(crate) fn golden() -> PathBuf {
    match std::env::var_os("CAPSIEVE_GOLDEN") {
        Some(folder) => folder.into(),
        None => concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden").into(),
    }
}

/// A safetensors file of expected values.
pub(crate) struct Tensors(Vec<u8>);

impl Tensors {
    pub(crate) fn open(relative: &str) -> Self {
        let path = golden().join(relative);
        Self(std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn bytes(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    /// Shape and values of an f32 or f64 tensor.
    pub(crate) fn floats(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let (shape, bytes) = self.bytes(name);
        let count: usize = shape.iter().product();
        let values = match bytes.len() / count.max(1) {
            4 => bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            8 => bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            size => panic!("{name} has values of {size} bytes"),
        };
        (shape, values)
    }

    /// Shape and values of an i64 tensor.
    pub(crate) fn integers(&self, name: &str) -> (Vec<usize>, Vec<i64>) {
        let (shape, bytes) = self.bytes(name);
        (shape, bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
    }

    /// Shape and values of a u8 tensor.
    pub(crate) fn samples(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        self.bytes(name)
    }
}

/// One of the two model sets with its prepared inputs. I images, C captions.
pub(crate) struct Oracle {
    pub(crate) name: &'static str,
    pub(crate) folder: PathBuf,
    pub(crate) image_names: Vec<String>,
    pub(crate) captions: Vec<String>,
    pub(crate) expected: Tensors,
    /// Side of the model's input.
    pub(crate) image_size: usize,
    /// Prepared pixels of each image, `[S, S, 3]`.
    pub(crate) pixels: Vec<Vec<u8>>,
    /// Token ids of each caption, without padding.
    pub(crate) tokens: Vec<Vec<u32>>,
}

impl Oracle {
    /// "tiny" or "wide".
    pub(crate) fn load(name: &'static str) -> Self {
        let folder = golden().join(name);
        let json: serde_json::Value = parse(&std::fs::read(folder.join("expected.json")).unwrap());
        let strings = |key: &str| -> Vec<String> {
            json[key].as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
        };
        let (image_names, captions) = (strings("images"), strings("captions"));
        let config: serde_json::Value = parse(&std::fs::read(folder.join("config.json")).unwrap());
        let image_size = config["vision_config"]["image_size"].as_u64().unwrap() as usize;
        let pixels = image_names.iter().map(|name| resize_bicubic(&rgb(name), image_size, image_size).pixels);
        let expected = Tensors::open(&format!("{name}/expected.safetensors"));
        let tokens = tokens(&expected);
        Self { name, image_size, pixels: pixels.collect(), image_names, captions, expected, tokens, folder }
    }
}

fn parse(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes).unwrap()
}

/// The decoded image; a JPEG's pixels are the stored ones of the reference decoder, so that the decoder and the network
/// are tested apart.
pub(crate) fn rgb(name: &str) -> RgbImage {
    if name.ends_with(".jpg") {
        let (shape, pixels) = Tensors::open("images.safetensors").samples(&format!("rgb.{name}"));
        return RgbImage { width: shape[1], height: shape[0], pixels };
    }
    let bytes = std::fs::read(golden().join("images").join(name)).unwrap();
    decode_rgb(&bytes, &DecodeLimits::default()).unwrap()
}

fn tokens(expected: &Tensors) -> Vec<Vec<u32>> {
    let (shape, ids) = expected.integers("input_ids");
    let (_, mask) = expected.integers("attention_mask");
    let row = |c: usize| {
        let cells = c * shape[1]..(c + 1) * shape[1];
        cells.filter(|i| mask[*i] == 1).map(|i| u32::try_from(ids[i]).unwrap()).collect()
    };
    (0..shape[0]).map(row).collect()
}

/// The normalisation every set uses.
pub(crate) fn pixel_lut(image_size: usize) -> [[f32; 256]; 3] {
    ImageSpec::blip(image_size).pixel_lut()
}
