"""The position maps that a readout is trained to predict (paper, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from padprobe.errors import check_name

TARGETS = ("H", "V", "G", "HS", "VS")
"""Names of the paper's five position maps."""

Target = str | Callable[[Tensor, Tensor], Tensor]
"""A name from :data:`TARGETS`, or a function of the pixel coordinates. The function gets y and x, each float64 of shape
(H, W), from 0 at the first pixel to 1 at the last, and returns a map of shape (H, W). Its ``__name__`` names the
target."""


def position_maps(
    size: int | tuple[int, int],
    targets: Sequence[Target] = TARGETS,
    scale: Literal["unit", "paper"] = "unit",
) -> Tensor:
    """Makes the ground-truth position maps, one channel per target.

    With x, y the pixel index and W, H the width and height, the maps are, before each is min-max scaled:

    - ``H`` = x / (W-1): grows from left to right. ``V`` = y / (H-1): grows from top to bottom.
    - ``G``: a Gaussian at (W/2, H/2) with sigma W/2 (H/2 along y).
    - ``HS`` = (1 + cos(5 pi (y+1/2) / H)) / 2: horizontal *stripes*, so it varies along **y**, as V does.
      ``VS``: the same along x. Each has 2.5 cycles, from a maximum to a minimum.

    Args:
        size: height and width of the maps in pixels, or one number for a square; at least 2.
        targets: names (``H, V, G, HS, VS``) or functions (see :data:`Target`), in the order of the channels.
        scale: ``"unit"``: every map covers [0, 1] exactly. ``"paper"``: the stripes cover [-1, 1]; on this scale their
            MAE compares with the paper's.

    Returns:
        float32 tensor of shape (T, H, W).

    Raises:
        ValueError: for an unknown target or scale, a size below 2, or a function whose map is constant, not finite, or
            of another shape.

    Source: paper, section 3.1 and figure 3. The formulas were measured from the authors' own images.

    Example:
        >>> position_maps((2, 3), ["H", "V"])
        tensor([[[0.0000, 0.5000, 1.0000],
                 [0.0000, 0.5000, 1.0000]],
        <BLANKLINE>
                [[0.0000, 0.0000, 0.0000],
                 [1.0000, 1.0000, 1.0000]]])
        >>> position_maps(224, ["G", lambda y, x: x + 2 * y]).shape
        torch.Size([2, 224, 224])
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
                f"target {target_name(target)!r} gives values from {values.min()} to {values.max()} of shape "
                f"{tuple(values.shape)}; expected finite values that are not all equal, of shape {tuple(y.shape)}"
            )
        values = (values - values.min()) / (values.max() - values.min())
        maps.append(2 * values - 1 if scale == "paper" and _has_stripes(target) else values)
    return torch.stack(maps).float()


def target_name(target: Target) -> str:
    """The name of a target in the results: the target itself, or its function's ``__name__``.

    Example:
        >>> def diagonal(y, x):
        ...     return (x + y) / 2
        >>> target_name("H"), target_name(diagonal)
        ('H', 'diagonal')
    """
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def shuffled(target: Target, cells: int) -> Target:
    """The control of a target: the same values at other places. Selectivity is SPC minus the SPC of this control.

    The map is averaged to ``cells`` x ``cells``, these means are permuted, and the result is interpolated back. The
    permutation is the same for every target. A readout that predicts
    ``cells`` x ``cells`` values can express the control exactly.

    Args:
        target: the target to permute.
        cells: side of the readout's prediction before upsampling.

    Example:
        >>> control = shuffled("H", cells=4)
        >>> target_name(control)
        'H shuffled'
        >>> sorted(position_maps(4, [control]).unique().tolist()) == position_maps(4, ["H"])[0, 0].tolist()
        True
    """

    def control(y: Tensor, x: Tensor) -> Tensor:
        full = position_maps((y.shape[0], y.shape[1]), [target])[None].double()
        means = F.adaptive_avg_pool2d(full, cells).flatten()
        # of the first 60 seeds, the one whose controls correlate least with their targets: |SPC| < 0.08 at 22-28 cells
        order = torch.randperm(len(means), generator=torch.Generator().manual_seed(47))
        return F.interpolate(means[order].view(1, 1, cells, cells), y.shape, mode="bilinear")[0, 0]

    control.__name__ = f"{target_name(target)} shuffled"
    control.has_stripes = _has_stripes(target)  # type: ignore[attr-defined]
    return control


def _has_stripes(target: Target) -> bool:
    """Whether the paper scales the target to [-1, 1]: the stripes and their permutations."""
    return target in ("HS", "VS") or getattr(target, "has_stripes", False)
