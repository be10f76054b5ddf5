"""How a network pads: set it, list it, undo it (paper, section 4.3 and table 4: position comes from zero padding)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from padprobe.errors import check_name
from padprobe.network.cells import Alignment, Facts, look, running
from padprobe.network.fill import Sides, built_fill, built_sides, fill, is_same, partial_weight

PaddingMode = Literal["zeros", "valid", "reflect", "replicate", "circular", "symmetric", "partial"]
PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)
AXES = ("height", "width")

POOL_LAYERS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
PAD_LAYERS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
_STATE = "_padprobe_padding"  # on a layer whose padding is not the one that it was built with
_OTHER_PADDERS = ("DeformConv2d", "Unfold", "Conv1d", "Conv3d", "MaxPool3d", "AvgPool3d", "MaxPool1d", "AvgPool1d")
"""Classes of layers that may pad and that :func:`set_padding` cannot change."""
_FORWARD = "_padprobe_forward"  # on a module with shortcuts, while layers in it do not pad
_ATTRIBUTES = ("padding", "padding_mode", "_reversed_padding_repeated_twice", "same_pad")
_FACTS: WeakKeyDictionary[nn.Module, tuple[Any, Facts]] = WeakKeyDictionary()


class _State(NamedTuple):
    """The padding that a layer was built with, and the one that it has."""

    attributes: dict[str, Any]
    fill: str
    modes: tuple[str, str]  # along height and width: "built", or one of PADDING_MODES
    aligned: bool  # the layer is patched so that an Alignment knows what it does not pad


class LayerPadding(NamedTuple):
    """What one layer pads: its dotted name, the pixels added to each side (height, width), and the mode.

    Where the two sides of an axis differ, its number is a pair: ((0, 1), 2) is none above, one below, 2 left and right.
    """

    layer: str
    padding: tuple[int | Sides, int | Sides]
    mode: str


def set_padding(module: nn.Module, mode: str, axis: str | None = None) -> nn.Module:
    """Changes in place how every 2-D convolution, pooling and padding layer of a network pads. Weights stay.

    Args:
        module: any network. ``ConvTranspose2d``, whose padding crops its output, is left alone.
        mode: the amounts are always those that a layer was built with (those of ``padding="same"``, timm's
            ``Conv2dSame`` and padding layers may differ between the two sides).

            - ``"zeros"``: filled with zeros.
            - ``"valid"``: no padding, so maps shrink. Where shortcuts and branches meet, they are cropped to the cells
              that they share, so that each cell is one of the padded network's: see
              :class:`~padprobe.network.cells.Alignment`.
            - ``"reflect"``, ``"replicate"``, ``"circular"``: filled in torch's way.
            - ``"symmetric"``: filled with the mirror image, the edge repeated (numpy's ``symmetric``).
            - ``"partial"``: filled with zeros, and outputs (without the bias) are multiplied by the window's size over
              its cells in the image (Liu et al. 2018), so that the border is not dimmer.

            Where the values never enter the output (max pooling), only ``"valid"`` changes something.
        axis: ``"height"`` or ``"width"`` sets the padding along this axis alone; the other axis stays as it is now.

    Returns:
        ``module`` itself. Modes can be set one after another: each layer remembers what it was built with.

    Raises:
        ValueError: before anything is changed, for an unknown mode or axis, and for a layer whose padding cannot be
            changed, with its name: one that pads in its own ``forward`` (``F.pad``, as Swin does). Such calls are found
            by a forward pass without data, if the network takes an image (B, C, H, W).

    Source: paper, section 4.3; shortcuts without padding and single axes are ours.

    Example:
        >>> list_padding(set_padding(nn.Conv2d(3, 8, 3, padding=1), "circular"))
        [LayerPadding(layer='', padding=(1, 1), mode='circular')]
        >>> list_padding(set_padding(nn.Conv2d(3, 8, 3, padding=1), "valid"))
        []
        >>> list_padding(set_padding(nn.Conv2d(3, 8, 3, padding=1), "valid", axis="width"))
        [LayerPadding(layer='', padding=(1, 0), mode='height zeros, width valid')]
    """
    check_name(mode, PADDING_MODES, "padding mode")
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise ValueError("the network is scripted, so its padding cannot be set: pass it before it is scripted")
    if isinstance(module, torch._dynamo.OptimizedModule):
        if mode == "valid" and _facts(module._orig_mod).shortcuts:
            raise ValueError("the network is compiled and has shortcuts: set its padding before torch.compile")
        set_padding(module._orig_mod, mode, axis)
        return module
    if axis is not None:
        check_name(axis, AXES, "axis")
    _check_settable(module, mode)
    for layer in _padders(module):
        before = _modes(layer)
        new = _mode_of(layer, mode)
        modes = (before[0] if axis == "width" else new, before[1] if axis == "height" else new)
        _set_layer(layer, modes)
    _align(module)
    return module


def list_padding(module: nn.Module) -> list[LayerPadding]:
    """Every convolution, pooling and padding layer that pads, in the order of definition. Unpadded networks give [].

    Layers that work out their padding from the size of their input (timm's ``Conv2dSame``) are listed with the most
    that they can pad. The mode of a pooling layer whose padding never enters its output is its class.
    """
    rows = []
    for name, layer in module.named_modules():
        if _pads(layer):
            sides = current_sides(layer)
            if any(map(any, sides)):
                rows.append(LayerPadding(name, tuple(a if a == b else (a, b) for a, b in sides), _shown(layer)))  # type: ignore[arg-type]
    return rows


def padding_of(encoder: nn.Module) -> str:
    """The padding mode of a network's convolutions and padding layers: "valid" if none pads, "mixed" if they differ."""
    rows = list_padding(encoder)
    modes = {row.mode for row in rows if not isinstance(encoder.get_submodule(row.layer), POOL_LAYERS)}
    return modes.pop() if len(modes) == 1 else "mixed" if modes else "valid"


@contextmanager
def as_built(module: nn.Module, mode: str | None = None) -> Iterator[None]:
    """A context in which a network pads as it was built to, or in another mode. Afterwards it pads as before."""
    if mode is not None:
        _check_settable(module, mode)
    with _restored(module):
        if mode is not None:
            for layer in _padders(module):
                _set_layer(layer, (_mode_of(layer, mode),) * 2)
            _align(module)
        yield


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """A context at whose start a network pads as it was built to, and at whose end it pads as before."""
    states = [(layer, state.modes, state.aligned) for layer in _padders(module) if (state := _state(layer))]
    wrapped = [part for part in module.modules() if _FORWARD in vars(part)]
    _unwrap(module)
    for layer, *_ in states:
        _set_layer(layer, ("built", "built"))
    try:
        yield
    finally:
        _unwrap(module)
        for layer in _padders(module):
            _set_layer(layer, ("built", "built"))
        for layer, modes, aligned in states:
            _set_layer(layer, modes, aligned)
        for part in wrapped:
            _wrap(part)


def current_sides(layer: nn.Module, size: Any = None) -> tuple[Sides, Sides]:
    """What a layer pads now, along height and width, before and after; of an input of this size (height, width).

    Example:
        >>> current_sides(set_padding(nn.Conv2d(3, 8, 3, padding=1), "valid", axis="height"))
        ((0, 0), (1, 1))
    """
    state = _state(layer)
    padding = state.attributes["padding"] if state else getattr(layer, "padding", 0)
    sides = built_sides(layer, padding, size) if state is None else _built_sides(layer, state, size)
    return tuple((0, 0) if mode == "valid" else pair for mode, pair in zip(_modes(layer), sides, strict=True))  # type: ignore[return-value]


def unpadded(layer: nn.Module, maps: Tensor) -> tuple[Tensor, tuple[Sides, Sides]]:
    """A layer's input, and the padding that it really gets, where the layer may pad less than it was built to.

    In an :class:`~padprobe.network.cells.Alignment`, the maps remember what is missing.
    """
    alignment, state = running(), _state(layer)
    size = [axis.full for axis in alignment.cells(maps)] if alignment else maps.shape[-2:]
    sides = current_sides(layer, size)
    if alignment and state:
        built = _built_sides(layer, state, size)
        missing = [b if mode == "valid" else (0, 0) for mode, b in zip(state.modes, built, strict=True)]
        maps = alignment.without_padding(maps, missing)
    return maps, sides


def aligned(module: nn.Module) -> AbstractContextManager[Alignment | None]:
    """A context in which the maps of a network remember their cells, where shortcuts in it meet without padding."""
    return Alignment() if any(_FORWARD in vars(part) for part in module.modules()) else nullcontext()


def has_shortcuts(module: nn.Module) -> bool:
    """Whether maps that went through different windows meet in a network."""
    return bool(_facts(module).shortcuts)


def _pads(layer: nn.Module) -> bool:
    """Whether the padding of a layer is known, and can be set."""
    return isinstance(layer, (nn.Conv2d, *POOL_LAYERS, *PAD_LAYERS)) and hasattr(layer, "padding")


def _padders(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if _pads(layer))


def _state(layer: nn.Module) -> _State | None:
    return getattr(layer, _STATE, None)


def _modes(layer: nn.Module) -> tuple[str, str]:
    state = _state(layer)
    return state.modes if state else ("built", "built")


def _shown(layer: nn.Module) -> str:
    """The mode of a layer, for people."""
    state = _state(layer)
    built = (state.fill if state else built_fill(layer)) or type(layer).__name__
    if isinstance(layer, POOL_LAYERS) and state is None:
        return type(layer).__name__
    modes = [built if mode == "built" else mode for mode in _modes(layer)]
    return modes[0] if modes[0] == modes[1] else f"height {modes[0]}, width {modes[1]}"


def _mode_of(layer: nn.Module, mode: str) -> str:
    """The mode that a layer takes where the network's is ``mode``: "built" where this is how it was built."""
    state = _state(layer)
    built = state.fill if state else built_fill(layer)
    return "built" if mode == built or (mode != "valid" and not built) else mode


def _check_settable(module: nn.Module, mode: str) -> None:
    """Raises ValueError with the layer's name if the padding of a layer cannot be changed."""
    if mode == "zeros" and all(_mode_of(layer, mode) == "built" for layer in _padders(module)):
        return
    for name, layer in module.named_modules():
        if isinstance(layer, PAD_LAYERS) and mode == "partial":
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, which pads for another layer, so that 'partial' cannot "
                "reweigh the outputs: use a network whose convolutions do the padding (nn.Conv2d(..., padding=...))"
            )
        if _pads(layer) and "forward" in vars(layer) and not hasattr(layer, _STATE):
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) has a forward of its own, put on it from outside, so its "
                f"padding cannot be set to {mode!r}: set the padding first"
            )
        amount = getattr(layer, "padding", 0)
        if (
            not _pads(layer)
            and type(layer).__name__ in _OTHER_PADDERS
            and amount not in (0, (0, 0), (0,), (0, 0, 0), "valid")
        ):
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) pads by {amount}, which cannot be set to {mode!r}: use a "
                "network whose 2-D convolutions do the padding"
            )
    for name, function in _facts(module).pads.items():
        raise ValueError(
            f"layer {name!r} ({type(module.get_submodule(name)).__name__}) calls {function} in its forward(), which "
            f"pads where padding cannot be set to {mode!r}: use a network whose convolutions do the padding"
        )


def _facts(module: nn.Module) -> Facts:
    """What a forward pass of the network as it was built shows; kept until its layers change."""
    key = [(name, type(layer)) for name, layer in module.named_modules()]
    if module not in _FACTS or _FACTS[module][0] != key:
        with_layers = any(
            not (_pads(m) or isinstance(m, nn.Sequential)) and any(m.children()) for m in module.modules()
        )
        facts = Facts((), {})
        if with_layers or type(module).__module__.partition(".")[0] != "torch":
            with _restored(module):
                facts = look(module, _pads)
        _FACTS[module] = (key, facts)
    return _FACTS[module][1]


def _align(module: nn.Module) -> None:
    """Lets maps meet cell by cell in the modules with shortcuts, if layers in them do not pad."""
    unpadded = [layer for layer in _padders(module) if "valid" in _modes(layer)]
    _unwrap(module)
    names = _facts(module).shortcuts if unpadded else ()
    for layer in unpadded if names else ():
        _set_layer(layer, _modes(layer), True)
    for name in names:
        _wrap(module.get_submodule(name))


def _wrap(part: nn.Module) -> None:
    setattr(part, _FORWARD, vars(part).get("forward"))
    part.forward = functools.partial(_aligned_forward, part)


def _unwrap(module: nn.Module) -> None:
    for part in module.modules():
        if _FORWARD in vars(part):
            original = vars(part).pop(_FORWARD)
            del part.forward
            if original is not None:
                part.forward = original


@torch.compiler.disable  # dynamo cannot trace what maps remember: a compiled parent breaks its graph here
def _aligned_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with shortcuts whose layers do not pad."""
    original = getattr(module, _FORWARD) or functools.partial(type(module).forward, module)
    if running():
        return original(*args, **kwargs)
    with Alignment():
        return original(*args, **kwargs)


def _set_layer(layer: nn.Module, modes: tuple[str, str], aligned: bool = False) -> None:
    """Sets the modes of a layer along height and width, by its attributes if torch can, else by its forward."""
    state = _state(layer)
    if state is not None:  # as it was built
        vars(layer).pop("forward", None)
        for name, value in state.attributes.items():
            setattr(layer, name, value)
        delattr(layer, _STATE)
    if modes == ("built", "built"):
        return
    attributes = {name: getattr(layer, name) for name in _ATTRIBUTES if hasattr(layer, name)}
    state = _State(attributes, built_fill(layer), modes, aligned)
    sides = built_sides(layer, layer.padding)
    native = not isinstance(layer, PAD_LAYERS) and _set_natively(layer, modes, sides)
    setattr(layer, _STATE, state)
    if not native or aligned:
        layer.forward = functools.partial(_padded_forward, layer)


def _set_natively(layer: Any, modes: tuple[str, str], sides: tuple[Sides, Sides]) -> bool:
    """Whether attributes of a convolution or pooling layer are enough; if not, they are set so that it does not pad."""
    built = built_fill(layer)
    filled = {built if mode == "built" else mode for mode in modes if mode != "valid"}  # modes that need filling
    simple = not is_same(layer) and all(a == b for a, b in sides)
    if isinstance(layer, nn.Conv2d):
        torchs = type(layer).forward is nn.Conv2d.forward and "valid" not in modes and len(filled) == 1
        native = simple and (filled <= {"zeros"} or (torchs and filled <= {"reflect", "replicate", "circular"}))
        kept = [a if native and mode != "valid" else 0 for mode, (a, _) in zip(modes, sides, strict=True)]
        layer.padding, layer.padding_mode = tuple(kept), filled.pop() if native and filled else "zeros"  # type: ignore[assignment]
        # nn.Conv2d computes this once, when it is built, and passes it to F.pad in all modes but zeros
        layer._reversed_padding_repeated_twice = [p for p in reversed(kept) for _ in range(2)]  # type: ignore[assignment]
        if hasattr(layer, "same_pad"):
            layer.same_pad = False  # type: ignore[assignment]
    else:
        native = simple and filled <= {"", built}
        layer.padding = tuple(a if native and mode != "valid" else 0 for mode, (a, _) in zip(modes, sides, strict=True))
    return native


def _built_sides(layer: nn.Module, state: _State, size: Any) -> tuple[Sides, Sides]:
    """The padding that a layer was built with, of an input of this size."""
    if state.attributes.get("same_pad"):
        layer.same_pad = True  # type: ignore[assignment]  # is_same() looks at it
        try:
            return built_sides(layer, state.attributes["padding"], size)
        finally:
            layer.same_pad = False  # type: ignore[assignment]
    return built_sides(layer, state.attributes["padding"], size)


def _padded_forward(layer: Any, maps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a layer that torch cannot pad in its modes: the maps are padded, the layer itself pads nothing."""
    state: _State = getattr(layer, _STATE)
    alignment = running()
    maps, sides = unpadded(layer, maps)
    by_itself = not isinstance(layer, PAD_LAYERS) and any(layer.padding)
    modes = [state.fill or "constant" if mode == "built" else mode for mode in state.modes]
    added: list[Sides] = [
        (0, 0) if by_itself or mode == "valid" else pair for mode, pair in zip(modes, sides, strict=True)
    ]
    if any(map(any, added)):
        value = float("-inf") if isinstance(layer, nn.MaxPool2d) else getattr(layer, "value", 0.0)
        maps, bare = fill(maps, added, modes, value), maps
        if alignment:
            alignment.with_padding(maps, bare, added)
    if isinstance(layer, PAD_LAYERS):
        return maps
    output = _plain_forward(layer)(layer, maps, *args, **kwargs)
    if "partial" in modes:
        reweighed = [pair if mode == "partial" else (0, 0) for mode, pair in zip(modes, added, strict=True)]
        weight = partial_weight(layer, maps.shape[-2:], output.shape[-2:], reweighed).to(output)
        bias = getattr(layer, "bias", None)
        output = output * weight if bias is None else (output - bias[:, None, None]) * weight + bias[:, None, None]
    return output


def _plain_forward(layer: nn.Module) -> Any:
    """The forward of a layer's class; that of torch's class where the layer's own pads whatever its attributes say."""
    if is_same(layer):
        return next(c.forward for c in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d) if isinstance(layer, c))
    return type(layer).forward
