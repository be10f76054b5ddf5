"""The position maps that a readout is asked to predict (paper, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from padprobe.errors import check_name

TARGETS = ("H", "V", "G", "HS", "VS")


def position_maps(
    size: int | tuple[int, int],
    targets: Sequence[str] = TARGETS,
    scale: Literal["unit", "paper"] = "unit",
) -> Tensor:
    """Ground-truth position maps, one channel a target.

    Args:
        size: height and width of the maps in pixels (one number for a square); at least 2.
        targets: names out of ``H, V, G, HS, VS``, in the order wanted.
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
        ValueError: for an unknown target or scale, or a size under 2.

    Source: paper, section 3.1 and figure 3; the formulas were measured from the authors' own images.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 2:
        raise ValueError(f"size is {size}; a position map needs at least 2 x 2 pixels")
    check_name(scale, ("unit", "paper"), "scale")
    for target in targets:
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
        values = formula(target)
        values = (values - values.min()) / (values.max() - values.min())
        maps.append(2 * values - 1 if scale == "paper" and target in ("HS", "VS") else values)
    return torch.stack(maps).float()
