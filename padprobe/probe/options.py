"""The options of a probe, declared once: for Python, the command line and a study's YAML."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from padprobe.errors import check_name, check_number, check_type
from padprobe.maps import TARGETS, Size, size_pair
from padprobe.network.layout import LAYOUTS
from padprobe.readout.spec import Readout

Function = TypeVar("Function", bound=Callable[..., Any])


def option(default: Any, help: str, changes: tuple[str, ...] = ("probe",), least: float | None = None) -> Any:
    """A field of an options class; a default that is a list or dictionary is copied for each instance.

    ``changes`` says which results of a study's cell depend on it, of ``"training"``, ``"scores"`` and ``"probe"``;
    ``least`` is the smallest value that is allowed.
    """
    metadata = {"help": help, "changes": changes, "least": least}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ProbeOptions:
    """How a frozen encoder is probed; the help of each field says what it is.

    Raises:
        ValueError: for a value of another type, a number that is too small or not finite, no image size, or
            an empty list.
    """

    readouts: list[Readout] | str = option(
        [Readout()],
        "readouts, each with its control on the image alone; the first is the headline, whose maps and border profile "
        "are kept. Or one file of trained readouts: then nothing is trained, and the file states targets, grid, "
        "image_size, normalize, seeds and selectivity",
        changes=(),
    )
    stages: str | list[str] = option(
        "auto",
        "names of the encoder's layers to read from, 'auto' (found by the tool), 'each_block' (every block that all "
        "information flows through) or 'paper' (as in the paper)",
    )
    layout: str = option(
        "auto",
        "what the outputs of these layers are: 'NCHW', 'NHWC', 'tokens' (behind class tokens), or 'auto': found from "
        "their shapes and checked on an image",
    )
    targets: list[Any] = option(list(TARGETS), "position maps to read out: H, V, G, HS, VS (in Python also functions)")
    grid: int = option(28, "side in cells of the grid that all stages are resized to", least=2)
    image_size: Size = option(
        224,
        "size in pixels of the images that the encoder sees and of the predicted maps: 224 for a square, or height and "
        "width, such as 240x320",
        least=2,
    )
    normalize: bool = option(
        False, "subtract ImageNet's mean and divide by its standard deviation (the paper's code does not)"
    )
    epochs: int = option(15, "epochs of the readouts' training", least=1)
    batch_size: int = option(32, "images per batch, of the encoder's pass and of the readouts' training", least=1)
    seeds: list[int] = option([0], "seeds of the readouts; the first also draws the samples of images and the stimuli")
    untrained: int = option(
        3,
        "untrained twins to compare with (delta = SPC - mean SPC of the twins); each costs as much as the encoder",
        least=0,
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
    limit_train: int | None = option(None, "use a random sample of at most so many training images", least=1)
    limit_test: int | None = option(None, "use a random sample of at most so many images of each test set", least=1)
    num_workers: int = option(0, "processes that read images", changes=(), least=0)
    cache_gb: float = option(
        8.0, "memory for the training images' features in GB; above it they go to a file", changes=(), least=0
    )

    def __post_init__(self) -> None:
        height, width = size_pair(self.image_size, "image_size")
        self.image_size = height if height == width else (height, width)
        hints = get_type_hints(ProbeOptions)
        for field in dataclasses.fields(ProbeOptions):
            name, value, hint = field.name, getattr(self, field.name), hints[field.name]
            if name == "image_size":
                if min(height, width) < 2:
                    raise ValueError(f"image_size is {value}; expected 2 or more")
            elif (kind := {int: int, float: float, int | None: int}.get(hint)) and (value is not None or hint is int):
                check_number(name, value, kind, field.metadata["least"])
                setattr(self, name, kind(value))  # of numpy's numbers too
            else:
                check_type(str(value) if isinstance(value, Path) else value, hint, name)
            if hasattr(value, "__len__") and not len(value):
                raise ValueError(f"{name} is empty; expected at least one")
        for seed in self.seeds:  # numpy takes no negative one
            check_number("a seed", seed, int, least=0)
        check_name(self.layout, LAYOUTS, "layout")
        for target in self.targets:
            if isinstance(target, str):
                check_name(target, TARGETS, "target")
            elif not callable(target):
                raise ValueError(f"a target is {target!r}; expected a name, one of {', '.join(TARGETS)}, or a function")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of an options class's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def change_options(options: ProbeOptions | None, changes: Mapping[str, Any]) -> ProbeOptions:
    """A copy of the options in which some have another value.

    Raises:
        ValueError: for a name that is no option, with the nearest names.
    """
    for name in changes:
        check_name(name, [field.name for field in dataclasses.fields(ProbeOptions)], "option of a probe")
    return dataclasses.replace(options or ProbeOptions(), **changes)


def show_options(function: Function) -> Function:
    """Decorator: puts every option into the signature and the docstring of a function that takes ``**changes``.

    The docstring has a line ``{options}`` where the options go.
    """
    signature = inspect.signature(function)
    fields = dataclasses.fields(ProbeOptions)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for field in fields:
        annotated = {"default": default_of(field), "annotation": field.type}
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, **annotated))
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper = textwrap.TextWrapper(120, initial_indent=" " * 8, subsequent_indent=" " * 12)
    lines = [wrapper.fill(f"{field.name}: {field.metadata['help']}.") for field in fields]
    function.__doc__ = (function.__doc__ or "").replace("        {options}", "\n".join(lines))
    return function
