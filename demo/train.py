"""Trains the demo's BLIP on procedurally drawn scenes.

    python train.py --out model [--seed 7] [--steps 6000] [--scenes 40000] [--state FILE]

Losses: ITM cross-entropy over true captions, hand-made hard negatives and in-batch hard negatives mined by ITC
similarity; ITC (InfoNCE and a sigmoid loss); and two throw-away helpers that make a small model learn in minutes
instead of hours: what each patch shows (and how many of each kind there are), and which words are wrong.
The saved weights are an exponential moving average, rounded to float16.
"""
import argparse
import io
import math
import multiprocessing
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import captions
import network
import scenes

TRUE, HARD = 3, 4           # captions per image: true ones and hand-made false ones; one mined one is added
PATCH_CLASSES = (1 + len(scenes.SHAPES), 1 + len(scenes.COLOUR_NAMES), 1 + len(scenes.SIZES),
                 1 + scenes.COUNT_MAX, 5)
KINDS = len(scenes.SHAPES) * len(scenes.COLOUR_NAMES)


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
        patches.append(scenes.patch_targets(scene, network.GRID))
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


class Helpers(nn.Module):
    """Everything that is trained and thrown away."""

    def __init__(self, width):
        super().__init__()
        self.patch = nn.Linear(width, sum(PATCH_CLASSES))
        self.whole = nn.Linear(width, len(scenes.BACKGROUNDS) + KINDS * (1 + scenes.COUNT_MAX))
        self.word = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.sigmoid_scale = nn.Parameter(torch.tensor(math.log(8.0)))
        self.sigmoid_bias = nn.Parameter(torch.tensor(-4.0))


def vision_loss(helpers, tokens, patches, wholes):
    """Cross-entropy of the linear read-outs: per patch from its token, per image from the class token."""
    loss, start = 0.0, 0
    logits = helpers.patch(tokens[:, 1:]).float()
    foreground = patches[:, 0].flatten(1) > 0
    weight = 0.25 + foreground.float()
    for index, classes in enumerate(PATCH_CLASSES):
        each = F.cross_entropy(logits[..., start:start + classes].flatten(0, 1), patches[:, index].flatten().long(),
                               reduction="none")
        loss = loss + (each * weight.flatten()).sum() / weight.sum()
        start += classes
    whole = helpers.whole(tokens[:, 0]).float()
    n = len(scenes.BACKGROUNDS)
    loss = loss + 0.5 * F.cross_entropy(whole[:, :n], wholes[:, 0].long())
    counts = wholes[:, 1:].long()
    each = F.cross_entropy(whole[:, n:].reshape(-1, 1 + scenes.COUNT_MAX), counts.flatten(), reduction="none")
    present = (counts.flatten() > 0).float()
    return loss + (each * present).sum() / present.sum() + (each * (1 - present)).sum() / len(tokens)


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
            _, words, flags = captions.noisy_caption(scene, other, rng)
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


def itc_losses(model, helpers, tokens, ids, mask):
    """(InfoNCE + sigmoid loss, cosine of every image with every caption [B, B*K])."""
    b, k = ids.shape[:2]
    hidden, first = network.encode_text(model, ids, mask)
    image = F.normalize(model.vision_proj(tokens[:, 0]).float(), dim=-1)
    text = F.normalize(model.text_proj(hidden[first]).float(), dim=-1)
    cosine = image @ text.t()
    own = torch.zeros(b, b, k, dtype=torch.bool)
    own[torch.arange(b), torch.arange(b), :TRUE] = True
    logits = cosine * helpers.log_scale.exp().clamp(max=50)
    to_text = logits.logsumexp(1).mean() - logits[own.view(b, -1)].mean()
    true = logits.view(b, b, k)[:, :, :TRUE].flatten(1).t()
    to_image = F.cross_entropy(true, torch.arange(b).repeat_interleave(TRUE))
    pairs = cosine.view(b, b, k)[torch.arange(b), torch.arange(b)]
    target = (torch.arange(k) < TRUE).float().expand(b, k)
    sigmoid = F.binary_cross_entropy_with_logits(
        pairs * helpers.sigmoid_scale.exp() + helpers.sigmoid_bias, target)
    return 0.5 * (to_text + to_image) + 2 * sigmoid, cosine


def mine(cosine, statements, encoded, drawn, k):
    """Adds to every image the caption of another image that ITC finds likely; returns its true label."""
    b = len(drawn)
    chances = cosine.detach().view(b, b, k)[:, :, :TRUE].clone()
    chances[torch.arange(b), torch.arange(b)] = -math.inf
    picked = torch.multinomial((chances.flatten(1) * 12).softmax(1), 1).squeeze(1).tolist()
    by_place = {(i, j): s for i, j, s in statements}
    labels = []
    for index, pick in enumerate(picked):
        owner, place = divmod(pick, TRUE)
        label = captions.holds(by_place[owner, place], drawn[index])
        ids, flags = encoded[owner][place]
        encoded[index].append((ids, flags if label else [-1] * len(flags)))
        labels.append(label)
    return torch.tensor(labels)


def itm_losses(model, helpers, tokens, encoded, mined):
    """(match cross-entropy with both classes weighted alike, wrong-word loss)."""
    ids, mask, flags = pad(encoded)
    b, k = ids.shape[:2]
    hidden, first = network.encode_text(model, ids, mask, tokens)
    target = (torch.arange(k) < TRUE).expand(b, k).clone()
    target[:, -1] = mined
    weight = torch.tensor([1.0, (k - TRUE) / TRUE])
    match = F.cross_entropy(model.itm_head(hidden[first]).float(), target.flatten().long(), weight)
    known = flags[mask]
    word = helpers.word(hidden).float().squeeze(1)
    return match, F.binary_cross_entropy_with_logits(word[known >= 0], known[known >= 0].float())


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


def learning_rate(step, args):
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < 200:
        return args.lr * (step + 1) / 200
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 200) / (args.steps - 200)))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--vision-steps", type=int, default=600, help="first steps, without any text")
    parser.add_argument("--scenes", type=int, default=40000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--every", type=int, default=500, help="steps between validations and saves")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--state", help="file to continue from, and to save the whole training state to")
    args = parser.parse_args()
    train(args)


def train(args):
    torch.set_num_threads(args.threads)
    started = time.time()
    data = render_all(args.seed, args.scenes)
    held_out = render_all(f"held-out-{args.seed}", 1024)
    print(f"rendered {args.scenes} scenes in {time.time() - started:.0f} s", flush=True)
    model = network.build_model(vision_layers=args.vision_layers, text_layers=args.text_layers, seed=args.seed)
    network.check_forward(model)
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    helpers = Helpers(model.config.vision_config.hidden_size)
    weights = list(model.parameters()) + list(helpers.parameters())
    groups = [dict(params=[p for p in weights if p.dim() > 1], weight_decay=0.02),
              dict(params=[p for p in weights if p.dim() <= 1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    rng, encoder, step = random.Random(f"train-{args.seed}"), network.WordEncoder(), 0
    if args.state and os.path.exists(args.state):
        kept = torch.load(args.state, weights_only=False)
        for part, name in ((model, "model"), (helpers, "helpers"), (optimizer, "optimizer")):
            part.load_state_dict(kept[name])
        average, step = kept["average"], kept["step"]
        rng.seed(f"train-{args.seed}-{step}")
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    totals = np.zeros(4)
    while step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses = step_losses(model, helpers, data, rng, encoder, args, step)
        helper_weight = 1.0 if step < args.vision_steps else 0.5
        loss = helper_weight * losses[0] + losses[1] + losses[2] + losses[3]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - decay)
        totals += [float(x) for x in losses]
        if step % 20 == 0:
            names = " ".join(f"{n} {v:.3f}" for n, v in zip(("vision", "itc", "itm", "word"), totals / 20))
            print(f"{time.time() - started:6.0f} s step {step} {names}", flush=True)
            totals[:] = 0
        if step >= args.vision_steps and step % args.every == 0 or step == args.steps:
            checkpoint(model, helpers, optimizer, average, step, args)
            print(validate(averaged(model, average), held_out, encoder), flush=True)


def averaged(model, average):
    """A copy of the model with the averaged weights, rounded as the file rounds them."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict({n: t.half().float() for n, t in average.items()})
    return copy


def checkpoint(model, helpers, optimizer, average, step, args):
    network.save_model(model, average, args.out)
    if args.state:
        torch.save(dict(model=model.state_dict(), helpers=helpers.state_dict(), optimizer=optimizer.state_dict(),
                        average=average, step=step), args.state + ".part")
        os.replace(args.state + ".part", args.state)


def step_losses(model, helpers, data, rng, encoder, args, step):
    """(vision helper, itc, itm, word helper) of one random batch."""
    picked = rng.sample(range(len(data[0])), args.batch)
    drawn = [data[0][i] for i in picked]
    tokens = network.encode_image(model, network.pixel_values(data[1][picked]))
    vision = vision_loss(helpers, tokens, data[2][picked], data[3][picked])
    if step < args.vision_steps:
        return vision, 0.0, 0.0, 0.0
    statements, encoded = caption_batch(drawn, rng, encoder)
    ids, mask, _ = pad(encoded)
    itc, cosine = itc_losses(model, helpers, tokens, ids, mask)
    mined = mine(cosine, statements, encoded, drawn, ids.shape[1])
    return vision, itc, *itm_losses(model, helpers, tokens, encoded, mined)


if __name__ == "__main__":
    main()
