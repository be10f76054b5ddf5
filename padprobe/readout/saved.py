"""Trained readouts in a file, with all that is needed to use them."""

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

from padprobe.maps import PERMUTATION, TARGETS, size_pair
from padprobe.readout.posenet import PosENet
from padprobe.readout.spec import Readout
from padprobe.results import write_atomically


@dataclass
class SavedReadouts:
    """Trained readouts, and the facts about the encoder's pass that they depend on.

    Attributes:
        readouts: each readout, controls included, with its seed.
        states: their weights, in the same order.
        targets: position maps.
        grid, image_size, normalize, selectivity: see :func:`~padprobe.probe_encoder`.
        layers: the layers of the encoder that they were trained on, its stages f1..fn.
    """

    readouts: list[tuple[Readout, int]]
    states: list[dict[str, Tensor]]
    targets: list[str]
    grid: int
    image_size: tuple[int, int]
    normalize: bool
    selectivity: bool
    layers: list[str]


_FACTS = ("targets", "grid", "image_size", "normalize", "selectivity", "layers")


def check_savable(readouts: Iterable[Readout], targets: Iterable[Any]) -> None:
    """Checks, before any work, that readouts can be saved.

    Raises:
        ValueError: for a target that is a function, or if none of the readouts is trained.

    Example:
        >>> check_savable([Readout()], ["H", "G"])
    """
    if unnamed := [target for target in targets if target not in TARGETS]:
        raise ValueError(
            f"readouts of the target {unnamed[0]!r} cannot be saved: only {', '.join(TARGETS)} can be named in a file"
        )
    if all(readout.kind != "posenet" for readout in readouts):
        raise ValueError("there are no trained readouts to save: ridge is solved again for every encoder")


def save_readouts(
    path: str | Path, made: Mapping[tuple[Readout, int], Any], targets: Sequence[Any], **facts: Any
) -> None:
    """Writes trained readouts to a safetensors file, with their description in its header.

    Args:
        path: where to write.
        made: the readouts by settings and seed; those in closed form are left out.
        targets: names of the position maps.
        facts: the other attributes of :class:`SavedReadouts`.

    Example:
        >>> import tempfile
        >>> facts = {"grid": 28, "image_size": 224, "normalize": False, "selectivity": False, "layers": ["3", "8"]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_readouts(f"{folder}/r.safetensors", {(Readout(), 0): PosENet(8, ["H"])}, ["H"], **facts)
        ...     load_readouts(f"{folder}/r.safetensors").readouts
        [(Readout(kind='posenet', stages='all', kernel_size=3, depth=1, padding=0, scale='unit'), 0)]
    """
    trained = {key: module for key, module in made.items() if isinstance(module, PosENet)}
    header = {
        **facts,
        "targets": list(targets),
        "permutation": PERMUTATION,
        "readouts": [(dataclasses.asdict(r), seed) for r, seed in trained],
    }
    tensors = {
        f"{i}.{name}": value.detach().cpu().contiguous()
        for i, module in enumerate(trained.values())
        for name, value in module.state_dict().items()
    }
    write_atomically(Path(path), lambda to: save_file(tensors, to, {"padprobe": json.dumps(header)}))


def load_readouts(path: str | Path) -> SavedReadouts:
    """Reads a file that :func:`save_readouts` wrote, as data only.

    Controls of a version that permuted the targets in another way are left out: they do not fit today's controls.

    Raises:
        ValueError: for a file that does not exist, is not a safetensors file, or was not written by padprobe.

    Example:
        >>> load_readouts("missing.safetensors")
        Traceback (most recent call last):
        ValueError: no file of readouts 'missing.safetensors': make one with `padprobe probe --save-readouts FILE`
    """
    if not Path(path).is_file():
        raise ValueError(f"no file of readouts {str(path)!r}: make one with `padprobe probe --save-readouts FILE`")
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
    header["image_size"] = size_pair(header["image_size"])
    if header["selectivity"] and header.get("permutation") != PERMUTATION:
        states = [_without_controls(state, len(header["targets"])) for state in states]
        header["selectivity"] = False
    return SavedReadouts(readouts, states, **{fact: header[fact] for fact in _FACTS})


def _without_controls(state: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The state of a readout of the first ``count`` targets of a readout."""
    kept = {}
    for name, value in state.items():
        if name.startswith("hidden."):  # hidden.TARGET.LAYER.weight
            if int(name.split(".")[1]) < count:
                kept[name] = value
        else:
            kept[name] = value[:count] if value.ndim else value
    return kept
