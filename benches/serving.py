"""The worker under load: throughput of inline streaming beside the engine's own, and what small calls wait for.

    pip install grpcio grpcio-tools grpcio-health-checking grpcio-reflection googleapis-common-protos pyarrow
    python benches/serving.py target/release/capsieve --model synthetic:base --seconds 60
    python benches/serving.py target/release/capsieve --model synthetic:tiny --calls 64 --seconds 300

Prints JSON: pairs/s of `capsieve bench` and of the calls by turns, percentiles of the small calls' seconds while
large ones run and alone, resident memory along the way, and whether every row came once with its own score.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))
import client  # noqa: E402

SHARD = ROOT / "demo" / "shard.parquet"
SMALL = 10


def bench(program, model, seconds):
    """Pairs/s of the engine alone."""
    command = [program, "bench", "--model", model, "--device", "cpu", "--seconds", str(seconds), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["engine_pairs_per_second"]


def memory(worker):
    """Resident bytes."""
    text = Path(f"/proc/{worker.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) << 10


def percentile(values, share):
    values = sorted(values)
    return round(values[min(len(values) - 1, int(len(values) * share))], 4) if values else None


class Load:
    """Calls of one worker from many threads; every score is checked against the first one of its row."""

    def __init__(self, pb, stub, items, seconds):
        self.pb, self.stub, self.items, self.end = pb, stub, items, time.monotonic() + seconds
        self.lock, self.known, self.rows, self.wrong, self.small, self.failed = threading.Lock(), {}, 0, 0, [], []

    def call(self, rows):
        request = self.pb.ScoreBatchRequest(pairs=self.pb.InlinePairs(items=[self.items[row] for row in rows]))
        got = {}
        for message in self.stub.ScoreBatch(request):
            if message.WhichOneof("event") == "chunk":
                for i, row in enumerate(message.chunk.row):
                    got[row] = (message.chunk.itm_score[i], message.chunk.cosine_score[i])
        with self.lock:
            self.rows += len(got)
            self.wrong += len(got) != len(rows)
            for at, row in enumerate(rows):
                self.wrong += self.known.setdefault(row, got.get(at)) != got.get(at)

    def run(self, size, times, seed):
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            start = time.monotonic()
            try:
                self.call([chance.randrange(len(self.items)) for _ in range(size)])
            except grpc.RpcError as error:
                with self.lock:
                    self.failed.append(f"{error.code()}: {error.details()}")
                continue
            if times is not None:
                times.append(time.monotonic() - start)

    def threads(self, large, small, large_rows):
        jobs = [(large_rows, None)] * large + [(SMALL, self.small)] * small
        return [threading.Thread(target=self.run, args=(*job, seed)) for seed, job in enumerate(jobs)]


def measure(load, worker, large, small, large_rows, seconds):
    threads, start = load.threads(large, small, large_rows), time.monotonic()
    [thread.start() for thread in threads]
    held = []
    while any(thread.is_alive() for thread in threads):
        held.append(memory(worker))
        time.sleep(min(1.0, seconds / 20))
    taken = time.monotonic() - start
    half = len(held) // 2
    return {
        "large_calls": large, "small_calls": small, "pairs_per_second": round(load.rows / taken, 2),
        "small_p50": percentile(load.small, 0.5), "small_p99": percentile(load.small, 0.99),
        "small_done": len(load.small), "rows": load.rows, "wrong": load.wrong, "failed": load.failed[:5],
        "memory_first_half_max": max(held[:half] or held), "memory_second_half_max": max(held[half:]),
        "memory_megabytes": [bytes >> 20 for bytes in held[::max(1, len(held) // 30)]],
    }


def rounds(a, run):
    """The engine alone and inline streaming by turns, so that a machine whose speed varies slows both."""
    seconds, found = min(25, a.seconds / a.rounds), []
    for _ in range(a.rounds):
        before = bench(a.program, a.model, seconds)
        streaming = run("streaming", min(2, a.calls), 0, seconds)
        found.append({"engine": round(before, 3), "streaming": streaming})
    ratios = sorted(one["streaming"]["pairs_per_second"] / one["engine"] for one in found)
    return {"rounds": found, "ratio_median": round(ratios[len(ratios) // 2], 3)}


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("program")
    args.add_argument("--model", default="synthetic:base")
    args.add_argument("--calls", type=int, default=8)
    args.add_argument("--seconds", type=float, default=60, help="of the mixed load; a round of throughput: at most 25")
    args.add_argument("--rounds", type=int, default=3)
    a = args.parse_args()
    processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    report = {"model": a.model, "processor": processor, "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as folder:
        pb, pb_grpc = client.stubs(folder)
        worker, address = client.start(a.program, "--model", a.model, "--max-calls", "256")
        rows = pq.read_table(SHARD).to_pylist()
        items = [pb.ImageCaptions(image_bytes=row["image"], captions=[row["caption"]]) for row in rows]
        large_rows = 2000 if a.model == "synthetic:tiny" else 32
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.ScoringServiceStub(channel)

            def run(name, large, small, seconds):
                print(f"{name}: {large} large and {small} small calls for {seconds:.0f} s", file=sys.stderr)
                load = Load(pb, stub, items, seconds)
                return measure(load, worker, large, small, large_rows, seconds)

            report["throughput"] = rounds(a, run)
            report["mixed"] = run("mixed", a.calls // 2, a.calls - a.calls // 2, a.seconds)
            report["small alone"] = run("small alone", 0, 1, min(10, a.seconds))
        worker.terminate()
        worker.wait(60)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
