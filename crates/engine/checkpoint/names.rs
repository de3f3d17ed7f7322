//! The tensor names of the original Salesforce files, and what they are called in transformers.

/// First components of names that only training needs: momentum copies and queues.
const DROPPED: [&str; 9] = [
    "visual_encoder_m",
    "text_encoder_m",
    "vision_proj_m",
    "text_proj_m",
    "image_queue",
    "text_queue",
    "idx_queue",
    "ptr_queue",
    "temp",
];

/// True if any of these names is one of the original image encoder's.
pub(super) fn is_salesforce<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|name| name.starts_with("visual_encoder."))
}

/// The transformers name of an original one; `None` if the tensor is not part of the scoring model.
pub(super) fn to_transformers(name: &str) -> Option<String> {
    let (first, rest) = name.split_once('.').unwrap_or((name, ""));
    if DROPPED.contains(&first) {
        return None;
    }
    if first != "visual_encoder" {
        return Some(name.to_owned());
    }
    let embeddings = "vision_model.embeddings";
    if let Some(rest) = rest.strip_prefix("patch_embed.proj.") {
        return Some(format!("{embeddings}.patch_embedding.{rest}"));
    }
    if let Some(rest) = rest.strip_prefix("norm.") {
        return Some(format!("vision_model.post_layernorm.{rest}"));
    }
    if let Some(rest) = rest.strip_prefix("blocks.") {
        let rest = rest
            .replace(".norm1.", ".layer_norm1.")
            .replace(".norm2.", ".layer_norm2.")
            .replace(".attn.qkv.", ".self_attn.qkv.")
            .replace(".attn.proj.", ".self_attn.projection.");
        return Some(format!("vision_model.encoder.layers.{rest}"));
    }
    match rest {
        "cls_token" => Some(format!("{embeddings}.class_embedding")),
        "pos_embed" => Some(format!("{embeddings}.position_embedding")),
        _ => Some(name.to_owned()),
    }
}
