"""Catches the stages of a running network."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from padprobe.maps import Size, size_pair
from padprobe.network.cells import running
from padprobe.network.forward import Output, first_tensor
from padprobe.network.layout import Layout, fitting_layouts, prefix_tokens


class StageTap:
    """Catches an encoder's stages in every forward pass and aligns them to the readout's grid.

    A hook resizes each stage's maps (B, C, H, W) as :func:`align` does. The result is a new, small tensor: a later
    in-place layer cannot overwrite it, and the full map is not kept in memory.

    A host may call its encoder several times in a step: for two views of each image, or for small crops. Of the calls
    since the last :meth:`clear`, those with the largest maps are kept. What gradient checkpointing computes again
    during the backward pass is no call.

    Args:
        encoder: the network to tap.
        stages: dotted layer names in ``encoder``.
        grid: side of the aligned maps in cells.
        sides: crop each stage's maps around their centre to this (height, width) before they are resized.
        layouts: how the stages' outputs hold their maps, see :func:`~padprobe.network.layout.find_layouts`. Of an
            output of several tensors, the first counts.
        layout: for stages that ``layouts`` lacks: what their outputs are, or ``"auto"`` to tell it from the shapes of
            the first output and of the image.

    Attributes:
        active: whether forward passes are caught; True at first.
        no_maps: shapes of outputs that are no maps, by stage.

    Example:
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> tap = StageTap(encoder, ["1", "2"], grid=14)
        >>> output = encoder(torch.rand(2, 3, 32, 32))
        >>> tap.take().shape
        torch.Size([2, 16, 14, 14])
    """

    def __init__(
        self,
        encoder: nn.Module,
        stages: Sequence[str],
        grid: int,
        sides: Sequence[tuple[int, int]] | None = None,
        layouts: Mapping[str, Layout] | None = None,
        layout: str = "NCHW",
    ) -> None:
        self.grid = grid
        self._sides = dict(zip(stages, sides, strict=True)) if sides else {}
        self._layouts, self._layout = dict(layouts or {}), layout
        self._prefix = prefix_tokens(encoder)
        self.active = True
        self.no_maps: dict[str, tuple[int, ...]] = {}
        self.modules = {stage: encoder.get_submodule(stage) for stage in stages}
        self._calls: list[_Call] = []
        self._image: tuple[int, int] | None = None  # height and width of the encoder's input, until a stage arrives
        self._handles = [
            module.register_forward_hook(functools.partial(self._keep, stage)) for stage, module in self.modules.items()
        ]
        self._handles.append(encoder.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Notes the size of the image that the encoder is called with."""
        if self.active:
            images = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim == 4]
            self._image = (images[0].shape[-2], images[0].shape[-1]) if images else None

    def _keep(self, stage: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output) if self.active and stage in self.modules and not _in_backward() else None
        if tensor is None:
            return
        begins = not self._calls or stage in self._calls[-1].shapes
        maps = self._maps(stage, module, tensor, self._image if begins else self._calls[-1].image)
        if maps is None:
            self.no_maps[stage] = tuple(tensor.shape)
            return
        if begins:
            self._begin_call((maps.shape[2], maps.shape[3]))
        call = self._calls[-1]
        call.shapes[stage] = (maps.shape[1], maps.shape[2], maps.shape[3])
        if call.is_largest:
            # in an unpadded network, maps remember their cells, and resizing them would be refused
            with torch._C.DisableTorchFunction() if running() else nullcontext():
                call.features[stage] = align(center_crop(maps, self._sides[stage]) if self._sides else maps, self.grid)

    def _maps(self, stage: str, module: nn.Module, output: Tensor, image: tuple[int, int] | None) -> Tensor | None:
        """An output as maps (B, C, H, W), for an image of this height and width; None if it is none."""
        layout = self._layouts.get(stage)
        if layout is None:
            if self._layout == "NCHW" or (image is None and output.ndim == 4):
                return output if output.ndim == 4 else None
            layout = self._tell_layout(stage, module, output, image)
        if layout is None:
            return None
        if layout.kind == "tokens" and image is not None:  # the grid has the proportions of this image
            layout = layout._replace(height=image[0], width=image[1])
        try:
            return layout.to_maps(output)
        except ValueError:
            return None

    def _tell_layout(
        self, stage: str, module: nn.Module, output: Tensor, image: tuple[int, int] | None
    ) -> Layout | None:
        """The only layout that fits the shapes of an output and its image; it holds from now on."""
        shown = Output(stage, (2, *output.shape[1:]), output.grad_fn, module, None)
        fitting = fitting_layouts(shown, image, self._layout) if image else []
        if len(fitting) > 1:
            is_known = self._prefix > 0 or self._layout == "tokens"
            fitting = [x for x in fitting if is_known and x.kind == "tokens" and x.prefix == self._prefix]
        if len(fitting) == 1:
            self._layouts[stage] = fitting[0]
        return self._layouts.get(stage)

    def _begin_call(self, cells: tuple[int, int]) -> None:
        """Begins a call whose first stage has this height and width; drops the features of smaller calls."""
        areas = [call.cells[0] * call.cells[1] for call in self._calls]
        area = cells[0] * cells[1]
        for call, other in zip(self._calls, areas, strict=True):
            if other < area:
                call.is_largest, call.features = False, {}
        self._calls.append(_Call(self._image, cells, area >= max(areas, default=0)))
        self._image = None

    @property
    def _kept(self) -> list[_Call]:
        return [call for call in self._calls if call.is_largest]

    @property
    def calls(self) -> Counter[str]:
        """How often the encoder was called since the last :meth:`clear`, by the size of its input or first stage."""
        known = all(call.image for call in self._calls)
        sizes = [(call.image or call.cells) if known else call.cells for call in self._calls]
        unit = "px" if known else "cells"
        return Counter(f"{height} x {width} {unit}" for height, width in sizes)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the encoder's largest input since the last :meth:`clear`.

        Of its first stage, which has the same proportions, where the encoder was not called as a whole.
        """
        if not self._calls:
            return 0, 0
        call = self._kept[0]
        return call.image or call.cells

    @property
    def map_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of each stage's maps in the first of the largest calls since the last :meth:`clear`."""
        shapes = self._kept[0].shapes if self._calls else {}
        return {stage: shapes[stage] for stage in self.modules if stage in shapes}

    def forget(self, stage: str) -> None:
        """Leaves a stage out from now on."""
        del self.modules[stage]
        for call in self._calls:
            call.features.pop(stage, None)

    @property
    def missing(self) -> list[str]:
        """Stages that one of the largest calls did not reach, or whose batch was smaller there than others'."""
        missing = [] if self._calls else list(self.modules)
        for call in self._kept:
            sizes = {stage: len(maps) for stage, maps in call.features.items()}
            most = max([1, *sizes.values()])
            missing += [s for s in self.modules if sizes.get(s, 0) < most and s not in missing]
        return missing

    def take(self, *extra: Tensor) -> Tensor:
        """The stages, then ``extra``, side by side: (B, sum of C, grid, grid). Clears the tap.

        B counts the images of all calls with the largest input, in the order of the calls.

        Raises:
            RuntimeError: if a forward pass did not reach all stages, with their names.
        """
        if self.missing:
            raise RuntimeError(
                f"the forward pass did not reach stage(s) {', '.join(self.missing)}: tap a network before it is "
                "compiled or first run, and name only layers that every forward pass calls"
            )
        calls = [[call.features[stage] for stage in self.modules] for call in self._kept]
        columns = [torch.cat(column) if len(calls) > 1 else column[0] for column in zip(*calls, strict=True)]
        features = torch.cat([*columns, *extra], dim=1)
        self.clear()
        return features

    def clear(self) -> None:
        """Drops what was caught."""
        self._calls, self._image = [], None

    def remove(self) -> None:
        """Removes the hooks from the encoder."""
        for handle in self._handles:
            handle.remove()
        self.active = False  # compiled graphs may hold it still
        self.clear()


@dataclass
class _Call:
    """What was caught of one call of the encoder."""

    image: tuple[int, int] | None  # height and width of the input, if known
    cells: tuple[int, int]  # of the stage that came first
    is_largest: bool  # so far
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # (C, H, W) of each stage's maps
    features: dict[str, Tensor] = field(default_factory=dict)  # aligned; empty if the call is not the largest


def _in_backward() -> bool:
    """Whether a backward pass is running, in which gradient checkpointing computes layers again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def center_crop(maps: Tensor, size: Size) -> Tensor:
    """The centre of maps (..., H, W): a view (..., height, width)."""
    height, width = size_pair(size)
    top, left = (maps.shape[-2] - height) // 2, (maps.shape[-1] - width) // 2
    return maps[..., top : top + height, left : left + width]


def align(features: Tensor, grid: int) -> Tensor:
    """Resizes maps to the readout's grid: (B, C, H, W) -> (B, C, grid, grid), float32, detached, always a new tensor.

    Source: the authors' code (bilinear, ``align_corners=True``).
    """
    resized = F.interpolate(features.detach().float(), (grid, grid), mode="bilinear", align_corners=True)
    return resized.contiguous()
