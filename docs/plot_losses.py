"""Draw the loss curves of a run from its metrics.jsonl: `python docs/plot_losses.py RUN OUT.png`."""

import sys
from pathlib import Path

import matplotlib

from rawloop.records import read_metrics


def main(run: Path, out: Path) -> None:
    """Plot training and evaluation loss, all streams together and audio alone, with the best step marked."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(run)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, suffix, title in zip(axes, ("", "/audio"), ("audio + text", "audio alone"), strict=True):
        for name, style in ((f"loss{suffix}", "-"), (f"eval_loss{suffix}", "o-")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), style, label=name, markersize=4)
        best = min((line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line)[1]
        axis.axvline(best, color="grey", linewidth=0.8, linestyle="--", label=f"best, step {best}")
        axis.set(title=title, xlabel="optimizer step", ylabel="nats per target")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
