"""Catches the stages of a running network."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StageTap:
    """Catches the stages of every forward pass of an encoder, aligned to the readout's grid.

    A stage's output (B, C, H, W) is resized inside its hook to (B, C, grid, grid), float32 and detached: bilinear with
    ``align_corners=True``, as the authors' code does. The result is a new, small tensor, so that no later in-place
    layer can overwrite it and the full map is not kept.

    Args:
        encoder: the network to tap.
        stages: dotted layer names in ``encoder``.
        grid: side of the aligned maps in cells.
        sides: centre-crop each stage to this side before it is resized (see :func:`context_size`).
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
        """Stages that have not arrived since the last :meth:`clear`, or came last with fewer images than others."""
        most = max([1, *(len(features) for features in self._caught.values())])
        return [stage for stage, features in self._caught.items() if len(features) < most]

    def take(self, *more: Tensor) -> Tensor:
        """The stages of the last forward pass side by side, (B, sum of C, grid, grid), then ``more``; forgets them.

        Raises:
            RuntimeError: naming the stages that the forward pass did not reach.
        """
        if self.missing:
            raise RuntimeError(
                f"the forward pass did not reach stage(s) {', '.join(self.missing)}; tap a network before it is "
                "compiled or first run, and name only layers that every forward pass calls"
            )
        features = torch.cat([*self._caught.values(), *more], dim=1)
        self.clear()
        return features

    def clear(self) -> None:
        """Forgets what was caught."""
        for stage in self._caught:
            self._caught[stage] = torch.empty(0)

    def remove(self) -> None:
        """Takes the hooks off the encoder."""
        for handle in self._handles:
            handle.remove()
        self.clear()


def center_crop(maps: Tensor, side: int) -> Tensor:
    """The centre of maps (..., H, W): a view (..., side, side)."""
    top, left = (maps.shape[-2] - side) // 2, (maps.shape[-1] - side) // 2
    return maps[..., top : top + side, left : left + side]


def align(features: Tensor, grid: int) -> Tensor:
    """Maps resized to the readout's grid: (B, C, H, W) -> (B, C, grid, grid), detached float32, always a new tensor."""
    resized = F.interpolate(features.detach().float(), (grid, grid), mode="bilinear", align_corners=True)
    return resized.contiguous()
