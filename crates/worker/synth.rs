//! The job `synth`: synthetic weights as a folder that transformers loads.

use std::path::Path;

pub use capsieve_engine::SyntheticSize as SynthSize;
use serde_json::json;

use crate::{Error, LoadedModel, Result};

/// Writes `synthetic:size:seed` as a Hugging Face folder: weights, configuration, tokenizer, preprocessing.
///
/// # Errors
/// The folder holds something and must not be replaced, or cannot be written.
pub fn synth(size: SynthSize, seed: u64, folder: &Path, overwrite: bool) -> Result<()> {
    let fail = |path: &Path| {
        let path = path.display().to_string();
        move |source| Error::File { path, source }
    };
    let used = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    if used && !overwrite {
        return Err(Error::FolderInUse { path: folder.display().to_string() });
    }
    let model = LoadedModel::synthetic(size, seed)?;
    model.checkpoint.write_safetensors(folder)?;
    let bad = |source| Error::Preprocessing { model: model.name.clone(), source };
    let image = &model.image;
    let names = json!({
        "cls_token": "[CLS]", "mask_token": "[MASK]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]",
    });
    let mut tokenizer = names.clone();
    for (key, value) in [
        ("do_lower_case", json!(true)),
        ("model_max_length", json!(512)),
        ("processor_class", json!("BlipProcessor")),
        ("tokenizer_class", json!("BertTokenizer")),
    ] {
        tokenizer[key] = value;
    }
    // Decimals as people write them: the f32 0.48145466 is a longer f64.
    let decimals = |values: [f32; 3]| values.map(|v| v.to_string().parse::<f64>().expect("a float's text is a float"));
    let preprocessor = json!({
        "do_resize": true, "do_rescale": true, "do_normalize": true, "resample": 3,
        "size": { "height": image.size, "width": image.size },
        "image_mean": decimals(image.mean), "image_std": decimals(image.std), "rescale_factor": image.rescale,
        "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor",
    });
    let files = [
        ("tokenizer.json", model.tokenizer.to_json().map_err(bad)?),
        ("vocab.txt", model.tokenizer.vocab_txt()),
        ("special_tokens_map.json", format!("{names:#}\n")),
        ("tokenizer_config.json", format!("{tokenizer:#}\n")),
        ("preprocessor_config.json", format!("{preprocessor:#}\n")),
    ];
    for (name, content) in files {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(fail(&path))?;
    }
    Ok(())
}
