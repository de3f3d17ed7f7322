//! Checkpoints: every format gives the same tensors, and everything that is wrong with one is named.

use std::io::Write;
use std::path::Path;

use capsieve_engine::{Checkpoint, Error, SyntheticSize};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use zip::write::SimpleFileOptions;

use crate::oracle::golden;

struct Tensor {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn tensors(checkpoint: &Checkpoint) -> Vec<Tensor> {
    let read = |name: &str, shape: &[usize]| checkpoint.read_f32(name, shape).unwrap();
    checkpoint.tensors().map(|t| Tensor { values: read(&t.name, &t.shape), name: t.name, shape: t.shape }).collect()
}

fn tiny() -> Vec<Tensor> {
    tensors(&Checkpoint::open(&golden().join("tiny")).unwrap())
}

fn copy_config(folder: &Path) {
    std::fs::copy(golden().join("tiny/config.json"), folder.join("config.json")).unwrap();
}

/// A tensor as pickled by torch, `FloatStorage` number `key`.
fn pickled(tensor: &Tensor, key: usize) -> Vec<u8> {
    let number = |value: usize| [b"J".as_slice(), &(value as u32).to_le_bytes()].concat();
    let text = |text: &str| [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let tuple = |items: Vec<Vec<u8>>| [b"(".to_vec(), items.concat(), b"t".to_vec()].concat();
    let strides: Vec<usize> = (0..tensor.shape.len()).map(|i| tensor.shape[i + 1..].iter().product()).collect();
    let sizes = |sizes: &[usize]| tuple(sizes.iter().map(|size| number(*size)).collect());
    let id = vec![text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text(&key.to_string()), text("cpu"), number(1)];
    let arguments =
        vec![[tuple(id), b"Q".to_vec()].concat(), number(0), sizes(&tensor.shape), sizes(&strides), b"\x89N".to_vec()];
    [text(&tensor.name), b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(), tuple(arguments), b"R".to_vec()].concat()
}

/// A torch.save file of the tensors, under `model` beside leftovers of training if `salesforce`.
fn torch_file(path: &Path, tensors: &[Tensor], salesforce: bool) {
    let entries: Vec<u8> = tensors.iter().enumerate().flat_map(|(key, tensor)| pickled(tensor, key)).collect();
    let dict = [b"ccollections\nOrderedDict\n)R(".as_slice(), &entries, b"u"].concat();
    let pickle = if salesforce {
        let model = b"\x80\x02}(X\x06\0\0\0configcargparse\nNamespace\n)RX\x05\0\0\0epochK\x05X\x05\0\0\0model";
        [model.as_slice(), &dict, b"u."].concat()
    } else {
        [b"\x80\x02".as_slice(), &dict, b"."].concat()
    };
    let mut archive = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut entry = |name: &str, data: &[u8]| {
        archive.start_file(format!("archive/{name}"), options).unwrap();
        archive.write_all(data).unwrap();
    };
    entry("data.pkl", &pickle);
    entry("byteorder", b"little");
    for (key, tensor) in tensors.iter().enumerate() {
        let bytes: Vec<u8> = tensor.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        entry(&format!("data/{key}"), &bytes);
    }
    archive.finish().unwrap();
}

fn safetensors_file(path: &Path, tensors: &[&Tensor]) {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(t, bytes)| (t.name.clone(), TensorView::new(Dtype::F32, t.shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn assert_same(folder: &Path, format: &str) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    assert_eq!(checkpoint.format(), format);
    assert!(checkpoint.warnings().is_empty(), "{:?}", checkpoint.warnings());
    for (got, want) in tensors(&checkpoint).iter().zip(tiny()) {
        assert_eq!(got.name, want.name);
        assert!(got.values == want.values, "{} differs", got.name);
    }
}

fn refused(path: &Path, words: &[&str]) {
    let Err(error) = Checkpoint::open(path) else { panic!("{} was accepted", path.display()) };
    let text = chain(&error);
    for word in words {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
}

fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

#[test]
fn float16_pickle_equals_the_rounded_weights() {
    let folder = temp();
    copy_config(folder.path());
    std::fs::copy(golden().join("tiny/pytorch_model_f16.bin"), folder.path().join("pytorch_model.bin")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.format(), "pytorch pickle");
    assert!(checkpoint.warnings().is_empty(), "the stale position_ids pass silently: {:?}", checkpoint.warnings());
    for (got, want) in tensors(&checkpoint).iter().zip(tiny()) {
        for (value, exact) in got.values.iter().zip(&want.values) {
            assert_eq!(*value, half::f16::from_f32(*exact).to_f32(), "{}", want.name);
        }
    }
}

#[test]
fn sharded_index_and_pickle_and_salesforce_names_give_the_same_tensors() {
    let all = tiny();
    let folder = temp();
    copy_config(folder.path());
    let halves: Vec<Vec<&Tensor>> = all.chunks(all.len().div_ceil(3)).map(|part| part.iter().collect()).collect();
    let mut map = serde_json::Map::new();
    for (i, part) in halves.iter().enumerate() {
        let name = format!("model-{i}.safetensors");
        safetensors_file(&folder.path().join(&name), part);
        part.iter().for_each(|t| drop(map.insert(t.name.clone(), name.clone().into())));
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    assert_same(folder.path(), "safetensors (3 shards)");

    let folder = temp();
    copy_config(folder.path());
    torch_file(&folder.path().join("pytorch_model.bin"), &all, false);
    assert_same(folder.path(), "pytorch pickle");

    let folder = temp();
    copy_config(folder.path());
    let mut original: Vec<Tensor> = all.into_iter().map(|t| Tensor { name: salesforce_name(&t.name), ..t }).collect();
    for name in ["visual_encoder_m.cls_token", "image_queue", "temp", "text_encoder.embeddings.position_ids"] {
        original.push(Tensor { name: name.to_owned(), shape: vec![1], values: vec![0.5] });
    }
    torch_file(&folder.path().join("model_large_retrieval_flickr.pth"), &original, true);
    assert_same(folder.path(), "Salesforce .pth");
    assert_same(&folder.path().join("model_large_retrieval_flickr.pth"), "Salesforce .pth");
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    refused(folder.path(), &["no config.json", "-large-flickr"]);
}

fn salesforce_name(name: &str) -> String {
    let pairs = [
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
        ("vision_model.encoder.layers", "visual_encoder.blocks"),
        ("vision_model.post_layernorm", "visual_encoder.norm"),
        (".layer_norm1.", ".norm1."),
        (".layer_norm2.", ".norm2."),
        (".self_attn.qkv.", ".attn.qkv."),
        (".self_attn.projection.", ".attn.proj."),
    ];
    let vision = name.starts_with("vision_model");
    pairs.iter().fold(name.to_owned(), |name, (ours, theirs)| if vision { name.replace(ours, theirs) } else { name })
}

#[test]
fn wrong_tensors_are_named() {
    let all = tiny();
    let folder = temp();
    copy_config(folder.path());
    let file = folder.path().join("model.safetensors");
    let without = |name: &str| all.iter().filter(|t| t.name != name).collect::<Vec<_>>();
    safetensors_file(&file, &without("itm_head.bias"));
    refused(folder.path(), &["itm_head.bias", "[2]"]);
    let misshapen = Tensor { name: "itm_head.bias".to_owned(), shape: vec![3], values: vec![0.0; 3] };
    safetensors_file(&file, &[without("itm_head.bias"), vec![&misshapen]].concat());
    refused(folder.path(), &["itm_head.bias", "[3]", "[2]", "different models"]);
    let extra = Tensor { name: "text_decoder.cls".to_owned(), shape: vec![1], values: vec![0.0] };
    safetensors_file(&file, &[all.iter().collect(), vec![&extra]].concat());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.warnings()[0].contains("text_decoder.cls"), "{:?}", checkpoint.warnings());
    assert!(checkpoint.read_f32("nowhere", &[1]).unwrap_err().to_string().contains("nowhere"));
    assert!(matches!(checkpoint.read_f32("itm_head.bias", &[4]), Err(Error::WrongShape { .. })));
}

#[test]
fn cut_and_foreign_files_are_refused() {
    let all = tiny();
    let (folder, torch) = (temp(), temp());
    copy_config(folder.path());
    copy_config(torch.path());
    let whole = std::fs::read(golden().join("tiny/model.safetensors")).unwrap();
    torch_file(&torch.path().join("pytorch_model.bin"), &all, false);
    let zipped = std::fs::read(torch.path().join("pytorch_model.bin")).unwrap();
    for twentieth in 0..20 {
        let file = folder.path().join("model.safetensors");
        std::fs::write(&file, &whole[..whole.len() * twentieth / 20]).unwrap();
        refused(folder.path(), &["model.safetensors"]);
        let file = torch.path().join("pytorch_model.bin");
        std::fs::write(&file, &zipped[..zipped.len() * twentieth / 20]).unwrap();
        refused(torch.path(), &["pytorch_model.bin"]);
    }
    std::fs::write(torch.path().join("pytorch_model.bin"), b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.").unwrap();
    refused(torch.path(), &["1.6"]);
    std::fs::write(torch.path().join("pytorch_model.bin"), b"<html>not found</html>").unwrap();
    refused(torch.path(), &["pytorch_model.bin", "not a torch file"]);
    let empty = temp();
    refused(empty.path(), &["no weights"]);
    refused(&empty.path().join("nowhere"), &["nowhere"]);
}

#[test]
fn damaged_torch_files_never_panic() {
    let folder = temp();
    copy_config(folder.path());
    let file = folder.path().join("pytorch_model.bin");
    torch_file(&file, &tiny(), false);
    let whole = std::fs::read(&file).unwrap();
    // The pickle stands at the start, the directory at the end; weights between them are numbers like any other.
    let interesting = (0..4000).chain(whole.len() - 4000..whole.len());
    for at in interesting.step_by(37) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x41;
        std::fs::write(&file, &damaged).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            assert_eq!(tensors(&checkpoint).len(), tiny().len());
        }
    }
}

#[test]
fn an_index_cannot_leave_its_folder() {
    let folder = temp();
    copy_config(folder.path());
    for name in ["../model.safetensors", "/etc/passwd", "", ".."] {
        let index = serde_json::json!({ "weight_map": { "x": name } }).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        refused(folder.path(), &["not a file of its folder"]);
    }
}

#[test]
fn impossible_configurations_are_named() {
    let original: Value = serde_json::from_slice(&std::fs::read(golden().join("tiny/config.json")).unwrap()).unwrap();
    let folder = temp();
    std::fs::copy(golden().join("tiny/model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let cases: [(&str, &str, Value, &str); 16] = [
        ("text_config", "num_attention_heads", 7.into(), "not divisible"),
        ("vision_config", "num_attention_heads", 7.into(), "not divisible"),
        ("text_config", "hidden_act", "relu".into(), "hidden_act"),
        ("vision_config", "hidden_act", "quick_gelu".into(), "hidden_act"),
        ("text_config", "is_decoder", false.into(), "cross-attention"),
        ("vision_config", "num_channels", 4.into(), "num_channels"),
        ("vision_config", "patch_size", 500.into(), "patch_size"),
        ("vision_config", "hidden_size", 0.into(), "hidden_size"),
        ("vision_config", "hidden_size", (-3).into(), "hidden_size"),
        ("vision_config", "hidden_size", u64::MAX.into(), "hidden_size"),
        ("vision_config", "hidden_size", "wide".into(), "hidden_size"),
        ("text_config", "vocab_size", 4_000_000_000_u64.into(), "vocab_size"),
        ("text_config", "layer_norm_eps", (-1.0).into(), "layer_norm_eps"),
        ("", "model_type", "clip".into(), "clip"),
        ("", "architectures", serde_json::json!(["BlipForConditionalGeneration"]), "BlipForConditionalGeneration"),
        ("text_config", "hidden_size", 90.into(), "text_encoder.embeddings.word_embeddings.weight"),
    ];
    for (part, key, value, word) in cases {
        let mut config = original.clone();
        let object = if part.is_empty() { &mut config } else { &mut config[part] };
        object[key] = value;
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        refused(folder.path(), &[word]);
    }
    std::fs::write(folder.path().join("config.json"), "{\"model_type\": ").unwrap();
    refused(folder.path(), &["config.json", "not valid"]);
}

/// config.json as published for base-coco, without the fields that scoring ignores; large differs in four numbers.
fn public_config(large: bool) -> Vec<u8> {
    let (hidden, layers, heads, mlp) = if large { (1024, 24, 16, 4096) } else { (768, 12, 12, 3072) };
    let config = serde_json::json!({
        "architectures": ["BlipForImageTextRetrieval"], "model_type": "blip", "image_text_hidden_size": 256,
        "torch_dtype": "float32", "_commit_hash": null, "projection_dim": 512,
        "text_config": { "num_attention_heads": 12, "is_decoder": true, "chunk_size_feed_forward": 0 },
        "vision_config": {
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
        },
    });
    config.to_string().into_bytes()
}

#[test]
fn public_configurations_have_their_published_sizes() {
    for (large, tensors, parameters) in [(false, 472, 223_744_258_usize), (true, 616, 446_128_642)] {
        // An empty weights file: every tensor is missing, and the first is named.
        let Err(error) = Checkpoint::from_bytes(&public_config(large), b"\x02\0\0\0\0\0\0\0{}") else {
            panic!("a file without tensors was accepted")
        };
        let Error::MissingTensor { others, .. } = error else { panic!("{error}") };
        assert_eq!(others + 1, tensors);
        let size = if large { SyntheticSize::Large } else { SyntheticSize::Base };
        let synthetic = Checkpoint::synthetic(size, 0);
        assert_eq!(synthetic.tensors().map(|t| t.shape.iter().product::<usize>()).sum::<usize>(), parameters);
        let vision = &synthetic.config().vision;
        assert_eq!((vision.eps, synthetic.config().text.eps), (1e-5, 1e-12));
    }
}

#[test]
fn absent_heads_are_eight_and_warned_of() {
    let mut config: Value = serde_json::from_slice(&public_config(false)).unwrap();
    config["text_config"].as_object_mut().unwrap().remove("num_attention_heads");
    let folder = temp();
    Checkpoint::synthetic(SyntheticSize::Base, 1).write_safetensors(folder.path()).unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.config().text.heads, 8);
    assert!(checkpoint.warnings()[0].contains("8 attention heads"), "{:?}", checkpoint.warnings());
}

#[test]
fn synthetic_weights_survive_the_disk() {
    let folder = temp();
    let made = Checkpoint::synthetic(SyntheticSize::Tiny, 7);
    made.write_safetensors(folder.path()).unwrap();
    let read = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(read.config(), made.config());
    for (a, b) in tensors(&made).iter().zip(tensors(&read)) {
        assert!(a.name == b.name && a.values == b.values, "{}", a.name);
    }
    let other = Checkpoint::synthetic(SyntheticSize::Tiny, 8);
    assert_ne!(
        made.read_f32("itm_head.weight", &[2, 64]).unwrap(),
        other.read_f32("itm_head.weight", &[2, 64]).unwrap()
    );
    let leftovers = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(leftovers, 2, "config.json and model.safetensors, nothing partial");
}

#[test]
fn the_hash_follows_the_content() {
    let folder = temp();
    let tiny = Checkpoint::open(&golden().join("tiny")).unwrap().hash().unwrap();
    copy_config(folder.path());
    torch_file(&folder.path().join("pytorch_model.bin"), &self::tiny(), false);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().hash().unwrap(), tiny, "the format does not matter");
    let mut all = self::tiny();
    all[50].values[3] += 1.0;
    torch_file(&folder.path().join("pytorch_model.bin"), &all, false);
    assert_ne!(Checkpoint::open(folder.path()).unwrap().hash().unwrap(), tiny, "one value does");
    let seeds = [1, 2].map(|seed| Checkpoint::synthetic(SyntheticSize::Tiny, seed).hash().unwrap());
    assert_ne!(seeds[0], seeds[1]);
}
