"""Which layers are the stages f1..fn of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from padprobe.network.padding import as_built
from padprobe.network.trace import Trace, trace_forward


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
        trace = trace_forward(encoder, image_size)
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


def choose_layers(encoder: nn.Module, stages: str | Sequence[str], image_size: int) -> list[str]:
    """The names of the stages f1..fn, see ``stages`` of :func:`probe_encoder`."""
    if not isinstance(stages, str):
        return list(stages)
    if stages not in ("auto", "paper"):
        raise ValueError(f"stages is {stages!r}; expected 'auto', 'paper' or a list of layers such as [{stages!r}]")
    return (find_stages if stages == "auto" else paper_stages)(encoder, image_size)
