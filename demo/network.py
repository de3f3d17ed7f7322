"""The demo's network: its sizes, its tokenizer, and a training forward pass over the transformers modules.

The forward pass here computes what `BlipForImageTextRetrieval` computes (`check_forward` proves it on every
run) but encodes an image once for all its captions and spends nothing on padding, which the class cannot do.
"""
import json
import os

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import BertTokenizerFast, BlipConfig, BlipForImageTextRetrieval

import scenes
from captions import vocabulary

IMAGE_PX = 96
PATCH_PX = IMAGE_PX // scenes.CELLS      # one patch per cell: 17 image tokens, which two cores can train
POSITIONS = 128
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
INIT_STD = 0.05             # transformers' 0.02 suits width 768; at width 128 it only delays learning


def build_model(width=128, vision_layers=4, text_layers=3, heads=4, seed=0):
    """A random model of the demo's shape; the two rows past the vocabulary are [DEC] and [ENC], as in public weights."""
    torch.manual_seed(seed)
    words = len(vocabulary())
    common = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, hidden_act="gelu",
                  initializer_range=INIT_STD, attention_dropout=0.0)
    config = BlipConfig(
        vision_config=dict(common, num_hidden_layers=vision_layers, image_size=IMAGE_PX, patch_size=PATCH_PX,
                           layer_norm_eps=1e-5),
        text_config=dict(common, num_hidden_layers=text_layers, encoder_hidden_size=width, vocab_size=words + 2,
                         max_position_embeddings=POSITIONS, layer_norm_eps=1e-12, is_decoder=True, pad_token_id=0,
                         sep_token_id=3, eos_token_id=3, bos_token_id=words, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0),
        image_text_hidden_size=64, projection_dim=64)
    return BlipForImageTextRetrieval(config).eval()


def build_tokenizer():
    """BERT uncased rules over the demo's own vocabulary; neither truncates nor pads, like the public files."""
    tokenizer = BertTokenizerFast(vocab={w: i for i, w in enumerate(vocabulary())}, do_lower_case=True)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class WordEncoder:
    """Words to ids, remembering each word: the training loop encodes hundreds of captions per step."""

    def __init__(self):
        self.backend: Tokenizer = build_tokenizer().backend_tokenizer
        self.known = {}

    def __call__(self, words, flags):
        """(ids, flags per token) with [CLS] and [SEP]; flag -1 where nothing is known about a token."""
        ids, marks = [2], [-1]
        for word, flag in zip(words, flags or [-1] * len(words)):
            if word not in self.known:
                self.known[word] = self.backend.encode(word, add_special_tokens=False).ids
            ids += self.known[word]
            marks += [flag] * len(self.known[word])
        return (ids + [3])[:POSITIONS], (marks + [-1])[:POSITIONS]


def pixel_values(images):
    """uint8 [B, H, W, 3] to normalised float32 [B, 3, H, W], as the processor does."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def _split(x, heads):
    """[B, T, H*D] to [B, H, T, D]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def encode_image(model, pixels):
    """Image tokens [B, N, V] after the final layer norm."""
    vision = model.vision_model
    x = vision.embeddings(pixels)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        q, k, v = (_split(t, attention.num_heads) for t in attention.qkv(layer.layer_norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + attention.projection(mixed)
        x = x + layer.mlp(layer.layer_norm2(x))
    return vision.post_layernorm(x)


def encode_text(model, ids, mask, image=None):
    """Last hidden states of the real tokens, packed [M, T], and the row of each caption's [CLS] in them.

    ids, mask [B, K, L]: K captions per image. With `image` [B, N, V] the cross-attention is on.
    """
    b, k, length = ids.shape
    real = mask.flatten().nonzero().squeeze(1)
    bias = torch.zeros(b * k, 1, 1, length).masked_fill(~mask.reshape(b * k, 1, 1, length), -1e4)
    text = model.text_encoder
    positions = torch.arange(length).expand(b * k, length).flatten()[real]
    x = text.embeddings.word_embeddings(ids.flatten()[real]) + text.embeddings.position_embeddings(positions)
    x = text.embeddings.LayerNorm(x)

    def spread(packed):
        """[M, T] to [B*K, L, T] with zero rows for padding."""
        return packed.new_zeros(b * k * length, packed.shape[-1]).index_copy(0, real, packed).view(b * k, length, -1)

    for layer in text.encoder.layer:
        own, heads = layer.attention.self, layer.attention.self.num_attention_heads
        q, key, value = (_split(spread(f(x)), heads) for f in (own.query, own.key, own.value))
        mixed = F.scaled_dot_product_attention(q, key, value, attn_mask=bias.to(q.dtype))
        mixed = mixed.transpose(1, 2).reshape(b * k * length, -1)[real]
        x = layer.attention.output(mixed, x)
        if image is not None:
            cross = layer.crossattention.self
            q = _split(spread(cross.query(x)).view(b, k * length, -1), heads)
            key, value = _split(cross.key(image), heads), _split(cross.value(image), heads)
            mixed = F.scaled_dot_product_attention(q, key, value)
            mixed = mixed.transpose(1, 2).reshape(b * k * length, -1)[real]
            x = layer.crossattention.output(mixed, x)
        x = layer.output(layer.intermediate(x), x)
    lengths = mask.reshape(b * k, length).sum(1)
    return x, lengths.cumsum(0) - lengths


def check_forward(model):
    """Asserts that the pass above equals the transformers class on random input."""
    torch.manual_seed(1)
    pixels, ids = torch.randn(2, 3, IMAGE_PX, IMAGE_PX), torch.randint(5, 100, (2, 1, 9))
    mask = torch.ones(2, 1, 9, dtype=torch.bool)
    mask[0, 0, 6:] = False
    with torch.no_grad():
        ours, first = encode_text(model, ids, mask, encode_image(model, pixels))
        theirs = model(input_ids=ids[:, 0], attention_mask=mask[:, 0].long(), pixel_values=pixels).itm_score
    gap = (model.itm_head(ours[first]) - theirs).abs().max().item()
    assert gap < 1e-4, f"training pass and transformers differ by {gap}"


def save_model(model, weights, folder):
    """Writes the Hugging Face folder with float16 weights; each file appears whole."""
    os.makedirs(folder, exist_ok=True)
    config = model.config.to_dict()
    config.pop("dtype", None)
    config.update(architectures=["BlipForImageTextRetrieval"], torch_dtype="float16")
    _json(folder, "config.json", config)
    names = {n + "_token": f"[{n.upper()}]" for n in ("cls", "mask", "pad", "sep", "unk")}
    _json(folder, "special_tokens_map.json", names)
    _json(folder, "tokenizer_config.json", dict(
        names, do_basic_tokenize=True, do_lower_case=True, model_max_length=POSITIONS, never_split=None,
        processor_class="BlipProcessor", strip_accents=None, tokenize_chinese_chars=True,
        tokenizer_class="BertTokenizer"))
    _json(folder, "preprocessor_config.json", dict(
        do_normalize=True, do_rescale=True, do_resize=True, image_mean=MEAN, image_std=STD,
        image_processor_type="BlipImageProcessor", processor_class="BlipProcessor", resample=3,
        rescale_factor=0.00392156862745098, size={"height": IMAGE_PX, "width": IMAGE_PX}))
    _replace(folder, "vocab.txt", ("\n".join(vocabulary()) + "\n").encode())
    _replace(folder, "tokenizer.json", build_tokenizer().backend_tokenizer.to_str(pretty=True).encode() + b"\n")
    from safetensors.torch import save
    half = {name: tensor.detach().half().contiguous() for name, tensor in weights.items()}
    _replace(folder, "model.safetensors", save(half, metadata={"format": "pt"}))


def _json(folder, name, value):
    _replace(folder, name, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def _replace(folder, name, data):
    path = os.path.join(folder, name)
    with open(path + ".part", "wb") as f:
        f.write(data)
    os.replace(path + ".part", path)
