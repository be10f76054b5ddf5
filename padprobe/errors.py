"""Checks whose error messages name the bad value and the nearest valid choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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
