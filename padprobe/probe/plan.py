"""What one pass of an encoder reads out: stages, readouts, targets and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from padprobe.maps import Target, position_maps, shuffled, size_pair, target_name
from padprobe.network.layout import Layout, find_layouts
from padprobe.network.stages import choose_layers
from padprobe.network.trace import context_size
from padprobe.probe.options import ProbeOptions
from padprobe.readout.posenet import PosENet, readout_side
from padprobe.readout.ridge import RidgeReadout
from padprobe.readout.saved import SavedReadouts
from padprobe.readout.spec import Readout, with_controls

Key = tuple[Readout, int]
"""A readout and its seed."""
Made = dict[Key, PosENet | RidgeReadout]
"""Readouts that were trained or solved."""


@dataclass(frozen=True)
class Plan:
    """What one pass reads out; the first readout at the first seed is the headline.

    Attributes:
        layouts: how the stages f1..fn hold their maps, by the dotted names of their layers.
        channels: place of each stage's channels, and last of the image's ("rgb"), among the features of a pass.
        readouts: all of them, with the controls on the image alone.
        source_px: height and width of the images that are read; ``size`` in their centre is used.
        sides: heights and widths of the stages in cells, where the probe has a context run.
        unpadded: this is the context run: the encoder sees all of ``source_px`` without padding, and its stages are
            centre-cropped to ``sides``.
        states: weights of readouts that were trained before; where given, nothing is trained.
        cache_dir: folder for features that do not fit into memory.
    """

    options: ProbeOptions
    layouts: Mapping[str, Layout]
    channels: Mapping[str, slice]
    readouts: Sequence[Readout]
    source_px: tuple[int, int]
    sides: Sequence[tuple[int, int]] | None = None
    unpadded: bool = False
    states: Mapping[Key, dict[str, Tensor]] | None = None
    cache_dir: str | Path | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that a padded encoder sees and of the predicted maps."""
        return size_pair(self.options.image_size)

    @property
    def layers(self) -> list[str]:
        """Dotted names of the stages f1..fn."""
        return list(self.layouts)

    @property
    def names(self) -> list[str]:
        """Names of the targets."""
        return [target_name(target) for target in self.options.targets]

    @property
    def keys(self) -> list[Key]:
        """Every readout at every seed; ridge, in closed form, at the first seed only."""
        seeds = self.options.seeds
        return [(r, seed) for seed in seeds for r in self.readouts if r.kind == "posenet" or seed == seeds[0]]

    @property
    def width(self) -> int:
        """Channels of all stages and of the image."""
        return self.channels["rgb"].stop

    def all_targets(self, readout: Readout) -> list[Target]:
        """The targets, then the permuted ones."""
        targets = self.options.targets
        side = readout_side(readout.kernel_size, readout.depth, readout.padding, self.options.grid)
        return [*targets, *(shuffled(target, side) for target in targets if self.options.selectivity)]

    def maps(self, readout: Readout) -> tuple[list[str], Tensor]:
        """Names and maps, (T or 2T, H, W), of :meth:`all_targets`."""
        targets = self.all_targets(readout)
        return [target_name(t) for t in targets], position_maps(self.size, targets, readout.scale)

    def posenet(self, readout: Readout, seed: int) -> PosENet:
        """The readout before its training."""
        shape = readout.kernel_size, readout.depth, readout.padding, self.options.grid, self.size
        return PosENet(self.width_of(readout), self.all_targets(readout), *shape, seed, readout.scale)

    def parts(self, readout: Readout) -> list[slice]:
        """The channels that a readout reads; neighbours are merged."""
        if readout.stages == "all":
            return [slice(0, self.channels["rgb"].start)]
        names = dict.fromkeys(readout.stages.split("+"))
        merged: list[slice] = []
        for part in sorted((self.channels[name] for name in names), key=lambda part: part.start):
            if merged and merged[-1].stop == part.start:
                merged[-1] = slice(merged[-1].start, part.stop)
            else:
                merged.append(part)
        return merged

    def width_of(self, readout: Readout) -> int:
        """How many channels a readout reads."""
        return sum(part.stop - part.start for part in self.parts(readout))

    def select(self, readout: Readout, features: Tensor) -> Tensor:
        """What a readout reads of features (B, width, grid, grid): a view of neighbouring channels, else a copy."""
        parts = self.parts(readout)
        return features[:, parts[0]] if len(parts) == 1 else torch.cat([features[:, part] for part in parts], dim=1)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises ValueError for an image that does not have the shape (3, *source_px)."""
        if tuple(shape) != (3, *self.source_px):
            larger = self.source_px != self.size
            hint = " with its surroundings: give larger images, or leave `context` out" if larger else ""
            raise ValueError(
                f"an image has shape {tuple(shape)}; expected {(3, *self.source_px)} for image_size "
                f"{self.options.image_size}{hint}"
            )

    def without_padding(self) -> Plan:
        """The plan of the context run. An encoder that was settled keeps its statistics."""
        return dataclasses.replace(self, unpadded=True, options=dataclasses.replace(self.options, settle=False))

    def of_twin(self) -> Plan:
        """The plan of an untrained twin: settled, at the first seed only."""
        seeds = self.options.seeds[:1]
        return dataclasses.replace(self, options=dataclasses.replace(self.options, settle=True, seeds=seeds))


def make_plan(
    encoder: nn.Module, options: ProbeOptions, saved: SavedReadouts | None = None, cache_dir: str | Path | None = None
) -> Plan:
    """The plan of an encoder's probe, checked without running a layer; ``saved`` are readouts that were trained before.

    Raises:
        ValueError: naming the target, stage, layer, readout or image size that is not possible.
    """
    if len(set(names := [target_name(target) for target in options.targets])) < len(names):
        raise ValueError(f"targets {', '.join(names)} share a name: give each function its own __name__")
    position_maps(options.image_size, options.targets)
    layers = choose_layers(encoder, options.stages, options.image_size)
    layouts = find_layouts(encoder, layers, options.image_size, options.layout)
    channels = stage_channels(layouts)
    readouts = with_controls(options.readouts, list(channels)[:-1])  # type: ignore[arg-type]
    for readout in readouts:
        readout_side(readout.kernel_size, readout.depth, readout.padding, options.grid)
    source_px, sides = size_pair(options.image_size), None
    if options.context:
        source_px, sides = context_size(encoder, options.image_size, layers)
    states = dict(zip(saved.readouts, saved.states, strict=True)) if saved else None
    plan = Plan(options, layouts, channels, readouts, source_px, sides, states=states, cache_dir=cache_dir)
    for readout in readouts:
        plan.maps(readout)  # a control that cannot be made is refused now
    for (readout, _), state in (states or {}).items():
        width, expected = plan.width_of(readout), state["weight"].shape[1]
        if width != expected:
            raise ValueError(
                f"the trained readout of stages {readout.stages} reads {expected} channels, and those of "
                f"{type(encoder).__name__} have {width}: it was trained on another architecture"
            )
    return plan


def stage_channels(layouts: Mapping[str, Layout]) -> dict[str, slice]:
    """The channels of f1..fn and of the image ("rgb"), side by side: each one's place."""
    widths = [*(layout.channels for layout in layouts.values()), 3]
    names = [*(f"f{i + 1}" for i in range(len(layouts))), "rgb"]
    return {name: slice(sum(widths[:i]), sum(widths[: i + 1])) for i, name in enumerate(names)}
