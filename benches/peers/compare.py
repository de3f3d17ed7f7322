"""Capsieve against transformers in float32: same weights, same rows, same machine, interleaved in one run.

    cargo build --release
    target/release/capsieve synth --size large --out large
    python benches/peers/compare.py --model large --capsieve target/release/capsieve --rounds 3 --out benches/results/NAME.json

Each round scores the same shard once by every variant, in turn, so that a machine whose speed drifts slows all of them.
Capsieve's time is the engine stage of its stats file; a peer's is its forward passes, pixels and token ids made before.
Every variant's scores are compared with the first peer's.
"""
import argparse
import io
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from transformers import BlipForImageTextRetrieval, BlipProcessor

WORDS = ("a dog cat man woman child horse car bus tree river beach street table red blue green small large old "
         "wooden sitting running standing playing holding near under over beside with and the of in on").split()


def make_shard(path, rows, seed):
    """A shard of smooth random photographs (lossless, so that every decoder agrees) and captions of 6 to 33 words."""
    rng, random_words = np.random.default_rng(seed), random.Random(seed)
    images, captions = [], []
    for _ in range(rows):
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((640, 480), Image.BICUBIC)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        images.append(file.getvalue())
        captions.append(" ".join(random_words.choices(WORDS, k=random_words.randint(6, 33))))
    pq.write_table(pa.table({"image": images, "caption": captions}), path)
    return images, captions


class Peer:
    """transformers' class, called in one of the ways people call it."""

    def __init__(self, folder, batch, attention):
        self.model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        self.model.eval()
        self.batch = batch

    def two_calls(self, pixels, texts):
        """The model card's way: the whole model once for each head."""
        itm = self.model(pixel_values=pixels, **texts)[0].softmax(1)[:, 1]
        cosine = self.model(pixel_values=pixels, use_itm_head=False, **texts)[0].diagonal()
        return itm, cosine

    def shared(self, pixels, texts):
        """The optimised user's way: one image pass for both heads."""
        m, ids, mask = self.model, texts["input_ids"], texts["attention_mask"]
        embeds = m.vision_model(pixel_values=pixels)[0]
        seen = torch.ones(embeds.shape[:-1], dtype=torch.long)
        text = m.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=embeds,
                              encoder_attention_mask=seen, return_dict=True)[0]
        itm = m.itm_head(text[:, 0]).softmax(1)[:, 1]
        text = m.text_encoder(input_ids=ids, attention_mask=mask, return_dict=True)[0]
        u = torch.nn.functional.normalize(m.vision_proj(embeds[:, 0]), dim=-1)
        w = torch.nn.functional.normalize(m.text_proj(text[:, 0]), dim=-1)
        return itm, (u * w).sum(1)

    @torch.inference_mode()
    def run(self, way, pixels, captions, tokenizer):
        """Scores all rows; returns seconds and scores [rows, 2]."""
        batches = [(pixels[i:i + self.batch],
                    tokenizer(captions[i:i + self.batch], padding=True, return_tensors="pt"))
                   for i in range(0, len(captions), self.batch)]
        batches = [(p, {k: t[k] for k in ("input_ids", "attention_mask")}) for p, t in batches]
        start = time.perf_counter()
        scores = [torch.stack(getattr(self, way)(p, t), 1) for p, t in batches]
        return time.perf_counter() - start, torch.cat(scores).numpy()


def run_capsieve(binary, model, shard, folder, extra):
    """Scores the shard with the binary; returns the engine's seconds, the scores and the process's peak memory."""
    out = os.path.join(folder, "scored.parquet")
    command = [binary, "score", "--model", model, "--input", shard, "--output", out, "--overwrite", *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stats = json.load(open(os.path.join(folder, "scored.stats.json")))
    table = pq.read_table(out, columns=["itm_score", "cosine_score"])
    scores = np.stack([np.array(c) for c in table.columns], 1)
    return stats["seconds"]["engine"], scores, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", required=True, help="folder in Hugging Face's layout")
    args.add_argument("--capsieve", required=True, help="the binary")
    args.add_argument("--rows", type=int, default=8)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--threads", type=int, default=os.cpu_count())
    args.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="batch sizes of the peers")
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--out", help="raw results, JSON")
    a = args.parse_args()
    torch.set_num_threads(a.threads)
    processor = BlipProcessor.from_pretrained(a.model, backend="pil")
    with tempfile.TemporaryDirectory() as folder:
        shard = os.path.join(folder, "rows.parquet")
        images, captions = make_shard(shard, a.rows, a.seed)
        images = [Image.open(io.BytesIO(b)).convert("RGB") for b in images]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        variants = {"capsieve": None}
        for batch in a.batches:
            for attention in ("eager", "sdpa"):
                try:
                    peer = Peer(a.model, batch, attention)
                except ValueError as refused:
                    print(f"transformers has no {attention} attention for this model: {refused}")
                    continue
                for way in ("two_calls", "shared"):
                    variants[f"transformers {attention} {way} batch {batch}"] = (peer, way)
        times, first, drift, peak = {}, None, {}, 0
        for _ in range(a.rounds):
            for name, peer in variants.items():
                if peer is None:
                    seconds, scores, peak = run_capsieve(a.capsieve, a.model, shard, folder, ["--threads", str(a.threads)])
                    ours = scores
                else:
                    seconds, scores = peer[0].run(peer[1], pixels, captions, processor.tokenizer)
                    first = scores if first is None else first
                    drift[name] = np.abs(scores - ours).max(0).tolist()
                times.setdefault(name, []).append(a.rows / seconds)
                print(f"{name}: {a.rows / seconds:.3f} pairs/s", flush=True)
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = max((n for n in medians if n != "capsieve"), key=medians.get)
    result = {"machine": {"cpu": platform.processor() or platform.machine(), "threads": a.threads},
              "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
              "rows": a.rows, "pairs_per_second": times, "median": medians, "best_peer": best,
              "ratio_to_best_peer": medians["capsieve"] / medians[best],
              "score_difference_to_capsieve_itm_cosine": drift, "capsieve_peak_kb": peak}
    print(json.dumps({k: result[k] for k in ("median", "best_peer", "ratio_to_best_peer")}, indent=1))
    if a.out:
        with open(a.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
