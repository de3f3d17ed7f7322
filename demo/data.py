"""Training data: rendered scenes, batches of encoded captions, and the measure of a model on held-out scenes."""
import io
import math
import multiprocessing
import os
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import captions
import network
import scenes

TRUE, HARD = 2, 4           # captions per image for ITM: true ones, hand-made false ones; one mined one is added
# Training draws the kinds that apply to few statements, and are learnt last, more often: the order of NOISE_KINDS.
KIND_WEIGHTS = (0.5, 0.7, 0.7, 2.0, 1.0, 4.0, 2.5, 1.5, 1.0)
HELD_OUT = 1024             # scenes that training never sees


def render(job):
    """(scenes, images, patch targets, whole targets) of one chunk: the unit of work of a rendering process."""
    seed, count = job
    rng = random.Random(f"scenes-{seed}")
    drawn, images, patches, wholes = [], [], [], []
    for _ in range(count):
        scene = scenes.sample_scene(rng)
        spoilt = Image.open(io.BytesIO(scenes.jpeg_bytes(scenes.draw(scene, rng), rng))).convert("RGB")
        images.append(np.asarray(spoilt.resize((network.IMAGE_PX, network.IMAGE_PX), Image.BICUBIC)))
        drawn.append(scene)
        patches.append(scenes.patch_targets(scene))
        wholes.append(scenes.whole_targets(scene))
    return drawn, np.stack(images), np.stack(patches), np.stack(wholes)


def render_all(seed, count, processes=2):
    """`count` scenes from `seed`, the same whatever the number of processes."""
    chunk = 500
    jobs = [(f"{seed}-{i}", min(chunk, count - i * chunk)) for i in range(math.ceil(count / chunk))]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        parts = pool.map(render, jobs)
    drawn = [s for p in parts for s in p[0]]
    return drawn, *(torch.from_numpy(np.concatenate([p[i] for p in parts])) for i in (1, 2, 3))


def training_data(seed, count, cache=None):
    """(training scenes, held-out scenes), from the cache file where it exists."""
    if cache and os.path.exists(cache):
        return torch.load(cache, weights_only=False)
    both = render_all(seed, count), render_all(f"held-out-{seed}", HELD_OUT)
    if cache:
        torch.save(both, cache)
    return both


def caption_batch(drawn, rng, encoder):
    """Statements and encoded captions [B][TRUE + HARD] with word flags; the first TRUE of each are true."""
    statements, encoded = [], []
    for index, scene in enumerate(drawn):
        row = []
        for _ in range(TRUE):
            statement, words = captions.true_caption(scene, rng)
            statements.append((index, len(row), statement))
            row.append(([w for w, _ in words], [1] * len(words)))
        for _ in range(HARD):
            other = drawn[(index + rng.randrange(1, len(drawn))) % len(drawn)]
            _, words, flags = captions.noisy_caption(scene, other, rng, KIND_WEIGHTS)
            row.append((words, flags))
        # The full stop that `sentence` may add says nothing about the truth: flag unknown.
        encoded.append([encoder(w + ["."], (f or [-1] * len(w)) + [-1]) if rng.random() < 0.3 else encoder(w, f)
                        for w, f in row])
    return statements, encoded


def pad(encoded):
    """Nested (ids, flags) to tensors [B, K, L]: ids, mask, flags."""
    longest = max(len(ids) for row in encoded for ids, _ in row)
    ids = torch.tensor([[i + [0] * (longest - len(i)) for i, _ in row] for row in encoded])
    flags = torch.tensor([[f + [-1] * (longest - len(f)) for _, f in row] for row in encoded])
    return ids, ids != 0, flags


def auc(score, truth):
    """Area under the ROC curve by ranks (ties are vanishingly rare in float scores)."""
    rank = np.empty(len(score))
    rank[np.argsort(score)] = np.arange(1, len(score) + 1)
    positives = truth.sum()
    return (rank[truth].sum() - positives * (positives + 1) / 2) / (positives * (len(truth) - positives))


@torch.no_grad()
def validate(model, data, encoder):
    """One line: AUC of both heads over one true and one noisy caption per held-out scene, then ITM AUC by kind."""
    drawn, images = data[0], data[1]
    rng, rows, kinds = random.Random("validation"), [], []
    for i, scene in enumerate(drawn):
        _, words = captions.true_caption(scene, rng)
        kind, wrong, _ = captions.noisy_caption(scene, drawn[i - 1], rng)
        rows.append([encoder([w for w, _ in words], None), encoder(wrong, None)])
        kinds.append(kind)
    itm, cos = [], []
    for i in range(0, len(drawn), 64):
        tokens = network.encode_image(model, network.pixel_values(images[i:i + 64]))
        ids, mask, _ = pad(rows[i:i + 64])
        hidden, first = network.encode_text(model, ids, mask, tokens)
        itm.append(model.itm_head(hidden[first]).diff(dim=1).view(-1, 2))
        hidden, first = network.encode_text(model, ids, mask)
        text = F.normalize(model.text_proj(hidden[first]), dim=-1).view(len(ids), 2, -1)
        cos.append((text * F.normalize(model.vision_proj(tokens[:, 0]), dim=-1)[:, None]).sum(-1))
    itm, cos, kinds = torch.cat(itm).numpy(), torch.cat(cos).numpy(), np.array(kinds)
    truth = np.repeat([[True, False]], len(itm), 0)
    line = f"AUC itm {auc(itm.ravel(), truth.ravel()):.4f} cosine {auc(cos.ravel(), truth.ravel()):.4f} |"
    for kind in captions.NOISE_KINDS:
        score = np.concatenate([itm[:, 0], itm[kinds == kind, 1]])
        line += f" {kind} {auc(score, np.arange(len(score)) < len(itm)):.3f}"
    return line
