"""Rows from Parquet to model input: Capsieve against pyarrow, Pillow and transformers' BlipProcessor, on one core.

    pip install -r benches/peers/requirements.txt scikit-image torchvision
    python benches/peers/prepare.py target/release/capsieve [--simd OTHER] --out benches/results/NAME.json

Makes a shard of photographs of about 500 x 375 (crops of scikit-image's, JPEG of quality 90, some PNG and WebP) with captions,
and brings it to pixels of 384 x 384 and token ids by every variant in turn, round for round, all bound to the same core.
Rates are rows in a second of that core's time, reading included; the ratios are of the medians, and of the wall clock.

The peers' pixels end as normalised floats. Ours end as bytes, for the engine looks the floats up on its way: `pillow alone`
does only that much, and is what nobody calls but everybody could.
"""
import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import skimage.data  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
VOCABULARY = ROOT / "crates" / "prep" / "assets" / "bert_uncased_vocab.txt"
SIZE = 384
BATCH = 32
WORDS = ("a dog cat man woman child horse car bus tree river beach street table red blue green small large old "
         "wooden sitting running standing playing holding near under over beside with and the of in on").split()
PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "rocket"]


def photograph(chance, sources):
    """A piece of a photograph, brighter or darker, as wide as pictures on the web."""
    source = chance.choice(sources)
    width, height = (int(side * chance.uniform(0.5, 1.0)) for side in source.size)
    left, top = chance.randrange(source.width - width + 1), chance.randrange(source.height - height + 1)
    size = (500, chance.randint(333, 500)) if chance.random() < 0.7 else (chance.randint(333, 500), 500)
    piece = source.crop((left, top, left + width, top + height)).resize(size, Image.BICUBIC)
    if chance.random() < 0.5:
        piece = piece.transpose(Image.FLIP_LEFT_RIGHT)
    # No camera's picture is as smooth as one that was enlarged.
    grain = np.random.default_rng(chance.randrange(1 << 32)).normal(0, 2.5, (size[1], size[0], 1))
    bright = chance.uniform(0.7, 1.2)
    return Image.fromarray(np.clip(np.asarray(piece, np.float32) * bright + grain, 0, 255).astype(np.uint8))


def make_shard(path, rows, seed):
    """Nine of ten are JPEG; gives the number of each format, and the mean bytes of a JPEG."""
    chance = random.Random(seed)
    sources = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    images, captions, formats, jpeg_bytes = [], [], {}, 0
    for _ in range(rows):
        kind = chance.choices(["JPEG", "PNG", "WEBP"], [90, 5, 5])[0]
        file = io.BytesIO()
        photograph(chance, sources).save(file, kind, **{"PNG": {}}.get(kind, {"quality": 90}))
        formats[kind] = formats.get(kind, 0) + 1
        jpeg_bytes += file.tell() if kind == "JPEG" else 0
        images.append(file.getvalue())
        captions.append(" ".join(chance.choices(WORDS, k=chance.randint(6, 20))))
    pq.write_table(pa.table({"image": images, "caption": captions}), path, row_group_size=500)
    return formats, jpeg_bytes // formats["JPEG"]


def batches(path):
    for batch in pq.ParquetFile(path).iter_batches(BATCH, use_threads=False):
        images = [Image.open(io.BytesIO(image.as_py())).convert("RGB") for image in batch["image"]]
        yield images, batch["caption"].to_pylist()


def with_processor(processor):
    """The whole of what a user of transformers calls before the model."""
    def prepare(path):
        count = 0
        for images, captions in batches(path):
            made = processor(images=images, text=captions, padding=True, return_tensors="pt")
            assert made["pixel_values"].shape == (len(captions), 3, SIZE, SIZE) and len(made["input_ids"]) == len(captions)
            count += len(captions)
        return count
    return prepare


def pillow_alone(tokenizer):
    """Bytes of pixels and lists of ids, as ours."""
    def prepare(path):
        count = 0
        for images, captions in batches(path):
            pixels = [np.asarray(image.resize((SIZE, SIZE), Image.BICUBIC)) for image in images]
            assert len(tokenizer(captions)["input_ids"]) == len(pixels)
            count += len(pixels)
        return count
    return prepare


def peers():
    tokenizer = transformers.BertTokenizerFast(vocab=str(VOCABULARY))
    size = {"height": SIZE, "width": SIZE}
    found = {"pillow alone": pillow_alone(tokenizer)}
    slow = transformers.BlipImageProcessorPil(size=size)
    found["transformers, BlipProcessor with Pillow"] = with_processor(transformers.BlipProcessor(slow, tokenizer))
    try:
        import torchvision
        fast = transformers.BlipImageProcessor(size=size)
        found["transformers, BlipProcessor with torchvision"] = with_processor(transformers.BlipProcessor(fast, tokenizer))
        return found, {"torchvision": torchvision.__version__}
    except ImportError:
        return found, {}


def measured(prepare, path):
    """Rows in a second of the core, and of the clock."""
    wall, core = time.perf_counter(), time.process_time()
    count = prepare(path)
    return {"core": count / (time.process_time() - core), "wall": count / (time.perf_counter() - wall)}


def ours(program, path, seconds):
    command = [program, "bench", "--prepare-only", "--model", "synthetic:base", "--input", path, "--threads", "1",
               "--seconds", str(seconds), "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert (report["image_size"], report["failed"]) == (SIZE, 0), report
    return {"core": report["rows_per_second_per_core"], "wall": report["rows_per_second"]}


def machine():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {"processor": names[0] if names else "", "cores": os.cpu_count()}


def commit():
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip()


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("program")
    args.add_argument("--simd", help="the same program, built with --features jpeg-simd")
    args.add_argument("--rows", type=int, default=2000)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--seconds", type=float, default=8, help="of ours in a round; a peer takes all rows once")
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--out", help="raw results, JSON")
    a = args.parse_args()
    assert int(PIL.__version__.split(".")[0]) < 13, "Pillow 13 changed the order of its resize passes"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    others, versions = peers()
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "photographs.parquet")
        formats, jpeg_bytes = make_shard(path, a.rows, a.seed)
        variants = {"capsieve": lambda: ours(a.program, path, a.seconds)}
        if a.simd:
            variants["capsieve, jpeg-simd"] = lambda: ours(a.simd, path, a.seconds)
        variants |= {name: lambda prepare=prepare: measured(prepare, path) for name, prepare in others.items()}
        for number in range(a.rounds):
            for name, variant in variants.items():
                rate = variant()
                rates.setdefault(name, []).append(rate)
                print(f"round {number}: {name}: {rate['core']:.1f} rows/s a core, {rate['wall']:.1f} by the clock", file=sys.stderr)
    medians = {name: {by: statistics.median(rate[by] for rate in of) for by in ("core", "wall")} for name, of in rates.items()}
    mine = [name for name in medians if name.startswith("capsieve")]
    ratios = {name: {to: {by: medians[name][by] / medians[to][by] for by in ("core", "wall")} for to in others} for name in mine}
    result = {
        "machine": machine(), "commit": commit(), "rows": a.rows, "formats": formats, "jpeg_bytes_mean": jpeg_bytes,
        "versions": {"transformers": transformers.__version__, "pillow": PIL.__version__, "pyarrow": pa.__version__,
                     "torch": torch.__version__, "numpy": np.__version__} | versions,
        "rows_per_second": rates, "medians": medians, "ratios": ratios,
    }
    print(json.dumps({"medians": medians, "ratios": ratios}, indent=1))
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
