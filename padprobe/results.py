"""The tidy table that every measurement goes into, and the maps beside it."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

COLUMNS = (
    *("run", "encoder", "weights", "task", "padding", "seed"),
    *("readout", "kernel_size", "depth", "head_padding", "stages"),
    *("stimulus", "target", "metric", "value", "ci_low", "ci_high", "n"),
)
TRAJECTORY = ("run", "task", "padding", "step", "target", "metric", "value")
PROFILE = (
    *("run", "encoder", "weights", "task", "padding", "seed"),
    *("readout", "kernel_size", "depth", "head_padding", "stages"),
    *("stimulus", "target", "distance", "metric", "value", "ci_low", "ci_high", "n"),
)
NOTES = ("kind", "what", "text")


@dataclass
class Results:
    """Measurements: ``rows`` (one a measurement, :data:`COLUMNS`), and what is too large for a table.

    ``trajectory`` has one row a logged value of a training (:data:`TRAJECTORY`; a task's metric has an empty target).
    ``profile`` has one row a measurement at one distance to the nearest border, in pixels of the image
    (:data:`PROFILE`).
    ``notes`` says how it was measured (:data:`NOTES`): of kind "missing", what was to be measured and was not, and why;
    of kind "how", the options of a run.
    ``maps`` holds mean maps over a stimulus's images, shape (S, S), under ``run/stimulus/target/prediction`` and
    ``.../error`` (mean absolute error), and the share of a stage's variance that position explains cell by cell, shape
    (grid, grid), under ``run/stimulus/STAGE/eta2``.
    """

    rows: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(COLUMNS)))
    trajectory: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(TRAJECTORY)))
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    profile: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(PROFILE)))
    notes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(NOTES)))

    def save(self, folder: str | Path) -> None:
        """Writes ``results.csv``, ``trajectory.csv``, ``profile.csv``, ``notes.csv`` and ``maps.npz`` into a folder;
        results.csv last, each whole or not at all, so that a results.csv means that all is there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "maps.npz", lambda path: np.savez_compressed(path, **self.maps))  # type: ignore[arg-type]
        write_atomically(folder / "trajectory.csv", lambda path: self.trajectory.to_csv(path, index=False))
        write_atomically(folder / "profile.csv", lambda path: self.profile.to_csv(path, index=False))
        write_atomically(folder / "notes.csv", lambda path: self.notes.to_csv(path, index=False))
        write_atomically(folder / "results.csv", lambda path: self.rows.to_csv(path, index=False))

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """What :meth:`save` wrote.

        Raises:
            ValueError: where the folder has no results.csv, or one without the columns of a results table.
        """
        folder = Path(folder)
        if not (folder / "results.csv").is_file():
            raise ValueError(f"no results.csv in {str(folder)!r}: give the --out folder of `padprobe probe` or `study`")
        rows = pd.read_csv(folder / "results.csv", keep_default_na=False, na_values={c: [""] for c in _NUMBERS})
        missing = [column for column in COLUMNS if column not in rows]
        if missing:
            raise ValueError(f"{str(folder / 'results.csv')!r} lacks the column(s) {', '.join(missing)}")
        results = cls(rows)
        if (folder / "trajectory.csv").is_file():
            results.trajectory = pd.read_csv(folder / "trajectory.csv", keep_default_na=False)
        if (folder / "notes.csv").is_file():
            results.notes = pd.read_csv(folder / "notes.csv", keep_default_na=False)
        if (folder / "profile.csv").is_file():
            numbers = {c: [""] for c in (*_NUMBERS, "distance")}
            results.profile = pd.read_csv(folder / "profile.csv", keep_default_na=False, na_values=numbers)
        if (folder / "maps.npz").is_file():
            with np.load(folder / "maps.npz") as maps:
                results.maps = dict(maps)
        return results

    @classmethod
    def join(cls, parts: Iterable[Results]) -> Results:
        """All measurements of several results."""
        parts = list(parts)
        joined = cls(maps={key: value for part in parts for key, value in part.maps.items()})
        for table in ("rows", "trajectory", "profile", "notes"):
            filled = [frame for part in parts if len(frame := getattr(part, table))]
            if filled:
                setattr(joined, table, pd.concat(filled, ignore_index=True))
        return joined


_NUMBERS = ("kernel_size", "depth", "head_padding", "seed", "value", "ci_low", "ci_high", "n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write) -> None:
    """Calls ``write`` with a temporary path beside ``path`` and renames it: readers see the old file or the new one."""
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
    """How often each of n images is in each of 1,000 samples of n with replacement, over n: (1000, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000) / n


def summarize(scores: dict[str, Tensor], targets: Sequence[str]) -> list[dict[str, Any]]:
    """Per-image scores, as :class:`PositionScores` gives them, as one row a target and metric.

    Rows have ``target``, ``metric`` (the mean over images; of ``constant`` the number of images), ``value``,
    ``ci_low``, ``ci_high`` (95% percentile bootstrap over images, 1,000 resamples, NaN for a single image or a count)
    and ``n``.
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
