"""Writes the demo's shard: held-out pairs, a third of them with noisy captions.

    python make_shard.py --out shard.parquet [--rows 384] [--seed 2024]

Columns: key, image (bytes), caption, is_match (the truth), noise (the kind of fault, "none" where it matches).
Every picture has JPEG noise. Half are stored as JPEG; the other half went through JPEG and were then reduced to a
palette and stored as PNG, so that any correct decoder gives the very same pixels (evaluate.py marks them lossless).
"""
import argparse
import io
import os
import random

import pyarrow
import pyarrow.parquet
from PIL import Image

import captions
import scenes

PALETTE_COLOURS = 40        # enough for the picture, few enough for a small file


def encode(scene, lossless, rng):
    jpeg = scenes.jpeg_bytes(scenes.draw(scene, rng), rng)
    if not lossless:
        return jpeg
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    buffer = io.BytesIO()
    # Maximum coverage keeps the colour of small objects, which a median cut merges into the background.
    image.quantize(PALETTE_COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        buffer, "PNG", optimize=True)
    return buffer.getvalue()


def rows(count, seed):
    """One dict per pair; the noise kinds take turns, so that each is there equally often."""
    rng = random.Random(f"shard-{seed}")
    drawn = [scenes.sample_scene(rng) for _ in range(count)]
    noisy = set(rng.sample(range(count), round(count / 3)))
    turn = 0
    for index, scene in enumerate(drawn):
        if index in noisy:
            wanted = captions.NOISE_KINDS[turn % len(captions.NOISE_KINDS)]
            noise, words = draw_noise(wanted, scene, drawn[index - 1], rng)
            turn += noise == wanted
        else:
            noise, words = "none", [w for w, _ in captions.true_caption(scene, rng)[1]]
        yield dict(key=f"{index:05d}", image=encode(scene, index % 2 == 0, rng),
                   caption=captions.sentence(words, rng), is_match=noise == "none", noise=noise)


def draw_noise(wanted, scene, other, rng):
    """A noisy caption of the wanted kind, or of any kind where the scene has nothing that could be wrong that way."""
    for _ in range(400):
        kind, words, _ = captions.noisy_caption(scene, other, rng)
        if kind == wanted:
            break
    return kind, words


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    schema = pyarrow.schema([("key", pyarrow.string()), ("image", pyarrow.binary()), ("caption", pyarrow.string()),
                             ("is_match", pyarrow.bool_()), ("noise", pyarrow.string())])
    table = pyarrow.Table.from_pylist(list(rows(args.rows, args.seed)), schema)
    # Images are compressed already; several row groups, because real shards have them.
    pyarrow.parquet.write_table(table, args.out + ".part", row_group_size=64, compression="snappy",
                                use_dictionary=["noise"])
    os.replace(args.out + ".part", args.out)
    print(f"{args.out}: {table.num_rows} rows, {os.path.getsize(args.out)} bytes")


if __name__ == "__main__":
    main()
