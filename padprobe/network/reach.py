"""Which cells of a stage have padding in their receptive field."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from padprobe.network.padding import PAD_LAYERS, POOL_LAYERS, pixels

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def padding_reach(encoder: nn.Module, stages: Sequence[str], image_size: int = 224) -> dict[str, Tensor]:
    """Finds the cells of each stage that have padding in their receptive field: bool (h, w) by layer name.

    One forward pass carries marks instead of features. The padding of every layer is marked, and each convolution or
    pooling layer marks all cells whose window holds a mark. Operations before the first convolution add no mark. Gates
    and norms over a whole map count as local. For VGG16 at 224 px, padding reaches 0.035, 0.104, 0.325, 0.673 and 0.980
    of the cells of f1..f5. The encoder is left as it was.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        >>> padding_reach(network, ["1"], image_size=4)["1"].int()
        tensor([[1, 1, 1, 1],
                [1, 0, 0, 1],
                [1, 0, 0, 1],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    masks: dict[str, Tensor] = {}

    def keep(stage: str, module: nn.Module, args: Any, output: Tensor) -> None:
        masks[stage] = (output[0] != 0).any(0).cpu()

    # convolutions and norms count as one layer even if they hold others
    layers = [m for m in encoder.modules() if isinstance(m, (nn.Conv2d, *_NORMS)) or not any(m.children())]
    marks = _Marks()
    handles = [layer.register_forward_hook(marks.replace) for layer in layers]
    handles += [encoder.get_submodule(s).register_forward_hook(functools.partial(keep, s)) for s in stages]
    modes = {module: module.training for module in encoder.modules()}
    first = next(encoder.parameters(), torch.zeros(()))
    channels = next((m.in_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)), 3)
    try:
        encoder.eval()
        with torch.no_grad():
            encoder(torch.zeros(1, channels, image_size, image_size, device=first.device, dtype=first.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return masks


class _Marks:
    """Replaces each layer's output by marks: 1 where padding reaches, 0 elsewhere."""

    def __init__(self) -> None:
        self._begun = False  # the image itself, normalised in whatever way, has no mark

    def replace(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook; None leaves the output as it is."""
        windowed, pads = isinstance(module, (nn.Conv2d, *POOL_LAYERS)), isinstance(module, PAD_LAYERS)
        if not isinstance(output, Tensor) or not (args and isinstance(args[0], Tensor)):
            return None
        if not (self._begun or windowed or pads):
            return None
        mark = (args[0] != 0).to(args[0].dtype) if self._begun else torch.zeros_like(args[0])
        self._begun = True
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
        return mark.expand(output.shape).clone()  # a copy, because in-place layers may write to it


def _widen(mark: Tensor, layer: Any, size: Sequence[int]) -> Tensor:
    """Marks the cells of a layer's output, of this size, whose window holds a mark or padding: (B, 1, h, w)."""
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    dilation = _pair(getattr(layer, "dilation", 1))
    pads: list[int] = []
    for axis in (1, 0):
        window = dilation[axis] * (kernel[axis] - 1) + 1
        # All windows together need this much padding. A layer with padding "same" states no amount; its odd pixel
        # comes last.
        needed = max((size[axis] - 1) * stride[axis] + window - mark.shape[2 + axis], 0)
        stated = 0 if layer.padding == "same" else pixels(layer, layer.padding)[axis]
        before = stated or needed // 2
        pads += [before, max(needed - before, 0)]
    return F.max_pool2d(F.pad(mark, pads, value=1.0), kernel, stride, 0, dilation)[..., : size[0], : size[1]]
