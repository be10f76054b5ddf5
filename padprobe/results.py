"""The tables of all measurements, their confidence intervals, and the folder that they are saved in."""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

READOUT = ("readout", "kernel_size", "depth", "head_padding", "scale", "stages")
"""The columns that tell one readout from another."""
COLUMNS = (
    *("run", "encoder", "weights", "task", "padding", "seed"),
    *READOUT,
    *("stimulus", "target", "metric", "value", "ci_low", "ci_high", "n"),
)
RUNS = (
    *("run", "group", "pair", "encoder", "weights", "task", "padding", "position_embedding", "seed"),
    *("image_px", "source_px", "shown_px", "image_width", "source_width", "shown_width", "n_train", "how"),
)
TRAJECTORY = ("run", "step", "target", "metric", "value")
PROFILE = ("run", "seed", *READOUT, "stimulus", "target", "distance", "metric", "value", "ci_low", "ci_high", "n")
MISSING = ("what", "why")
REFERENCES = (
    "run",
    "encoder",
    "weights",
    "task",
    "padding",
    *READOUT,
    "stimulus",
    "target",
    "metric",
    "value",
    "source",
    "table",
)
CLAIMS = ("claim", "says", "part", "value", "ci_low", "ci_high", "bound", "verdict", "claim_verdict")

_WIDTHS = {"image_width": "image_px", "source_width": "source_px", "shown_width": "shown_px"}
"""Columns of widths, and those of the heights that they equal in files without them."""
_TABLES = {
    "rows": ("results.csv", COLUMNS),
    "runs": ("runs.csv", RUNS),
    "trajectory": ("trajectory.csv", TRAJECTORY),
    "profile": ("profile.csv", PROFILE),
    "missing": ("missing.csv", MISSING),
    "references": ("references.csv", REFERENCES),
    "claims": ("claims.csv", CLAIMS),
}
_NUMBERS = (
    *("kernel_size", "depth", "head_padding", "seed", "value", "ci_low", "ci_high", "n", "distance", "step"),
    *("image_px", "source_px", "shown_px", "image_width", "source_width", "shown_width", "n_train"),
)


def _empty(name: str) -> Any:
    return field(default_factory=lambda: pd.DataFrame(columns=list(_TABLES[name][1])))


@dataclass
class Results:
    """All measurements as tidy tables, and mean maps.

    Attributes:
        rows: one row per measurement (``results.csv``, :data:`COLUMNS`). ``n`` counts images. A task's score has an
            empty ``readout`` and ``target``; ``readout`` is "variance" where no readout is involved (eta2, reach).
        runs: one row per run (``runs.csv``, :data:`RUNS`). ``group``: runs that differ only in their seed share it.
            ``pair``: runs that differ only in their padding or position embedding share it. ``position_embedding``:
            "learned", "none" or "shuffled", "" for a network without. ``image_px``: height of the image that maps are
            predicted for; ``source_px``: height at which images were read; ``shown_px``: height that the encoder saw,
            which is larger where an unpadded encoder saw the image's surroundings; ``image_width``, ``source_width``
            and ``shown_width``: their widths. ``how``: how the run was made, in words.
        trajectory: one row per value logged in a training (:data:`TRAJECTORY`); a task's metric has an empty target.
        maps: mean maps over the images of a stimulus, shape (H, W), under ``run/stimulus/target/prediction`` and
            ``run/stimulus/target/error`` (mean absolute error); and, under ``run/stimulus/STAGE/eta2``, the share of a
            stage's variance that position explains, cell by cell, shape (grid, grid).
        profile: one row per measurement at one distance to the nearest border, in pixels (:data:`PROFILE`).
        missing: what should have been measured but was not, and why (:data:`MISSING`).
        references: published or earlier numbers to set beside ours (:data:`REFERENCES`).
        claims: the study's claims and their verdicts, one row per comparison (:data:`CLAIMS`).
        about: what the study says about itself: its title, tables and claims, as written in its YAML.
    """

    rows: pd.DataFrame = _empty("rows")
    runs: pd.DataFrame = _empty("runs")
    trajectory: pd.DataFrame = _empty("trajectory")
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    profile: pd.DataFrame = _empty("profile")
    missing: pd.DataFrame = _empty("missing")
    references: pd.DataFrame = _empty("references")
    claims: pd.DataFrame = _empty("claims")
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Writes all tables, ``maps.npz`` and ``about.json`` into a folder.

        Each file is written whole or not at all, and ``results.csv`` last: a folder that has it is complete.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "maps.npz", lambda path: np.savez_compressed(path, **self.maps))  # type: ignore[arg-type]
        write_text(folder / "about.json", json.dumps(self.about, indent=1, ensure_ascii=False))
        for name in reversed(_TABLES):
            table = getattr(self, name)
            write_atomically(folder / _TABLES[name][0], functools.partial(table.to_csv, index=False))

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: if the folder has no results.csv, or one without the columns of a results table, or a file that
                cannot be read.
        """
        folder = Path(folder)
        if not (folder / "results.csv").is_file():
            raise ValueError(f"no results.csv in {str(folder)!r}: give the --out folder of `padprobe probe` or `study`")
        results = cls()
        for name, (file, columns) in _TABLES.items():
            if (folder / file).is_file():
                with naming(folder / file):
                    table = read_csv(folder / file)
                    for column in set(_NUMBERS).intersection(table):
                        table[column] = pd.to_numeric(table[column])
                if name == "rows" and "readout" in table and "scale" not in table:
                    table = _with_scale(table)
                if name == "runs":
                    table = table.assign(**{w: table[h] for w, h in _WIDTHS.items() if w not in table and h in table})
                lacking = [column for column in columns if column not in table]
                if lacking and name == "rows":
                    raise ValueError(f"{str(folder / file)!r} lacks the column(s) {', '.join(lacking)}")
                setattr(results, name, table.reindex(columns=list(columns)))
        if not len(results.runs):  # no runs.csv: each run has its own group and pair
            runs = results.rows.drop_duplicates("run", ignore_index=True).reindex(columns=list(RUNS))
            results.runs = runs.assign(group=runs["run"], pair=runs["run"], how="")
        if (folder / "maps.npz").is_file():
            with naming(folder / "maps.npz"), np.load(folder / "maps.npz") as maps:
                results.maps = dict(maps)
        if (folder / "about.json").is_file():
            results.about = read_json(folder / "about.json")
        return results

    @classmethod
    def join(cls, parts: Iterable[Results]) -> Results:
        """All measurements of several results, and ``about`` of the first that has one.

        A run that is in several of them has one row in ``runs``: the first value that is not missing, per column.

        Example:
            >>> a, b = (Results(runs=pd.DataFrame([{"run": run, "how": run}])) for run in "ab")
            >>> Results.join([a, b, a]).runs.run.tolist()
            ['a', 'b']
        """
        parts = list(parts)
        joined = cls(maps={key: value for part in parts for key, value in part.maps.items()})
        for name in _TABLES:
            filled = [table for part in parts if len(table := getattr(part, name))]
            if filled:
                setattr(joined, name, pd.concat(filled, ignore_index=True))
        joined.runs = joined.runs.groupby("run", sort=False, as_index=False).first().reindex(columns=list(RUNS))
        joined.about = next((part.about for part in parts if part.about), {})
        return joined


def _with_scale(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of version 0.1, which wrote the scale of the target maps into the readout's name."""
    kind = rows["readout"].str.partition(",")
    trained = rows["readout"].isin(["", "variance"])
    return rows.assign(
        readout=kind[0], scale=kind[2].eq(" paper scale").map({True: "paper", False: "unit"}).mask(trained, "")
    )


def read_csv(path: str | Path) -> pd.DataFrame:
    """A table of :class:`Results`: numbers as numbers, and an empty text as "", not as NaN."""
    texts = {column: str for column in pd.read_csv(path, nrows=0) if column not in _NUMBERS}
    return pd.read_csv(path, dtype=texts, keep_default_na=False, na_values={column: [""] for column in _NUMBERS})


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ValueError: naming the file, where it holds none.
    """
    with naming(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {content!r}; expected a mapping")
    return content


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Calls ``write`` with a temporary path beside ``path`` and renames it: readers see the old file or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@functools.lru_cache(maxsize=64)
def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t with ``df`` degrees of freedom: half the width of a 95% interval.

    With t = sqrt(df) tan(a), the density of a is proportional to cos(a)^(df - 1).

    Example:
        >>> round(t_quantile(2), 3), round(t_quantile(9), 3), round(t_quantile(100_000), 3)
        (4.303, 2.262, 1.96)
    """
    steps = np.linspace(0, np.pi / 2, 200_001)
    mass = np.cumsum(np.cos((steps[:-1] + steps[1:]) / 2) ** (df - 1))
    return float(np.sqrt(df) * np.tan(np.interp(0.95, mass / mass[-1], steps[1:])))


def twins_half_width(spread: Any, k: int) -> Any:
    """Half the width of the 95% interval of a network's score minus the mean score of k twins, for their part.

    ``spread`` is the standard deviation of the twins' scores, a number or an array. The interval holds 0 where the
    network is one more of its twins. It is NaN for a single twin, which has no spread.

    Example:
        >>> round(twins_half_width(0.1, k=3), 3)
        0.497
    """
    return t_quantile(k - 1) * spread * math.sqrt(1 + 1 / k) if k > 1 else spread * math.nan


def summarize(
    scores: Mapping[str, Tensor], targets: Sequence[str], twins: Tensor | None = None
) -> list[dict[str, Any]]:
    """One row per target and metric from scores per image.

    Args:
        scores: by metric, each (n, T).
        targets: their names.
        twins: the SPC of k untrained twins, (k, n, T), where ``scores`` has a ``delta``.

    Returns:
        Rows with ``target``, ``metric``, ``value`` (the mean over images; of ``constant`` the number of images),
        ``ci_low`` and ``ci_high`` (the 95% t interval over images; NaN for a single image or a count) and ``n``. The
        half-width of delta's interval is that over images and :func:`twins_half_width`, added in quadrature. For a
        single image it is the latter, for a single twin NaN.

    Example:
        >>> import torch
        >>> rows = summarize({"spc": torch.tensor([[0.4], [0.6]])}, ["H"])
        >>> round(rows[0]["value"], 3), rows[0]["n"]
        (np.float64(0.5), 2)
    """
    rows = []
    for metric, values in scores.items():
        per_image = values.double().cpu().numpy()  # (n, T)
        n = len(per_image)
        mean = per_image.sum(0) if metric == "constant" else per_image.mean(0)
        half = np.full_like(mean, np.nan)
        if n > 1 and metric != "constant":
            half = t_quantile(n - 1) * per_image.std(0, ddof=1) / math.sqrt(n)
        if metric == "delta" and twins is not None:
            of_twins = twins.double().cpu().numpy().mean(1)  # (k, T)
            spread = of_twins.std(0, ddof=min(1, len(of_twins) - 1))
            half = np.hypot(half if n > 1 else 0, twins_half_width(spread, len(of_twins)))
        low, high = mean - half, mean + half
        for i, target in enumerate(targets):
            row = {"target": target, "metric": metric, "value": mean[i], "ci_low": low[i], "ci_high": high[i], "n": n}
            rows.append(row)
    return rows
