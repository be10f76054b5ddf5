"""Messages that name the offending value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_name(name: str, choices: Iterable[str], what: str) -> None:
    """Raises ValueError naming ``name`` and the nearest valid choices, if it is none of them."""
    choices = list(choices)
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=5, cutoff=0.4)
        listed = choices if len(choices) <= 10 else near or choices
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown {what} {name!r}{hint} Valid: {', '.join(listed)}")
