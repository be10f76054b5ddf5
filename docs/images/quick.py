"""Draws docs/images/quick.svg, the picture of the README, from the results of the quick study.

python docs/images/quick.py runs/quick       (a folder with results.csv, made by `make quick`)

One dot is the SPC of one network's readout on held-out scenes; the line through it is the 95% interval over
images. Filled: the network pads with zeros. Open: it does not pad.
"""

import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

TARGETS = {"H": "H: left to right", "V": "V: top to bottom", "G": "G: from the centre"}
NETWORKS = {  # names in configs/study/quick.yaml, bottom to top
    "ss-p0": "segmentation,\nlabels ignore position",
    "ss": "segmentation,\nlabels depend on position",
    "sod": "saliency",
    "classification": "classification",
    "untrained": "untrained",
}
PADDINGS = {"zeros": {"color": "#1f5fa8"}, "valid": {"color": "#c2562d", "markerfacecolor": "white"}}


def draw(results: pd.DataFrame) -> Figure:
    """The chart of a quick study's results.csv."""
    rows = results[(results.metric == "spc") & (results.stimulus == "scenes") & (results.stages == "all")]
    rows = rows[rows.readout == "posenet"].set_index(["run", "target"])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, len(TARGETS), sharex=True, sharey=True)
    for ax, (target, title) in zip(axes, TARGETS.items(), strict=True):
        for padding, style in PADDINGS.items():
            for y, network in enumerate(NETWORKS):
                row = rows.loc[(f"{network}-{padding}", target)]
                spread = [[row.value - row.ci_low], [row.ci_high - row.value]]
                ax.errorbar(row.value, y, xerr=spread, fmt="o", ms=6, lw=1.5, **style)
            label = {"zeros": "zero padding", "valid": "no padding"}[padding]
            ax.text(row.value, y + 0.25, label, color=style["color"], ha="center", fontsize="small")
        ax.axvline(0, color="0.75", lw=0.8, zorder=0)
        ax.set(title=title, yticks=range(len(NETWORKS)), yticklabels=NETWORKS.values(), xlim=(-0.15, 1))
        ax.set_ylim(-0.5, len(NETWORKS) - 0.4)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[1].set_xlabel("SPC on held-out scenes: 1 is perfect, 0 is none (95% interval over 160 images)")
    figure.suptitle("Position comes from zero padding, in trained and untrained networks alike")
    return figure


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "padprobe", "axes.titlesize": "medium"})  # the same file every time
    figure = draw(pd.read_csv(Path(sys.argv[1]) / "results.csv"))
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
