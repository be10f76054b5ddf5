"""Which layers are the stages f1..fn of a CNN, and how to tap them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.utils import _pair
from torch.utils._pytree import tree_leaves

from padprobe.errors import check_name
from padprobe.padding import PAD_LAYERS, as_built


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


def find_stages(encoder: nn.Module, image_size: int = 224) -> list[str]:
    """The dotted names of an encoder's stages f1..fn: the last output before each spatial reduction.

    An output counts only if all information flows through it (inside a residual block it does not: the shortcut goes
    around it), and only if convolutions follow the reduction before it. VGG16: ``features.3, 8, 15, 22, 29``; ResNet:
    ``relu, layer1, layer2, layer3, layer4``. Shapes are traced without data: no weight, buffer or random state is
    touched. The answer does not depend on :func:`~padprobe.set_padding`.

    Args:
        encoder: a CNN that takes an image of shape (B, C, S, S) and returns a tensor, or a list or dictionary of them,
            the deepest last.
        image_size: S, the size to trace with.

    Raises:
        ValueError: if the image is too small for the encoder (with the smallest size that works), or where no stage can
            be found (no reduction, no 4-D outputs): name the layers then.

    Source: paper, section 3.1 (f_enc: the features before each pooling layer).
    """
    with as_built(encoder):
        trace = _trace(encoder, image_size)
    outputs, cuts = trace.calls, _cuts(trace)
    stages: list[str] = []
    has_conv = False  # a convolution since the last reduction
    previous = -1
    for i, here in enumerate(cuts):
        after = cuts[i + 1] if i + 1 < len(cuts) else None
        has_conv = has_conv or any(output.is_conv for output in outputs[previous + 1 : here + 1])
        previous = here
        size = max(outputs[here].shape[-2:])
        reduces = after is not None and max(outputs[after].shape[-2:]) <= 0.75 * size
        if has_conv and size > 1 and (reduces or after is None):
            stages.append(outputs[here].layer)
        if reduces:
            has_conv = False
    if not stages:
        layers = ", ".join(dict.fromkeys(output.layer for output in outputs if len(output.shape) == 4)) or "none"
        raise ValueError(
            f"no stages found in {type(encoder).__name__}: it has no spatial reduction that all information flows "
            f"through. Name the layers to probe instead (stages=[...]). Layers with 4-D outputs: {layers}"
        )
    return stages


def paper_stages(encoder: nn.Module, image_size: int = 224) -> list[str]:
    """The paper's stages: those of :func:`find_stages`, but of a ResNet ``layer1 .. layer4`` alone.

    Source: the authors' code (the paper's text draws five stages for both networks).
    """
    stages = find_stages(encoder, image_size)
    blocks = [stage for stage in stages if stage.split(".")[-1] in ("layer1", "layer2", "layer3", "layer4")]
    return blocks if len(blocks) == 4 else stages


def stage_shapes(encoder: nn.Module, stages: Sequence[str], image_size: int = 224) -> list[tuple[int, int, int]]:
    """(channels, height, width) of each named stage for one square image, without running any layer.

    Raises:
        ValueError: for a layer that does not exist (with the nearest names), that the forward pass does not reach,
            whose output is not 4-D, or an image that is too small (with the smallest size that works).
    """
    names = [name for name, _ in encoder.named_modules() if name]
    for stage in stages:
        check_name(stage, names, "layer")
    shapes = {output.layer: output.shape for output in _trace(encoder, image_size).calls}
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
        wanted = sides(_forward_shapes(encoder, image_size))
    for size in range(image_size, 8 * image_size, 2):
        with as_built(encoder, "valid"):
            try:
                found = _forward_shapes(encoder, size)
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
    return _trace(encoder, image_size).sides


def takes(encoder: nn.Module, image_size: int) -> bool:
    """Whether the encoder can run on a square image of this side in pixels; no layer is run."""
    try:
        _forward_shapes(encoder, image_size)
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


class StageTap:
    """Catches the stages of every forward pass of an encoder, aligned to the readout's grid.

    A stage's output (B, C, H, W) is resized inside its hook to (B, C, grid, grid), float32 and detached: bilinear with
    ``align_corners=True``, as the authors' code does. The result is a new, small tensor, so that no later in-place
    layer can overwrite it and the full map is not kept.

    Args:
        encoder: the network to tap.
        stages: dotted layer names in ``encoder``.
        grid: side of the aligned maps in cells.
        sides: centre-crop each stage to this side before it is resized (see :func:`context_size`).
    """

    def __init__(
        self, encoder: nn.Module, stages: Sequence[str], grid: int, sides: Sequence[int] | None = None
    ) -> None:
        self.grid = grid
        self._sides = dict(zip(stages, sides, strict=True)) if sides else {}
        self.active = True
        self._caught: dict[str, Tensor] = dict.fromkeys(stages, torch.empty(0))
        self._handles = [
            encoder.get_submodule(stage).register_forward_hook(functools.partial(self._keep, stage)) for stage in stages
        ]

    def _keep(self, stage: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.active and isinstance(output, Tensor) and output.ndim == 4:
            side = self._sides.get(stage, output.shape[-1])
            self._caught[stage] = align(center_crop(output, side), self.grid)

    @property
    def missing(self) -> list[str]:
        """Stages that have not arrived since the last :meth:`clear`, or came last with fewer images than others."""
        most = max([1, *(len(features) for features in self._caught.values())])
        return [stage for stage, features in self._caught.items() if len(features) < most]

    def take(self, *more: Tensor) -> Tensor:
        """The stages of the last forward pass side by side, (B, sum of C, grid, grid), then ``more``; forgets them.

        Raises:
            RuntimeError: naming the stages that the forward pass did not reach.
        """
        if self.missing:
            raise RuntimeError(
                f"the forward pass did not reach stage(s) {', '.join(self.missing)}; tap a network before it is "
                "compiled or first run, and name only layers that every forward pass calls"
            )
        features = torch.cat([*self._caught.values(), *more], dim=1)
        self.clear()
        return features

    def clear(self) -> None:
        """Forgets what was caught."""
        for stage in self._caught:
            self._caught[stage] = torch.empty(0)

    def remove(self) -> None:
        """Takes the hooks off the encoder."""
        for handle in self._handles:
            handle.remove()
        self.clear()


def center_crop(maps: Tensor, side: int) -> Tensor:
    """The centre of maps (..., H, W): a view (..., side, side)."""
    top, left = (maps.shape[-2] - side) // 2, (maps.shape[-1] - side) // 2
    return maps[..., top : top + side, left : left + side]


def align(features: Tensor, grid: int) -> Tensor:
    """Maps resized to the readout's grid: (B, C, H, W) -> (B, C, grid, grid), detached float32, always a new tensor."""
    resized = F.interpolate(features.detach().float(), (grid, grid), mode="bilinear", align_corners=True)
    return resized.contiguous()


def _trace(encoder: nn.Module, image_size: int) -> Trace:
    """:func:`_forward_shapes`, with an error that says which image size would work."""
    try:
        return _forward_shapes(encoder, image_size)
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


def _forward_shapes(encoder: nn.Module, image_size: int) -> Trace:
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


def _cuts(trace: Trace) -> list[int]:
    """Indices of the 4-D outputs that every path from the image to the end passes through, in order.

    A node is such a cut if (paths from the end to it) x (paths from it to the image) = all paths. Of the modules that
    give the same output the outermost is taken; one that is called several times in a pass cannot be tapped.
    """
    outputs, image_node, end_node = trace.calls, trace.image, trace.end
    if end_node is None:
        return []
    order: list[Any] = []  # every node after those that it needs
    seen, stack = set(), [(end_node, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    to_image: Counter[Any] = Counter({image_node: 1})
    for node in order:
        if node is not image_node:
            to_image[node] = sum(to_image[n] for n, _ in node.next_functions if n is not None)
    from_end: Counter[Any] = Counter({end_node: 1})
    for node in reversed(order):
        for n, _ in node.next_functions:
            if n is not None:
                from_end[n] += from_end[node]
    total = to_image[end_node]
    calls = Counter(output.layer for output in outputs)
    chosen: dict[Any, int] = {}
    for i, output in enumerate(outputs):
        node = output.node
        is_cut = node in seen and total > 0 and from_end[node] * to_image[node] == total
        if is_cut and len(output.shape) == 4 and calls[output.layer] == 1:
            chosen[node] = i
    return sorted(chosen.values())
