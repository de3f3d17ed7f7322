"""Trains the demo's BLIP on procedurally drawn scenes.

    python train.py --out model [--seed 7] [--steps VISION TEXT JOINT] [--scenes 20000] [--state FILE]

Losses: ITM cross-entropy over true captions, hand-made hard negatives and in-batch hard negatives mined by ITC
similarity; ITC (InfoNCE and a sigmoid loss); and two throw-away helpers that make a small model learn in minutes
instead of hours: what each patch shows (and how many of each kind there are), and which words are wrong.
Three stages, because two cores are slow: the image encoder alone with the helpers; the text encoder on the frozen
image tokens, which are computed once; then everything together. The saved weights are an exponential moving average,
rounded to float16.
"""
import argparse
import itertools
import math
import multiprocessing
import os
import random
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn

import captions
import network
import scenes
from data import TRUE, caption_batch, pad, training_data, validate

ITC_TRUE = 2                # ITC sees only this many of each kind: its text pass shares nothing with ITM's
ITC_COLUMNS = [0, 1, TRUE, TRUE + 1]
PATCH_CLASSES = (1 + len(scenes.SHAPES), 1 + len(scenes.COLOUR_NAMES), 1 + len(scenes.SIZES),
                 1 + scenes.COUNT_MAX, 5)
KINDS = len(scenes.SHAPES) * len(scenes.COLOUR_NAMES)


class Helpers(nn.Module):
    """Everything that is trained and thrown away."""

    def __init__(self, width):
        super().__init__()
        self.patch = nn.Linear(width, sum(PATCH_CLASSES))
        self.whole = nn.Linear(width, len(scenes.BACKGROUNDS) + KINDS * (1 + scenes.COUNT_MAX))
        with torch.no_grad():   # most kinds are absent from most scenes: start from that
            self.whole.bias[len(scenes.BACKGROUNDS)::1 + scenes.COUNT_MAX] = 4.0
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
        # Shape is the slowest to learn and everything else waits for it.
        loss = loss + (2 if index == 0 else 1) * (each * weight.flatten()).sum() / weight.sum()
        start += classes
    whole = helpers.whole(tokens[:, 0]).float()
    n = len(scenes.BACKGROUNDS)
    loss = loss + 0.5 * F.cross_entropy(whole[:, :n], wholes[:, 0].long())
    counts = wholes[:, 1:].long()
    each = F.cross_entropy(whole[:, n:].reshape(-1, 1 + scenes.COUNT_MAX), counts.flatten(), reduction="none")
    present = (counts.flatten() > 0).float()
    return loss + 0.3 * ((each * present).sum() / present.sum() + (each * (1 - present)).sum() / len(tokens))


def itc_losses(model, helpers, tokens, ids, mask):
    """(InfoNCE + sigmoid loss, cosine of every image with every caption [B, B*K])."""
    ids, mask = ids[:, ITC_COLUMNS], mask[:, ITC_COLUMNS]
    b, k = ids.shape[:2]
    hidden, first = network.encode_text(model, ids, mask)
    image = F.normalize(model.vision_proj(tokens[:, 0]).float(), dim=-1)
    text = F.normalize(model.text_proj(hidden[first]).float(), dim=-1)
    cosine = image @ text.t()
    own = torch.zeros(b, b, k, dtype=torch.bool)
    own[torch.arange(b), torch.arange(b), :ITC_TRUE] = True
    logits = cosine * helpers.log_scale.exp().clamp(max=50)
    to_text = logits.logsumexp(1).mean() - logits[own.view(b, -1)].mean()
    true = logits.view(b, b, k)[:, :, :ITC_TRUE].flatten(1).t()
    to_image = F.cross_entropy(true, torch.arange(b).repeat_interleave(ITC_TRUE))
    pairs = cosine.view(b, b, k)[torch.arange(b), torch.arange(b)]
    target = (torch.arange(k) < ITC_TRUE).float().expand(b, k)
    sigmoid = F.binary_cross_entropy_with_logits(
        pairs * helpers.sigmoid_scale.exp() + helpers.sigmoid_bias, target)
    return 0.5 * (to_text + to_image) + 2 * sigmoid, cosine


def mine(cosine, statements, encoded, drawn):
    """Adds to every image the caption of another image that ITC finds likely; returns its true label."""
    b = len(drawn)
    chances = cosine.detach().view(b, b, -1)[:, :, :ITC_TRUE].clone()
    chances[torch.arange(b), torch.arange(b)] = -math.inf
    picked = torch.multinomial((chances.flatten(1) * 12).softmax(1), 1).squeeze(1).tolist()
    by_place = {(i, j): s for i, j, s in statements}
    labels = []
    for index, pick in enumerate(picked):
        owner, place = divmod(pick, ITC_TRUE)
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


def learning_rate(step, steps, peak):
    """Linear warm-up over 100 steps, then a cosine down to a twentieth, at each stage anew."""
    warm = min(100, steps // 4)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, nargs=3, default=(2200, 800, 2800), help="steps of the three stages")
    parser.add_argument("--lr", type=float, nargs=3, default=(1.2e-3, 1.2e-3, 9e-4), help="peak rates of the stages")
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--every", type=int, default=400, help="steps between validations and saves")
    parser.add_argument("--cache", help="file that keeps the rendered scenes for the next run")
    parser.add_argument("--state", help="file to continue from, and to save the whole training state to")
    parser.add_argument("--processes", type=int, default=2, help="one thread each; every one has its own batch")
    args = parser.parse_args()
    # One thread per process: on a shared two-core machine two processes beat two threads three times over.
    torch.set_num_threads(1)
    data, held_out = training_data(args.seed, args.scenes, args.cache)
    fork = multiprocessing.get_context("fork")      # the children share the parent's images
    with tempfile.TemporaryDirectory() as folder:
        children = [fork.Process(target=worker, args=(rank, args, data, held_out, folder))
                    for rank in range(1, args.processes)]
        for child in children:
            child.start()
        worker(0, args, data, held_out, folder)


def worker(rank, args, data, held_out, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.processes)
    Trainer(rank, args, data, held_out).run()
    distributed.destroy_process_group()


class Trainer:
    """The model, its helpers, the optimizer and the data of one process; all processes hold equal weights."""

    def __init__(self, rank, args, data, held_out):
        self.rank, self.args, self.started, self.step = rank, args, time.time(), 0
        self.data, self.held_out = data, held_out
        self.model = network.build_model(seed=args.seed)
        network.check_forward(self.model)
        self.average = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.helpers = Helpers(self.model.config.vision_config.hidden_size)
        self.weights = list(self.model.parameters()) + list(self.helpers.parameters())
        self.optimizer = torch.optim.AdamW(
            [dict(params=[p for p in self.weights if p.dim() > 1], weight_decay=0.02),
             dict(params=[p for p in self.weights if p.dim() <= 1], weight_decay=0.0)], betas=(0.9, 0.98))
        self.rng, self.encoder = random.Random(f"train-{args.seed}-{rank}"), network.WordEncoder()
        self.frozen_tokens = None
        if args.state and os.path.exists(args.state):
            self.restore()
        self.log(f"{args.scenes} scenes, {sum(p.numel() for p in self.model.parameters())} parameters")

    def restore(self):
        kept = torch.load(self.args.state, weights_only=False)
        for name in ("model", "helpers", "optimizer"):
            getattr(self, name).load_state_dict(kept[name])
        self.average, self.step = kept["average"], kept["step"]
        # A continued run differs from an unbroken one: it draws other batches.
        self.rng.seed(f"train-{self.args.seed}-{self.rank}-{self.step}")

    def log(self, text):
        if self.rank == 0:
            print(f"{time.time() - self.started:6.0f} s step {self.step} {text}", flush=True)

    def run(self):
        ends = list(itertools.accumulate(self.args.steps))
        totals, every = np.zeros(4), 25
        while self.step < ends[-1]:
            stage = next(i for i, end in enumerate(ends) if self.step < end)
            inside = self.step - (ends[stage] - self.args.steps[stage])
            rate = learning_rate(inside, self.args.steps[stage], self.args.lr[stage])
            totals += self.update(stage, rate)
            if self.step % every == 0:
                names = ("vision", "itc", "itm", "word")
                self.log(" ".join(f"{n} {v:.3f}" for n, v in zip(names, totals / every)))
                totals[:] = 0
            if self.rank == 0 and (self.step % self.args.every == 0 or self.step in ends):
                self.checkpoint(stage)

    def update(self, stage, rate):
        """One optimizer step; returns the four losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.losses(stage)
        self.optimizer.zero_grad()
        ((1.0, 0.0, 0.3)[stage] * losses[0] + losses[1] + losses[2] + losses[3]).backward()
        self.share_gradients()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(0.995, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                self.average[name].lerp_(tensor, 1 - decay)
        return np.array([float(torch.as_tensor(x).detach()) for x in losses])

    def share_gradients(self):
        """Averages the gradients over the processes."""
        grads = [p.grad for p in self.weights if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        distributed.all_reduce(flat)
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(mean.view_as(grad) / self.args.processes)

    def losses(self, stage):
        """(vision helper, itc, itm, word helper) of one random batch."""
        drawn, images, patches, wholes = self.data
        picked = self.rng.sample(range(len(drawn)), self.args.batch)
        if stage == 1:
            if self.frozen_tokens is None:
                self.freeze()
            tokens, vision = self.frozen_tokens[picked].float(), 0.0
        else:
            tokens = network.encode_image(self.model, network.pixel_values(images[picked]))
            vision = vision_loss(self.helpers, tokens, patches[picked], wholes[picked])
        if stage == 0:
            return vision, 0.0, 0.0, 0.0
        drawn = [drawn[i] for i in picked]
        statements, encoded = caption_batch(drawn, self.rng, self.encoder)
        ids, mask, _ = pad(encoded)
        itc, cosine = itc_losses(self.model, self.helpers, tokens, ids, mask)
        mined = mine(cosine, statements, encoded, drawn)
        return vision, itc, *itm_losses(self.model, self.helpers, tokens, encoded, mined)

    @torch.no_grad()
    def freeze(self):
        """Takes over the averaged weights and encodes every image once, in half precision to save memory."""
        self.model.load_state_dict(self.average)
        images = self.data[1]
        self.frozen_tokens = torch.cat([
            network.encode_image(self.model, network.pixel_values(images[i:i + 250])).half()
            for i in range(0, len(images), 250)])
        self.log("image tokens computed")

    def checkpoint(self, stage):
        """Saves the averaged model, measures it on held-out scenes as the file rounds it, saves the state."""
        network.save_model(self.model, self.average, self.args.out)
        if self.args.state:
            parts = {name: getattr(self, name).state_dict() for name in ("model", "helpers", "optimizer")}
            torch.save(dict(parts, average=self.average, step=self.step), self.args.state + ".part")
            os.replace(self.args.state + ".part", self.args.state)
        if stage > 0:
            copy = type(self.model)(self.model.config).eval()
            copy.load_state_dict({n: t.half().float() for n, t in self.average.items()})
            self.log(validate(copy, self.held_out, self.encoder))


if __name__ == "__main__":
    main()
