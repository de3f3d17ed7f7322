//! A checkpoint as a Hugging Face folder: config.json and model.safetensors, which transformers loads as they are.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Checkpoint, Config, required};
use crate::Error;

/// config.json in the published style.
pub(super) fn config_json(config: &Config) -> Vec<u8> {
    let (v, t) = (&config.vision, &config.text);
    let json = json!({
        "architectures": ["BlipForImageTextRetrieval"],
        "model_type": "blip",
        "image_text_hidden_size": config.projection,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "blip_text_model",
            "hidden_size": t.hidden,
            "encoder_hidden_size": v.hidden,
            "intermediate_size": t.intermediate,
            "num_hidden_layers": t.layers,
            "num_attention_heads": t.heads,
            "max_position_embeddings": t.positions,
            "vocab_size": t.vocab,
            "hidden_act": "gelu",
            "layer_norm_eps": eps(t.eps),
            "is_decoder": true,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "pad_token_id": 0,
            "bos_token_id": t.vocab - 2,
            "sep_token_id": 102,
        },
        "vision_config": {
            "model_type": "blip_vision_model",
            "hidden_size": v.hidden,
            "intermediate_size": v.intermediate,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "image_size": v.image_size,
            "patch_size": v.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": eps(v.eps),
            "attention_dropout": 0.0,
        },
    });
    format!("{json:#}\n").into_bytes()
}

/// The decimal a person wrote, not the nearest f32's sixteen digits.
fn eps(value: f32) -> f64 {
    value.to_string().parse().expect("a float's own text is a float")
}

/// Writes config.json and model.safetensors into `folder`.
pub(super) fn folder(checkpoint: &Checkpoint, folder: &Path) -> Result<(), Error> {
    let config = folder.join("config.json");
    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Write { path, source }
    };
    std::fs::create_dir_all(folder).map_err(write(folder))?;
    std::fs::write(&config, &checkpoint.config_json).map_err(write(&config))?;
    let (partial, whole) = (folder.join(".model.safetensors.partial"), folder.join("model.safetensors"));
    let written = weights(checkpoint, &partial);
    if written.is_err() {
        // What cannot be removed either is hidden and says in its name that it is partial.
        let _ = std::fs::remove_file(&partial);
    }
    written?;
    std::fs::rename(&partial, &whole).map_err(write(&whole))
}

fn weights(checkpoint: &Checkpoint, path: &Path) -> Result<(), Error> {
    let write = |source| Error::Write { path: path.to_owned(), source };
    let tensors = required(checkpoint.config());
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(write)?);
    let header = header(&tensors);
    out.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&header)).map_err(write)?;
    for (name, shape) in &tensors {
        for value in checkpoint.read_f32(name, shape)? {
            out.write_all(&value.to_le_bytes()).map_err(write)?;
        }
    }
    let file = out.into_inner().map_err(|e| write(e.into_error()))?;
    file.sync_all().map_err(write)
}

/// The header of the format: each tensor's type, shape and place, padded with spaces to eight bytes.
fn header(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut start = 0;
    for (name, shape) in tensors {
        let end = start + 4 * shape.iter().product::<usize>();
        entries.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }));
        start = end;
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}
