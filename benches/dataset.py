"""`capsieve score` over many shards: cost per row and memory as the dataset grows, and how long the engine waits.

    pip install pyarrow
    python benches/dataset.py target/release/capsieve

Prints JSON. `growth`: seconds per row, the start of the program taken off, and peak memory for 1, 10 and 100 shards of one size
(tiny model, so that reading, decoding and writing are what counts). `soak`: resident memory along a run of 100,000 rows. `idle`:
the part of a run of 50 small shards in which the engine computes nothing, with a model that makes it the bound.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "python"))
from support import picture  # noqa: E402


def shards(folder, count, rows, side):
    """So many shards; their images are few and repeat, their captions are all different."""
    folder.mkdir(parents=True)
    images = [picture(seed, side, side) for seed in range(64)]
    for number in range(count):
        captions = [f"caption {row} of shard {number}" for row in range(rows)]
        columns = {"image": [images[(number + row) % len(images)] for row in range(rows)], "caption": captions}
        pq.write_table(pa.table(columns), folder / f"{number:05}.parquet", row_group_size=1000)
    return folder


def score(program, model, source, output):
    """Seconds, peak memory, and resident memory every fifth of a second."""
    command = [program, "score", "--model", model, "--input", f"{source}/", "--output", f"{output}/"]
    start, samples = time.monotonic(), []
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{worker.pid}/status")
    while worker.poll() is None:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmRSS" in fields:
            samples.append(int(fields["VmRSS"].split()[0]) * 1024)
        time.sleep(0.2)
    assert worker.returncode == 0, worker.returncode
    return time.monotonic() - start, max(samples), samples


def growth(program, folder, rows, rounds):
    sources = {count: shards(folder / f"in{count}", count, rows, 64) for count in (1, 10, 100)}
    found = {count: [] for count in sources}
    # What is complete already costs the start of the program and little else.
    score(program, "synthetic:tiny", sources[1], folder / "start")
    starting = min(score(program, "synthetic:tiny", sources[1], folder / "start")[0] for _ in range(3))
    for number in range(rounds):
        for count, source in sources.items():
            seconds, memory, _ = score(program, "synthetic:tiny", source, folder / f"out{count}-{number}")
            found[count].append({"microseconds_per_row": (seconds - starting) / (count * rows) * 1e6, "megabytes": memory >> 20})
    return {"rows_per_shard": rows, "start_seconds": starting, "shards": found}


def soak(program, folder, rows):
    source = shards(folder / "in-soak", 50, rows // 50, 64)
    seconds, _, samples = score(program, "synthetic:tiny", source, folder / "out-soak")
    # The model is loaded by then.
    samples = samples[len(samples) // 20:]
    first, second = samples[:len(samples) // 2], samples[len(samples) // 2:]
    return {"rows": rows, "rows_per_second": rows / seconds, "first_half_max_megabytes": max(first) >> 20,
            "second_half_max_megabytes": max(second) >> 20, "ratio": max(second) / max(first)}


def idle(program, folder, model, count, rows):
    source, output = shards(folder / "in-idle", count, rows, 384), folder / "out-idle"
    score(program, model, source, output)
    stats = [json.loads(path.read_text()) for path in output.glob("*.stats.json")]
    assert len(stats) == count
    written = sorted(path.stat().st_mtime for path in output.glob("*.parquet"))
    # From the first output to the last one: the model is loaded, and every shard's tail is in it.
    engine = sum(one["seconds"]["engine"] for one in stats)
    per_shard = engine / count
    wall = (written[-1] - written[0]) / (count - 1)
    return {"model": model, "shards": count, "rows_per_shard": rows, "engine_seconds_per_shard": per_shard,
            "wall_seconds_per_shard": wall, "idle": 1 - per_shard / wall}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--rows", type=int, default=2000, help="of a shard, for the growth")
    parser.add_argument("--rounds", type=int, default=1, help="of the growth")
    parser.add_argument("--soak-rows", type=int, default=100_000)
    parser.add_argument("--idle-model", default="synthetic:base")
    parser.add_argument("--idle-rows", type=int, default=4, help="of each of 50 shards")
    arguments = parser.parse_args()
    program = arguments.program.resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        report = {"cores": os.cpu_count()}
        print("growth", file=sys.stderr)
        report["growth"] = growth(program, folder, arguments.rows, arguments.rounds)
        print("soak", file=sys.stderr)
        report["soak"] = soak(program, folder, arguments.soak_rows)
        print("idle", file=sys.stderr)
        report["idle"] = idle(program, folder, arguments.idle_model, 50, arguments.idle_rows)
    print(json.dumps(report, indent=1))


main()
