"""What a page is made of, and how a declared table becomes one of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from padprobe.report.declared import Selection, TableSpec, combinations
from padprobe.report.measurements import Estimate, Row, Rows, estimate, select

ABSENT = "\N{EN DASH}"
_SHOWN = {"mae": "MAE", "nmae": "nMAE", "delta": "Δ", "selectivity": "sel"}
_DIFFERENCES = ("delta", "selectivity")


@dataclass
class Table:
    """A table of text. ``rows``: (kind: "run", "gap" or "control"; cells); the first line of a cell is its value, the
    other lines qualify it. ``labels``: how many columns name the row."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    labels: int = 1


@dataclass
class Figure:
    """A drawn figure: its file name without suffix, what it shows, and the PNG."""

    name: str
    alt: str
    png: bytes


@dataclass
class Section:
    """A heading, how to read what follows, tables, figures."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


class _Cell(NamedTuple):
    lines: list[str]
    n: int


def sections_with_tables(*parts: tuple[str, str, list[Table | None]]) -> list[Section]:
    """Sections from their title, text and tables; those without any table are left out."""
    sections = [Section(title, text, [table for table in tables if table]) for title, text, tables in parts]
    return [section for section in sections if section.tables]


def number(value: float, digits: int = 3, sign: str = "") -> str:
    """A number without the zero before the point; a dash for NaN. ``sign="+"`` shows a plus.

    Example:
        >>> number(0.7421), number(-0.0001), number(0.5, 2, "+")
        ('.742', '.000', '+.50')
    """
    if pd.isna(value):
        return ABSENT
    text = f"{round(float(value), digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no minus before zeros
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text


def between(row: Row, digits: int = 3) -> str:
    """The range over seeds, "low … high", or the interval over images, "[low, high]"; "" where there is none."""
    if pd.isna(row["low"]):
        return ""
    low, high = number(row["low"], digits), number(row["high"], digits)
    return f"{low} … {high}" if row["spread"] == "seeds" else f"[{low}, {high}]"


def render(spec: TableSpec, table: Rows, heading: str = "run") -> Table | None:
    """A declared table in text: rows without any value are left out; None where nothing is left.

    Args:
        spec: ``minus`` may stand in a row, too.
        table: the measurements by run.
        heading: what the rows' labels are.
    """
    lines: list[tuple[str, list[str], list[_Cell | None]]] = []
    for place in combinations(spec.each):
        for row in spec.rows:
            cells = [_look_up(table, {**row, **place, **column}, spec.show) for column in spec.columns]
            if any(cells):
                control = row.get("stages") == "rgb" or row.get("metric") == "reach"
                kind = "gap" if "minus" in row else "control" if control else "run"
                lines.append((kind, [*map(str, place.values()), row["label"]], cells))
    if not lines:
        return None
    counts = [max((c.n for c in column if c), default=0) for column in zip(*(c for _, _, c in lines), strict=True)]
    headers = [c["label"] + (f" (n = {n})" if n else "") for c, n in zip(spec.columns, counts, strict=True)]
    rows = [
        (kind, [*labels, *(_text(cell, n) for cell, n in zip(cells, counts, strict=True))])
        for kind, labels, cells in lines
    ]
    return Table(spec.title, [*spec.each, heading, *headers], rows, len(spec.each) + 1)


def _text(cell: _Cell | None, n: int) -> str:
    """A cell's lines; it states its number of images where the column's header does not."""
    if cell is None:
        return ABSENT
    lines = cell.lines if cell.n in (0, n) else [*cell.lines[:2], f"n = {cell.n}", *cell.lines[2:]]
    return "\n".join(filter(None, lines))


def _look_up(table: Rows, selection: Selection, show: tuple[str, ...]) -> _Cell | None:
    """The selected value with its interval, its references and the metrics to show; None where it was not measured."""
    minus = selection.get("minus")
    selection = {k: v for k, v in selection.items() if k not in ("label", "minus")}
    metric = selection.get("metric", "spc")
    matches = select(table, {**selection, "metric": [metric] if minus else [metric, *show]})
    rows = [row for row in matches if row["metric"] == metric]
    if len(rows) != 1:
        return _Cell([f"{len(rows)} values match"], 0) if rows else None
    row = rows[0]
    if minus:
        others = select(table, {**selection, **minus, "metric": metric})
        return _difference(row, others[0]) if len(others) == 1 and others[0] is not row else None
    lines = [number(row["value"]), between(row)]
    for source, value in row["references"].items():
        lines.append(f"{source} {number(value)}, {number(row['value'] - value, sign='+')}")
    by_metric = {other["metric"]: other for other in matches if other is not row}
    lines += [_shown(by_metric[name]) for name in show if name in by_metric]
    return _Cell(lines, row["n"])


def _difference(row: Row, other: Row) -> _Cell:
    difference = estimate(row) - estimate(other)
    lines = [number(difference.value, sign="+"), _interval(difference)]
    for source in row["references"].keys() & other["references"].keys():
        lines.append(f"{source} {number(row['references'][source] - other['references'][source], sign='+')}")
    return _Cell(lines, row["n"])


def _interval(value: Estimate) -> str:
    return f"[{number(value.low)}, {number(value.high)}]" if value.low < value.high else ""


def _shown(row: Row) -> str:
    """Another metric beside the selected one, in a line."""
    name = row["metric"]
    if name == "constant":
        count = f"{row['value']:g} of {row['n']} constant" if row["n"] > 1 else "constant"
        return count if row["value"] else ""
    if name in _DIFFERENCES:
        return f"{_SHOWN[name]} {number(row['value'], 2, '+')} {between(row, 2)}".strip()
    return ", ".join(
        [
            f"{_SHOWN.get(name, name)} {number(row['value'])}",
            *(f"{s} {number(v)}" for s, v in row["references"].items()),
        ]
    )
