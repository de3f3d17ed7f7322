"""Scores the demo's shard with transformers, measures how well the noise is found, writes the expected scores.

    python evaluate.py --model model --shard shard.parquet [--expected expected.json]

The reference path, one pair at a time: Pillow opens the image and converts it to RGB, the PIL image processor
resizes it, the class `BlipForImageTextRetrieval` scores it in float32 (the float16 weights are widened).
"""
import argparse
import io
import json
import os

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from transformers import BertTokenizerFast, BlipForImageTextRetrieval
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil


@torch.no_grad()
def score(folder, table):
    """(ITM probability, cosine) of every row, float32."""
    model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    processor = BlipImageProcessorPil.from_pretrained(folder)
    scores = []
    for row in table.to_pylist():
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        inputs = dict(pixel_values=processor(image, return_tensors="pt").pixel_values,
                      **tokenizer(row["caption"], return_tensors="pt", return_token_type_ids=False))
        itm = model(**inputs).itm_score.softmax(1)[0, 1].item()
        scores.append((itm, model(**inputs, use_itm_head=False).itm_score[0, 0].item()))
    return np.array(scores, np.float32).T


def report(table, itm, cosine):
    truth = np.array(table["is_match"])
    noise = np.array(table["noise"])
    print(f"rows {len(truth)}, matching {truth.sum()}")
    print(f"ROC AUC: itm {roc_auc_score(truth, itm):.4f}, cosine {roc_auc_score(truth, cosine):.4f}")
    found = itm < 0.5
    print(f"noise found at itm < 0.5: precision {precision_score(~truth, found):.3f}, "
          f"recall {recall_score(~truth, found):.3f}")
    print(f"matches kept at itm >= 0.5: precision {precision_score(truth, ~found):.3f}, "
          f"recall {recall_score(truth, ~found):.3f}")
    lossless = is_lossless(table)
    for name, part in (("png", lossless), ("jpeg", ~lossless)):
        print(f"  {name:17} itm {roc_auc_score(truth[part], itm[part]):.4f} ({part.sum()} rows)")
    for kind in sorted(set(noise) - {"none"}):
        part = (noise == kind) | truth
        print(f"  {kind:17} itm {roc_auc_score(truth[part], itm[part]):.4f} "
              f"cosine {roc_auc_score(truth[part], cosine[part]):.4f} ({(noise == kind).sum()} rows)")


def is_lossless(table):
    return np.array([image.startswith(b"\x89PNG") for image in table["image"].to_pylist()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--shard", required=True)
    parser.add_argument("--expected", help="JSON file to write: one object per row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = pyarrow.parquet.read_table(args.shard)
    itm, cosine = score(args.model, table)
    report(table, itm, cosine)
    if args.expected:
        rows = [dict(key=key, lossless=bool(png), itm_score=float(p), cosine_score=float(c))
                for key, png, p, c in zip(table["key"].to_pylist(), is_lossless(table), itm, cosine)]
        with open(args.expected + ".part", "w", encoding="utf-8") as f:
            f.write("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        os.replace(args.expected + ".part", args.expected)


if __name__ == "__main__":
    main()
