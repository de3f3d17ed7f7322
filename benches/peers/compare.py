"""Capsieve against transformers, ONNX Runtime and OpenVINO: same weights, rows and machine, interleaved in one run.

    cargo build --release
    python3.11 -m venv target/peers; target/peers/bin/pip install -r benches/peers/requirements.txt
    target/release/capsieve synth --size large --out target/large
    target/peers/bin/python benches/peers/compare.py --model target/large --out benches/results/NAME.json

Every peer of a precision loads the model in a process of its own and waits. Each round scores the same rows once with each of
them in turn, so that a machine whose speed drifts slows all of them; Capsieve's bf16 takes part in those of int8, too, under a
name of its own. A peer's time is its forward passes, pixels and token ids made before; Capsieve's is the engine's part of its
stats file. All peers share the image pass of both heads, but for the model card's two calls. Scores are compared with those of
the first peer in f32, where there is one. The share of the peak is `capsieve bench`'s: exact operations of the forward pass in a
second, against multiply-adds between registers measured just before; and the pairs/s of one and of five captions an image.
"""
import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from peer import NEEDS, PEERS
from rows import make_rows, read_pixels
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
CALIBRATION_ROWS = 8
BF16_BESIDE_INT8 = "capsieve bf16 beside int8"


def processor():
    """The processor's name, and which of the vector instructions that matter it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii")
    except OSError:
        return {"cpu": platform.processor() or platform.machine()}
    field = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    wanted = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"}
    return {"cpu": field.get("model name"), "instructions": sorted(wanted & set(field.get("flags", "").split()))}


def write_inputs(a, work):
    """The shard that Capsieve reads, and what it says as the arrays that peers take."""
    config = json.loads((Path(a.model) / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    for name, count, seed in (("rows", a.rows, a.seed), ("calibration", CALIBRATION_ROWS, a.seed + 1000)):
        shard = work / f"{name}.parquet"
        make_rows(shard, count, config["vision_config"]["image_size"], seed)
        pixels, captions = read_pixels(shard)
        tokens = [tokenizer(caption)["input_ids"] for caption in captions]
        ids = np.zeros((len(tokens), max(map(len, tokens))), np.int64)
        for row, of in zip(ids, tokens):
            row[:len(of)] = of
        np.savez(work / f"{name}.npz", pixels=pixels, ids=ids, lengths=np.array([len(t) for t in tokens]))


def precision_of(name):
    return next(word for word in name.split() if word in ("f32", "bf16", "int8"))


class Peer:
    """A peer that waits in its process."""

    def __init__(self, a, work, name):
        command = [sys.executable, HERE / "peer.py", "run", name, "--model", a.model, "--work", work,
                   "--threads", str(a.threads)]
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL if a.quiet else None, text=True)
        self.answer("ready")

    def answer(self, wanted=None):
        for line in self.process.stdout:
            if wanted is None and line.startswith("{"):
                return json.loads(line)
            if wanted and line.strip() == wanted:
                return None
        raise RuntimeError(f"the peer ended with {self.process.wait()}")

    def run(self, batch):
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


class Capsieve:
    """The binary, started anew for each round: its engine's time does not count the loading."""

    def __init__(self, a, work, precision):
        self.out = work / f"scored-{precision}"
        self.command = [a.capsieve, "score", "--model", a.model, "--input", work / "rows.parquet", "--overwrite",
                        "--output", f"{self.out}.parquet", "--precision", precision, "--threads", str(a.threads),
                        "--device", "cpu"]

    def run(self, batch):
        done = subprocess.Popen([*map(str, self.command), "--batch-size", str(batch)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(done.pid, 0)
        if status:
            raise RuntimeError(f"{self.command} ended with {status}")
        stats = json.loads(Path(f"{self.out}.stats.json").read_text(encoding="utf-8"))
        columns = pq.read_table(f"{self.out}.parquet", columns=["itm_score", "cosine_score"]).columns
        scores = np.stack([np.asarray(c) for c in columns], 1).tolist()
        return {"seconds": stats["seconds"]["engine"], "scores": scores, "peak_kb": used.ru_maxrss}

    def end(self):
        pass


def share_of_peak(a, precision, batch, captions):
    """What `capsieve bench` says of one precision."""
    command = [a.capsieve, "bench", "--model", a.model, "--device", "cpu", "--precision", precision, "--seconds", "5",
               "--batch-size", batch, "--captions-per-image", captions, "--threads", a.threads, "--json"]
    report = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True).stdout)
    return {k: report[k] for k in ("device", "engine_gflops", "ceiling_gflops", "engine_pairs_per_second", "stages")}


def start(a, work, precision):
    """All variants of a precision that this machine has, ready."""
    made = set()
    variants = {f"capsieve {precision}": Capsieve(a, work, precision)}
    if precision == "int8":
        variants[BF16_BESIDE_INT8] = Capsieve(a, work, "bf16")
    for name in PEERS:
        if name.split()[0] not in a.peers or precision_of(name) != precision or name in a.without:
            continue
        try:
            for need in NEEDS.get(name, []):
                if need not in made:
                    command = [sys.executable, HERE / "peer.py", "make", need, "--model", a.model, "--work", work]
                    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
                    made.add(need)
            variants[name] = Peer(a, work, name)
            print(f"{name}: ready", flush=True)
        except (RuntimeError, subprocess.CalledProcessError) as failed:
            print(f"{name}: left out, for {failed}", flush=True)
    return variants


def measure(a, variants, found):
    """Rounds in turn: pairs/s, last scores and peak memory of each variant and batch size."""
    for turn, batch, name in itertools.product(range(a.rounds), a.batches, variants):
        got = variants[name].run(batch)
        of = found.setdefault((name, batch), {"pairs_per_second": []})
        of["pairs_per_second"].append(a.rows / got["seconds"])
        of["peak_mb"], of["scores"] = round(got["peak_kb"] / 1024), np.array(got["scores"])
        print(f"round {turn + 1}, {name}, batch {batch}: {a.rows / got['seconds']:.3f} pairs/s", flush=True)
    for variant in variants.values():
        variant.end()


def report(a, found):
    """Best batch of each variant, its drift from f32, and the ratios that matter."""
    exact = (of["scores"] for (name, _), of in found.items() if precision_of(name) == "f32" and "capsieve" not in name)
    reference = next(exact, None)
    best = {}
    for (name, batch), of in found.items():
        scores = of.pop("scores")
        of["median"] = statistics.median(of["pairs_per_second"])
        if reference is not None:
            drift = np.abs(scores - reference)
            for column, head in enumerate(("itm", "cosine")):
                of[f"{head}_drift"] = {"max": float(drift[:, column].max()), "mean": float(drift[:, column].mean())}
        if name not in best or of["median"] > best[name]["median"]:
            best[name] = {"batch": batch, **of}
    ratios = {}
    for precision in a.precisions:
        ours = best[f"capsieve {precision}"]
        others = [name for name in best if precision_of(name) == precision and "capsieve" not in name]
        for name in others + [BF16_BESIDE_INT8] * (precision == "int8"):
            ratios[f"{precision}: {name}"] = ours["median"] / best[name]["median"]
    return best, ratios


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", required=True, help="folder in Hugging Face's layout")
    args.add_argument("--capsieve", default="target/release/capsieve", help="the binary")
    args.add_argument("--rows", type=int, default=8)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--threads", type=int, default=os.cpu_count())
    args.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    args.add_argument("--precisions", nargs="+", default=["f32", "bf16", "int8"])
    args.add_argument("--peers", nargs="+", default=["transformers", "onnxruntime", "openvino"])
    args.add_argument("--without", nargs="*", default=[], help="peers by their whole names")
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--quiet", action="store_true", help="hides what peers write to stderr")
    args.add_argument("--work", help="keeps what is made for the peers there")
    args.add_argument("--out", help="raw results, JSON")
    a = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(a.work or folder).resolve()
        work.mkdir(exist_ok=True)
        write_inputs(a, work)
        found = {}
        for precision in a.precisions:
            measure(a, start(a, work, precision), found)
        best, ratios = report(a, found)
        packages = ["torch", "transformers", "onnxruntime", "openvino", "nncf"]
        peak = {p: {f"{n} captions": share_of_peak(a, p, best[f"capsieve {p}"]["batch"], n) for n in (1, 5)}
                for p in a.precisions}
    commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    result = {"machine": {**processor(), "threads": a.threads}, "commit": commit.stdout.strip(),
              "versions": {p: version(p) for p in packages}, "rows": a.rows,
              "variants": [{"name": n, "batch": b, **of} for (n, b), of in found.items()], "best": best,
              "ours_to_peer": ratios, "peak": peak}
    for name, of in sorted(best.items(), key=lambda item: -item[1]["median"]):
        drift = "".join(f", {head} off by at most {of[f'{head}_drift']['max']:.1e}"
                        for head in ("itm", "cosine") if f"{head}_drift" in of)
        print(f"{name:>30} {of['median']:.3f} pairs/s at batch {of['batch']}, {of['peak_mb']} MB{drift}")
    print(json.dumps(ratios, indent=1))
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
