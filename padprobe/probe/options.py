"""The options of a probe, declared once: for Python, the command line and a study's YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from padprobe.maps import TARGETS
from padprobe.readout.spec import Readout


def option(default: Any, help: str, changes: tuple[str, ...] = ("probe",)) -> Any:
    """A field of an options class.

    Args:
        default: its value; a list or dictionary is copied for each instance.
        help: what it is, as users read it.
        changes: which results of a study's cell depend on it, of ``"training"``, ``"scores"`` and ``"probe"``.
    """
    metadata = {"help": help, "changes": changes}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ProbeOptions:
    """How a frozen encoder is probed; the help of each field says what it is.

    Example:
        >>> ProbeOptions(image_size=96).epochs
        15
    """

    readouts: list[Readout] | str = option(
        [Readout()],
        "readouts, each with its control on the image alone; the first is the headline, whose maps and border profile "
        "are kept. Or one file of trained readouts: then nothing is trained, and the file states targets, grid, "
        "image_size, normalize, seeds and selectivity",
        changes=(),
    )
    stages: str | list[str] = option(
        "auto", "names of the encoder's layers to read from, 'auto' (found by the tool) or 'paper' (as in the paper)"
    )
    targets: list[Any] = option(list(TARGETS), "position maps to read out: H, V, G, HS, VS (in Python also functions)")
    grid: int = option(28, "side in cells of the grid that all stages are resized to")
    image_size: int = option(224, "side in pixels of the images that the encoder sees and of the predicted maps")
    normalize: bool = option(
        False, "subtract ImageNet's mean and divide by its standard deviation (the paper's code does not)"
    )
    epochs: int = option(15, "epochs of the readouts' training")
    batch_size: int = option(32, "images per batch, of the encoder's pass and of the readouts' training")
    seeds: list[int] = option([0], "seeds of the readouts; the first also draws the samples of images and the stimuli")
    untrained: int = option(
        3, "untrained twins to compare with (delta = SPC - mean SPC of the twins); each costs as much as the encoder"
    )
    selectivity: bool = option(True, "read out a permuted target too: selectivity = SPC - SPC of the permuted target")
    context: bool = option(
        False,
        "also probe the encoder without padding, shown the image's real surroundings instead; one more run",
    )
    settle: bool = option(
        False,
        "the encoder is untrained: its BatchNorms take the statistics of a batch of training images, as those of the "
        "twins do, and no twins are made",
    )
    limit_train: int | None = option(None, "use a random sample of at most so many training images")
    limit_test: int | None = option(None, "use a random sample of at most so many images of each test set")
    num_workers: int = option(0, "processes that read images", changes=())
    cache_gb: float = option(
        8.0, "memory for the training images' features in GB; above it they go to a file", changes=()
    )
