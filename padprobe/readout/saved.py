"""Trained readouts in a file: what they are, and their weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from padprobe.maps import TARGETS
from padprobe.readout.posenet import PosENet
from padprobe.readout.spec import Readout
from padprobe.results import write_atomically


@dataclass
class SavedReadouts:
    """Trained readouts, and all that they need to know of the encoder's pass.

    Attributes:
        readouts: each of them, controls included, with its seed.
        states: their weights, in the same order.
        targets: position maps.
        grid, image_size, normalize, selectivity: see :func:`~padprobe.probe_encoder`.
        layers: of the encoder that they were trained on, its stages f1..fn.
    """

    readouts: list[tuple[Readout, int]]
    states: list[dict[str, Tensor]]
    targets: list[str]
    grid: int
    image_size: int
    normalize: bool
    selectivity: bool
    layers: list[str]


_FACTS = ("targets", "grid", "image_size", "normalize", "selectivity", "layers")


def check_savable(readouts: Iterable[Readout], targets: Iterable[Any]) -> None:
    """Raises ValueError for a target that is a function, or where nothing will be trained."""
    if unnamed := [target for target in targets if target not in TARGETS]:
        raise ValueError(
            f"readouts of {unnamed[0]!r} cannot be saved: only the targets {', '.join(TARGETS)} have names"
        )
    if all(readout.kind != "posenet" for readout in readouts):
        raise ValueError("there are no trained readouts to save; ridge is solved anew for every encoder")


def save_readouts(
    path: str | Path, made: Mapping[tuple[Readout, int], Any], targets: Sequence[Any], **facts: Any
) -> None:
    """Writes trained readouts as safetensors; what they are stands in the file's header.

    Args:
        path: of the file.
        made: the readouts by kind and seed; those in closed form are left out.
        targets: position maps by name.
        facts: the other attributes of :class:`SavedReadouts`.
    """
    trained = {key: module for key, module in made.items() if isinstance(module, PosENet)}
    header = {**facts, "targets": list(targets), "readouts": [(dataclasses.asdict(r), seed) for r, seed in trained]}
    tensors = {
        f"{i}.{name}": value.detach().cpu().contiguous()
        for i, module in enumerate(trained.values())
        for name, value in module.state_dict().items()
    }
    write_atomically(Path(path), lambda to: save_file(tensors, to, {"padprobe": json.dumps(header)}))


def load_readouts(path: str | Path) -> SavedReadouts:
    """What :func:`save_readouts` wrote.

    Raises:
        ValueError: for a file that is not there, is no safetensors file, or was not written by padprobe.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file of readouts {str(path)!r}: `padprobe probe --save-readouts FILE` writes one")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["padprobe"])
        tensors = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{str(path)!r} holds no readouts that padprobe saved: {error}") from error
    readouts = [(Readout(**readout), seed) for readout, seed in header["readouts"]]
    states: list[dict[str, Tensor]] = [{} for _ in readouts]
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        states[int(number)][key] = value
    return SavedReadouts(readouts, states, **{fact: header[fact] for fact in _FACTS})
