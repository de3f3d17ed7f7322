"""Rows for the peers: smooth random pictures of the model's size, without loss, so that every reader sees the same pixels."""
import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WORDS = ("a dog cat man woman child horse car bus tree river beach street table red blue green small large old "
         "wooden sitting running standing playing holding near under over beside with and the of in on").split()


def make_rows(path, count, side, seed=1, captions=1):
    """Writes `count` pictures, each in as many rows as it has captions of 6 to 33 words, as Parquet."""
    rng, words = np.random.default_rng(seed), random.Random(seed)
    images, texts = [], []
    for _ in range(count):
        image = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        images.append(file.getvalue())
        texts.append([" ".join(words.choices(WORDS, k=words.randint(6, 33))) for _ in range(captions)])
    pq.write_table(pa.table({"image": images, "caption": [t[0] for t in texts] if captions == 1 else texts}), path)


def read_pixels(path):
    """Pixels `[rows, side, side, 3]` u8 and captions of such rows."""
    table = pq.read_table(path)
    pixels = [np.asarray(Image.open(io.BytesIO(image.as_py())).convert("RGB")) for image in table["image"]]
    return np.stack(pixels), table["caption"].to_pylist()
