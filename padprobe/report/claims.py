"""Evaluates a study's claims: held, not held, undecided or not measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from padprobe.report.declared import BOUNDS, ClaimSpec, Selection, combinations, read_claims
from padprobe.report.measurements import PLACE, RUN, Estimate, Rows, by_run, estimate, measurements, select
from padprobe.results import CLAIMS, Results

VERDICTS = ("not held", "undecided", "not measured", "held")
"""From the worst to the best; a claim's verdict is the worst of its comparisons'."""
_EXACT = 1e-9


def evaluate(results: Results) -> pd.DataFrame:
    """Tests the claims that ``results.about`` declares.

    Returns:
        One row per comparison, columns :data:`~padprobe.results.CLAIMS`. A difference is compared with its bound by its
        95% interval: "held" where the whole interval is within, "not held" where none of it is, otherwise "undecided".
        The interval of a difference adds the half-widths of the two in quadrature, which is conservative where both
        were measured on the same images or against the same twins. A number that needs an interval and has none is
        "undecided", see :func:`~padprobe.report.measurements.estimate`.

    Raises:
        ValueError: where a claim is declared wrongly.

    Example:
        >>> evaluate(Results()).empty
        True
    """
    specs = read_claims(results.about.get("claims") or [])
    table = by_run(measurements(results)) if specs else {}
    rows = []
    for spec in specs:
        compared = list(_ordered(spec, table) if spec.order else _bounded(spec, table))
        worst = min((row["verdict"] for row in compared), key=VERDICTS.index)
        rows += [{"claim": spec.name, "says": spec.says, "claim_verdict": worst, **row} for row in compared]
    return pd.DataFrame(rows, columns=list(CLAIMS))


def verdict(value: Estimate | None, bound: str, limit: float) -> str:
    """Whether a number keeps to a bound, a key of :data:`~padprobe.report.declared.BOUNDS`.

    Example:
        >>> verdict(Estimate(0.5, 0.3, 0.7), "at_least", 0.4), verdict(Estimate(0.5, 0.4, 0.6), "at_least", 0.4)
        ('undecided', 'held')
    """
    if value is None or not math.isfinite(value.value):
        return "not measured"
    if math.isnan(value.low):
        return "undecided"
    if bound == "equals":
        if all(abs(end - limit) <= _EXACT for end in value):
            return "held"
        return "undecided" if value.low < value.high and value.low <= limit <= value.high else "not held"
    if bound in ("at_most", "below"):
        value, limit = Estimate(-value.value, -value.high, -value.low), -limit
    strict = bound in ("above", "below")
    if value.low > limit or (value.low == limit and not strict):
        return "held"
    return "not held" if value.high < limit or (value.high == limit and strict) else "undecided"


def _bounded(spec: ClaimSpec, table: Rows) -> Iterator[dict[str, Any]]:
    assert spec.bound is not None
    bound, limit = spec.bound
    for place in combinations(spec.each):
        value, why = _value(table, {**spec.value, **place}, spec.minus)
        yield _row([_words(place), why], value, f"{BOUNDS[bound]} {limit:g}", verdict(value, bound, limit))


def _ordered(spec: ClaimSpec, table: Rows) -> Iterator[dict[str, Any]]:
    for place in combinations(spec.each):
        for smaller, larger in itertools.pairwise(spec.order):
            (low, why_low), (high, why_high) = (
                _value(table, {**spec.value, **place, **change}, spec.minus) for change in (smaller, larger)
            )
            value = high - low if low and high else None
            part = [_words(place), f"{_words(larger)} > {_words(smaller)}", why_low or why_high]
            yield _row(part, value, "> 0", verdict(value, "above", 0.0))


def _value(table: Rows, selection: Selection, minus: Selection) -> tuple[Estimate | None, str]:
    """The one number that is selected, or None and why there is none."""
    rows = [select(table, {**selection, **change}) for change in ([{}, minus] if minus else [{}])]
    for matches in rows:
        if len(matches) != 1:
            differing = [column for column in (*RUN, *PLACE) if len({str(row[column]) for row in matches}) > 1]
            return None, f"{len(matches)} values match, state {differing[0]} too" if differing else ""
    value, *others = (estimate(row) for [row] in rows)
    if others and rows[0][0] is rows[1][0]:
        return Estimate(0.0, 0.0, 0.0), ""
    return (value - others[0] if others else value), ""


def _row(part: list[str], value: Estimate | None, bound: str, verdict: str) -> dict[str, Any]:
    numbers = value or Estimate(*[float("nan")] * 3)
    row: dict[str, Any] = {"part": ", ".join(filter(None, part)), "bound": bound, "verdict": verdict}
    return {**row, "value": numbers.value, "ci_low": numbers.low, "ci_high": numbers.high}


def _words(selection: Selection) -> str:
    """A selection in words: "H", "depth 2", "run a, black"."""
    plain = ("run", "pair", "stages", "stimulus", "target", "metric", "padding", "task")
    return ", ".join(
        str(value) if column in plain else f"{column.replace('_', ' ')} {value}" for column, value in selection.items()
    )
