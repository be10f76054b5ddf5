"""How a network pads: set it, list it (paper, section 4.3 and table 4: zero padding is where position comes from)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

from torch import nn
from torch.nn.modules.utils import _pair

from padprobe.errors import check_name

PaddingMode = Literal["zeros", "valid", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
PAD_LAYERS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
_ORIGINAL = "_padprobe_original_padding"


class LayerPadding(NamedTuple):
    """What one layer pads: its dotted name, the pixels added to each side (height, width) and the mode."""

    layer: str
    padding: tuple[int, int]
    mode: str


def set_padding(module: nn.Module, mode: str) -> nn.Module:
    """Changes how every 2-D convolution and pooling layer in ``module`` pads, in place; weights stay as they are.

    Args:
        module: any network; ``ConvTranspose2d``, whose padding crops its output, is left alone.
        mode: ``"zeros"``: the amount that the layer was built with, zeros. ``"valid"``: no padding at all, so maps
            shrink. ``"reflect" | "replicate" | "circular"``: the amount that the layer was built with, filled so
            (pooling layers keep their own padding, which no value enters).

    Returns:
        ``module`` itself. Modes can be set one after another: each layer remembers what it was built with.

    Raises:
        ValueError: for an unknown mode, or a layer that pads in a way that this cannot change (an explicit padding
            layer, or timm's ``Conv2dSame``), with the layer's name. A ``F.pad`` in a ``forward`` cannot be seen: check
            with a constant image, whose features are constant without padding.

    Source: paper, section 4.3.
    """
    check_name(mode, PADDING_MODES, "padding mode")
    for name, layer in module.named_modules():
        if isinstance(layer, PAD_LAYERS) or (isinstance(layer, nn.Conv2d) and "same" in type(layer).__name__.lower()):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, whose padding cannot be set to {mode!r}: "
                "use a network whose convolutions pad themselves (nn.Conv2d(..., padding=...))"
            )
    for layer in module.modules():
        _set_layer(layer, mode)
    return module


def list_padding(module: nn.Module) -> list[LayerPadding]:
    """Every convolution and pooling layer that pads, in the order of definition; empty for an unpadded network."""
    rows = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            amount, mode = _pixels(layer, layer.padding), str(layer.padding_mode)
        elif isinstance(layer, (*_POOLS, *PAD_LAYERS)) and hasattr(layer, "padding"):
            amount, mode = _pixels(layer, layer.padding), type(layer).__name__
        else:
            continue
        if any(amount):
            rows.append(LayerPadding(name, amount, mode))
    return rows


@contextmanager
def as_built(module: nn.Module, mode: str = "zeros") -> Iterator[None]:
    """While open, ``module`` pads as it was built to (or in another mode), whatever :func:`set_padding` made of it."""
    attributes = ("padding", "padding_mode", "_reversed_padding_repeated_twice")
    layers = [layer for layer in module.modules() if mode != "zeros" or hasattr(layer, _ORIGINAL)]
    before = [{a: getattr(layer, a) for a in attributes if hasattr(layer, a)} for layer in layers]
    for layer in layers:
        _set_layer(layer, mode)
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for attribute, value in values.items():
                setattr(layer, attribute, value)


def _original(layer: nn.Module):
    """The padding that the layer was built with, noted at the first change."""
    if not hasattr(layer, _ORIGINAL):
        setattr(layer, _ORIGINAL, layer.padding)
    return getattr(layer, _ORIGINAL)


def _set_layer(layer: nn.Module, mode: str) -> None:
    if isinstance(layer, nn.Conv2d):
        _set_conv(layer, mode)
    elif isinstance(layer, _POOLS) and hasattr(layer, "padding"):
        original = _original(layer)
        layer.padding = 0 if mode == "valid" else original  # type: ignore[assignment]


def _set_conv(conv: nn.Conv2d, mode: str) -> None:
    amount = (0, 0) if mode == "valid" else _pixels(conv, _original(conv))
    _original(conv)
    conv.padding = amount
    conv.padding_mode = "zeros" if mode == "valid" else mode  # type: ignore[assignment]
    # what nn.Conv2d hands to F.pad in the modes other than zeros; it computes this once, when it is built
    conv._reversed_padding_repeated_twice = [p for p in reversed(amount) for _ in range(2)]


def _pixels(layer: nn.Module, padding) -> tuple[int, int]:
    """A layer's padding as (height, width) in pixels, whatever form it was written in."""
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
        if any(d * (k - 1) % 2 for k, d in zip(kernel, dilation, strict=True)):
            raise ValueError(f"{layer} pads its two sides by different amounts ('same' with an even kernel)")
        return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))  # type: ignore[return-value]
    pair = padding if isinstance(padding, tuple) else _pair(padding)
    return (max(pair[2:]), max(pair[:2])) if len(pair) == 4 else tuple(pair)  # type: ignore[return-value]
