"""Finds the layers that are the stages f1..fn of a network."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from padprobe.maps import Size
from padprobe.network.forward import Output, Trace, trace_forward
from padprobe.network.layout import fitting_layouts, map_size
from padprobe.network.padding import as_built


def find_stages(encoder: nn.Module, image_size: Size = 224) -> list[str]:
    """The dotted names of an encoder's stages f1..fn: the last output before each spatial reduction.

    An output counts only if all information flows through it: not inside a residual block, whose shortcut goes around
    it. There must also be a convolution, a linear layer or an attention between two reductions. Where a block does the
    reduction, the output before the block counts (MobileNetV2: ``features.1``, not the expanded channels inside
    ``features.2``), and a LayerNorm at the end of a stage does not. Where timm's ``feature_info`` knows the stages,
    they are these. A network that reduces only once, such as a ViT, has the outputs of its blocks at even depths, the
    last included. VGG16: ``features.3, 8, 15, 22, 29``; ResNet: ``relu, layer1, layer2, layer3, layer4``; timm's ViT:
    ``blocks.1, blocks.3, ..., blocks.11``. No layer is run. The answer does not depend on
    :func:`~padprobe.set_padding`.

    Args:
        encoder: a network that takes images (B, C, H, W) and returns a tensor, or a list or dictionary of tensors with
            the deepest last.
        image_size: the size in pixels to trace with.

    Raises:
        ValueError: if the image is too small for the encoder (with the smallest size that works), or if no stage is
            found (no reduction, no output that is a map): pass the names of the layers instead.

    Source: paper, section 3.1 (f_enc: the features before each pooling layer); transformers: ours.

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)
        ... )
        >>> find_stages(network, image_size=32)
        ['1', '4']
    """
    with as_built(encoder):
        trace = trace_forward(encoder, image_size)
    if stages := _library_stages(encoder, trace):
        return stages
    nodes = _cut_nodes(trace)
    for call in trace.calls:
        if call.node in nodes and len(call.shape) == 3 and call.shape[1] == 2 != call.shape[0]:  # 2 images are traced
            raise ValueError(
                f"layer {call.layer!r} of {type(encoder).__name__} gives (tokens, images, channels): images "
                "on the second axis are not supported. Build it with batch_first=True, or name the layers to probe "
                "(stages=[...]) whose first axis are the images"
            )
    stages = _before_reductions(encoder, trace, _cuts(trace, nodes))
    if len(stages) == 1 and len(blocks := _blocks(trace, nodes)) > 1:
        return [block for i, block in enumerate(blocks, 1) if i % 2 == 0 or i == len(blocks) or len(blocks) == 2]
    sides = {call.layer: max(map_size(call, trace.size) or (0,)) for call in trace.calls}
    deeper = [layer for layer, side in sides.items() if stages and 1 < side <= sides[stages[0]] / 2]
    if len(stages) == 1 and deeper:
        raise ValueError(
            f"only one stage of {type(encoder).__name__} passes on all information, {stages[0]!r}, but it has smaller "
            f"maps, such as {deeper[-1]!r}, around which shortcuts go: probe its encoder, or name the layers "
            "(stages=[...])"
        )
    if not stages:
        layers = ", ".join(dict.fromkeys(call.layer for call in trace.calls if map_size(call, trace.size))) or "none"
        raise ValueError(
            f"no stages found in {type(encoder).__name__}: it has no spatial reduction that all information flows "
            f"through. Name the layers to probe instead (stages=[...]). Layers whose outputs may be maps: {layers}"
        )
    return stages


def find_blocks(encoder: nn.Module, image_size: Size = 224) -> list[str]:
    """The dotted names of all blocks through which all information flows, such as those of a ViT or a ResNet.

    A block is a module with at least two convolutions or linear layers, one of several of its class.

    Raises:
        ValueError: if there are none: a VGG has no blocks.

    Example:
        >>> block = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> class ViT(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(block(), block(), block())
        ...     def forward(self, image):
        ...         return self.blocks(self.patches(image).flatten(2).mT)
        >>> find_blocks(ViT(), image_size=16), find_stages(ViT(), image_size=16)
        (['blocks.0', 'blocks.1', 'blocks.2'], ['blocks.1', 'blocks.2'])
    """
    with as_built(encoder):
        trace = trace_forward(encoder, image_size)
    if blocks := _blocks(trace, _cut_nodes(trace)):
        return blocks
    raise ValueError(
        f"{type(encoder).__name__} has no blocks that all information flows through (stages='each_block'): use "
        "stages='auto', or name the layers"
    )


def choose_layers(encoder: nn.Module, stages: str | Sequence[str], image_size: Size = 224) -> list[str]:
    """The layers of ``"auto"``, ``"each_block"`` (:func:`find_blocks`), ``"paper"``, or a list, returned as it is.

    ``"auto"`` is :func:`find_stages`. The paper's are the same, but only ``layer1 .. layer4`` of a ResNet.

    Raises:
        ValueError: for any other word, or a layer that is named twice.

    Source: the authors' code (the paper's text draws five stages for both networks).
    """
    if not isinstance(stages, str):
        if len(set(stages)) < len(stages):
            raise ValueError(f"stages are {', '.join(stages)}; expected each layer once")
        return list(stages)
    if stages == "each_block":
        return find_blocks(encoder, image_size)
    if stages not in ("auto", "paper"):
        raise ValueError(
            f"stages is {stages!r}; expected 'auto', 'each_block', 'paper' or a list of layers such as [{stages!r}]"
        )
    layers = find_stages(encoder, image_size)
    blocks = [layer for layer in layers if layer.split(".")[-1] in ("layer1", "layer2", "layer3", "layer4")]
    return blocks if stages == "paper" and len(blocks) == 4 else layers


def _library_stages(encoder: nn.Module, trace: Trace) -> list[str]:
    """The stages that timm's ``feature_info`` names, of timm's networks and of what wraps them; else an empty list."""
    calls = {call.layer: call for call in trace.calls}
    root, module = "", encoder
    while not hasattr(module, "feature_info") and isinstance(getattr(module, "model", None), nn.Module):
        root, module = f"{root}model.", module.model  # type: ignore[assignment]  # smp's encoders hold timm's network
    info: Any = getattr(module, "feature_info", [])
    known: list[dict[str, Any]] = info.get_dicts() if hasattr(info, "get_dicts") else info
    if not isinstance(known, list) or len({entry["reduction"] for entry in known}) < 2:
        return []
    if isinstance(getattr(module, "model", None), nn.Module):  # timm's wrapper around a whole network
        root = f"{root}model."
    cuts = [trace.calls[i] for i in _cuts(trace, _cut_nodes(trace))]
    stages = []
    for entry in known:
        name = root + entry["module"]
        flat = root + entry["module"].replace(".", "_", 1)  # in wrappers that are flattened by one level
        named = [calls[n] for n in (name, flat) if n in calls]
        fitting = [call for call in (*named, *reversed(cuts)) if _agrees(call, entry, trace.size)]
        if not fitting:
            return []
        stages.append(fitting[0].layer)
    return stages if len(set(stages)) == len(stages) else []


def _agrees(call: Output, entry: dict[str, Any], size: tuple[int, int]) -> bool:
    """Whether a layer's output has the channels and the size that timm states."""
    for layout in fitting_layouts(call, size):
        sides = zip((layout.height, layout.width), size, strict=True)
        if layout.channels == entry["num_chs"] and all(abs(n - px / entry["reduction"]) < 1 for n, px in sides):
            return True
    return False


def _before_reductions(encoder: nn.Module, trace: Trace, cuts: list[int]) -> list[str]:
    """The last of the cuts before each reduction, or a whole block's before it."""
    calls, sizes = trace.calls, {i: max(map_size(trace.calls[i], trace.size) or (0,)) for i in cuts}
    stages: list[str] = []
    start = 0  # of the calls since the last reduction
    for cut, after in zip(cuts, [*cuts[1:], None], strict=False):
        if after is not None and sizes[after] > 0.75 * sizes[cut]:
            continue
        usable = [i for i in cuts if start <= i <= cut and any(_mixes(call) for call in calls[start : i + 1])]
        if usable and sizes[cut] > 1:
            chosen = _without_norm(calls, usable)
            reductions = [a for a, b in itertools.pairwise(cuts) if a >= cut and sizes[b] <= 0.75 * sizes[a]]
            stages.append(calls[_whole_block(encoder, calls, chosen, usable, reductions)].layer)
        start = cut + 1
    return stages


def _without_norm(calls: list[Output], usable: list[int]) -> int:
    """The last cut before the LayerNorm that ends a stage or begins a reduction; else the last."""
    for position in range(len(usable) - 1, 0, -1):
        if any(_mixes(call) for call in calls[usable[position] : usable[-1] + 1]):
            break
        if "layernorm" in type(calls[usable[position]].module).__name__.lower():
            return usable[position - 1]
    return usable[-1]


def _whole_block(encoder: nn.Module, calls: list[Output], chosen: int, usable: list[int], reductions: list[int]) -> int:
    """The last cut that is a whole block's, where ``chosen`` lies inside a block that does one reduction."""
    parts = calls[chosen].layer.split(".")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        end = next((i for i, call in enumerate(calls) if call.layer == name), chosen)
        if type(encoder.get_submodule(name)) is nn.Sequential or sum(i < end for i in reductions) != 1:
            continue
        begin = next(i for i, call in enumerate(calls) if call.layer.startswith(f"{name}."))
        inside = [i for i in usable if begin <= i <= chosen and _is_block(calls, calls[i])]
        before = [i for i in usable if i < begin]
        return (inside or before or [chosen])[-1]
    return chosen


def _blocks(trace: Trace, nodes: set[Any]) -> list[str]:
    """The innermost blocks whose output is a cut, of the classes that occur more than once."""
    once = Counter(call.layer for call in trace.calls)
    blocks = [
        call
        for call in trace.calls
        if call.node in nodes
        and once[call.layer] == 1
        and map_size(call, trace.size)
        and not isinstance(call.module, (nn.Sequential, nn.ModuleList))
        and _is_block(trace.calls, call)
    ]
    inner = [a for a in blocks if not any(b.layer.startswith(f"{a.layer}.") for b in blocks)]
    counts = Counter(type(call.module) for call in inner)
    return [call.layer for call in inner if counts[type(call.module)] > 1]


def _is_block(calls: list[Output], call: Output) -> bool:
    return sum(_mixes(inner) for inner in calls if inner.layer.startswith(f"{call.layer}.")) > 1


def _mixes(call: Output) -> bool:
    """Whether a layer is a convolution, a linear layer or an attention, and works on a map, not on pooled channels."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)
    return isinstance(call.module, layers) and len([n for n in call.shape[1:] if n > 1]) > 1


def _cuts(trace: Trace, nodes: set[Any]) -> list[int]:
    """Indices, in order, of the outputs that may be maps and that every path from the image to the end passes through.

    If several modules give the same output, the outermost counts that returns nothing else, and never an Identity
    behind it. The image itself, which some encoders return first, is no stage. A module that is called several times
    in a pass cannot be tapped.
    """
    times_called = Counter(call.layer for call in trace.calls)
    chosen: dict[Any, int] = {}
    for i, call in enumerate(trace.calls):
        is_cut = call.node in nodes and call.node is not trace.image
        is_repeated = call.node in chosen and (isinstance(call.module, nn.Identity) or not call.is_single)
        if is_cut and not is_repeated and times_called[call.layer] == 1 and map_size(call, trace.size):
            chosen[call.node] = i
    return sorted(chosen.values())


def _cut_nodes(trace: Trace) -> set[Any]:
    """The nodes of the autograd graph that every path from the image to the end passes through.

    A node is such a cut if (paths from it to the end) x (paths from the image to it) = all paths.
    """
    if trace.end is None:
        return set()
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
    return {node for node in order if total > 0 and from_end[node] * to_image[node] == total}


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
