"""A forward pass without data: shapes, order and the sizes that a network can take."""

from __future__ import annotations

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
    """A shape-only forward pass."""

    calls: list[Output]  # every module's output, in the order in which they finish
    image: Any  # node of the image in the autograd graph
    end: Any  # node of the deepest output
    sides: list[int]  # of the encoder's own (B, C, H, W) outputs
    whole: bool  # every strided layer's windows fill its input: no row or column is left over


class Output(NamedTuple):
    """One module's output in a shape-only forward pass."""

    layer: str
    shape: tuple[int, ...]
    node: Any  # its place in the autograd graph
    is_conv: bool


def stage_shapes(encoder: nn.Module, stages: Sequence[str], image_size: int = 224) -> list[tuple[int, int, int]]:
    """(channels, height, width) of each named stage for one square image, without running any layer.

    Raises:
        ValueError: for a layer that does not exist (with the nearest names), that the forward pass does not reach,
            whose output is not 4-D, or an image that is too small (with the smallest size that works).
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
    """The larger image that an unpadded encoder needs to see an image with its real surroundings.

    Of an image of this size, the unpadded encoder's outputs, centre-cropped, have the sizes and the geometry that the
    padded encoder's have for the centre of ``image_size``: the same resolution, no padding.

    Args:
        encoder: an encoder that :func:`~padprobe.set_padding` can change.
        image_size: side of the padded encoder's image in pixels.
        stages: the layers whose outputs are to be cropped. Default: the encoder's own (B, C, H, W) outputs.

    Returns:
        The side of the larger image, and the sides of the cropped outputs. VGG16 at 224: 404 and 224, 112, 56, 28, 14
        (after the last pooling layer: 7). Crops are even on both sides, on whole cells.

    Raises:
        ValueError: where no size up to eight times ``image_size`` fits.
    """

    def sides(trace: Trace) -> list[int]:
        if stages is None:
            return trace.sides
        found = {call.layer: call.shape[-1] for call in trace.calls}
        return [found[stage] for stage in stages]

    with as_built(encoder):
        wanted = sides(forward_shapes(encoder, image_size))
    for size in range(image_size, 8 * image_size, 2):
        with as_built(encoder, "valid"):
            try:
                found = forward_shapes(encoder, size)
            except RuntimeError:
                continue
        surplus = [a - b for a, b in zip(sides(found), wanted, strict=True)]
        if found.whole and all(n >= 0 and n % 2 == 0 for n in surplus):
            return size, wanted
    raise ValueError(
        f"no image size up to {8 * image_size} px gives {type(encoder).__name__} without padding the maps that it has "
        f"with padding at {image_size} px, evenly cropped: try an image_size of {image_size + 1}, or leave context out"
    )


def output_sides(encoder: nn.Module, image_size: int) -> list[int]:
    """The sides in cells of the (B, C, H, W) maps that an encoder gives of one square image, without running any layer.

    Raises:
        ValueError: for an image that is too small (with the smallest size that works).
    """
    return trace_forward(encoder, image_size).sides


def takes(encoder: nn.Module, image_size: int) -> bool:
    """Whether the encoder can run on a square image of this side in pixels; no layer is run."""
    try:
        forward_shapes(encoder, image_size)
    except (RuntimeError, ValueError):  # what torch raises where a map would vanish
        return False
    return True


def smallest_image(encoder: nn.Module, limit: int = 2048, step: int = 1) -> int | None:
    """The smallest square image, in pixels, that the encoder can take; None if it takes none up to ``limit``.

    Args:
        encoder: any network that takes images.
        limit: the largest side to try.
        step: only multiples of it are tried.
    """
    if not takes(encoder, limit // step * step):
        return None
    low, high = 0, limit // step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(encoder, middle * step) else (middle, high)
    return high * step


def trace_forward(encoder: nn.Module, image_size: int) -> Trace:
    """:func:`forward_shapes`, with an error that says which image size would work."""
    try:
        return forward_shapes(encoder, image_size)
    except (RuntimeError, ValueError) as error:
        smallest = smallest_image(encoder)
        name = type(encoder).__name__
        if smallest is None or smallest <= image_size:
            raise ValueError(
                f"{name} cannot run on a {image_size} x {image_size} image (see image_size): {error}"
            ) from error
        raise ValueError(
            f"a {image_size} x {image_size} image is too small for {name} as it is padded now: the smallest that works "
            f"is {smallest} x {smallest}. Use larger images, or padding that keeps the maps' size (zeros)"
        ) from error


def forward_shapes(encoder: nn.Module, image_size: int) -> Trace:
    """A forward pass on the meta device, where tensors have shapes but no data."""
    channels = next((m.in_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)), 3)
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
    calls: list[Output] = []
    left_over: list[int] = []
    attributes = {module: dict(vars(module)) for module in encoder.modules()}  # a forward pass may change some

    def record(layer: str, is_conv: bool):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls.append(Output(layer, tuple(output.shape), output.grad_fn, is_conv))
                if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
                    reach, pad = _pair(module.kernel_size)[0] - 1, _pair(module.padding)[0]
                    reach *= _pair(getattr(module, "dilation", 1))[0]
                    left_over.append((args[0].shape[-2] + 2 * pad - reach - 1) % _pair(module.stride)[0])

        return hook

    layers = [(n, m) for n, m in encoder.named_modules() if n and not isinstance(m, PAD_LAYERS)]
    handles = [m.register_forward_hook(record(n, isinstance(m, nn.Conv2d))) for n, m in layers]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("meta"),
            torch.compiler.set_stance("force_eager"),
        ):
            state = {k: v.detach().to("meta") for k, v in [*encoder.named_parameters(), *encoder.named_buffers()]}
            shape = (2, channels, image_size, image_size)
            image = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
            copy = image.view_as(image)  # a node of its own, and in-place layers may write to it
            result = functional_call(encoder, state, (copy,))
    finally:
        for handle in handles:
            handle.remove()
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
    for call in calls:
        if 0 in call.shape:  # older versions of torch let a convolution's output vanish on the meta device
            raise RuntimeError(f"the output of layer {call.layer!r} has no pixel left: shape {call.shape}")
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    ends = [leaf.grad_fn for leaf in results if leaf.grad_fn is not None]
    sides = [leaf.shape[-1] for leaf in results if leaf.ndim == 4]
    return Trace(calls, copy.grad_fn, ends[-1] if ends else None, sides, not any(left_over))
