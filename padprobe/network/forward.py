"""A forward pass without data: every layer's output shape, the order, and the image sizes that a network takes."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.utils import _pair
from torch.utils._pytree import tree_leaves

from padprobe.maps import Size, size_pair
from padprobe.network.cells import Cells, running
from padprobe.network.guest import copied_state, evaluation, image_channels
from padprobe.network.padding import PAD_LAYERS, aligned, current_sides


class Trace(NamedTuple):
    """A forward pass in evaluation mode that computes shapes only."""

    size: tuple[int, int]  # height and width of the image in pixels
    calls: list[Output]  # every module's output, in the order in which they finish
    image: Any  # the image's node in the autograd graph
    end: Any  # the node of the deepest output
    sides: list[tuple[int, int]]  # height and width of the (B, C, H, W) maps that the encoder returns
    exact: tuple[bool, bool]  # along height and width: the windows of every strided layer leave no row or column over
    cells: list[Cells | None]  # of these maps, where shortcuts meet without padding


class Output(NamedTuple):
    """One module's output in a :class:`Trace`; of several tensors the first."""

    layer: str
    shape: tuple[int, ...]
    node: Any  # in the autograd graph
    module: nn.Module
    cells: Cells | None  # where shortcuts meet without padding
    is_single: bool = True  # the output is one tensor


def trace_forward(encoder: nn.Module, image_size: Size) -> Trace:
    """Traces a forward pass on an image in evaluation mode. The encoder stays as it is.

    No layer is run, unless a network needs data, as where a value decides what is computed: it sees two random images.

    Raises:
        ValueError: if the encoder cannot run on such an image, with the smallest size that works.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)):
            raise ValueError(
                f"module {name!r} is a {type(module).__name__}, whose layers cannot be read: pass the network before "
                "it is scripted or wrapped (DataParallel: its `module`)"
            )
    try:
        try:
            return trace_once(encoder, image_size)
        except Exception as error:  # a network may raise anything for an image that it cannot take
            if "meta" not in str(error).lower():
                raise
            return trace_once(encoder, image_size, with_data=True)
    except Exception as error:
        height, width = size_pair(image_size)
        name, smallest = type(encoder).__name__, smallest_image(encoder, shape=image_size)
        if smallest is None or smallest <= min(height, width):
            raise ValueError(
                f"{name} cannot run on a {height} x {width} image (see image_size): {str(error).rstrip('.')}. Use the "
                "image size that it was built for, or build it for this one (timm: img_size=..., transformers: "
                "image_size=... in the configuration)"
            ) from error
        least_height, least_width = _scale(image_size, smallest)
        raise ValueError(
            f"a {height} x {width} image is too small for {name} with its current padding: the smallest that works is "
            f"{least_height} x {least_width}. Use larger images, or padding that keeps the size of the maps (zeros)"
        ) from error


def takes(encoder: nn.Module, image_size: Size) -> bool:
    """Whether an encoder can run on an image of this size in pixels. No layer is run."""
    try:
        trace_once(encoder, image_size)
    except Exception:  # raised where a map would have no pixel left, or by a check of the network
        return False
    return True


def smallest_image(encoder: nn.Module, limit: int = 2048, step: int = 1, shape: Size = 1) -> int | None:
    """The shorter side in pixels, a multiple of ``step``, of the smallest image that an encoder takes.

    The image has the proportions of ``shape``: square by default. None if the side would be above ``limit``.
    """
    if not takes(encoder, _scale(shape, limit // step * step)):
        return None
    low, high = 0, limit // step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(encoder, _scale(shape, middle * step)) else (middle, high)
    return high * step


def _scale(shape: Size, side: int) -> tuple[int, int]:
    """The size with the proportions of ``shape`` whose shorter side is ``side``."""
    height, width = size_pair(shape)
    short = min(height, width)
    return round(height * side / short), round(width * side / short)


def first_tensor(output: Any) -> Tensor | None:
    """A layer's output, or the first tensor of a tuple, a list or a dictionary; None where there is none."""
    if isinstance(output, Tensor):
        return output
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)


def trace_once(encoder: nn.Module, image_size: Size, with_data: bool = False) -> Trace:
    """A forward pass on the meta device, where tensors have shapes but no data; raises what the network raises.

    With data, it runs on random images where the encoder is.
    """
    size = size_pair(image_size)
    calls: list[Output] = []
    left_over: list[tuple[int, int]] = []

    def cells(tensor: Tensor) -> Cells | None:
        return alignment.cells(tensor) if (alignment := running()) and tensor.ndim == 4 else None

    def record(layer: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            is_single = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(output)) == 1
            calls.append(Output(layer, tuple(tensor.shape), tensor.grad_fn, module, cells(tensor), is_single))
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
                left_over.append(_left_over(module, args[0].shape[-2:]))

    layers = [(n, m) for n, m in encoder.named_modules() if n and not isinstance(m, PAD_LAYERS)]
    first = next((p for p in encoder.parameters() if p.is_floating_point()), torch.zeros(()))
    device = first.device if with_data else torch.device("meta")
    grad, eager = torch.enable_grad, torch.compiler.set_stance
    rng = isolate_rng(include_cuda=device.type == "cuda") if with_data else nullcontext()
    with rng, evaluation(encoder), torch.inference_mode(False), grad(), device, eager("force_eager"):
        for layer, module in layers:
            module.register_forward_hook(functools.partial(record, layer))
        state = copied_state(encoder, with_data)
        leaf = torch.rand((2, image_channels(encoder), *size), dtype=first.dtype, requires_grad=True)
        image = leaf.view_as(leaf)  # unlike a leaf it has a node, and in-place layers may write to it
        with aligned(encoder):
            result = functional_call(encoder, state, (image,), tie_weights=False)
            maps = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.ndim == 4]
            map_cells = [cells(leaf) for leaf in maps]
    for call in calls:
        if 0 in call.shape:  # older versions of torch let a convolution's output vanish on the meta device
            raise RuntimeError(f"the output of layer {call.layer!r} has no pixel left: shape {call.shape}")
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    ends = [leaf.grad_fn for leaf in outputs if leaf.grad_fn is not None]
    sides = [(leaf.shape[-2], leaf.shape[-1]) for leaf in maps]
    exact = (not any(rows for rows, _ in left_over), not any(columns for _, columns in left_over))
    return Trace(size, calls, image.grad_fn, ends[-1] if ends else None, sides, exact, map_cells)


def _left_over(layer: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows and columns of its input a strided layer's windows leave over."""
    kernel, stride, pads = _pair(layer.kernel_size), _pair(layer.stride), current_sides(layer, shape)
    dilation = _pair(getattr(layer, "dilation", 1))
    windows = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    rows, columns = ((shape[i] + sum(pads[i]) - windows[i]) % stride[i] for i in (0, 1))
    return rows, columns
