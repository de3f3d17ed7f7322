"""Draws what compare.py measured: pairs/s of each engine at its best batch size, by precision.

    python benches/peers/picture.py benches/results/NAME.json docs/cpu.svg
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "capsieve", "svg.fonttype": "none"})
import matplotlib.pyplot as plt  # noqa: E402
from compare import BF16_BESIDE_INT8, precision_of  # noqa: E402

OURS, PEER = "#1f6f8b", "#b8b8b8"


def main():
    source, target = map(Path, sys.argv[1:])
    result = json.loads(source.read_text(encoding="utf-8"))
    groups = {}
    for name, of in result["best"].items():
        if name != BF16_BESIDE_INT8:
            groups.setdefault(precision_of(name), []).append((of["median"], name))
    rows = [sorted(groups[p]) for p in ("int8", "bf16", "f32") if p in groups]
    count = sum(map(len, rows)) + len(rows) - 1
    figure, axes = plt.subplots(figsize=(8, 0.34 * count + 1))
    y, ticks, labels = 0, [], []
    for group in rows:
        for median, name in group:
            ours = name.startswith("capsieve")
            rounds = next(v["pairs_per_second"] for v in result["variants"]
                          if (v["name"], v["batch"]) == (name, result["best"][name]["batch"]))
            axes.barh(y, median, color=OURS if ours else PEER)
            axes.plot([min(rounds), max(rounds)], [y, y], color="black", linewidth=1)
            axes.text(max(rounds), y, f"  {median:.2f}", va="center", fontsize=9, fontweight="bold" if ours else "normal")
            ticks.append(y)
            labels.append(name)
            y += 1
        y += 1
    axes.set_yticks(ticks, labels, fontsize=9)
    machine = result["machine"]
    axes.set_xlabel(f"pairs/s, ViT-L/16 at 384 px, both heads, {machine['threads']} threads of an {machine['cpu']} "
                    f"({', '.join(machine['instructions'])}); median of rounds, line: all of them", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
