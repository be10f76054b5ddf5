"""What a probe reads out: readouts, targets, seeds, and the channels that each reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padprobe.maps import Target, position_maps, shuffled, target_name
from padprobe.probe.features import FeatureReader
from padprobe.readout.posenet import PosENet, readout_side
from padprobe.readout.ridge import RidgeReadout
from padprobe.readout.spec import Readout

Key = tuple[Readout, int]
"""A readout and its seed."""
Made = dict[Key, PosENet | RidgeReadout]
"""Readouts that were trained or solved."""


@dataclass(frozen=True)
class Plan:
    """What to read out: the first readout at the first seed is the headline.

    Attributes:
        readouts: all of them, the controls on the image alone included.
        targets: position maps.
        image_size: side of the predicted maps in pixels.
        grid: side of the aligned features in cells.
        epochs, batch_size: of the trained readouts.
        seeds: of the readouts.
        selectivity: whether to read out the permuted targets too.
        states: weights of readouts that were trained before; where given, nothing is trained, and ``readouts`` and
            ``seeds`` are theirs.
    """

    readouts: tuple[Readout, ...]
    targets: tuple[Target, ...]
    image_size: int
    grid: int
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    selectivity: bool
    states: Mapping[Key, dict[str, Tensor]] | None = None

    @property
    def names(self) -> list[str]:
        """The targets' names."""
        return [target_name(target) for target in self.targets]

    @property
    def keys(self) -> list[Key]:
        """Every readout at every seed; a closed form has none, and stands at the first."""
        return [(r, s) for s in self.seeds for r in self.readouts if r.kind == "posenet" or s == self.seeds[0]]

    def all_targets(self, readout: Readout) -> list[Target]:
        """The targets, then the permuted ones."""
        side = readout_side(readout.kernel_size, readout.depth, readout.padding, self.grid)
        return [*self.targets, *(shuffled(t, side) for t in self.targets if self.selectivity)]

    def all_names(self, readout: Readout) -> list[str]:
        """Their names."""
        return [target_name(target) for target in self.all_targets(readout)]

    def maps(self, readout: Readout) -> Tensor:
        """Their maps, (T or 2T, S, S)."""
        return position_maps(self.image_size, self.all_targets(readout), readout.scale)

    def posenet(self, readout: Readout, seed: int, in_channels: int) -> PosENet:
        """An untrained readout."""
        return PosENet(
            in_channels,
            self.all_targets(readout),
            readout.kernel_size,
            readout.depth,
            readout.padding,
            self.grid,
            self.image_size,
            seed,
            readout.scale,
        )


def describe(key: Key) -> dict[str, Any]:
    """A readout's columns in the results."""
    readout, seed = key
    return {
        "readout": readout.kind,
        "kernel_size": readout.kernel_size,
        "depth": readout.depth,
        "head_padding": readout.padding,
        "scale": readout.scale,
        "stages": readout.stages,
        "seed": seed,
    }


def channels_of(reader: FeatureReader, readout: Readout) -> list[slice]:
    """The channels that a readout reads, neighbours together."""
    if readout.stages == "all":
        return [slice(0, reader.channels["rgb"].start)]
    names = dict.fromkeys(readout.stages.split("+"))
    parts = sorted((reader.channels[name] for name in names), key=lambda part: part.start)
    merged: list[slice] = []
    for part in parts:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


def select_channels(features: Tensor, parts: list[slice]) -> Tensor:
    """A view of neighbouring channels, or a copy of scattered ones."""
    return features[:, parts[0]] if len(parts) == 1 else torch.cat([features[:, part] for part in parts], dim=1)


def total_width(parts: list[slice]) -> int:
    return sum(part.stop - part.start for part in parts)


def held_out_mask(index: Tensor) -> Tensor:
    """The images on which ridge chooses its penalty: every fifth."""
    return index % 5 == 4
