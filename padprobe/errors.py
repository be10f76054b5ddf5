"""Checks whose error messages name the bad value and the nearest valid choices."""

from __future__ import annotations

import difflib
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def check_name(name: str, choices: Iterable[str], what: str) -> None:
    """Checks that a name is one of the valid choices.

    Args:
        name: the name to check.
        choices: all valid names.
        what: what the name stands for, such as ``"layer"``; it begins the error message.

    Raises:
        ValueError: for any other name, with the nearest valid choices.

    Example:
        >>> check_name("resnet43", ["resnet18", "resnet34", "vgg16"], "encoder")
        Traceback (most recent call last):
        ValueError: unknown encoder 'resnet43'; did you mean 'resnet34'? Valid: resnet18, resnet34, vgg16
    """
    choices = list(choices)
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=5, cutoff=0.4)
        listed = choices if len(choices) <= 10 else near or choices
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown {what} {name!r}{hint} Valid: {', '.join(listed)}")


def check_number(name: str, value: Any, kind: type, least: float | None = None, most: float | None = None) -> None:
    """Checks that an option is a finite number of the right kind in its range.

    Args:
        name: of the option; it begins the error message.
        value: the option's value; numpy's numbers count as numbers, and True and False do not.
        kind: ``int`` or ``float``, which takes integers too.
        least, most: the smallest and largest value that is allowed.

    Raises:
        ValueError: for any other value.

    Example:
        >>> check_number("epochs", 0, int, least=1)
        Traceback (most recent call last):
        ValueError: epochs is 0; expected 1 or more
    """
    if not fits_type(value, kind) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected {'an integer' if kind is int else 'a finite number'}")
    if (least is not None and value < least) or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"{most} or less" if least is None else f"{least} to {most}"
        raise ValueError(f"{name} is {value}; expected {limits}")


def check_type(value: Any, hint: Any, what: str) -> None:
    """Raises ValueError unless a value, of a YAML say, fits a type.

    Example:
        >>> check_type("yes", bool, "normalize")
        Traceback (most recent call last):
        ValueError: normalize is 'yes'; expected bool
    """
    if not fits_type(value, hint):
        expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
        raise ValueError(f"{what} is {value!r}; expected {expected.replace('typing.', '')}")


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a value fits a type, as a YAML or a caller gives it: a list may be any sequence, True is no number.

    Example:
        >>> fits_type([1, 2], list[int]), fits_type(True, int), fits_type(None, int | None)
        (True, False, True)
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (UnionType, Union):
        return any(fits_type(value, choice) for choice in inner)
    if kind is dict:
        return isinstance(value, dict) and all(
            fits_type(k, inner[0]) and fits_type(v, inner[1]) for k, v in value.items()
        )
    if kind is list:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(fits_type(v, inner[0]) for v in value)
    if kind is tuple:
        return True  # an image size: the options themselves say what is wrong with it
    if kind is Literal:
        kind = str  # the class itself names the nearest choice
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_writable(folder: str | Path, what: str) -> None:
    """Raises ValueError where no file can be made in a folder; ``what`` needs it.

    Example:
        >>> check_writable("nowhere", "--out")
        Traceback (most recent call last):
        ValueError: --out needs to write into the folder 'nowhere': No such file or directory
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{what} needs to write into the folder {str(folder)!r}: {error.strerror}") from error


@contextmanager
def require(extra: str) -> Iterator[None]:
    """Says which extra to install when an import inside the block does not find its package.

    Raises:
        ModuleNotFoundError: with the missing package and the ``pip install`` that brings it.

    Example:
        >>> with require("report"):
        ...     import no_such_package
        Traceback (most recent call last):
        ModuleNotFoundError: 'no_such_package' is not installed; it comes with: pip install "padprobe[report]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'{error.name!r} is not installed; it comes with: pip install "padprobe[{extra}]"'
        raise ModuleNotFoundError(message, name=error.name) from error
