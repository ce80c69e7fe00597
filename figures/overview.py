"""README's figure, from the records of speed.py and real_gradient.py.

    python figures/overview.py                              # draws overview.png; needs matplotlib
"""

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]

from measure import ACCURACY, TOKENS, interval_half  # noqa: E402 (all lie in this folder)
from speed import SETTINGS, read_records  # noqa: E402
from speed_table import groups_of  # noqa: E402

STYLES = {  # of curves: (label, how it is drawn)
    "uniform": ("uniform", {"color": "black", "linestyle": ":", "marker": "o"}),
    "most prompts": ("uniform, most prompts", {"color": "grey", "linestyle": ":", "marker": "s"}),
    "published": ("the paper's rule", {"color": "grey", "linestyle": "--", "marker": "^"}),
    "wider pool": ("p predicted, 64 candidates",
                   {"color": "black", "linestyle": "-", "marker": "D"}),
}
WAYS = {  # of the real model's gradient: names in the records, and in the figure
    "most prompts": "uniform,\nmost prompts",
    "published": "the paper's\nrule",
    "predicted": "p predicted,\nof 16",
    "wider pool": "p predicted,\nof 64",
    "known p, wider pool": "p known,\nof 64",
}
LOWEST = 0.05
NAMES = {"toy": "the toy", "real": "the real model"}


def draw_curves(axes, on: str, records: list[dict], objective: str) -> None:
    """Accuracy against tokens, mean and 95 % interval over the seeds that all methods have."""
    groups = groups_of(SETTINGS[on], records, objective)
    for method in (name for name in STYLES if name in groups):  # RAFT has no wider pool
        label, style = STYLES[method]
        curves = [record["curve"] for record in groups[method].runs]
        shortest = min(map(len, curves))
        curves = np.array([curve[:shortest] for curve in curves])
        tokens, accuracy = curves[..., TOKENS].mean(axis=0) / 1000, curves[..., ACCURACY]
        axes.errorbar(tokens, accuracy.mean(axis=0), interval_half(accuracy), label=label,
                      capsize=2, linewidth=1.2, markersize=4, **style)
    axes.set(title=f"{NAMES[on]}: {objective.upper()}, {len(curves)} seeds",
             xlabel="thousand response tokens, pilot included", ylabel="accuracy, 95 % interval")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower right")


def draw_gradient(axes, records: list[dict]) -> None:
    """What a token tells of the gradient, over uniform's; medians and 95 % intervals."""
    found = {(row["objective"], row["way"]): row["efficiency_per_token"] for row in records
             if "way" in row}
    for shift, objective, marker in ((-0.1, "raft", "o"), (0.1, "grpo", "D")):
        middles, lows, highs = np.transpose([found[objective, way] for way in WAYS])
        lows = lows.clip(LOWEST)  # on a logarithmic axis
        places = np.arange(len(WAYS)) + shift
        axes.errorbar(places, middles, [middles - lows, highs - middles], fmt=marker, color="black",
                      markerfacecolor="black" if objective == "raft" else "white", capsize=3,
                      label=objective.upper())
    axes.axhline(1, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(WAYS)), WAYS.values(), fontsize=8)
    axes.set(title="the real model: its gradient", yscale="log", ylim=(LOWEST, 20),
             ylabel="signal² / variance of a token, over uniform's")
    axes.legend(frameon=False, loc="lower left")


def draw(path: Path) -> None:
    """All four panels, as a file."""
    from matplotlib import pyplot as plt

    _, axes = plt.subplots(2, 2, figsize=(11, 8))
    toy, real = (read_records(SETTINGS[on].records_path) for on in NAMES)
    draw_curves(axes[0, 0], "toy", toy, "raft")
    draw_curves(axes[0, 1], "toy", toy, "grpo")
    draw_gradient(axes[1, 0], read_records(FOLDER / "real_gradient.jsonl"))
    draw_curves(axes[1, 1], "real", real, "grpo")
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    plt.tight_layout()
    plt.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(FOLDER / "overview.png")
