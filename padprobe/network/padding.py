"""How a network pads: set it, list it, undo it (paper, section 4.3 and table 4: position comes from zero padding)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

from torch import nn
from torch.nn.modules.utils import _pair

from padprobe.errors import check_name

PaddingMode = Literal["zeros", "valid", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)

POOL_LAYERS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
PAD_LAYERS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
_ORIGINAL = "_padprobe_original_padding"  # on each layer, from its first change on


class LayerPadding(NamedTuple):
    """What one layer pads: its dotted name, the pixels added to each side (height, width), and the mode."""

    layer: str
    padding: tuple[int, int]
    mode: str


def set_padding(module: nn.Module, mode: str) -> nn.Module:
    """Changes in place how every 2-D convolution and pooling layer of a network pads. Weights stay as they are.

    Args:
        module: any network. ``ConvTranspose2d``, whose padding crops its output, is left alone.
        mode: ``"zeros"``: the padding that each layer was built with, filled with zeros. ``"valid"``: no padding, so
            maps shrink. ``"reflect"``, ``"replicate"``, ``"circular"``: the padding that each layer was built with,
            filled in that way; pooling layers keep their own padding, whose values never enter their output.

    Returns:
        ``module`` itself. Modes can be set one after another: each layer remembers what it was built with.

    Raises:
        ValueError: for an unknown mode, or for a layer whose padding cannot be changed (a padding layer, or timm's
            ``Conv2dSame``), with its name. A call of ``F.pad`` inside ``forward`` cannot be seen. To find one, show the
            network a constant image: without padding its features are constant.

    Source: paper, section 4.3.

    Example:
        >>> list_padding(set_padding(nn.Conv2d(3, 8, 3, padding=1), "circular"))
        [LayerPadding(layer='', padding=(1, 1), mode='circular')]
        >>> list_padding(set_padding(nn.Conv2d(3, 8, 3, padding=1), "valid"))
        []
    """
    check_name(mode, PADDING_MODES, "padding mode")
    _refuse_fixed(module, mode)
    for layer in module.modules():
        _set_layer(layer, mode)
    return module


def list_padding(module: nn.Module) -> list[LayerPadding]:
    """Every convolution, pooling and padding layer that pads, in the order of definition. Unpadded networks give []."""
    rows = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            mode = str(layer.padding_mode)
        elif isinstance(layer, (*POOL_LAYERS, *PAD_LAYERS)) and hasattr(layer, "padding"):
            mode = type(layer).__name__
        else:
            continue
        amount = pixels(layer, layer.padding)
        if any(amount):
            rows.append(LayerPadding(name, amount, mode))
    return rows


def padding_of(encoder: nn.Module) -> str:
    """The padding mode of a network's convolutions: "valid" if none pads, "mixed" if they differ."""
    rows = list_padding(encoder)
    modes = {row.mode for row in rows if isinstance(encoder.get_submodule(row.layer), nn.Conv2d)}
    return modes.pop() if len(modes) == 1 else "mixed" if modes else "valid"


@contextmanager
def as_built(module: nn.Module, mode: str = "zeros") -> Iterator[None]:
    """A context in which a network pads as it was built to, or in another mode. Afterwards it pads as before."""
    if mode != "zeros":
        _refuse_fixed(module, mode)
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


def pixels(layer: nn.Module, padding: Any) -> tuple[int, int]:
    """A layer's padding in pixels (height, width), in whatever form torch keeps it: a number, a tuple or a word.

    Raises:
        ValueError: for "same" with an even kernel, which pads the two sides by different amounts.
    """
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
        if any(d * (k - 1) % 2 for k, d in zip(kernel, dilation, strict=True)):
            raise ValueError(
                f"{layer} pads its two sides by different amounts ('same' with an even kernel), which is not "
                "supported: use an odd kernel, or padding in pixels"
            )
        return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))  # type: ignore[return-value]
    pair = padding if isinstance(padding, tuple) else _pair(padding)
    return (max(pair[2:]), max(pair[:2])) if len(pair) == 4 else tuple(pair)  # type: ignore[return-value]


def _refuse_fixed(module: nn.Module, mode: str) -> None:
    """Raises ValueError with the layer's name if the padding of a layer cannot be changed."""
    for name, layer in module.named_modules():
        if isinstance(layer, PAD_LAYERS) or (isinstance(layer, nn.Conv2d) and "same" in type(layer).__name__.lower()):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, whose padding cannot be set to {mode!r}: "
                "use a network whose convolutions do the padding (nn.Conv2d(..., padding=...))"
            )


def _set_layer(layer: nn.Module, mode: str) -> None:
    is_conv = isinstance(layer, nn.Conv2d)
    if not is_conv and not (isinstance(layer, POOL_LAYERS) and hasattr(layer, "padding")):
        return
    if not hasattr(layer, _ORIGINAL):
        setattr(layer, _ORIGINAL, layer.padding)
    original: Any = getattr(layer, _ORIGINAL)
    if is_conv:
        amount = (0, 0) if mode == "valid" else pixels(layer, original)
        layer.padding = amount  # type: ignore[assignment]
        layer.padding_mode = "zeros" if mode == "valid" else mode  # type: ignore[assignment]
        # nn.Conv2d computes this once, when it is built, and passes it to F.pad in all modes but zeros
        layer._reversed_padding_repeated_twice = [p for p in reversed(amount) for _ in range(2)]  # type: ignore
    else:
        layer.padding = 0 if mode == "valid" else original  # type: ignore[assignment]
