"""A forward pass without data: shapes, order, and the image sizes that a network can take."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.utils import _pair
from torch.utils._pytree import tree_leaves

from padprobe.errors import check_name
from padprobe.network.padding import PAD_LAYERS, as_built


class Trace(NamedTuple):
    """A forward pass that computes shapes only."""

    calls: list[Output]  # every module's output, in the order in which they finish
    image: Any  # the image's node in the autograd graph
    end: Any  # the node of the deepest output
    sides: list[int]  # of the (B, C, H, W) maps that the encoder returns
    exact: bool  # the windows of every strided layer fill its input: no row or column is left over


class Output(NamedTuple):
    """One module's output in a :class:`Trace`."""

    layer: str
    shape: tuple[int, ...]
    node: Any  # in the autograd graph
    is_conv: bool


def stage_shapes(encoder: nn.Module, stages: Sequence[str], image_size: int = 224) -> list[tuple[int, int, int]]:
    """(channels, height, width) of each named stage for one square image. No layer is run.

    Raises:
        ValueError: for a layer that does not exist (with the nearest names), that ``forward`` does not reach, or whose
            output is not 4-D; and for an image that is too small (with the smallest size that works).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2))
        >>> stage_shapes(network, ["0", "1"], image_size=32)
        [(8, 32, 32), (8, 16, 16)]
    """
    names = [name for name, _ in encoder.named_modules() if name]
    for stage in stages:
        check_name(stage, names, "layer")
    shapes = {output.layer: output.shape for output in trace_forward(encoder, image_size).calls}
    for stage in stages:
        if len(shapes.get(stage, ())) != 4:
            what = f"gives an output of shape {shapes[stage]}" if stage in shapes else "is not reached by forward()"
            usable = ", ".join(name for name, shape in shapes.items() if len(shape) == 4)
            raise ValueError(f"stage {stage!r} {what}; a stage's output has shape (B, C, H, W). Usable: {usable}")
    return [(shapes[stage][1], shapes[stage][2], shapes[stage][3]) for stage in stages]


def context_size(encoder: nn.Module, image_size: int, stages: Sequence[str] | None = None) -> tuple[int, list[int]]:
    """The larger image on which an unpadded encoder replaces padding by real surroundings.

    The unpadded encoder's outputs for the larger image, cropped around the centre, have the size and the geometry of
    the padded encoder's outputs for the central ``image_size`` pixels: same resolution, no padding. ``stages`` are the
    layers whose outputs will be cropped; default: the (B, C, H, W) maps that the encoder returns.

    Returns:
        The side of the larger image, and the sides of the cropped outputs. VGG16 at 224: 404, and 224, 112, 56, 28, 14.
        Every crop is the same on both sides, in whole cells.

    Raises:
        ValueError: if no size up to eight times ``image_size`` fits.
    """

    def sides(trace: Trace) -> list[int]:
        if stages is None:
            return trace.sides
        by_layer = {call.layer: call.shape[-1] for call in trace.calls}
        return [by_layer[stage] for stage in stages]

    with as_built(encoder):
        wanted = sides(_trace(encoder, image_size))
    for size in range(image_size, 8 * image_size, 2):
        with as_built(encoder, "valid"):
            try:
                trace = _trace(encoder, size)
            except RuntimeError:
                continue
        surplus = [a - b for a, b in zip(sides(trace), wanted, strict=True)]
        if trace.exact and all(n >= 0 and n % 2 == 0 for n in surplus):
            return size, wanted
    raise ValueError(
        f"no image size up to {8 * image_size} px gives {type(encoder).__name__} without padding the maps that it has "
        f"with padding at {image_size} px, evenly cropped: another image_size may fit, but none where shortcuts go "
        "around convolutions (ResNets): leave context out then"
    )


def output_sides(encoder: nn.Module, image_size: int) -> list[int]:
    """The sides, in cells, of the (B, C, H, W) maps that an encoder returns for a square image. No layer is run."""
    return trace_forward(encoder, image_size).sides


def takes(encoder: nn.Module, image_size: int) -> bool:
    """Whether an encoder can run on a square image of this side in pixels. No layer is run."""
    try:
        _trace(encoder, image_size)
    except (RuntimeError, ValueError, AssertionError):  # raised where a map would have no pixel left, or by a check
        return False
    return True


def smallest_image(encoder: nn.Module, limit: int = 2048, step: int = 1) -> int | None:
    """The side in pixels, a multiple of ``step``, of the smallest image that an encoder takes; None above ``limit``."""
    if not takes(encoder, limit // step * step):
        return None
    low, high = 0, limit // step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(encoder, middle * step) else (middle, high)
    return high * step


def trace_forward(encoder: nn.Module, image_size: int) -> Trace:
    """Traces a forward pass on a square image. No layer is run; the encoder stays as it is.

    Raises:
        ValueError: if the encoder cannot run on such an image, with the smallest size that works.
    """
    try:
        return _trace(encoder, image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        smallest = smallest_image(encoder)
        name = type(encoder).__name__
        if smallest is None or smallest <= image_size:
            raise ValueError(
                f"{name} cannot run on a {image_size} x {image_size} image (see image_size): {error}"
            ) from error
        raise ValueError(
            f"a {image_size} x {image_size} image is too small for {name} with its current padding: the smallest that "
            f"works is {smallest} x {smallest}. Use larger images, or padding that keeps the size of the maps (zeros)"
        ) from error


def _trace(encoder: nn.Module, image_size: int) -> Trace:
    """A forward pass on the meta device, where tensors have shapes but no data."""
    calls: list[Output] = []
    left_over: list[int] = []

    def record(layer: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            calls.append(Output(layer, tuple(output.shape), output.grad_fn, isinstance(module, nn.Conv2d)))
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
                reach, pad = _pair(module.kernel_size)[0] - 1, _pair(module.padding)[0]
                reach *= _pair(getattr(module, "dilation", 1))[0]
                left_over.append((args[0].shape[-2] + 2 * pad - reach - 1) % _pair(module.stride)[0])

    attributes = {module: dict(vars(module)) for module in encoder.modules()}  # a forward pass may change some
    layers = [(n, m) for n, m in encoder.named_modules() if n and not isinstance(m, PAD_LAYERS)]
    handles = [m.register_forward_hook(functools.partial(record, n)) for n, m in layers]
    channels = next((m.in_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)), 3)
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
    grad, eager = torch.enable_grad, torch.compiler.set_stance
    try:
        with torch.inference_mode(False), grad(), torch.device("meta"), eager("force_eager"):
            state = {k: v.detach().to("meta") for k, v in [*encoder.named_parameters(), *encoder.named_buffers()]}
            leaf = torch.empty((2, channels, image_size, image_size), dtype=dtype, requires_grad=True)
            image = leaf.view_as(leaf)  # unlike a leaf it has a node, and in-place layers may write to it
            result = functional_call(encoder, state, (image,))
    finally:
        for handle in handles:
            handle.remove()
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
    for call in calls:
        if 0 in call.shape:  # older versions of torch let a convolution's output vanish on the meta device
            raise RuntimeError(f"the output of layer {call.layer!r} has no pixel left: shape {call.shape}")
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    ends = [leaf.grad_fn for leaf in outputs if leaf.grad_fn is not None]
    sides = [leaf.shape[-1] for leaf in outputs if leaf.ndim == 4]
    return Trace(calls, image.grad_fn, ends[-1] if ends else None, sides, not any(left_over))
