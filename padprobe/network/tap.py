"""Catches the stages of a running network."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StageTap:
    """Catches an encoder's stages in every forward pass and aligns them to the readout's grid.

    A hook resizes each stage's output (B, C, H, W) as :func:`align` does. The result is a new, small tensor: a later
    in-place layer cannot overwrite it, and the full map is not kept in memory.

    Args:
        encoder: the network to tap.
        stages: dotted layer names in ``encoder``.
        grid: side of the aligned maps in cells.
        sides: crop each stage around its centre to this side before it is resized.

    Attributes:
        active: whether forward passes are caught; True at first.

    Example:
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> tap = StageTap(encoder, ["1", "2"], grid=14)
        >>> output = encoder(torch.rand(2, 3, 32, 32))
        >>> tap.take().shape
        torch.Size([2, 16, 14, 14])
    """

    def __init__(
        self, encoder: nn.Module, stages: Sequence[str], grid: int, sides: Sequence[int] | None = None
    ) -> None:
        self.grid = grid
        self._sides = dict(zip(stages, sides, strict=True)) if sides else {}
        self.active = True
        self._caught: dict[str, Tensor] = dict.fromkeys(stages, torch.empty(0))
        self._handles = [
            encoder.get_submodule(stage).register_forward_hook(functools.partial(self._keep, stage)) for stage in stages
        ]

    def _keep(self, stage: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.active and isinstance(output, Tensor) and output.ndim == 4:
            side = self._sides.get(stage, output.shape[-1])
            self._caught[stage] = align(center_crop(output, side), self.grid)

    @property
    def missing(self) -> list[str]:
        """Stages that were not reached since the last :meth:`clear`, or that last had fewer images than others."""
        most = max([1, *(len(features) for features in self._caught.values())])
        return [stage for stage, features in self._caught.items() if len(features) < most]

    def take(self, *extra: Tensor) -> Tensor:
        """The stages of the last forward pass, then ``extra``, side by side: (B, sum of C, grid, grid). Clears the tap.

        Raises:
            RuntimeError: if the forward pass did not reach all stages, with their names.
        """
        if self.missing:
            raise RuntimeError(
                f"the forward pass did not reach stage(s) {', '.join(self.missing)}: tap a network before it is "
                "compiled or first run, and name only layers that every forward pass calls"
            )
        features = torch.cat([*self._caught.values(), *extra], dim=1)
        self.clear()
        return features

    def clear(self) -> None:
        """Drops what was caught."""
        for stage in self._caught:
            self._caught[stage] = torch.empty(0)

    def remove(self) -> None:
        """Removes the hooks from the encoder."""
        for handle in self._handles:
            handle.remove()
        self.clear()


def center_crop(maps: Tensor, side: int) -> Tensor:
    """The centre of maps (..., H, W): a view (..., side, side)."""
    top, left = (maps.shape[-2] - side) // 2, (maps.shape[-1] - side) // 2
    return maps[..., top : top + side, left : left + side]


def align(features: Tensor, grid: int) -> Tensor:
    """Resizes maps to the readout's grid: (B, C, H, W) -> (B, C, grid, grid), float32, detached, always a new tensor.

    Source: the authors' code (bilinear, ``align_corners=True``).
    """
    resized = F.interpolate(features.detach().float(), (grid, grid), mode="bilinear", align_corners=True)
    return resized.contiguous()
