"""The position maps that a readout is trained to predict (paper, section 3.1)."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from padprobe.errors import check_name
from padprobe.scores import standard_ranks

TARGETS = ("H", "V", "G", "HS", "VS")
"""Names of the paper's five position maps."""
PERMUTATION = 2
"""Version of the controls' permutation. A readout that was trained with another one does not predict these controls."""
FLAT = 0.01
"""Least range of a target's means over the cells of a control, as a share of the target's range."""

Size = int | tuple[int, int]
"""The size of images or maps in pixels: (height, width), or one number for a square."""

Target = str | Callable[[Tensor, Tensor], Tensor]
"""A name from :data:`TARGETS`, or a function of the pixel coordinates. The function gets y and x, each float64 of shape
(H, W), from 0 at the first pixel to 1 at the last, and returns a map of shape (H, W). Its ``__name__`` names the
target."""


def size_pair(size: Size | str, what: str = "size") -> tuple[int, int]:
    """The height and the width of a size in pixels.

    Args:
        size: one number for a square, (height, width), or either as text, such as ``"224"`` or ``"240x320"``.
        what: what the error message calls it.

    Raises:
        ValueError: for anything else, or a side below 1.

    Example:
        >>> size_pair(224), size_pair((240, 320)), size_pair("240x320")
        ((224, 224), (240, 320), (240, 320))
        >>> size_pair("224x")
        Traceback (most recent call last):
        ValueError: size is '224x'; expected pixels: 224 for a square, or height and width as 240x320 or (240, 320)
    """
    sides: Sequence[int] = ()
    if isinstance(size, str):
        sides = [int(side) for side in size.split("x")] if re.fullmatch(r"[0-9]+(x[0-9]+)?", size) else ()
    elif isinstance(size, (tuple, list)):
        sides = size if len(size) == 2 else ()
    else:
        sides = [size]
    if not sides or any(isinstance(side, bool) or not hasattr(side, "__index__") or side < 1 for side in sides):
        raise ValueError(
            f"{what} is {size!r}; expected pixels: 224 for a square, or height and width as 240x320 or (240, 320)"
        )
    return operator.index(sides[0]), operator.index(sides[-1])


def position_maps(
    size: Size,
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
    height, width = size_pair(size)
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

    The map is averaged to ``cells`` x ``cells``, these means are permuted, and the result is interpolated back. A
    readout that predicts ``cells`` x ``cells`` values can express the control exactly. The permutation is the same for
    every target. It is chosen so that |SPC| of a control with its own target is below 0.02 for H, V, G, HS and VS at
    any image size, from 4 x 4 cells on. Of 3 x 3 cells or fewer there are few permutations: |SPC| is below 0.04. With a
    function as target it is about 1 / ``cells`` or less.

    Args:
        target: the target to permute.
        cells: side of the readout's prediction before upsampling.

    Raises:
        ValueError: when the map is made, where the means are almost equal: of G over 2 x 2 cells, of the stripes over
            5 x 5.

    Source: ours.

    Example:
        >>> control = shuffled("H", cells=4)
        >>> target_name(control)
        'H shuffled'
        >>> sorted(position_maps(4, [control]).unique().tolist()) == position_maps(4, ["H"])[0, 0].tolist()
        True
    """

    def control(y: Tensor, x: Tensor) -> Tensor:
        size = (y.shape[0], y.shape[1])
        maps = position_maps(size, [target])
        if _ranges(_means(maps, cells)) < FLAT:
            raise ValueError(
                f"target {target_name(target)!r} has almost equal means over {cells} x {cells} cells: permuting them "
                "gives no control. Use another grid, or leave selectivity out"
            )
        return _permuted(maps, cells, _permutation(cells, size))[0]

    control.__name__ = f"{target_name(target)} shuffled"
    control.has_stripes = _has_stripes(target)  # type: ignore[attr-defined]
    return control


def _means(maps: Tensor, cells: int) -> Tensor:
    """Means over cells x cells parts of maps: (T, H, W) -> (T, cells**2), float64."""
    return F.adaptive_avg_pool2d(maps[None].double(), cells)[0].flatten(1)


def _permuted(maps: Tensor, cells: int, order: list[int]) -> Tensor:
    """Maps (T, H, W) whose cells are those of ``maps`` in another order."""
    means = _means(maps, cells)[:, order]
    return F.interpolate(means.view(1, -1, cells, cells), maps.shape[1:], mode="bilinear")[0]


def _ranges(values: Tensor) -> Tensor:
    return values.amax(-1) - values.amin(-1)


def _spread_out(side: int, count: int) -> Tensor:
    """Up to ``count`` indices of 0..side-1 at equal distances, as far from one end as from the other."""
    count = min(side, count)
    return ((torch.arange(count) + 0.5) * side / count).long()


@functools.lru_cache(maxsize=32)
def _permutation(cells: int, size: tuple[int, int]) -> list[int]:
    """The order of cells in which the five targets correlate least with themselves, of those that are tried.

    The correlations of the cells' ranks tell quickly what a swap does, but interpolation changes them. So swaps bring
    the correlations of the cells to a goal, SPC is measured on the interpolated maps, and the goal moves by what is
    left of it. Correlations between different targets are kept small too, for functions like x + 2y.
    """
    maps = position_maps(size)
    maps = maps[_ranges(_means(maps, cells)) > FLAT]
    rows, columns = (_spread_out(side, max(96, 4 * cells)) for side in size)  # SPC needs no more pixels
    ranks = standard_ranks(maps[:, rows][..., columns])
    cell_ranks = standard_ranks(_means(maps, cells)[..., None]).numpy()
    others = 0.2 if cells > 6 else 0.0
    weights = others + (1 - others) * np.eye(len(maps))
    best: tuple[float, list[int]] = (math.inf, [])
    for seed in range(15):
        rng = np.random.default_rng(seed)
        order = rng.permutation(cells**2)
        goal = np.zeros((len(maps), len(maps)))
        for _ in range(10):
            _swap(order, cell_ranks, goal, weights, rng)
            controls = _permuted(maps, cells, order.tolist())
            spc = (standard_ranks(controls[:, rows][..., columns]) * ranks).sum(-1).numpy()
            best = min(best, (float(np.abs(spc).max()), order.tolist()))
            if best[0] < 0.012:
                return best[1]
            goal = np.diag(np.diag(cell_ranks @ cell_ranks[:, order].T) - spc)
    if cells >= 8 and best[0] > 0.022:
        raise ValueError(
            f"a permutation of {cells} x {cells} cells correlates with its target by {best[0]:.2f} on {size[0]} x "
            f"{size[1]} px; expected less than 0.02: use images with more pixels than cells along both sides, "
            "a smaller grid, or selectivity=False"
        )
    return best[1]


def _swap(
    order: np.ndarray, ranks: np.ndarray, goal: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> None:
    """Swaps cells of a permutation, in place, until their correlations (T, T) are close to a goal or no swap helps."""
    for _ in range(100):
        excess = weights * (ranks @ ranks[:, order].T - goal)
        if np.abs(excess).max() < 1e-3:
            return
        i, j = rng.integers(len(order), size=(2, 1000))
        change = (ranks[:, None, i] - ranks[:, None, j]) * (ranks[None][..., order[j]] - ranks[None][..., order[i]])
        after = ((excess[..., None] + weights[..., None] * change) ** 2).sum((0, 1))
        best = after.argmin()
        if after[best] >= (excess**2).sum():
            return
        order[[i[best], j[best]]] = order[[j[best], i[best]]]


def _has_stripes(target: Target) -> bool:
    """Whether the paper scales the target to [-1, 1]: the stripes and their permutations."""
    return target in ("HS", "VS") or getattr(target, "has_stripes", False)
