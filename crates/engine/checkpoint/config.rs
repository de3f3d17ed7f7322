//! config.json: the shape of the model. Never guessed from a name; absent keys have the defaults of transformers' classes.

use serde_json::Value;

use crate::Error;

/// Bounds on what a configuration may ask for: ten times the public checkpoints, far below what would overflow.
const WIDTH_MAX: u64 = 1 << 14;
const LAYERS_MAX: u64 = 256;
const VOCAB_MAX: u64 = 1 << 20;
const IMAGE_MAX: u64 = 1 << 12;

/// The model's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The image encoder's.
    pub vision: VisionConfig,
    /// The text encoder's.
    pub text: TextConfig,
    /// Width of the shared space of the cosine head.
    pub projection: usize,
}

/// The image encoder's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Width of a token.
    pub hidden: usize,
    /// Width of the mlp.
    pub intermediate: usize,
    /// Number of layers.
    pub layers: usize,
    /// Attention heads of a layer.
    pub heads: usize,
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// eps of every layer norm.
    pub eps: f32,
}

/// The text encoder's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    /// Width of a token.
    pub hidden: usize,
    /// Width of the mlp.
    pub intermediate: usize,
    /// Number of layers.
    pub layers: usize,
    /// Attention heads of a layer.
    pub heads: usize,
    /// Longest caption in tokens.
    pub positions: usize,
    /// Rows of the word table.
    pub vocab: usize,
    /// eps of every layer norm.
    pub eps: f32,
    /// Row of `[ENC]`, which no tokenizer knows: the last of the word table.
    pub enc_token_id: u32,
}

impl VisionConfig {
    /// Patches of an image.
    pub fn patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }
}

/// Reads config.json. `origin` names the checkpoint in errors; warnings are for the user to see.
///
/// # Errors
/// Not JSON, another model's configuration, or values no model can have.
pub(super) fn parse(origin: &str, json: &[u8]) -> Result<(Config, Vec<String>), Error> {
    let root: Value =
        serde_json::from_slice(json).map_err(|source| Error::ConfigJson { origin: origin.to_owned(), source })?;
    read(&root).map_err(|reason| Error::Config { origin: origin.to_owned(), reason })
}

fn read(root: &Value) -> Result<(Config, Vec<String>), String> {
    check_kind(root)?;
    let absent = Value::Null;
    let part = |name: &str| root.get(name).unwrap_or(&absent);
    let (vision, text) = (Fields("vision_config", part("vision_config")), Fields("text_config", part("text_config")));
    let config = Config {
        vision: VisionConfig {
            hidden: vision.size("hidden_size", 768, WIDTH_MAX)?,
            intermediate: vision.size("intermediate_size", 3072, 4 * WIDTH_MAX)?,
            layers: vision.size("num_hidden_layers", 12, LAYERS_MAX)?,
            heads: vision.size("num_attention_heads", 12, WIDTH_MAX)?,
            image_size: vision.size("image_size", 384, IMAGE_MAX)?,
            patch_size: vision.size("patch_size", 16, IMAGE_MAX)?,
            eps: vision.eps(1e-5)?,
        },
        text: TextConfig {
            hidden: text.size("hidden_size", 768, WIDTH_MAX)?,
            intermediate: text.size("intermediate_size", 3072, 4 * WIDTH_MAX)?,
            layers: text.size("num_hidden_layers", 12, LAYERS_MAX)?,
            // transformers' default has been wrong since the beginning; files that mean 12 say so.
            heads: text.size("num_attention_heads", 8, WIDTH_MAX)?,
            positions: text.size("max_position_embeddings", 512, WIDTH_MAX)?,
            vocab: text.size("vocab_size", 30_524, VOCAB_MAX)?,
            eps: text.eps(1e-12)?,
            enc_token_id: text.size("vocab_size", 30_524, VOCAB_MAX)? as u32 - 1,
        },
        projection: Fields("the top level", root).size("image_text_hidden_size", 256, WIDTH_MAX)?,
    };
    vision.activation()?;
    text.activation()?;
    check(&config, &vision, &text)?;
    let mut warnings = Vec::new();
    if config.text.hidden == 768 && config.text.heads != 12 {
        warnings.push(format!(
            "config.json gives the text encoder {} attention heads; the public checkpoints have 12, and early copies of \
             their config.json omit the number, which makes every score wrong",
            config.text.heads
        ));
    }
    Ok((config, warnings))
}

fn check_kind(root: &Value) -> Result<(), String> {
    if !root.is_object() {
        return Err("it is not a JSON object".to_owned());
    }
    let kind = root.get("model_type").and_then(Value::as_str).unwrap_or("blip");
    if kind != "blip" {
        return Err(format!("model_type is {kind:?}, this engine runs BLIP image-text matching models (\"blip\")"));
    }
    let architecture = root.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
    match architecture {
        Some(name) if name != "BlipForImageTextRetrieval" => Err(format!(
            "architectures is {name:?}, which has no matching head; expected \"BlipForImageTextRetrieval\", \
             for example Salesforce/blip-itm-base-coco"
        )),
        _ => Ok(()),
    }
}

fn check(config: &Config, vision: &Fields<'_>, text: &Fields<'_>) -> Result<(), String> {
    let parts = [
        ("vision_config", config.vision.hidden, config.vision.heads),
        ("text_config", config.text.hidden, config.text.heads),
    ];
    for (name, hidden, heads) in parts {
        if hidden % heads != 0 {
            return Err(format!("{name}.hidden_size {hidden} is not divisible by num_attention_heads {heads}"));
        }
    }
    if config.vision.patch_size > config.vision.image_size {
        let (patch, image) = (config.vision.patch_size, config.vision.image_size);
        return Err(format!("vision_config.patch_size {patch} is larger than image_size {image}"));
    }
    if vision.size("num_channels", 3, 64)? != 3 {
        return Err("vision_config.num_channels is not 3".to_owned());
    }
    if text.0 == "text_config" && text.1.get("is_decoder").and_then(Value::as_bool) == Some(false) {
        return Err(
            "text_config.is_decoder is false: such a text encoder has no cross-attention to match with".to_owned()
        );
    }
    Ok(())
}

/// An object of config.json and its name.
struct Fields<'a>(&'static str, &'a Value);

impl Fields<'_> {
    fn size(&self, key: &str, default: u64, max: u64) -> Result<usize, String> {
        let value = match self.1.get(key) {
            None | Some(Value::Null) => default,
            Some(value) => value.as_u64().unwrap_or(0),
        };
        if value == 0 || value > max {
            let found = self.1.get(key).unwrap_or(&Value::Null);
            return Err(format!("{}.{key} is {found}, expected a whole number from 1 to {max}", self.0));
        }
        Ok(value as usize)
    }

    fn eps(&self, default: f64) -> Result<f32, String> {
        let value = match self.1.get("layer_norm_eps") {
            None | Some(Value::Null) => default,
            Some(value) => value.as_f64().unwrap_or(-1.0),
        };
        if (0.0..1.0).contains(&value) {
            return Ok(value as f32);
        }
        Err(format!("{}.layer_norm_eps is {value}, expected 0 to 1", self.0))
    }

    fn activation(&self) -> Result<(), String> {
        match self.1.get("hidden_act") {
            None | Some(Value::Null) => Ok(()),
            Some(Value::String(name)) if name == "gelu" => Ok(()),
            Some(other) => Err(format!("{}.hidden_act is {other}, this engine has \"gelu\" (the erf form)", self.0)),
        }
    }
}
