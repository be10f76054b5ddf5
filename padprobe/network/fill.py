"""How much a layer pads, and what with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

Sides = tuple[int, int]  # the cells added before and after: above and below, or left and right

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def is_same(layer: nn.Module) -> bool:
    """Whether a layer works out its padding from the size of its input, as TensorFlow does (timm's ``Conv2dSame``).

    smp's ``Conv2dStaticSamePadding`` has a padding layer inside instead.
    """
    named_so = "same" in type(layer).__name__.lower() and not any(layer.children())
    return isinstance(layer, (nn.Conv2d, *_POOLS)) and named_so and getattr(layer, "same_pad", True)


def built_sides(layer: nn.Module, padding: Any, size: Sequence[int] | None = None) -> tuple[Sides, Sides]:
    """A layer's padding along height and width, for an input of this size (height, width).

    Args:
        layer: a convolution, pooling or padding layer.
        padding: its attribute ``padding``: a number, a tuple (four numbers are left, right, top, bottom) or a word.
        size: of the input; only :func:`is_same` layers depend on it. None: the most that they can pad.

    Example:
        >>> built_sides(nn.Conv2d(1, 1, 4, padding="same"), "same")
        ((1, 2), (1, 2))
    """
    if is_same(layer) or padding == "same":
        sides = []
        for i in (0, 1):
            kernel, dilation = _pair(layer.kernel_size)[i], _pair(getattr(layer, "dilation", 1))[i]
            total = dilation * (kernel - 1)
            if is_same(layer) and size is not None:
                stride = _pair(layer.stride)[i]
                total = max((-(-size[i] // stride) - 1) * stride + total + 1 - size[i], 0)
            sides.append((total // 2, total - total // 2))
        return sides[0], sides[1]
    pair = (0, 0) if padding == "valid" else tuple(padding) if isinstance(padding, (tuple, list)) else _pair(padding)
    if len(pair) == 4:
        return (pair[2], pair[3]), (pair[0], pair[1])
    return (pair[0], pair[0]), (pair[1], pair[1])


def built_fill(layer: nn.Module) -> str:
    """What the padding of a layer, as it was built, is filled with; "" where the values never enter the output."""
    if isinstance(layer, nn.Conv2d):
        return str(layer.padding_mode)
    if isinstance(layer, nn.ReflectionPad2d):
        return "reflect"
    if isinstance(layer, nn.ReplicationPad2d):
        return "replicate"
    if isinstance(layer, nn.CircularPad2d):
        return "circular"
    if isinstance(layer, nn.ConstantPad2d):
        return "constant" if layer.value else "zeros"
    return "zeros" if isinstance(layer, nn.AvgPool2d) and layer.count_include_pad else ""


def fill(maps: Tensor, sides: Sequence[Sides], modes: Sequence[str], value: float = 0.0) -> Tensor:
    """Pads maps (..., H, W), each axis by its own amounts and in its own mode; "constant" fills with ``value``.

    Example:
        >>> fill(torch.arange(3.0).view(1, 1, 1, 3), [(0, 0), (2, 1)], ["zeros", "symmetric"]).flatten().tolist()
        [1.0, 0.0, 0.0, 1.0, 2.0, 2.0]
    """
    (top, bottom), (left, right) = sides
    if modes[0] == modes[1] and modes[0] != "symmetric":
        return _pad(maps, [left, right, top, bottom], modes[0], value)
    maps = _pad(maps, [left, right, 0, 0], modes[1], value)
    return _pad(maps, [0, 0, top, bottom], modes[0], value)


def _pad(maps: Tensor, amounts: list[int], mode: str, value: float) -> Tensor:
    if not any(amounts):
        return maps
    if mode == "symmetric":
        for dim, (before, after) in ((-1, amounts[:2]), (-2, amounts[2:])):
            n = maps.shape[dim]
            index = torch.arange(-before, n + after, device=maps.device).remainder(2 * n)
            maps = maps.index_select(dim, torch.where(index < n, index, 2 * n - 1 - index))
        return maps
    if mode in ("zeros", "partial", "constant"):
        return F.pad(maps, amounts, value=value if mode == "constant" else 0.0)
    return F.pad(maps, amounts, mode=mode)


def partial_weight(layer: Any, padded: Sequence[int], out: Sequence[int], sides: Sequence[Sides]) -> Tensor:
    """What the outputs of a partial convolution are multiplied by, (h, w): the window's cells / those in the image.

    Args:
        layer: a convolution or average pooling layer.
        padded: (height, width) of its padded input.
        out: (height, width) of its output.
        sides: the padding to reweigh; (0, 0) along an axis leaves this axis alone.

    Source: Liu et al. 2018, "Partial Convolution based Padding" (without their epsilon).
    """
    factors = []
    for i, (before, after) in enumerate(sides):
        kernel, stride = _pair(layer.kernel_size)[i], _pair(layer.stride)[i]
        taps = torch.arange(kernel) * _pair(getattr(layer, "dilation", 1))[i]
        cells = torch.arange(out[i])[:, None] * stride + taps  # of the padded input, (out, kernel)
        total = (cells < padded[i]).sum(1)
        inside = ((cells >= before) & (cells < padded[i] - after)).sum(1)
        factors.append(torch.where(inside > 0, total / inside.clamp(min=1), 0.0))
    return factors[0][:, None] * factors[1]
