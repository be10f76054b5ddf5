"""The position maps that a readout is asked to predict (paper, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from padprobe.errors import check_name

TARGETS = ("H", "V", "G", "HS", "VS")

Target = str | Callable[[Tensor, Tensor], Tensor]
"""A name out of :data:`TARGETS`, or any function of the pixels' coordinates: it gets y and x, float64 of shape (H, W),
0 at the first pixel and 1 at the last, and returns the map, (H, W). Its ``__name__`` is the target's name."""


def position_maps(
    size: int | tuple[int, int],
    targets: Sequence[Target] = TARGETS,
    scale: Literal["unit", "paper"] = "unit",
) -> Tensor:
    """Ground-truth position maps, one channel a target.

    Args:
        size: height and width of the maps in pixels (one number for a square); at least 2.
        targets: names out of ``H, V, G, HS, VS``, or functions (see :data:`Target`), in the order wanted.
        scale: ``"unit"``: every map covers [0, 1] exactly. ``"paper"``: the stripes cover [-1, 1], the scale on which
            the paper's MAE of the stripes can be read.

    Returns:
        float32 tensor of shape (T, H, W).

    With x, y the pixel index and W, H the width and height (a square in the paper), each map min-max scaled:

    - ``H`` = x / (W-1): varies from left to right. ``V`` = y / (H-1): from top to bottom.
    - ``G``: a Gaussian at (W/2, H/2) with sigma W/2 (H/2 along y).
    - ``HS`` = (1 + cos(5 pi (y+1/2) / H)) / 2: horizontal *stripes*, so it varies along **y** as V does;
      ``VS``: the same along x, as H does. 2.5 cycles, from a maximum to a minimum.

    Raises:
        ValueError: for an unknown target or scale, a function whose map is constant, not finite or of another shape, or
            a size under 2.

    Source: paper, section 3.1 and figure 3; the formulas were measured from the authors' own images.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 2:
        raise ValueError(f"size is {size}; a position map needs at least 2 x 2 pixels")
    check_name(scale, ("unit", "paper"), "scale")
    for target in targets:
        if isinstance(target, str):
            check_name(target, TARGETS, "target")

    y = torch.arange(height, dtype=torch.float64)[:, None].expand(height, width)
    x = torch.arange(width, dtype=torch.float64)[None, :].expand(height, width)

    def formula(target: str) -> Tensor:
        if target == "H":
            return x
        if target == "V":
            return y
        if target == "G":
            return torch.exp(-((2 * x / width - 1) ** 2 + (2 * y / height - 1) ** 2) / 2)
        pixel, length = (y, height) if target == "HS" else (x, width)
        return torch.cos(5 * math.pi * (pixel + 0.5) / length)

    maps = []
    for target in targets:
        values = formula(target) if isinstance(target, str) else target(y / (height - 1), x / (width - 1))
        if values.shape != y.shape or not values.isfinite().all() or values.min() == values.max():
            raise ValueError(
                f"target {target_name(target)!r} gives values {values.min()} to {values.max()} of shape "
                f"{tuple(values.shape)}; expected a finite map of shape {tuple(y.shape)} that is not constant"
            )
        values = (values - values.min()) / (values.max() - values.min())
        maps.append(2 * values - 1 if scale == "paper" and _has_stripes(target) else values)
    return torch.stack(maps).float()


def target_name(target: Target) -> str:
    """What a target is called in results: its name, or its function's."""
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def shuffled(target: Target, cells: int) -> Target:
    """The control target of the same values in meaningless places: selectivity = SPC - SPC of this target.

    The map's ``cells`` x ``cells`` means are permuted, the same way for every target, and interpolated back, so that a
    readout with so many cells can express it exactly.
    """

    def control(y: Tensor, x: Tensor) -> Tensor:
        full = position_maps((y.shape[0], y.shape[1]), [target])[None].double()
        means = F.adaptive_avg_pool2d(full, cells).flatten()
        # of the first 60 seeds the one whose controls correlate least with their targets, |SPC| < .08 at 22 to 28 cells
        order = torch.randperm(len(means), generator=torch.Generator().manual_seed(47))
        return F.interpolate(means[order].view(1, 1, cells, cells), y.shape, mode="bilinear")[0, 0]

    control.__name__ = f"{target_name(target)} shuffled"
    control.stripes = _has_stripes(target)  # type: ignore[attr-defined]
    return control


def _has_stripes(target: Target) -> bool:
    """Whether the paper's scale of the target is [-1, 1]: the stripes, and their permutations."""
    return target in ("HS", "VS") or getattr(target, "stripes", False)
