"""A network's position embeddings: list them, remove or shuffle them, and put them back."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from padprobe.errors import check_name

EmbeddingMode = Literal["learned", "none", "shuffled"]
EMBEDDING_MODES: tuple[str, ...] = get_args(EmbeddingMode)

_ABSOLUTE = re.compile(r"(?!query)(\w+_)?pos(ition(al)?)?_?(emb|enc)\w*|(patch|pixel)_pos|pe")
_RELATIVE = re.compile(r"(\w+_)?rel(ative)?_pos\w*|(height|width)_rel|attention_biases")
_RELATIVE_MLP = re.compile(r"cpb_mlp|meta_mlp|continuous_position_bias_mlp")  # Swin v2's
_RELATIVE_IN = {("RelPosMlp", "mlp"), ("GPSA", "pos_proj")}  # classes in which a layer of this name computes a bias
_ROTARY = re.compile(r"(rotary|rope)\w*embed|ropeattention", re.IGNORECASE)
_SINCOS = "PositionalEncodingFourier"  # XCiT's and EdgeNeXt's
_MOST_PREFIX_TOKENS = 32
_CHANGES = "_padprobe_position_embedding"  # of a layer, while it is changed: how, by attribute
_ORIGINAL = "_padprobe_original_class"


class PositionEmbedding(NamedTuple):
    """One position embedding: its dotted name, its kind ("absolute", "relative", "rotary" or "sincos"), and its shape,
    which is () where it is computed."""

    name: str
    kind: str
    shape: tuple[int, ...]


class _Place(NamedTuple):
    """Where an embedding is: an attribute of a layer, or, where ``attribute`` is "", the layer's own output."""

    row: PositionEmbedding
    layer: nn.Module
    attribute: str


class _Change(NamedTuple):
    """How a tensor is read: as zeros, or with its positions permuted.

    ``axes``: the neighbouring axes of the positions; None for an output whose last axis alone has no positions.
    ``first``, ``last``: how many positions at either end stay in place.
    """

    mode: str
    axes: tuple[int, ...] | None = None
    first: int = 0
    last: int = 0


def list_position_embedding(module: nn.Module) -> list[PositionEmbedding]:
    """Every position embedding of a network, in the order of definition; [] for a network without any.

    Known by their names and types: absolute embeddings (``pos_embed`` and its relatives, parameters, buffers and
    ``nn.Embedding``), tables of relative biases (Swin, MaxViT, BEiT, CoAtNet, LeViT, EfficientFormer; ``rel_pos_h`` of
    SAM and MViT), relative biases that an MLP computes (Swin v2), rotary embeddings, and the sines and cosines of XCiT
    and EdgeNeXt. A convolution that encodes position (PVTv2, the PEG of CPVT and Twins, the depthwise convolutions of
    CoAtNet) does so by its padding: see :func:`~padprobe.network.padding.list_padding`. An embedding that
    ``forward`` computes under another name cannot be seen. To find one, shuffle an image's patches: without position
    embedding a transformer's tokens are the same, shuffled.

    Example:
        >>> network = nn.Module()
        >>> network.pos_embed = nn.Parameter(torch.zeros(1, 197, 192))
        >>> list_position_embedding(network)
        [PositionEmbedding(name='pos_embed', kind='absolute', shape=(1, 197, 192))]
    """
    return [place.row for place in _places(module)]


def set_position_embedding(module: nn.Module, mode: str) -> nn.Module:
    """Changes in place which position embedding a network sees.

    The parameters themselves are not touched, only what ``forward`` reads of them: they keep their values, their
    gradients' flags and their names in ``state_dict``, weights can be loaded in any mode, and copies have the mode of
    the original. Set "learned" before you change a network's input size.

    Args:
        module: a network with position embeddings.
        mode: ``"learned"``: as it was built or trained. ``"none"``: absolute embeddings and relative biases are 0; a
            relative bias that an MLP computes is the same for all pairs of positions, which the softmax cancels.
            ``"shuffled"``: absolute embeddings are exchanged between the patches, and the entries of relative tables
            between the offsets, by a fixed permutation; those of class and other prefix tokens stay in place. This is
            no control for position: each patch keeps an embedding of its own, from which a readout that is trained
            on it reads its place. What is lost is the order that the training gave to the embeddings.

    Returns:
        ``module`` itself. Modes can be set one after another.

    Raises:
        ValueError: for an unknown mode; for a network without any position embedding, or with a rotary one, which
            cannot be removed; and for a shape in which the positions to shuffle are not clear.

    Source: ours. Without position embedding, self-attention does not know the order of its tokens (Vaswani et al. 2017,
    section 3.5; Dosovitskiy et al. 2021, appendix D.4).

    Example:
        >>> network = nn.Module()
        >>> network.pos_embed = nn.Parameter(torch.ones(1, 16, 8))
        >>> set_position_embedding(network, "none").pos_embed.sum().item(), len(network.state_dict()["pos_embed"][0])
        (0.0, 16)
        >>> set_position_embedding(network, "learned").pos_embed.sum().item()
        128.0
    """
    check_name(mode, EMBEDDING_MODES, "position embedding")
    changes: dict[nn.Module, dict[str, _Change]] = {}
    if mode != "learned":
        places = list(_places(module))
        _refuse(module, places, mode)
        for place in places:
            how = _Change("none") if mode == "none" else _shuffling(module, place)
            changes.setdefault(place.layer, {})[place.attribute] = how
    for layer in list(module.modules()):
        if layer in changes or _CHANGES in vars(layer):
            _change_layer(layer, changes.get(layer, {}))
    return module


def position_embedding_of(module: nn.Module) -> str:
    """The mode of a network's position embeddings: "" where it has none, "mixed" if they differ."""
    modes = set()
    for place in _places(module):
        change = vars(place.layer).get(_CHANGES, {}).get(place.attribute)
        modes.add(change.mode if change else "learned")
    return modes.pop() if len(modes) == 1 else "mixed" if modes else ""


@contextmanager
def as_learned(module: nn.Module) -> Iterator[None]:
    """A context in which a network has its own position embeddings, as when they are drawn. Afterwards it has its mode
    again."""
    before = {layer: vars(layer)[_CHANGES] for layer in module.modules() if _CHANGES in vars(layer)}
    for layer in before:
        _change_layer(layer, {})
    try:
        yield
    finally:
        for layer, changes in before.items():
            _change_layer(layer, changes)


def _places(module: nn.Module) -> Iterator[_Place]:
    """Where a network's position embeddings are."""
    rotary: list[str] = []
    classes: dict[str, str] = {}
    for name, layer in module.named_modules():
        parent, _, last = name.rpartition(".")
        classes[name] = type(layer).__name__
        if any(name.startswith(f"{outer}.") for outer in rotary):
            continue
        if _ROTARY.search(classes[name]):
            rotary.append(name)
            yield _Place(PositionEmbedding(name, "rotary", ()), layer, "")
        elif classes[name] == _SINCOS:
            yield _Place(PositionEmbedding(name, "sincos", ()), layer, "")
        elif _RELATIVE_MLP.fullmatch(last) or (classes[parent], last) in _RELATIVE_IN:
            yield _Place(PositionEmbedding(name, "relative", ()), layer, "")
        elif isinstance(layer, nn.Embedding) and _ABSOLUTE.fullmatch(last):
            yield _Place(PositionEmbedding(f"{name}.weight", "absolute", tuple(layer.weight.shape)), layer, "weight")
        else:
            for attribute, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
                if tensor is not None and tensor.is_floating_point() and (kind := _kind(layer, attribute, tensor)):
                    full = f"{name}.{attribute}" if name else attribute
                    yield _Place(PositionEmbedding(full, kind, tuple(tensor.shape)), layer, attribute)


def _kind(layer: nn.Module, attribute: str, tensor: Tensor) -> str:
    """ "absolute" or "relative"; "" for a tensor that is no position embedding."""
    if tensor.ndim < 2:
        return ""
    if _RELATIVE.fullmatch(attribute):
        return "relative"
    if _ABSOLUTE.fullmatch(attribute):
        return "relative" if hasattr(layer, "rel_pos_indices") else "absolute"  # a LambdaNet's are between positions
    return ""


def _refuse(module: nn.Module, places: list[_Place], mode: str) -> None:
    """Raises ValueError where a network's position embeddings cannot be changed."""
    kind = type(module).__name__
    if not places:
        raise ValueError(
            f"{kind} has no position embedding that could be set to {mode!r}: its position, if any, comes from "
            "elsewhere, such as padding. Leave position_embedding out, or try padding='valid'"
        )
    for row, layer, _ in places:
        if row.kind == "rotary":
            raise ValueError(
                f"{kind} has a rotary position embedding, {row.name!r} ({type(layer).__name__}), which turns queries "
                f"and keys and cannot be set to {mode!r}: leave position_embedding out"
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(f"{row.name!r} is in a scripted module, which cannot be changed: use the network itself")


def _shuffling(module: nn.Module, place: _Place) -> _Change:
    """Which axes of an embedding are positions, and which positions are not patches."""
    (name, kind, shape), layer, attribute = place
    if kind == "sincos":
        return _Change("shuffled", (2, 3))  # (B, C, H, W)
    if kind == "relative" and not attribute:
        return _Change("shuffled")
    if kind == "relative":
        if attribute == "attention_biases":  # (heads, offsets)
            return _Change("shuffled", (1,))
        if attribute.endswith("_table") and len(shape) == 3:  # (heads, 2h - 1, 2w - 1)
            return _Change("shuffled", (1, 2))
        if len(shape) == 2:  # (offsets, heads or channels)
            window = getattr(layer, "window_size", None)
            sides = tuple(window) if isinstance(window, (tuple, list)) else ()
            offsets = math.prod(2 * side - 1 for side in sides) if sides else shape[0]
            rest = shape[0] - offsets  # BEiT's last three rows are those of the class token
            return _Change("shuffled", (0,), last=max(rest, 0) if attribute.endswith("_table") else 0)
    elif len(shape) == 2 or (len(shape) == 3 and shape[0] == 1):  # (1, tokens, channels)
        prefix = _prefix_tokens(module, shape[-2])
        if prefix is not None:
            return _Change("shuffled", (len(shape) - 2,), first=prefix)
    elif len(shape) == 4 and shape[0] == 1 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
        return _Change("shuffled", (1, 2) if shape[1] == shape[2] else (2, 3))  # (1, H, W, C) or (1, C, H, W)
    raise ValueError(
        f"position embedding {name!r} has shape {shape}, in which the patches' positions are not clear, so it cannot "
        "be shuffled: set it to 'none'"
    )


def _prefix_tokens(module: nn.Module, tokens: int) -> int | None:
    """How many of an embedding's tokens come before the patches; None where that is not clear.

    Known from the number of patches that a layer of the network states, else from the squares below ``tokens``.
    """
    stated = [getattr(layer, "num_patches", None) for layer in module.modules()]
    counts = [count for count in stated if isinstance(count, int)]
    counts = counts or [side * side for side in range(1, math.isqrt(tokens) + 1)]
    rest = [tokens - count for count in counts if 0 <= tokens - count <= _MOST_PREFIX_TOKENS]
    return min(rest, default=None)


def _change_layer(layer: nn.Module, changes: dict[str, _Change]) -> None:
    """Sets how a layer's attributes are read; no changes restore the layer as it was.

    The layer gets a subclass of its class, as in ``torch.nn.utils.parametrize``, but its parameters and their names
    stay.
    """
    original: Any = vars(type(layer)).get(_ORIGINAL, type(layer))
    vars(layer).pop(_CHANGES, None)
    layer.__class__ = _changed_class(original, tuple(changes)) if changes else original
    if changes:
        vars(layer)[_CHANGES] = changes
    if isinstance(vars(layer).get("attention_bias_cache"), dict):  # LeViT's, computed once in evaluation mode
        layer.attention_bias_cache = {}  # type: ignore[assignment]


@functools.cache
def _changed_class(original: Any, attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass that reads some of its attributes, or ("") its own output, as :data:`_CHANGES` says."""
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce_ex__": lambda self, protocol: (_bare, (original, attributes), self.__getstate__()),  # for pickle
        _ORIGINAL: original,
    }
    for attribute in attributes:
        if attribute:
            namespace[attribute] = property(functools.partial(_read, attribute))
        else:
            namespace["forward"] = lambda self, *args, **kwargs: _changed(
                original.forward(self, *args, **kwargs), vars(self).get(_CHANGES, {}).get("")
            )
    return type(original.__name__, (original,), namespace)


def _bare(original: Any, attributes: tuple[str, ...]) -> nn.Module:
    """An empty module of a changed class."""
    changed = _changed_class(original, attributes)
    return changed.__new__(changed)


def _read(attribute: str, layer: nn.Module) -> Tensor | None:
    """The value of a changed layer's parameter or buffer."""
    tensors = layer._parameters if attribute in layer._parameters else layer._buffers
    return _changed(tensors[attribute], vars(layer).get(_CHANGES, {}).get(attribute))


def _changed(tensor: Tensor | None, change: _Change | None) -> Tensor | None:
    if tensor is None or change is None:
        return tensor
    if change.mode == "none":
        return torch.zeros_like(tensor)
    batch = int(tensor.ndim == 4)
    axes = change.axes or tuple(range(batch, tensor.ndim - 1))
    flat = tensor.flatten(axes[0], axes[-1])
    order = torch.tensor(_order(flat.shape[axes[0]], change.first, change.last), device=tensor.device)
    return flat.index_select(axes[0], order).reshape(tensor.shape)


@functools.lru_cache(maxsize=64)
def _order(n: int, first: int, last: int) -> tuple[int, ...]:
    """A fixed permutation of n positions, of which some at either end stay in place."""
    middle = range(first, n - last)
    return (*range(first), *random.Random(0).sample(middle, len(middle)), *range(n - last, n))
