"""Turns a layer's output into maps (B, C, H, W), whatever its layout: NCHW, NHWC or tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from padprobe.errors import check_name
from padprobe.maps import Size
from padprobe.network.forward import Output, first_tensor, trace_forward
from padprobe.network.guest import evaluation, image_channels
from padprobe.stimuli import dead_leaves

LAYOUTS = ("auto", "NCHW", "NHWC", "tokens")
MOST_PREFIX_TOKENS = 8
# nodes of the autograd graph: of layers whose output is always (B, C, H, W), and of those that keep the layout
_CONVOLUTIONS = (
    *("Convolution", "NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm", "MaxPool2D", "AvgPool2D"),
    *("AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "Upsample", "ReflectionPad2D", "ReplicationPad2D"),
)
_POINTWISE = (
    *("Relu", "LeakyRelu", "Silu", "Gelu", "Elu", "Hardtanh", "Hardswish", "Mish", "Tanh", "Sigmoid", "Softplus"),
    *("Add", "Sub", "Mul", "Div", "Clone", "Cat"),
)
_PREFIX = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens")


class Layout(NamedTuple):
    """How a layer's output holds a map of ``channels`` x ``height`` x ``width``.

    ``"NCHW"``: (B, C, H, W); ``"NHWC"``: (B, H, W, C); ``"tokens"``: (B, prefix + H W, C), row after row, behind
    ``prefix`` tokens that have no place (class, register and distillation tokens).

    Example:
        >>> Layout("tokens", channels=8, height=2, width=3, prefix=1).to_maps(torch.rand(4, 7, 8)).shape
        torch.Size([4, 8, 2, 3])
    """

    kind: str
    channels: int
    height: int
    width: int
    prefix: int = 0

    def to_maps(self, output: Tensor) -> Tensor:
        """A layer's output as maps (B, C, H, W): a view. Images of another size must have the same proportions.

        Raises:
            ValueError: for another number of dimensions, or a number of tokens that is no grid of these proportions.
        """
        if output.ndim != (3 if self.kind == "tokens" else 4):
            raise ValueError(f"an output has shape {tuple(output.shape)}; expected {self.kind}")
        if self.kind == "NCHW":
            return output
        if self.kind == "NHWC":
            return output.permute(0, 3, 1, 2)
        tokens = output[:, self.prefix :]  # (B, H W, C)
        height = round((tokens.shape[1] * self.height / self.width) ** 0.5)
        if height * (width := tokens.shape[1] // max(height, 1)) != tokens.shape[1]:
            raise ValueError(
                f"an output has {output.shape[1]} tokens, which are not {self.prefix} and a grid with the proportions "
                f"of {self.height} x {self.width}: give the encoder images of the proportions of image_size"
            )
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def find_layouts(
    encoder: nn.Module, stages: Sequence[str], image_size: Size = 224, layout: str = "auto"
) -> dict[str, Layout]:
    """How each stage's output holds its maps.

    A layout must fit the output's shape: the map is smaller than the image by the same factor along both axes, and at
    most 8 tokens stand before it. (B, C, H, W) is taken without a check where nothing else fits. Every other layout is
    checked on real images, with the encoder in evaluation mode: changing the pixels of a corner must change this
    corner's quarter of the map most. The encoder and the random states stay as they are.

    Args:
        encoder: a network that takes images (B, C, H, W).
        stages: dotted names of its layers.
        image_size: in pixels.
        layout: ``"auto"``; or ``"NCHW"``, ``"NHWC"`` or ``"tokens"``, which is believed without a check where an output
            has that many dimensions.

    Raises:
        ValueError: for an unknown layout; for a layer that does not exist (with the nearest names) or that ``forward``
            does not reach; and for a layer whose output is no map, with its shape.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(2), nn.Softmax(-1))
        >>> find_layouts(network, ["0"], image_size=(16, 32))
        {'0': Layout(kind='NCHW', channels=6, height=4, width=8, prefix=0)}
    """
    check_name(layout, LAYOUTS, "layout")
    names = [name for name, _ in encoder.named_modules() if name]
    for stage in stages:
        check_name(stage, names, "layer")
    trace = trace_forward(encoder, image_size)
    outputs = {output.layer: output for output in trace.calls}
    candidates: dict[str, list[Layout]] = {}
    for stage in stages:
        candidates[stage] = fitting_layouts(outputs[stage], trace.size, layout) if stage in outputs else []
        if not candidates[stage]:
            what = f"gives an output of shape {outputs[stage].shape}" if stage in outputs else "is not reached"
            usable = ", ".join(name for name, output in outputs.items() if map_size(output, trace.size)) or "none"
            raise ValueError(
                f"stage {stage!r} {what} by forward(); a stage's output has shape (B, C, H, W), (B, H, W, C) or "
                f"(B, tokens, C). Usable: {usable}"
            )
    prefix = prefix_tokens(encoder)
    doubtful: dict[str, list[Layout]] = {}
    for stage, layouts in candidates.items():
        # a grid can fit with several numbers of prefix tokens: the known one first
        layouts.sort(key=lambda x: x.kind == "tokens" and x.prefix != prefix)
        is_clear = len(layouts) == 1 and layouts[0].kind == "NCHW" and _shrunk(layouts[0], trace.size)
        if layouts[0].kind != layout and not is_clear:
            doubtful[stage] = layouts
    verified = _check_corners(encoder, doubtful, trace.size) if doubtful else {}
    for stage, layouts in verified.items():
        if len(layouts) > 1 and layouts[0].kind == "tokens" and layouts[0].prefix == prefix:
            del layouts[1:]
        if len(layouts) != 1:
            tried = ", ".join(f"{x.kind} of {x.height} x {x.width} cells" for x in candidates[stage])
            raise ValueError(
                f"stage {stage!r} gives an output of shape {outputs[stage].shape} for a {trace.size[0]} x "
                f"{trace.size[1]} image, which could be {tried}; changing a corner of an image "
                f"{'fits several of them' if layouts else 'does not change this corner of the map most'}. Say what it "
                "is (layout='NCHW', 'NHWC' or 'tokens'), or name other layers (stages=[...])"
            )
    return {stage: verified.get(stage, layouts)[0] for stage, layouts in candidates.items()}


def map_size(output: Output, size: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of the likeliest map in an output's shape, for an image of this size; None where it has none."""
    layouts = [x for x in fitting_layouts(output, size) if x.kind != "NCHW" or _shrunk(x, size)]
    return (layouts[0].height, layouts[0].width) if layouts else None


def fitting_layouts(output: Output, size: tuple[int, int], layout: str = "auto") -> list[Layout]:
    """The layouts that fit an output's shape, the likeliest first. An output has the trace's two images."""
    shape = output.shape
    if len(shape) == 4 and shape[0] == 2:
        nchw, nhwc = Layout("NCHW", *shape[1:]), Layout("NHWC", shape[3], *shape[1:3])
        if layout in ("NCHW", "NHWC"):
            return [nchw if layout == "NCHW" else nhwc]
        if _from_convolution(output.node):
            return [nchw]
        return [x for x, fits in ((nchw, _shrunk), (nhwc, _same_factor)) if fits(x, size)]
    if len(shape) == 3 and shape[0] == 2:
        grids = [_grid(shape[1] - prefix, shape[2], prefix, size) for prefix in range(MOST_PREFIX_TOKENS + 1)]
        return [grid for grid in grids if grid is not None]
    return []


def _grid(cells: int, channels: int, prefix: int, size: tuple[int, int]) -> Layout | None:
    """The grid of so many cells that has the image's proportions; None where there is none."""
    height = round((max(cells, 0) * size[0] / size[1]) ** 0.5)
    if cells < 2 or height * (cells // max(height, 1)) != cells:
        return None
    layout = Layout("tokens", channels, height, cells // height, prefix)
    return layout if _same_factor(layout, size) else None


def _same_factor(layout: Layout, size: tuple[int, int]) -> bool:
    """Whether a map is smaller than the image by one factor along both axes, up to rounding to a cell."""
    sides = (layout.height, size[0]), (layout.width, size[1])
    least = max(pixels / (cells + 1) for cells, pixels in sides)
    most = min(pixels / (cells - 1) if cells > 1 else float("inf") for cells, pixels in sides)
    return most >= 1 - 1e-9 and least < most


def _shrunk(layout: Layout, size: tuple[int, int]) -> bool:
    """As :func:`_same_factor`, but without padding every layer may also have cut off the same number of pixels."""
    height, width = size
    longer, stretch = layout.width - layout.height, width - height
    unpadded = longer * stretch > 0 and 1 <= stretch / longer <= height / max(layout.height - 1, 1)
    if unpadded:  # by a whole stride, up to rounding to a cell
        apart, cells = abs(stretch), abs(longer)
        unpadded = math.ceil(apart / (cells + 1)) <= (apart / (cells - 1) if cells > 1 else apart)
    return unpadded or _same_factor(layout, size)


def _from_convolution(node: Any) -> bool:
    """Whether an output comes from a convolution, a BatchNorm or a pooling layer, by pointwise operations at most."""
    while node is not None and node.name().startswith(_POINTWISE) and node.next_functions:
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return node is not None and node.name().startswith(_CONVOLUTIONS)


def prefix_tokens(encoder: nn.Module) -> int:
    """How many tokens a transformer puts before those of the image, as far as its attributes tell."""
    for module in encoder.modules():
        if isinstance(count := getattr(module, "num_prefix_tokens", None), int):  # timm
            return count
    parameters = {name.split(".")[-1]: value for name, value in encoder.named_parameters()}
    counts = [parameters[name].shape[1] for name in _PREFIX if name in parameters and parameters[name].ndim == 3]
    return sum(counts) + ("class_embedding" in parameters)  # CLIP's, a vector


def _check_corners(
    encoder: nn.Module, candidates: Mapping[str, Sequence[Layout]], size: tuple[int, int]
) -> dict[str, list[Layout]]:
    """The layouts of each stage's candidates in which each corner of the map changes most with that of the image."""
    outputs: dict[str, Tensor] = {}

    def keep(stage: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        assert tensor is not None
        outputs[stage] = tensor.detach().float().clone()

    height, width = size
    leaves = dead_leaves(2, max(size), seed=1)[:, torch.arange(image_channels(encoder)) % 3, :height, :width]
    # the image, then with another top left, top right, bottom left, bottom right
    images = leaves[:1].repeat(5, 1, 1, 1)
    for image, (rows, columns) in zip(images[1:], _quarters(height, width), strict=True):
        image[:, rows, columns] = leaves[1, :, rows, columns]
    first = next((p for p in encoder.parameters() if p.is_floating_point()), images)
    buffers = [(buffer, buffer.clone()) for buffer in encoder.buffers()]
    try:
        with (
            isolate_rng(include_cuda=first.device.type == "cuda"),
            evaluation(encoder),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            for stage in candidates:
                encoder.get_submodule(stage).register_forward_hook(functools.partial(keep, stage))
            encoder(images.to(first.device, first.dtype))
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return {s: [layout for layout in c if _corners_agree(layout.to_maps(outputs[s]))] for s, c in candidates.items()}


def _quarters(height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the quarters of a map: top left, top right, bottom left, bottom right."""
    rows, columns = height // 2, width // 2
    halves = slice(0, rows), slice(height - rows, height)
    return [(half, side) for half in halves for side in (slice(0, columns), slice(width - columns, width))]


def _corners_agree(maps: Tensor) -> bool:
    """Whether in maps (5, C, H, W) the k-th quarter changes most from the first map to the (k + 1)-th.

    Every channel counts alike: a trained transformer has a few that are hundreds of times larger.
    """
    if min(maps.shape[-2:]) < 2:
        return False
    changes = (maps[1:] - maps[:1]).abs()  # (4, C, H, W)
    changes = (changes / changes.mean((0, 2, 3), keepdim=True).clamp(min=torch.finfo().tiny)).mean(1)
    by_quarter = torch.stack([changes[:, rows, columns].mean((1, 2)) for rows, columns in _quarters(*maps.shape[-2:])])
    informative = bool(by_quarter.isfinite().all()) and bool(by_quarter.any())
    return informative and by_quarter.argmax(0).tolist() == [0, 1, 2, 3]
