"""How a network pads: set it, list it (paper, section 4.3 and table 4: zero padding is where position comes from)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    _refuse_fixed(module, mode)
    for layer in module.modules():
        _set_layer(layer, mode)
    return module


def _refuse_fixed(module: nn.Module, mode: str) -> None:
    """Raises ValueError, naming the layer, where one pads in a way that cannot be changed."""
    for name, layer in module.named_modules():
        if isinstance(layer, PAD_LAYERS) or (isinstance(layer, nn.Conv2d) and "same" in type(layer).__name__.lower()):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, whose padding cannot be set to {mode!r}: "
                "use a network whose convolutions pad themselves (nn.Conv2d(..., padding=...))"
            )


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


def padding_reach(encoder: nn.Module, stages: Sequence[str], image_size: int = 224) -> dict[str, Tensor]:
    """Which cells of each stage have padding in their receptive field: bool (h, w) by layer name.

    A mark that starts in the padding of every layer is carried through the network by one forward pass in which each
    convolution and pooling layer passes it to all cells whose window holds it. What comes before the first convolution
    has no mark; gates and norms over a whole map are taken as local. VGG16 at 224 px: .035, .104, .325, .673, .980 of
    the cells of f1..f5.

    Args:
        encoder: with any padding that :func:`list_padding` sees, or a convolution works out for itself. It is left as
            it was.
        stages: dotted layer names.
        image_size: side of the image in pixels.
    """
    found: dict[str, Tensor] = {}
    begun = False  # the image, however it is normalised, has no mark

    def spread(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal begun
        windowed, pads = isinstance(module, (nn.Conv2d, *_POOLS)), isinstance(module, PAD_LAYERS)
        if not isinstance(output, Tensor) or not (args and isinstance(args[0], Tensor)):
            return None
        if not (begun or windowed or pads):
            return None
        mark = (args[0] != 0).to(args[0].dtype) if begun else torch.zeros_like(args[0])
        begun = True
        if output.shape == mark.shape and not windowed:
            return mark
        if isinstance(module, nn.Linear):
            return mark.amax(-1, keepdim=True).expand(output.shape).clone()
        if mark.ndim != 4 or output.ndim != 4:
            return None
        mark = mark.amax(1, keepdim=True)
        if windowed:
            mark = _widen(mark, module, output.shape[-2:])
        elif pads:
            mark = F.pad(mark, module.padding, value=1.0)  # type: ignore[arg-type]
        else:
            mark = F.adaptive_max_pool2d(mark, output.shape[-2:])
        return mark.expand(output.shape).clone()  # in-place layers may write to it

    def keep(stage: str):
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[stage] = (output[0] != 0).any(0).cpu()

        return hook

    first = next(encoder.parameters(), torch.zeros(()))
    channels = next((m.in_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)), 3)
    whole = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)  # whatever layers they hold
    layers = [m for m in encoder.modules() if isinstance(m, whole) or not any(m.children())]
    handles = [layer.register_forward_hook(spread) for layer in layers]
    handles += [encoder.get_submodule(stage).register_forward_hook(keep(stage)) for stage in stages]
    modes = {module: module.training for module in encoder.modules()}
    try:
        encoder.eval()
        with torch.no_grad():
            encoder(torch.zeros(1, channels, image_size, image_size, device=first.device, dtype=first.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def _widen(mark: Tensor, layer: Any, size: Sequence[int]) -> Tensor:
    """The cells of a layer's output, of this size, whose window holds a mark or padding: (B, 1, h, w)."""
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    dilation = _pair(getattr(layer, "dilation", 1))
    pads: list[int] = []
    for axis in (1, 0):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        # what the last window needs in all; a layer that pads "same" says no amount, and puts the odd pixel last
        needed = max((size[axis] - 1) * stride[axis] + reach - mark.shape[2 + axis], 0)
        own = 0 if layer.padding == "same" else _pixels(layer, layer.padding)[axis]
        before = own or needed // 2
        pads += [before, max(needed - before, 0)]
    return F.max_pool2d(F.pad(mark, pads, value=1.0), kernel, stride, 0, dilation)[..., : size[0], : size[1]]


@contextmanager
def as_built(module: nn.Module, mode: str = "zeros") -> Iterator[None]:
    """While open, ``module`` pads as it was built to (or in another mode), whatever :func:`set_padding` made of it."""
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


def padding_of(encoder: nn.Module) -> str:
    """The padding mode of an encoder's convolutions: "valid" where none pads, "mixed" where they differ."""
    modes = {row.mode for row in list_padding(encoder) if not row.mode.endswith("2d")}
    return modes.pop() if len(modes) == 1 else "mixed" if modes else "valid"
