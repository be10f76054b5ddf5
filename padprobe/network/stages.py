"""Finds the layers that are the stages f1..fn of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from padprobe.network.padding import as_built
from padprobe.network.trace import Trace, trace_forward


def find_stages(encoder: nn.Module, image_size: int = 224) -> list[str]:
    """The dotted names of an encoder's stages f1..fn: the last output before each spatial reduction.

    An output counts only if all information flows through it: not inside a residual block, whose shortcut goes around
    it. There must also be a convolution between two reductions. VGG16: ``features.3, 8, 15, 22, 29``; ResNet: ``relu,
    layer1, layer2, layer3, layer4``. No layer is run. The answer does not depend on :func:`~padprobe.set_padding`.

    Args:
        encoder: a CNN that takes images (B, C, S, S) and returns a tensor, or a list or dictionary of tensors with the
            deepest last.
        image_size: S, the size to trace with.

    Raises:
        ValueError: if the image is too small for the encoder (with the smallest size that works), or if no stage is
            found (no reduction, no 4-D output): pass the names of the layers instead.

    Source: paper, section 3.1 (f_enc: the features before each pooling layer).

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)
        ... )
        >>> find_stages(network, image_size=32)
        ['1', '4']
    """
    with as_built(encoder):
        trace = trace_forward(encoder, image_size)
    outputs, cuts = trace.calls, _cuts(trace)
    stages: list[str] = []
    has_conv = False  # a convolution since the last reduction
    previous = -1
    for cut, after in zip(cuts, [*cuts[1:], None], strict=False):
        has_conv = has_conv or any(output.is_conv for output in outputs[previous + 1 : cut + 1])
        previous = cut
        size = max(outputs[cut].shape[-2:])
        reduces = after is not None and max(outputs[after].shape[-2:]) <= 0.75 * size
        if has_conv and size > 1 and (reduces or after is None):
            stages.append(outputs[cut].layer)
        if reduces:
            has_conv = False
    if not stages:
        layers = ", ".join(dict.fromkeys(output.layer for output in outputs if len(output.shape) == 4)) or "none"
        raise ValueError(
            f"no stages found in {type(encoder).__name__}: it has no spatial reduction that all information flows "
            f"through. Name the layers to probe instead (stages=[...]). Layers with 4-D outputs: {layers}"
        )
    return stages


def choose_layers(encoder: nn.Module, stages: str | Sequence[str], image_size: int = 224) -> list[str]:
    """The layers of ``"auto"`` (:func:`find_stages`), of ``"paper"`` or of a list, which is returned as it is.

    The paper's are those of :func:`find_stages`, but only ``layer1 .. layer4`` of a ResNet.

    Raises:
        ValueError: for any other word, or a layer that is named twice.

    Source: the authors' code (the paper's text draws five stages for both networks).
    """
    if not isinstance(stages, str):
        if len(set(stages)) < len(stages):
            raise ValueError(f"stages are {', '.join(stages)}; expected each layer once")
        return list(stages)
    if stages not in ("auto", "paper"):
        raise ValueError(f"stages is {stages!r}; expected 'auto', 'paper' or a list of layers such as [{stages!r}]")
    layers = find_stages(encoder, image_size)
    blocks = [layer for layer in layers if layer.split(".")[-1] in ("layer1", "layer2", "layer3", "layer4")]
    return blocks if stages == "paper" and len(blocks) == 4 else layers


def _cuts(trace: Trace) -> list[int]:
    """Indices, in order, of the 4-D outputs that every path from the image to the end passes through.

    A node is such a cut if (paths from it to the end) x (paths from the image to it) = all paths. If several modules
    give the same output, the outermost counts. A module that is called several times in a pass cannot be tapped.
    """
    if trace.end is None:
        return []
    order = _topological(trace.end)
    to_image: Counter[Any] = Counter({trace.image: 1})
    for node in order:
        if node is not trace.image:
            to_image[node] = sum(to_image[parent] for parent in _inputs(node))
    from_end: Counter[Any] = Counter({trace.end: 1})
    for node in reversed(order):
        for parent in _inputs(node):
            from_end[parent] += from_end[node]
    total = to_image[trace.end]
    times_called = Counter(call.layer for call in trace.calls)
    reached = set(order)
    chosen: dict[Any, int] = {}
    for i, (layer, shape, node, _) in enumerate(trace.calls):
        is_cut = node in reached and total > 0 and from_end[node] * to_image[node] == total
        if is_cut and len(shape) == 4 and times_called[layer] == 1:
            chosen[node] = i
    return sorted(chosen.values())


def _topological(end: Any) -> list[Any]:
    """All nodes of an autograd graph that lead to ``end``, each after its inputs."""
    order: list[Any] = []
    seen, stack = set(), [(end, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in _inputs(node))
    return order


def _inputs(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]
