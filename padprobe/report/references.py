"""Published or earlier numbers beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from padprobe.results import READOUT, REFERENCES, read_csv

LABELS = ("encoder", "weights", "task", "padding")
KEYS = ("run", *LABELS, *READOUT, "stimulus", "target", "metric")
"""What a reference and a measurement must agree on."""
_COUNTS = ("kernel_size", "depth", "head_padding")


def read_references(path: str | Path) -> pd.DataFrame:
    """Reads a CSV of numbers to set beside ours: any file with columns of results.csv, ``metric`` and ``value``.

    Returns:
        The columns :data:`~padprobe.results.REFERENCES` and those of :data:`LABELS` that the file has, means over
        seeds. ``source`` is the label that is shown, by default the name of the file, with its folder for a
        results.csv. A key column that the file lacks is empty, and its numbers stand beside every value of it.

    Raises:
        ValueError: where there is no such file, or one without ``metric`` and ``value``, or a value that is no finite
            number, or two rows that agree in all keys and the seed but not in the value.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}: give a CSV with columns of results.csv")
    table = read_csv(path)
    lacking = [column for column in ("metric", "value") if column not in table]
    if lacking or not set(table) & {"run", "stimulus"}:
        raise ValueError(f"{str(path)!r} lacks the column(s) {', '.join(lacking or ['run or stimulus'])}")
    values = pd.to_numeric(table["value"], errors="coerce")
    wrong = ~np.isfinite(values.to_numpy(float))
    if wrong.any():
        line = int(wrong.argmax())
        raise ValueError(f"{str(path)!r}, line {line + 2}: value is {table['value'].iloc[line]}, expected a number")
    if "source" not in table:
        table["source"] = f"{path.resolve().parent.name}/{path.stem}" if path.stem == "results" else path.stem
    if "group" in table:
        table["run"] = table["group"]
    table["value"] = values
    keys = [key for key in ("source", *KEYS) if key in table]
    _check_unique(table, [*keys, *({"seed"} & set(table))], f"{str(path)!r}, line")
    table["value"] = table.groupby(keys, dropna=False)["value"].transform("mean")
    labels = [label for label in LABELS if label in table and label not in REFERENCES]
    return table.drop_duplicates(keys, ignore_index=True).reindex(columns=[*REFERENCES, *labels])


def matched(table: pd.DataFrame, references: pd.DataFrame, groups: Mapping[str, str]) -> pd.DataFrame:
    """Which references stand beside which rows of a table of measurements.

    Args:
        table: with the columns :data:`KEYS`; ``run`` is the run's group.
        references: :attr:`~padprobe.results.Results.references`. A key that a row leaves empty does not count for it,
            except that an empty ``readout`` is a task's score where other rows of the source state theirs.
        groups: the group of each run.

    Returns:
        One row per pair: ``line`` and ``reference`` (positions in the two tables), ``source``, ``value`` and ``stated``
        (how many keys agree).

    Raises:
        ValueError: where two rows of a source agree in all keys but not in the value.

    Example:
        >>> ours = pd.DataFrame({**dict.fromkeys(KEYS, ["a"]), **dict.fromkeys(_COUNTS, [1])})
        >>> theirs = pd.DataFrame({"run": ["a"], "metric": ["a"], "value": [0.5], "source": ["them"]})
        >>> matched(ours, theirs, {}).to_dict("records")
        [{'line': 0, 'reference': 0, 'source': 'them', 'value': 0.5, 'stated': 2}]
    """
    references = references.reset_index(drop=True)
    _check_unique(references, ["source", *(key for key in KEYS if key in references)], "references.csv, line")
    references = references.assign(run=[groups.get(run, run) for run in references["run"]])
    ours, pairs = _plain(table, list(KEYS)).assign(line=range(len(table))), []
    for source, numbers in references.groupby("source", sort=False):
        stated = pd.DataFrame({key: ~numbers[key].isin(["", None]) & numbers[key].notna() for key in numbers})
        keys = [key for key in KEYS if key in numbers and stated[key].any()]
        if "readout" in keys:
            stated[[*set(READOUT) & set(keys)]] |= ~stated[["readout"]].to_numpy()
        for pattern, alike in numbers.groupby([stated[key] for key in keys], sort=False):
            same = [key for key, used in zip(keys, pattern, strict=True) if used]
            theirs = _plain(alike, same).assign(
                reference=alike.index, source=source, value=alike["value"].astype(float)
            )
            pairs.append(ours.merge(theirs, on=same).assign(stated=len(same)))
    columns = ["line", "reference", "source", "value", "stated"]
    return pd.concat(pairs)[columns] if pairs else pd.DataFrame(columns=columns)


def beside(pairs: pd.DataFrame, lines: int) -> list[dict[str, float]]:
    """The references of each line as numbers by source, from :func:`matched`: those that agree in most keys, and the
    mean over runs that differ in their seed.

    Example:
        >>> pairs = pd.DataFrame({"line": [0], "reference": [0], "source": ["a"], "value": [0.5], "stated": [1]})
        >>> beside(pairs, 2)
        [{'a': 0.5}, {}]
    """
    numbers: list[dict[str, float]] = [{} for _ in range(lines)]
    means = pairs.groupby(["stated", "line", "source"], sort=False)["value"].mean().reset_index()
    for row in means.sort_values("stated", kind="stable").to_dict("records"):
        numbers[row["line"]][str(row["source"])] = row["value"]
    return numbers


def _check_unique(table: pd.DataFrame, keys: list[str], what: str) -> None:
    """Refuses rows that agree in the keys but not in the value."""
    first = table.groupby(keys, dropna=False, sort=False)["value"].transform("first")
    wrong = ((table["value"].astype(float) - first.astype(float)).abs() > 1e-9).to_numpy()
    if wrong.any():
        line = int(wrong.argmax())
        row = ", ".join(f"{key} {table[key].iloc[line]}" for key in keys if table[key].iloc[line] not in ("", None))
        raise ValueError(
            f"{what} {line + 2}: value is {table['value'].iloc[line]}, but an earlier row has {first.iloc[line]} for "
            f"{row}: give each row one value, or each file its own `source`"
        )


def _plain(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The key columns with one type each."""
    plain = table[keys].copy()
    for key in keys:
        plain[key] = (
            pd.to_numeric(plain[key], errors="coerce").fillna(0).astype(int)
            if key in _COUNTS
            else plain[key].fillna("").astype(str)
        )
    return plain
