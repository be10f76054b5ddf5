"""The settings of a readout: how it reads position out of an encoder's stages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from padprobe.errors import check_name
from padprobe.readout.posenet import readout_side

Kind = Literal["posenet", "ridge"]


@dataclass(frozen=True)
class Readout:
    """One way to read position out of an encoder's stages.

    Attributes:
        kind: ``"posenet"``: the paper's readout, trained. ``"ridge"``: linear, in closed form, see
            :mod:`padprobe.readout.ridge`.
        stages: ``"all"``; one stage, ``"f1"``; several, ``"f2+f4"``; ``"each"``: one readout per stage; ``"rgb"``: the
            image alone.
        kernel_size: size of each convolution; odd.
        depth: number of convolutions; 1 for ridge.
        padding: zero padding of each convolution; 0 for ridge.
        scale: scale of the target maps, see :func:`~padprobe.position_maps`.

    Raises:
        ValueError: for a value that is not possible.

    Example:
        >>> Readout("ridge", stages="f2+f4", kernel_size=1)
        Readout(kind='ridge', stages='f2+f4', kernel_size=1, depth=1, padding=0, scale='unit')
    """

    kind: Kind = "posenet"
    stages: str = "all"
    kernel_size: int = 3
    depth: int = 1
    padding: int = 0
    scale: Literal["unit", "paper"] = "unit"

    def __post_init__(self) -> None:
        check_name(self.kind, get_args(Kind), "readout")
        check_name(self.scale, ("unit", "paper"), "scale")
        readout_side(self.kernel_size, self.depth, self.padding, grid=10**6)  # checks all but the grid, not known yet
        if not re.fullmatch(r"all|each|rgb|f[1-9]\d*(\+f[1-9]\d*)*", self.stages):
            raise ValueError(
                f"the stages of a readout are {self.stages!r}; expected all, each, rgb, or stages such as f1 or f2+f4"
            )
        if self.kind == "ridge" and (self.depth, self.padding) != (1, 0):
            raise ValueError(
                f"a ridge readout has depth 1 and no padding; got depth {self.depth} and padding {self.padding}"
            )


def parse_readout(text: str) -> Readout:
    """Reads the settings of a readout from one line of text.

    Args:
        text: fields of :class:`Readout`, separated by commas; the kind needs no key.

    Raises:
        ValueError: for a key or value that is not possible.

    Example:
        >>> parse_readout("ridge,kernel_size=1,stages=f1+f2")
        Readout(kind='ridge', stages='f1+f2', kernel_size=1, depth=1, padding=0, scale='unit')
    """
    fields = {field.name: field.type for field in dataclasses.fields(Readout)}
    values: dict[str, str | int] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals:
            key, value = "kind", key
        check_name(key, tuple(fields), "readout option")
        if fields[key] == "int" and not value.isdigit():
            raise ValueError(f"{key} of readout {text!r} is {value!r}; expected a number")
        values[key] = int(value) if fields[key] == "int" else value
    return Readout(**values)  # type: ignore[arg-type]


def with_controls(readouts: Sequence[Readout], stages: Iterable[str]) -> list[Readout]:
    """The readouts to make for a request: ``stages="each"`` expanded, duplicates removed, and the controls added last.

    The control of a readout is the same readout on the image alone (``stages="rgb"``).

    Args:
        readouts: the readouts that were asked for.
        stages: the names of the encoder's stages, f1..fn.

    Raises:
        ValueError: for a stage that the encoder does not have.

    Example:
        >>> [readout.stages for readout in with_controls([Readout(), Readout(stages="each")], ["f1", "f2"])]
        ['all', 'f1', 'f2', 'rgb']
    """
    known = list(stages)
    expanded: list[Readout] = []
    for readout in readouts:
        chosen = known if readout.stages == "each" else [readout.stages]
        expanded += [dataclasses.replace(readout, stages=name) for name in chosen]
    for readout in expanded:
        for stage in readout.stages.split("+"):
            check_name(stage, [*known, "all", "rgb"], "stage")
    return list(dict.fromkeys([*expanded, *(dataclasses.replace(readout, stages="rgb") for readout in expanded)]))
