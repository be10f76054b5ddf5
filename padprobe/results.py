"""The tables that every measurement goes into, their intervals, and the folder that holds them."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
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
    *("run", "group", "pair", "encoder", "weights", "task", "padding", "seed"),
    *("image_px", "source_px", "shown_px", "n_train", "how"),
)
TRAJECTORY = ("run", "step", "target", "metric", "value")
PROFILE = ("run", "seed", *READOUT, "stimulus", "target", "distance", "metric", "value", "ci_low", "ci_high", "n")
MISSING = ("what", "why")
REFERENCES = ("run", *READOUT, "stimulus", "target", "metric", "value", "source", "table")
CLAIMS = ("claim", "says", "part", "value", "ci_low", "ci_high", "bound", "verdict", "claim_verdict")

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
    *("image_px", "source_px", "shown_px", "n_train"),
)


def _empty(name: str) -> Any:
    return field(default_factory=lambda: pd.DataFrame(columns=list(_TABLES[name][1])))


@dataclass
class Results:
    """All that was measured, as tidy tables, and the maps beside them.

    Attributes:
        rows: one row per measurement (``results.csv``, :data:`COLUMNS`). ``n`` counts images. A task's score has an
            empty ``readout`` and ``target``; ``readout`` is "variance" where no readout is involved (eta2, reach).
        runs: one row per run (``runs.csv``, :data:`RUNS`). ``group``: runs that differ in their seed alone share it.
            ``pair``: runs that differ in their padding alone share it. ``image_px``: side of the image that maps are
            predicted for; ``source_px``: side at which images were read; ``shown_px``: side that the encoder saw, which
            is larger than ``image_px`` where an unpadded encoder was shown the image's surroundings. ``how``: how the
            run was made, in words.
        trajectory: one row per value logged in a training (:data:`TRAJECTORY`); a task's metric has an empty target.
        maps: mean maps over the images of a stimulus, shape (S, S), under ``run/stimulus/target/prediction`` and
            ``run/stimulus/target/error`` (mean absolute error); and, under ``run/stimulus/STAGE/eta2``, the share of a
            stage's variance that position explains, cell by cell, shape (grid, grid).
        profile: one row per measurement at one distance to the nearest border, in pixels (:data:`PROFILE`).
        missing: what was to be measured and was not, and why (:data:`MISSING`).
        references: published or earlier numbers to set beside ours (:data:`REFERENCES`).
        claims: the study's claims and their verdicts, one row per comparison (:data:`CLAIMS`).
        about: what the study says about itself: its title, tables and claims, as written in its YAML.

    Example:
        >>> results = Results()
        >>> list(results.rows.columns[:3]), len(results.rows)
        (['run', 'encoder', 'weights'], 0)
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

        Each file is written whole or not at all, and ``results.csv`` last, so that a folder with a results.csv is
        complete.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "maps.npz", lambda path: np.savez_compressed(path, **self.maps))  # type: ignore[arg-type]
        write_text(folder / "about.json", json.dumps(self.about, indent=1, ensure_ascii=False))
        for name in reversed(_TABLES):
            write_csv(folder / _TABLES[name][0], getattr(self, name))

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: where the folder has no results.csv, or one without the columns of a results table.
        """
        folder = Path(folder)
        if not (folder / "results.csv").is_file():
            raise ValueError(f"no results.csv in {str(folder)!r}: give the --out folder of `padprobe probe` or `study`")
        results = cls()
        for name, (file, columns) in _TABLES.items():
            if (folder / file).is_file():
                table = read_csv(folder / file)
                if name == "rows" and "scale" not in table:
                    table = _with_scale(table)
                lacking = [column for column in columns if column not in table]
                if lacking and name == "rows":
                    raise ValueError(f"{str(folder / file)!r} lacks the column(s) {', '.join(lacking)}")
                setattr(results, name, table.reindex(columns=list(columns)))
        if not len(results.runs):
            results.runs = _runs_of(results.rows)
        if (folder / "maps.npz").is_file():
            with np.load(folder / "maps.npz") as maps:
                results.maps = dict(maps)
        if (folder / "about.json").is_file():
            results.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        return results

    @classmethod
    def join(cls, parts: Iterable[Results]) -> Results:
        """All measurements of several results; what the first of them says about itself."""
        parts = list(parts)
        joined = cls(maps={key: value for part in parts for key, value in part.maps.items()})
        for name in _TABLES:
            filled = [table for part in parts if len(table := getattr(part, name))]
            if filled:
                setattr(joined, name, pd.concat(filled, ignore_index=True))
        joined.about = next((part.about for part in parts if part.about), {})
        return joined


def _with_scale(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of version 0.1, which wrote the scale of the target maps into the readout's name."""
    kind = rows["readout"].str.partition(",")
    trained = rows["readout"].isin(["", "variance"])
    return rows.assign(
        readout=kind[0], scale=kind[2].eq(" paper scale").map({True: "paper", False: "unit"}).mask(trained, "")
    )


def _runs_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of a results table that has no runs.csv beside it: each is a group and a pair of its own."""
    runs = rows.drop_duplicates("run").reindex(columns=list(RUNS))
    return runs.assign(group=runs["run"], pair=runs["run"], how="").reset_index(drop=True)


def read_csv(path: str | Path) -> pd.DataFrame:
    """A table of :class:`Results`: numbers as numbers, and an empty text as "", not as NaN."""
    return pd.read_csv(path, keep_default_na=False, na_values={column: [""] for column in _NUMBERS})


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Writes a table, whole or not at all."""
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))


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


@functools.lru_cache(maxsize=8)
def _resamples(n: int) -> np.ndarray:
    """How often each of n images is in each of 1,000 samples of n with replacement, divided by n: (1000, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000) / n


def summarize(scores: dict[str, Tensor], targets: Sequence[str]) -> list[dict[str, Any]]:
    """One row per target and metric from scores per image.

    Args:
        scores: by metric, each of shape (n, T), as :class:`~padprobe.scores.PositionScores` gives them.
        targets: T names.

    Returns:
        Rows with ``target``, ``metric``, ``value`` (the mean over images; of ``constant`` the number of images),
        ``ci_low`` and ``ci_high`` (95% percentile bootstrap over images with 1,000 resamples; NaN for a single image or
        a count) and ``n``.

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
        low = high = np.full_like(mean, np.nan)
        if n > 1 and metric != "constant":
            low, high = np.percentile(_resamples(n) @ per_image, [2.5, 97.5], axis=0)
        for i, target in enumerate(targets):
            row = {"target": target, "metric": metric, "value": mean[i], "ci_low": low[i], "ci_high": high[i], "n": n}
            rows.append(row)
    return rows
