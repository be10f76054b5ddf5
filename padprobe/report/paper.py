"""The paper's own numbers, and which of them stands beside a measurement of ours."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

PAPER_SCALE = "posenet, paper scale"
"""The readout of stripes on [-1, 1], the scale that the paper's MAE of the stripes points to."""

STIMULI = {"pascals": "PASCAL-S", "black": "black", "white": "white", "noise": "noise"}


class PaperCell(NamedTuple):
    """One cell of the paper's tables: which network it describes, its SPC, and its MAE (NaN for the stripes on [0, 1],
    whose MAE in the paper is on another scale)."""

    network: str
    spc: float
    mae: float


@functools.cache
def paper_numbers() -> dict[str, Any]:
    """The paper's tables, with their source: ``paper.json`` beside this file."""
    return json.loads(files("padprobe.report").joinpath("paper.json").read_text(encoding="utf-8"))


def paper_cell(row: Mapping[Any, Any]) -> PaperCell | None:
    """The paper's cell for one of our measurements, or None where the paper has none.

    Args:
        row: ``encoder, weights, task, padding, readout, kernel_size, depth, head_padding, stages, stimulus, target``.

    The match is conservative: the paper's trained readout, its test stimuli, and a network that it names; of kernel,
    depth, padding and stages, at most one differs from the headline readout's (3 x 3, one layer, unpadded, all stages).
    """
    place = _network(row)
    stimulus = STIMULI.get("".join(c for c in str(row["stimulus"]).lower() if c.isalpha()))
    if place is None or stimulus is None:
        return None
    table, name, label = place
    cell = paper_numbers()[table].get(row["target"], {}).get(name, {}).get(stimulus)
    if cell is None:
        return None
    other_scale = row["target"] in ("HS", "VS") and row["readout"] != PAPER_SCALE
    return PaperCell(label, cell["SPC"], float("nan") if other_scale else cell["MAE"])


def _network(row: Mapping[Any, Any]) -> tuple[str, str, str] | None:
    """(table, the paper's name of the network, what we call it) for a measured encoder."""
    if row["readout"] not in ("posenet", PAPER_SCALE):
        return None
    changed = [
        place
        for place, differs in (
            (("table2a", f" layers={row['depth']}"), row["depth"] != 1),
            (("table2b", f" kernel={row['kernel_size']}"), row["kernel_size"] != 3),
            (("table3", f" {row['stages']}"), row["stages"] not in ("all", "rgb")),
            (("table4", f" pad={row['head_padding']}"), row["head_padding"] != 0),
        )
        if differs
    ]
    if len(changed) > 1:
        return None
    table, variant = changed[0] if changed else ("table1", "")
    if row["stages"] == "rgb":
        return table, f"PosENet{variant}", f"PosENet{variant}"
    encoder, task, zeros = row["encoder"].lower(), row["task"], row["padding"] == "zeros"
    if task in ("SOD", "SS"):
        stated = zeros and "vgg" in encoder and not changed
        return ("table6", f"VGG-{task}", f"VGG-{task} (VGG16, real data)") if stated else None
    if row["weights"] in ("", "untrained", "trained") or task not in ("", "classification"):
        return None
    if encoder.endswith("vgg16") and zeros:
        return table, f"VGG{variant}", "VGG (VGG16, ImageNet)"
    if changed:
        return None
    if encoder.endswith("vgg16") and row["padding"] == "valid":
        return "table4", "VGG16 w/o padding", "VGG16 w/o padding"
    if encoder.endswith("resnet152") and zeros:
        return "table1", "ResNet", "ResNet (ResNet-152, ImageNet)"
    return None
