"""Which cells of the padded network an unpadded one computes, so that shortcuts and branches meet cell by cell."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from padprobe.network.guest import copied_state, evaluation, image_channels

_ARGUMENTS = {  # of the functions whose output cells see a window of their input
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool2d": ("input", "kernel_size", "stride", "padding", "ceil_mode"),
    "lp_pool2d": ("input", "norm_type", "kernel_size", "stride", "ceil_mode"),
}
_MEETINGS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}
_MEETINGS |= {f"{name}_": out_of_place for name, out_of_place in _MEETINGS.items()}  # `x += y` gives a smaller x
_LISTS = ("cat", "concat", "concatenate", "stack")
_SIZES = (224, 256, 384, 448, 64, 32)  # tried in this order, for networks that take one image size alone
_thread = threading.local()


class Axis(NamedTuple):
    """The cells of a map along its height or width, counted as the padded network counts its own."""

    first: int  # the number of the first cell, in the padded network's map
    size: int  # how many cells there are
    full: int  # how many cells the padded network has
    step: int  # from cell to cell, in cells of the input; 0 after enlarging


Cells = tuple[Axis, Axis]


class Alignment(TorchFunctionMode):
    """Makes maps of an unpadded network meet where the cells of the padded network meet.

    While it is active, every map knows which cells of the padded network's map it holds. A convolution or pooling
    layer without its padding gives exactly the cells whose windows need none: with a stride, it starts where the padded
    network has a window. Where two maps are added, multiplied or concatenated, both are cropped to the cells that they
    share. What a shortcut crops is therefore exact: cell by cell, the unpadded network computes what the padded one
    computes where padding does not reach. A map of one cell in the padded network, such as a gate, is broadcast.

    Source: ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cells = WeakTensorKeyDictionary()

    def cells(self, maps: Tensor) -> Cells:
        """What a map (..., H, W) holds; a map of unknown origin is complete."""
        known = self._cells.get(maps)
        return known or tuple(Axis(0, n, n, 1) for n in maps.shape[-2:])  # type: ignore[return-value]

    def without_padding(self, maps: Tensor, padding: Sequence[tuple[int, int]]) -> Tensor:
        """A map that the padded network pads by (before, after) along height and width, and this one does not."""
        cells = self.cells(maps)
        result = maps.view_as(maps)  # a tensor of its own: a shortcut may take the map as it is
        self._cells[result] = tuple(
            axis._replace(first=axis.first + before, full=axis.full + before + after)
            for axis, (before, after) in zip(cells, padding, strict=True)
        )
        return result

    def with_padding(self, padded: Tensor, maps: Tensor, padding: Sequence[Sequence[int]]) -> None:
        """Says that ``padded`` is a map that was really padded by (before, after) along height and width."""
        axes = zip(self.cells(maps), padding, strict=True)
        self._cells[padded] = tuple(a._replace(size=a.size + sum(p), full=a.full + sum(p)) for a, p in axes)

    def copy_cells(self, maps: Tensor, source: Tensor) -> None:
        """Says that ``maps`` hold the cells that ``source`` holds."""
        self._cells[maps] = self.cells(source)

    def __enter__(self) -> Any:
        self._outer, _thread.running = running(), self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _thread.running = self._outer
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs one function of torch, on maps that fit each other."""
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":  # x.shape and the like
            return func(*args, **kwargs)
        if name in _ARGUMENTS:
            return self._window(func, name, args, kwargs)
        if name == "pad" and _is_map(args):
            return self._pad(func, args, kwargs)
        if name in ("interpolate", "conv_transpose2d") and _is_map(args):
            return self._enlarge(func, name, args, kwargs)
        if name in _MEETINGS and len(args) > 1:
            pair = self.meet(args[:2])
            if pair is not None:
                func, args = _MEETINGS[name], [*pair, *args[2:]]
        elif name in _LISTS and args and kwargs.get("dim", args[1] if len(args) > 1 else 0) in (0, 1):
            parts = self.meet(args[0])
            args = args if parts is None else [parts, *args[1:]]
        output = func(*args, **kwargs)
        self._inherit(args, output)
        return output

    def _inherit(self, args: Sequence[Any], output: Any) -> None:
        """The outputs of functions that keep height and width hold the cells of their first map."""
        flat = [v for arg in args for v in (arg if isinstance(arg, (list, tuple)) else [arg])]
        sources = [c for v in flat if isinstance(v, Tensor) and (c := self._cells.get(v)) is not None]
        sources.sort(key=lambda cells: -cells[0].size * cells[1].size)  # a gate of one cell is not the map
        for result in output if isinstance(output, (list, tuple)) else [output]:
            if sources and isinstance(result, Tensor) and result.ndim > 2 and result not in self._cells:
                sides = Counter(result.shape)
                kept = [cells for cells in sources if not Counter(axis.size for axis in cells) - sides]
                if kept:
                    self._cells[result] = kept[0]

    def meet(self, values: Sequence[Any]) -> list[Any] | None:
        """Maps cropped to the cells that they share; None if they hold the same cells already."""
        maps = [v for v in values if isinstance(v, Tensor) and v.ndim == 4 and v in self._cells]
        maps = [m for m in maps if tuple(axis.size for axis in self.cells(m)) == tuple(m.shape[-2:])]
        fulls = {tuple(axis.full for axis in self.cells(m)) for m in maps}
        if len(maps) < 2 or len(fulls) > 1 or len({self._extent(m) for m in maps}) < 2:
            return None
        shared: list[tuple[int, int]] = []
        for i in (0, 1):
            axes = [self.cells(m)[i] for m in maps]
            shared.append((max(a.first for a in axes), min(a.first + a.size for a in axes)))
        return [self._crop(v, shared) if any(v is m for m in maps) else v for v in values]

    def _extent(self, maps: Tensor) -> tuple[tuple[int, int], ...]:
        return tuple((axis.first, axis.size) for axis in self.cells(maps))

    def _crop(self, maps: Tensor, extent: Sequence[tuple[int, int]]) -> Tensor:
        """The cells of a map from number (first, end) along height and width."""
        cells = self.cells(maps)
        if any(first >= end for first, end in extent):
            raise RuntimeError("a map of the network without padding has no cell left: use larger images")
        (top, bottom), (left, right) = ((f - a.first, e - a.first) for a, (f, e) in zip(cells, extent, strict=True))
        result = maps[..., top:bottom, left:right]
        self._cells[result] = tuple(
            axis._replace(first=first, size=end - first) for axis, (first, end) in zip(cells, extent, strict=True)
        )
        return result

    def _window(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A convolution or pooling function, on the cells that its complete windows take."""
        given = dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs
        maps: Tensor = given["input"]
        kernel = _pair(given["weight"].shape[-2:] if name == "conv2d" else given["kernel_size"])
        stride, dilation = _pair(given.get("stride") or (1 if name == "conv2d" else kernel)), given.get("dilation", 1)
        padding, extent, after = given.get("padding", 0), [], []
        for i, axis in enumerate(self.cells(maps)):
            k, s, d = kernel[i], stride[i % len(stride)], _pair(dilation)[i % len(_pair(dilation))]
            window = d * (k - 1) + 1
            pad = _sides(padding, i, window)
            full, first = axis.full + sum(pad), axis.first  # this padding is really there
            number = -(-first // s)  # of the first window that fits
            begin, end = number * s, first + axis.size + sum(pad)
            count = (end - begin - window) // s + 1
            complete = axis.first + axis.size == axis.full
            if count > 0 and not complete:  # the padded network's last window may be cut off, no other
                end = begin + (count - 1) * s + window
            extent.append((begin, max(end - sum(pad), begin)))
            out = -(-(full - window) // s) if given.get("ceil_mode") else (full - window) // s
            after.append(Axis(number, 0, out + 1, axis.step * s))
        if any(axis.first or axis.size != axis.full for axis in self.cells(maps)):
            cropped = self._crop(maps, extent)
            args, kwargs = ([cropped, *args[1:]], kwargs) if args else (args, kwargs | {"input": cropped})
        output = func(*args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output
        if kernel == (1, 1) and stride == (1, 1) and not any(sum(_sides(padding, i, 1)) for i in (0, 1)):
            self._inherit(args or [given["input"]], output)
        else:
            sizes = zip(after, result.shape[-2:], strict=True)
            self._cells[result] = tuple(axis._replace(size=size) for axis, size in sizes)
        return output

    def _pad(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """F.pad, which really adds cells: they count as the padded network's own."""
        output, amounts = func(*args, **kwargs), [*(args[1] if len(args) > 1 else kwargs["pad"]), 0, 0, 0, 0]
        self.with_padding(output, args[0], (amounts[2:4], amounts[:2]))
        return output

    def _enlarge(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """F.interpolate and F.conv_transpose2d by a whole factor; anything else only on maps that miss no cell."""
        cells = self.cells(args[0])
        output = func(*args, **kwargs)
        if all(axis.first == 0 and axis.size == axis.full for axis in cells):
            self._cells[output] = tuple(Axis(0, n, n, 0) for n in output.shape[-2:])  # type: ignore[assignment]
            return output
        factors = [out // axis.size for out, axis in zip(output.shape[-2:], cells, strict=True)]
        whole = all(f * a.size == out for f, a, out in zip(factors, cells, output.shape[-2:], strict=True))
        by_factor = name == "conv_transpose2d" or (len(args) < 2 and kwargs.get("size") is None)
        if name == "conv_transpose2d":
            whole = whole and tuple(args[1].shape[-2:]) == tuple(factors)
        if not (whole and by_factor and not kwargs.get("align_corners")):
            raise RuntimeError(
                f"{name} enlarges a map that lost cells at its border without padding, by other than a whole factor: "
                "this network cannot do without padding"
            )
        sides = zip(cells, factors, strict=True)
        self._cells[output] = tuple(Axis(a.first * f, a.size * f, a.full * f, 0) for a, f in sides)
        if kwargs.get("mode", "nearest") in ("nearest", "nearest-exact", "area") or name == "conv_transpose2d":
            return output
        extent = []  # the outermost cells are mixed with cells that are missing
        for a, f in zip(cells, factors, strict=True):
            left, right = f // 2 * (a.first > 0), f // 2 * (a.first + a.size < a.full)
            extent.append((a.first * f + left, (a.first + a.size) * f - right))
        return self._crop(output, extent)


def running() -> Alignment | None:
    """The alignment of the forward pass that is under way in this thread."""
    return getattr(_thread, "running", None)


class Facts(NamedTuple):
    """What a forward pass showed."""

    shortcuts: tuple[str, ...]  # the modules in which maps meet that went through different windows
    pads: dict[str, str]  # which function pads in a module's own forward(), by the module's name


class _Watch(Alignment):
    """Finds the modules in which maps meet, and those whose forward() pads."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, bool]] = []  # the modules that are running, and whether their padding is known
        self.shortcuts: dict[str, None] = {}
        self.pads: dict[str, str] = {}

    def enter(self, name: str, is_known: bool, module: nn.Module, args: Any) -> None:
        """A forward pre-hook."""
        self.stack.append((name, is_known))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        self.stack.pop()

    def meet(self, values: Sequence[Any]) -> list[Any] | None:
        """Notes maps of one size that went through different windows."""
        origins = {id(c) for v in values if isinstance(v, Tensor) and (c := self._cells.get(v)) is not None}
        if len(origins) > 1:
            self.shortcuts |= {name: None for name, _ in self.stack}
        return super().meet(values)

    def _window(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs
        padding = given.get("padding", 0)
        self._note(name, padding not in (0, "valid") and (isinstance(padding, str) or any(_pair(padding))))
        return super()._window(func, name, args, kwargs)

    def _pad(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        amounts = [*(args[1] if len(args) > 1 else kwargs["pad"])]
        # amounts that are zero at this image's size may not be at another
        self._note("F.pad", any(amounts[:4]) or not any(amounts))
        return super()._pad(func, args, kwargs)

    def _note(self, function: str, does_pad: bool) -> None:
        if does_pad and self.stack and not self.stack[-1][1]:
            self.pads.setdefault(self.stack[-1][0], function)


def look(module: nn.Module, is_known: Callable[[nn.Module], bool]) -> Facts:
    """Runs a network on the meta device, as it is, and finds its shortcuts and the modules that pad by themselves.

    A network that takes no image, or none of the usual sizes, shows nothing.

    Args:
        module: any network. It stays as it is.
        is_known: whether the padding of a module is known, whatever its ``forward`` does.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for size in _SIZES:
        watch = _Watch()
        try:
            with evaluation(module), torch.no_grad(), torch.device("meta"), torch.compiler.set_stance("force_eager"):
                for name, layer in module.named_modules():
                    layer.register_forward_pre_hook(functools.partial(watch.enter, name, is_known(layer)))
                    layer.register_forward_hook(watch.leave)
                state = copied_state(module)
                image = torch.empty((2, image_channels(module), size, size), dtype=dtype)
                with watch:
                    functional_call(module, state, (image,), tie_weights=False)
            return Facts(tuple(watch.shortcuts), watch.pads)
        except Exception:  # any network may say in its own way that it does not take this image
            continue
    return Facts((), {})


def _is_map(args: Sequence[Any]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].ndim in (3, 4)


def _sides(padding: Any, i: int, window: int) -> tuple[int, int]:
    """The cells that a function's argument ``padding`` adds before and after, along height (0) or width (1)."""
    if padding == "same":
        return (window - 1) // 2, (window - 1) - (window - 1) // 2
    amount = 0 if padding == "valid" else _pair(padding)[i % len(_pair(padding))]
    return amount, amount
