"""The readouts of one run: how each reads position out of an encoder's stages."""

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
        kind: ``"posenet"``: the paper's, trained; ``"ridge"``: linear, in closed form, see
            :mod:`padprobe.readout.ridge`.
        stages: ``"all"``; one, as ``"f1"``; some, as ``"f2+f4"``; ``"each"``: one readout a stage; or ``"rgb"``, the
            image alone.
        kernel_size: of each convolution; odd.
        depth: number of convolutions; 1 for ridge.
        padding: zero padding of each convolution; 0 for ridge.
        scale: of the target maps, see :func:`~padprobe.position_maps`.

    Raises:
        ValueError: for a kind, stages, scale or numbers that are not possible.
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
        readout_side(self.kernel_size, self.depth, self.padding, 10**6)
        if not re.fullmatch(r"all|each|rgb|f[1-9]\d*(\+f[1-9]\d*)*", self.stages):
            raise ValueError(
                f"stages of a readout are {self.stages!r}; expected all, each, rgb, or stages such as f1 or f2+f4"
            )
        if self.kind == "ridge" and (self.depth, self.padding) != (1, 0):
            raise ValueError(
                f"a ridge readout has depth 1 and no padding; got depth {self.depth} and padding {self.padding}"
            )

    @property
    def name(self) -> str:
        """What the results call its kind."""
        return self.kind + (", paper scale" if self.scale == "paper" else "")


def parse_readout(text: str) -> Readout:
    """A readout from the command line: ``"kernel_size=7,stages=f1+f2"`` or ``"ridge,kernel_size=1"``.

    Raises:
        ValueError: naming the key or value that is not possible.
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
    """Readouts without repetition, ``stages="each"`` written out, and last the same readouts on the image alone.

    Args:
        readouts: as asked for.
        stages: the names that an encoder has, f1..fn.

    Raises:
        ValueError: for a stage that it has not.
    """
    known = list(stages)
    found: list[Readout] = []
    for readout in readouts:
        chosen = known if readout.stages == "each" else [readout.stages]
        found += [dataclasses.replace(readout, stages=name) for name in chosen]
    for readout in found:
        for stage in readout.stages.split("+"):
            check_name(stage, [*known, "all", "rgb"], "stage")
    return list(dict.fromkeys([*found, *(dataclasses.replace(readout, stages="rgb") for readout in found)]))
