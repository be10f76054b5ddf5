"""Which cells of a stage have padding in their receptive field."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

from padprobe.maps import Size, size_pair
from padprobe.network.cells import running
from padprobe.network.fill import Sides
from padprobe.network.forward import first_tensor
from padprobe.network.guest import evaluation, image_channels
from padprobe.network.layout import Layout
from padprobe.network.padding import PAD_LAYERS, POOL_LAYERS, unpadded

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def padding_reach(
    encoder: nn.Module,
    stages: Sequence[str],
    image_size: Size = 224,
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, Tensor]:
    """Finds the cells of each stage that have padding in their receptive field: bool (h, w) by layer name.

    One forward pass carries marks instead of features. The padding of every layer is marked, that of ``F.pad`` too, and
    each convolution or pooling layer marks all cells whose window holds a mark. Operations before the first convolution
    add no mark. Gates and norms over a whole map count as local. Attention carries a mark to every cell that it
    reaches. For VGG16 at 224 px, padding reaches 0.035, 0.104, 0.325, 0.673 and 0.980 of the cells of f1..f5. The
    encoder is left as it was.

    ``layouts`` say how the stages hold their maps; default: (B, C, H, W). A stage is left out where marks cannot be
    told from what the network adds itself, such as a position embedding.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        >>> padding_reach(network, ["1"], image_size=4)["1"].int()
        tensor([[1, 1, 1, 1],
                [1, 0, 0, 1],
                [1, 0, 0, 1],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    marks = _Marks(1.0)
    masks = _marked(encoder, stages, image_size, layouts or {}, marks)
    if not marks.pads:
        return {stage: torch.zeros_like(mask) for stage, mask in masks.items()}
    without = _marked(encoder, stages, image_size, layouts or {}, _Marks(0.0))
    return {stage: mask for stage, mask in masks.items() if not without[stage].any()}


def _marked(
    encoder: nn.Module, stages: Sequence[str], image_size: Size, layouts: Mapping[str, Layout], marks: _Marks
) -> dict[str, Tensor]:
    """The cells of each stage that hold a mark."""
    masks: dict[str, Tensor] = {}

    def keep(stage: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        assert tensor is not None
        maps = layouts[stage].to_maps(tensor) if stage in layouts else tensor
        masks[stage] = (maps[0] != 0).any(0).cpu()

    # convolutions and norms count as one layer even if they hold others
    layers = [m for m in encoder.modules() if isinstance(m, (nn.Conv2d, *_NORMS)) or not any(m.children())]
    first = next((p for p in encoder.parameters() if p.is_floating_point()), torch.zeros(()))
    shape = (1, image_channels(encoder), *size_pair(image_size))
    with evaluation(encoder), torch.no_grad(), marks:
        for layer in layers:
            layer.register_forward_pre_hook(marks.enter)
            layer.register_forward_hook(marks.replace)
        for stage in stages:
            encoder.get_submodule(stage).register_forward_hook(functools.partial(keep, stage))
        encoder(torch.zeros(shape, device=first.device, dtype=first.dtype))
    return masks


class _Marks(TorchFunctionMode):
    """Replaces each layer's output by marks: not 0 where padding reaches, 0 elsewhere.

    Args:
        value: the mark of padding. With 0, all marks that arrive anywhere come from the network itself.

    Attributes:
        pads: whether any padding was seen.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value
        self._begun = False  # the image itself, normalised in whatever way, has no mark
        self._inside = False  # a layer is running
        self.pads = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Marks what ``F.pad`` pads outside the layers."""
        kwargs = kwargs or {}
        if func is F.pad and not self._inside:
            amount = args[1] if len(args) > 1 else kwargs["pad"]
            if any(n > 0 for n in amount):
                mark = args[0] if self._begun else torch.zeros_like(args[0])
                self._begun = self.pads = True
                return F.pad(mark, amount, value=self._value)
        return func(*args, **kwargs)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: what a layer pads, :meth:`replace` marks."""
        self._inside = True

    def replace(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook; None leaves the output as it is."""
        marks, alignment = self._replace(module, args, output), running()
        if alignment and isinstance(marks, Tensor):
            alignment.copy_cells(marks, output)
        self._inside = False
        return marks

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        windowed, is_pad = isinstance(module, (nn.Conv2d, *POOL_LAYERS)), isinstance(module, PAD_LAYERS)
        if not isinstance(output, Tensor) or not (args and isinstance(args[0], Tensor)):
            return None
        if not (self._begun or windowed or is_pad):
            return None
        mark = (args[0] != 0).to(args[0].dtype) if self._begun else torch.zeros_like(args[0])
        self._begun = True
        if isinstance(module, nn.Linear):
            return mark.amax(-1, keepdim=True).expand(output.shape).clone()
        is_known = isinstance(module, _NORMS) or type(module).__module__.startswith("torch.nn")
        if not (is_known or windowed or is_pad):
            return None  # it may be an attention or a filter of the whole map: computed from the marks as it is
        if output.shape == mark.shape and not (windowed or is_pad):
            return mark
        if mark.ndim != 4 or output.ndim != 4:
            return None
        mark = mark.amax(1, keepdim=True)
        if windowed:
            mark, sides = unpadded(module, mark)
            pads = _window_pads(module, sides, mark.shape[-2:], output.shape[-2:])
            self.pads = self.pads or any(pads)
            mark = _widen(mark, module, output.shape[-2:], pads, self._value)
        elif is_pad:
            mark, (rows, columns) = unpadded(module, mark)
            self.pads = self.pads or any((*columns, *rows))
            mark = F.pad(mark, (*columns, *rows), value=self._value)
        else:
            mark = F.adaptive_max_pool2d(mark, output.shape[-2:])
        return mark.expand(output.shape).clone()  # a copy, because in-place layers may write to it


def _window_pads(layer: Any, sides: Sequence[Sides], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """What a layer with windows pads, from the sizes of its input and output: left, right, top, bottom."""
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    dilation = _pair(getattr(layer, "dilation", 1))
    pads: list[int] = []
    for axis in (1, 0):
        window = dilation[axis] * (kernel[axis] - 1) + 1
        # All windows together need this much padding. A layer may pad in a way of its own; its odd pixel comes last.
        needed = max((after[axis] - 1) * stride[axis] + window - before[axis], 0)
        start = sides[axis][0] if any(sides[axis]) else needed // 2
        pads += [start, max(needed - start, 0)]
    return pads


def _widen(mark: Tensor, layer: Any, size: Sequence[int], pads: list[int], value: float) -> Tensor:
    """Marks the cells of a layer's output, of this size, whose window holds a mark or padding: (B, 1, h, w)."""
    kernel, stride, dilation = _pair(layer.kernel_size), _pair(layer.stride), _pair(getattr(layer, "dilation", 1))
    return F.max_pool2d(F.pad(mark, pads, value=value), kernel, stride, 0, dilation)[..., : size[0], : size[1]]
