"""PyTorch on the card, on the weights and rows that capsieve gets: what scripts/gpu-check puts beside our figures.

    python benches/peers/gpu.py ceiling|gemm|attention
    python benches/peers/gpu.py end-to-end --model DIR --batch 58 --variants eager sdpa compile
    python benches/peers/gpu.py make-rows --out rows.parquet --rows 256
    python benches/peers/gpu.py parity --model DIR --rows rows.parquet --scored f16=f16.parquet ...

Prints JSON Lines. `eager` is transformers' own class, called once for both heads; `sdpa` is the same network in plain
PyTorch with scaled_dot_product_attention, which transformers lacks for this model, and `compile` that under
torch.compile. Pixels are on the card as bytes, as they are for capsieve. `--device cpu` tries all of it without a card.
"""
import argparse
import json
import os
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# ViT-L/16 at 384 px and BERT-base: outputs, inputs.
PRODUCTS = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (1536, 1024)]
TOKENS = 577


def say(**what):
    print(json.dumps(what), flush=True)


def seconds(work, device, rounds=5, least=0.03):
    """Median seconds of a call, over rounds long enough for the host's clock."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(runs):
        start = time.perf_counter()
        for _ in range(runs):
            work()
        wait()
        return (time.perf_counter() - start) / runs

    timed(2)
    runs = max(1, int(least / timed(1)))
    return statistics.median(timed(runs) for _ in range(rounds))


class Network(torch.nn.Module):
    """transformers' BlipForImageTextRetrieval as plain operations; both heads from one image pass."""

    def __init__(self, tensors, config):
        super().__init__()
        self.config = config
        self.weights = {name: name.replace(".", "_") for name in tensors}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_buffer(self.weights[name], tensor)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1) * 255)

    def get(self, name):
        return getattr(self, self.weights[name])

    def linear(self, name, x):
        return F.linear(x, self.get(name + ".weight"), self.get(name + ".bias"))

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.get(name + ".weight"), self.get(name + ".bias"), eps)

    @staticmethod
    def attend(q, k, v, heads, mask=None):
        def split(x):
            return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(split(q), split(k), split(v), mask)
        return out.transpose(1, 2).reshape(q.shape)

    def image(self, pixels):
        c, name = self.config["vision_config"], "vision_model."
        heads, eps = c["num_attention_heads"], c["layer_norm_eps"]
        x = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        weight, bias = (self.get(f"{name}embeddings.patch_embedding.{part}") for part in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, c["patch_size"]).flatten(2).transpose(1, 2)
        first = self.get(name + "embeddings.class_embedding").expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], 1) + self.get(name + "embeddings.position_embedding")
        for i in range(c["num_hidden_layers"]):
            layer = f"{name}encoder.layers.{i}."
            q, k, v = self.linear(layer + "self_attn.qkv", self.norm(layer + "layer_norm1", x, eps)).chunk(3, -1)
            x = x + self.linear(layer + "self_attn.projection", self.attend(q, k, v, heads))
            hidden = F.gelu(self.linear(layer + "mlp.fc1", self.norm(layer + "layer_norm2", x, eps)))
            x = x + self.linear(layer + "mlp.fc2", hidden)
        return self.norm(name + "post_layernorm", x, eps)

    def text(self, ids, mask, image=None):
        c, name = self.config["text_config"], "text_encoder."
        heads, eps = c["num_attention_heads"], c["layer_norm_eps"]
        x = self.get(name + "embeddings.word_embeddings.weight")[ids]
        x = x + self.get(name + "embeddings.position_embeddings.weight")[:ids.shape[1]]
        x = self.norm(name + "embeddings.LayerNorm", x, eps)
        mask = mask[:, None, None, :].bool()
        for j in range(c["num_hidden_layers"]):
            layer = f"{name}encoder.layer.{j}."

            def attention(part, x, source, mask):
                q = self.linear(f"{layer}{part}.self.query", x)
                k, v = (self.linear(f"{layer}{part}.self.{kv}", source) for kv in ("key", "value"))
                out = self.linear(f"{layer}{part}.output.dense", self.attend(q, k, v, heads, mask))
                return self.norm(f"{layer}{part}.output.LayerNorm", out + x, eps)

            x = attention("attention", x, x, mask)
            if image is not None:
                x = attention("crossattention", x, image, None)
            hidden = F.gelu(self.linear(layer + "intermediate.dense", x))
            x = self.norm(layer + "output.LayerNorm", self.linear(layer + "output.dense", hidden) + x, eps)
        return x[:, 0]

    def forward(self, pixels, ids, mask):
        embeds = self.image(pixels)
        logits = self.linear("itm_head", self.text(ids, mask, embeds)).float()
        u = F.normalize(self.linear("vision_proj", embeds[:, 0]).float(), dim=-1)
        w = F.normalize(self.linear("text_proj", self.text(ids, mask)).float(), dim=-1)
        return logits.softmax(1)[:, 1], (u * w).sum(1)


class Eager(torch.nn.Module):
    """transformers' class with the image pass shared by both heads, as an optimising user calls it."""

    def __init__(self, folder, dtype):
        from transformers import BlipForImageTextRetrieval
        super().__init__()
        self.model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=dtype).eval()
        self.register_buffer("mean", torch.tensor(MEAN, dtype=dtype).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(STD, dtype=dtype).view(1, 3, 1, 1) * 255)

    def forward(self, pixels, ids, mask):
        m = self.model
        x = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        embeds = m.vision_model(pixel_values=x)[0]
        seen = torch.ones(embeds.shape[:-1], dtype=torch.long, device=embeds.device)
        text = m.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=embeds,
                              encoder_attention_mask=seen, return_dict=True)[0]
        logits = m.itm_head(text[:, 0]).float()
        text = m.text_encoder(input_ids=ids, attention_mask=mask, return_dict=True)[0]
        u = F.normalize(m.vision_proj(embeds[:, 0]).float(), dim=-1)
        w = F.normalize(m.text_proj(text[:, 0]).float(), dim=-1)
        return logits.softmax(1)[:, 1], (u * w).sum(1)


def load(folder, variant, dtype, device):
    if variant == "eager":
        return Eager(folder, dtype).to(device)
    from safetensors.torch import load_file
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        network = Network(tensors, json.load(file)).to(device, dtype).eval()
    return torch.compile(network, mode="max-autotune" if device == "cuda" else "default") if variant == "compile" else network


def ceiling(a):
    side = 8192 if a.device == "cuda" else 256
    for name in ("f16", "bf16"):
        x, y = (torch.randn(side, side, device=a.device, dtype=TYPES[name]) for _ in range(2))
        time_ = seconds(lambda: x @ y, a.device)
        say(step="ceiling", who="torch", precision=name, what=f"product of {side}", us=time_ * 1e6,
            tflops=2 * side ** 3 / time_ / 1e12)
    x = torch.randn(side * side, device=a.device)
    y = torch.empty_like(x)
    time_ = seconds(lambda: y.copy_(x), a.device)
    say(step="ceiling", who="torch", what="copy", us=time_ * 1e6, gb_per_s=8 * side * side / time_ / 1e9)


def gemm(a):
    for images in (16, 29, 32, 58, 64) if a.device == "cuda" else (1,):
        for n, k in PRODUCTS:
            m = images * TOKENS
            x, w = torch.randn(m, k, device=a.device, dtype=torch.float16), torch.randn(n, k, device=a.device).half()
            b = torch.randn(n, device=a.device).half()
            time_ = seconds(lambda: torch.addmm(b, x, w.t()), a.device)
            say(step="gemm", who="torch", precision="f16", images=images, m=m, n=n, k=k, us=time_ * 1e6,
                tflops=2 * m * n * k / time_ / 1e12)


def attention(a):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    images = 58 if a.device == "cuda" else 1
    q, k, v = (torch.randn(images, 16, TOKENS, 64, device=a.device, dtype=torch.float16) for _ in range(3))
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                time_ = seconds(lambda: F.scaled_dot_product_attention(q, k, v), a.device)
        except RuntimeError as error:
            say(step="attention", who="torch", what=backend.lower(), error=str(error).splitlines()[0])
            continue
        say(step="attention", who="torch", what=backend.lower(), spans=images, us=time_ * 1e6,
            tflops=4 * images * 16 * TOKENS ** 2 * 64 / time_ / 1e12)


@torch.inference_mode()
def end_to_end(a):
    with open(os.path.join(a.model, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    side, vocabulary = config["vision_config"]["image_size"], config["text_config"]["vocab_size"]
    pixels = torch.randint(0, 256, (a.batch, side, side, 3), dtype=torch.uint8, device=a.device)
    ids = torch.randint(0, vocabulary, (a.batch, a.tokens), device=a.device)
    mask = torch.ones_like(ids)
    for variant in a.variants:
        start = time.perf_counter()
        model = load(a.model, variant, TYPES[a.precision], a.device)
        model(pixels, ids, mask)
        ready = time.perf_counter() - start
        time_ = seconds(lambda: model(pixels, ids, mask), a.device, least=1.0 if a.device == "cuda" else 0.01)
        say(step="end to end", who="torch", variant=variant, precision=a.precision, batch=a.batch, tokens=a.tokens,
            ms=time_ * 1e3, pairs_per_second=a.batch / time_, ready_seconds=ready)
        del model


@torch.inference_mode()
def parity(a):
    """Scores of each mode, ours and PyTorch's f16, against PyTorch in f32 without TF32."""
    import pyarrow.parquet as pq
    from rows import read_pixels
    from transformers import AutoTokenizer
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pixels, captions = read_pixels(a.rows)
    pixels, tokenizer = torch.from_numpy(pixels).to(a.device), AutoTokenizer.from_pretrained(a.model)

    def scores(precision):
        model, out = load(a.model, "sdpa", TYPES[precision], a.device), []
        for i in range(0, len(captions), 32):
            text = tokenizer(captions[i:i + 32], padding=True, return_tensors="pt").to(a.device)
            out.append(torch.stack(model(pixels[i:i + 32], text["input_ids"], text["attention_mask"]), 1))
        return torch.cat(out).double().cpu().numpy()

    reference = scores("f32")
    found = {("torch", "f16"): scores("f16")}
    for scored in a.scored:
        name, path = scored.split("=", 1)
        columns = pq.read_table(path, columns=["itm_score", "cosine_score"]).columns
        found["capsieve", name] = np.stack([np.asarray(column, dtype=np.float64) for column in columns], 1)
    for (who, precision), got in found.items():
        error = np.abs(got - reference)
        say(step="parity", who=who, precision=precision, rows=len(captions), probability_max=error[:, 0].max(),
            probability_mean=error[:, 0].mean(), cosine_max=error[:, 1].max(), cosine_mean=error[:, 1].mean(),
            decisions_flipped=int(((got[:, 0] > 0.5) != (reference[:, 0] > 0.5)).sum()))


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("step", choices=["ceiling", "gemm", "attention", "end-to-end", "make-rows", "parity"])
    args.add_argument("--device", default="cuda")
    args.add_argument("--model", help="folder in Hugging Face's layout")
    args.add_argument("--precision", default="f16", choices=TYPES)
    args.add_argument("--batch", type=int, default=58)
    args.add_argument("--tokens", type=int, default=13)
    args.add_argument("--variants", nargs="+", default=["eager", "sdpa"], choices=["eager", "sdpa", "compile"])
    args.add_argument("--out")
    args.add_argument("--rows", help="the rows, Parquet")
    args.add_argument("--rows-count", type=int, default=256)
    args.add_argument("--side", type=int, default=384)
    args.add_argument("--scored", nargs="*", default=[], help="MODE=PARQUET: what capsieve made of the rows")
    a = args.parse_args()
    if a.step == "make-rows":
        from rows import make_rows
        return make_rows(a.out, a.rows_count, a.side)
    {"ceiling": ceiling, "gemm": gemm, "attention": attention, "end-to-end": end_to_end,
     "parity": parity}[a.step](a)


if __name__ == "__main__":
    main()
