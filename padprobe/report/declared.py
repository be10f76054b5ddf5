"""The tables and claims that a study declares in its YAML: read, checked, and their selections completed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from padprobe.errors import check_name
from padprobe.results import READOUT

Selection = dict[str, Any]
"""Columns of results.csv and runs.csv, and ``context``, each with the value or the list of values that it may have."""

_SIZES = ("image_px", "source_px", "shown_px", "image_width", "source_width", "shown_width")
SELECTABLE = (
    *("run", "pair", "encoder", "weights", "task", "padding", "position_embedding", *_SIZES, "context"),
    *READOUT,
    *("stimulus", "target", "metric", "n"),
)
BOUNDS = {"at_least": ">=", "at_most": "<=", "above": ">", "below": "<", "equals": "="}
_NUMBERS = (*_SIZES, "kernel_size", "depth", "head_padding", "n")
_PAPER_READOUT = {"readout": "posenet", "kernel_size": 3, "depth": 1, "head_padding": 0, "scale": "unit"}


@dataclass(frozen=True)
class TableSpec:
    """A table: one line per row and value of ``each``, one cell per column.

    Attributes:
        rows: each a label and a selection.
        columns: each a label and a selection, which overrides the row's. With ``minus``, changes to that selection, the
            cell is a difference.
        each: repeats all rows for every combination of these values.
        show: metrics shown in the same cell, after the selected one.
    """

    name: str
    title: str
    rows: list[dict[str, Any]]
    columns: list[dict[str, Any]]
    text: str = ""
    each: dict[str, list[Any]] = field(default_factory=dict)
    show: tuple[str, ...] = ("mae", "delta", "selectivity")


@dataclass(frozen=True)
class ClaimSpec:
    """A sentence and the condition under which it holds.

    Attributes:
        value: selects a number.
        minus: changes to ``value`` that select the number to subtract; empty for none.
        each: the condition is tested for every combination of these values.
        order: changes to ``value``; each must select a larger number than the one before. Empty where ``bound`` is set.
        bound: a key of :data:`BOUNDS` and a number; None where ``order`` is set.
    """

    name: str
    says: str
    value: Selection
    minus: Selection = field(default_factory=dict)
    each: dict[str, list[Any]] = field(default_factory=dict)
    order: tuple[Selection, ...] = ()
    bound: tuple[str, float] | None = None


def read_tables(declared: Sequence[Mapping[str, Any]]) -> list[TableSpec]:
    """Reads the entries of ``tables:``.

    Raises:
        ValueError: naming the table and the key or value that is wrong.

    Example:
        >>> rows = [{"label": "small", "run": "vgg11"}]
        >>> read_tables([{"name": "a", "title": "A", "rows": rows, "columns": [{"stimulus": "black"}]}])[0].columns
        [{'label': 'black', 'stimulus': 'black'}]
    """
    specs = []
    known = [f.name for f in fields(TableSpec)]
    for what, spec in _entries(declared, "table", known, ("name", "title", "rows", "columns")):
        for key in ("rows", "columns"):
            spec[key] = [_labelled(entry, f"{what}, {key}") for entry in _list(spec[key], f"{what}, {key}")]
        spec["each"] = _each(spec.get("each", {}), what)
        if "show" in spec:
            spec["show"] = tuple(_typed(metric, "show", what) for metric in _list(spec["show"], f"{what}, show"))
        specs.append(TableSpec(**spec))
    return specs


def read_claims(declared: Sequence[Mapping[str, Any]]) -> list[ClaimSpec]:
    """Reads the entries of ``claims:``.

    Raises:
        ValueError: naming the claim and the key or value that is wrong.

    Example:
        >>> value = {"run": "vgg11", "stimulus": "black", "target": "H"}
        >>> read_claims([{"name": "a", "says": "H is read", "value": value, "at_least": 0.5}])[0].bound
        ('at_least', 0.5)
    """
    specs = []
    known = [*(f.name for f in fields(ClaimSpec) if f.name != "bound"), *BOUNDS]
    for what, spec in _entries(declared, "claim", known, ("name", "says", "value")):
        conditions = [key for key in ("order", *BOUNDS) if key in spec]
        if len(conditions) != 1:
            stated = " and ".join(conditions) or "none"
            raise ValueError(f"{what} states {stated}: state exactly one of order, {', '.join(BOUNDS)}")
        for key in ("value", "minus"):
            spec[key] = _selection(spec.get(key, {}), f"{what}, {key}")
        spec["each"] = _each(spec.get("each", {}), what)
        if "order" in spec:
            spec["order"] = tuple(_selection(c, f"{what}, order") for c in _list(spec["order"], f"{what}, order"))
            if len(spec["order"]) < 2:
                raise ValueError(f"{what}: order has {len(spec['order'])} entry, give two or more")
        else:
            number = spec.pop(conditions[0])
            spec["bound"] = (conditions[0], float(_typed(number, conditions[0], what)))
        _check_complete(spec, what)
        specs.append(ClaimSpec(**spec))
    return specs


def completed(selection: Selection) -> Selection:
    """A selection with the defaults for what it leaves out: the paper's readout on all stages, its SPC, and, unless it
    names a run, no context.

    Example:
        >>> completed({"run": "vgg11", "kernel_size": 7})["kernel_size"], completed({})["stages"]
        (7, 'all')
        >>> completed({"readout": "", "metric": "mIoU"})
        {'stages': '', 'context': False, 'readout': '', 'metric': 'mIoU'}
    """
    readout = selection.get("readout", "posenet")
    if readout == "":
        defaults: Selection = {"stages": ""}
    elif readout == "variance":
        defaults = {"stages": "all"}
    else:
        defaults = {**_PAPER_READOUT, "stages": "all", "metric": "spc"}
    return {**defaults, **({} if "run" in selection else {"context": False}), **selection}


def combinations(each: Mapping[str, Sequence[Any]]) -> Iterator[Selection]:
    """Every combination of the values of ``each``; one empty selection where there are none.

    Example:
        >>> list(combinations({"target": ["H", "V"]}))
        [{'target': 'H'}, {'target': 'V'}]
    """
    for values in itertools.product(*each.values()):
        yield dict(zip(each, values, strict=True))


def _entries(
    declared: Any, kind: str, known: Sequence[str], required: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry with its name in words; names are unique, keys are known, and none of the required ones is missing."""
    names: list[str] = []
    for i, item in enumerate(_list(declared, f"{kind}s")):
        if not isinstance(item, Mapping):
            raise ValueError(f"{kind} {i + 1} is {item!r}, expected a mapping with a name")
        what = f"{kind} {str(item.get('name', i + 1))!r}"
        if what in names:
            raise ValueError(f"{what} is declared twice: give each {kind} a name of its own")
        names.append(what)
        for key in item:
            check_name(str(key), known, f"key of {what}:")
        lacking = [key for key in required if not item.get(key)]
        if lacking:
            raise ValueError(f"{what} lacks {', '.join(lacking)}")
        for key in ("name", "title", "says", "text"):
            if not isinstance(item.get(key, ""), str):
                raise ValueError(f"{what}: {key} is {item[key]!r}, expected text: quote it")
        yield what, dict(item)


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise ValueError(f"{what} is {value!r}, expected a list")
    return list(value)


def _selection(value: Any, what: str, more: Sequence[str] = ()) -> Selection:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}, expected a mapping from columns to values")
    selection: Selection = {}
    for key, entry in value.items():
        check_name(str(key), [*SELECTABLE, *more], f"column in {what}:")
        several = isinstance(entry, Sequence) and not isinstance(entry, str) and key != "label"
        if key == "minus":
            selection[key] = _selection(entry, f"{what}, minus")
        elif several and not entry:
            raise ValueError(f"{what}: {key} is an empty list, give it a value or leave it out")
        else:
            selection[key] = [_typed(one, key, what) for one in entry] if several else _typed(entry, key, what)
    return selection


def _typed(value: Any, key: str, what: str) -> Any:
    """The value of a column or bound: a number, for ``context`` true or false, otherwise text, also from a number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if key in _NUMBERS or key in BOUNDS:
        good, expected = number, "a number"
    elif key == "context":
        good, expected = isinstance(value, bool), "true or false"
    else:
        good, expected = number or isinstance(value, str), "text"
        value = str(value) if number else value
    if not good:
        raise ValueError(f"{what}: {key} is {value!r}, expected {expected}")
    return value


def _labelled(value: Any, what: str) -> dict[str, Any]:
    """A row or column of a table; without a label it is called by the values that it selects."""
    selection = _selection(value, what, ("label", "minus"))
    values = [str(v) for key, v in selection.items() if key != "minus"]
    return {"label": ", ".join(values), **selection}


def _each(value: Any, what: str) -> dict[str, list[Any]]:
    return {k: _list(v, f"{what}, each {k}") for k, v in _selection(value, f"{what}, each").items()}


def _check_complete(spec: Mapping[str, Any], what: str) -> None:
    """A claim compares single numbers, so its selections must name a run, a stimulus, and what was measured on it."""
    changes: tuple[Selection, ...] = spec.get("order", ()) or ({},)
    for change in changes:
        selection = {**spec["value"], **spec["each"], **change}
        readout = selection.get("readout", "posenet")
        needed = ["stimulus", "metric" if readout in ("", "variance") else "target"]
        needed += [] if "run" in selection or "pair" in selection else ["run"]
        lacking = [key for key in needed if key not in selection]
        if lacking:
            raise ValueError(f"{what} does not say which {' and '.join(lacking)}: add it to value, each or order")
