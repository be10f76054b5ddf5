"""The paper's own numbers, and which of them stands beside a measurement of ours."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

STIMULI = {"pascals": "PASCAL-S", "black": "black", "white": "white", "noise": "noise"}


class PaperCell(NamedTuple):
    """One cell of the paper's tables: which network it describes, its SPC, and its MAE (NaN for the stripes, whose MAE
    in the paper is on another scale)."""

    network: str
    spc: float
    mae: float


@functools.cache
def paper_numbers() -> dict[str, Any]:
    """The paper's tables 1, 4, 5 and 6, with their source: ``paper.json`` beside this file."""
    return json.loads(files("padprobe.report").joinpath("paper.json").read_text(encoding="utf-8"))


def paper_cell(row: Mapping[Any, Any]) -> PaperCell | None:
    """The paper's cell for one of our measurements, or None where the paper has none.

    Args:
        row: ``encoder, weights, task, padding, readout, kernel_size, depth, head_padding, stages, stimulus, target``.

    The match is conservative: the paper's readout (3 x 3, one layer), its test stimuli, and a network that it names.
    """
    place = _network(row)
    stimulus = STIMULI.get("".join(c for c in str(row["stimulus"]).lower() if c.isalpha()))
    if place is None or stimulus is None:
        return None
    table, name, label = place
    cell = paper_numbers()[table].get(row["target"], {}).get(name, {}).get(stimulus)
    if cell is None:
        return None
    return PaperCell(label, cell["SPC"], float("nan") if row["target"] in ("HS", "VS") else cell["MAE"])


def _network(row: Mapping[Any, Any]) -> tuple[str, str, str] | None:
    """(table, the paper's name of the network, what we call it) for a measured encoder."""
    if (row["readout"], row["kernel_size"], row["depth"]) != ("posenet", 3, 1):
        return None
    if row["stages"] == "rgb":
        name = f"PosENet pad={row['head_padding']}" if row["head_padding"] else "PosENet"
        return ("table4" if row["head_padding"] else "table1"), name, name
    if row["head_padding"] or row["stages"] != "all":
        return None
    encoder, task, zeros = row["encoder"].lower(), row["task"], row["padding"] == "zeros"
    if task in ("SOD", "SS"):
        return ("table6", f"VGG-{task}", f"VGG-{task} (VGG16, real data)") if zeros and "vgg" in encoder else None
    if row["weights"] in ("", "untrained", "trained") or task not in ("", "classification"):
        return None
    if encoder.endswith("vgg16") and zeros:
        return "table1", "VGG", "VGG (VGG16, ImageNet)"
    if encoder.endswith("vgg16") and row["padding"] == "valid":
        return "table4", "VGG16 w/o padding", "VGG16 w/o padding"
    if encoder.endswith("resnet152") and zeros:
        return "table1", "ResNet", "ResNet (ResNet-152, ImageNet)"
    return None
