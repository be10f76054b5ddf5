"""Where a study keeps what its cells find, and how that becomes one table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from padprobe.readout.variants import Readout
from padprobe.results import NOTES, Results, write_text
from padprobe.study.plan import Cell, Planned, Study

PLAN = "study.json"
_RECORD = "part.json"


def scores_folder(planned: Planned, out: Path) -> Path:
    """Where a trained cell's task scores lie."""
    return out / "cells" / planned.name / f"scores-{planned.scores_key}"


def _probe_folder(planned: Planned, out: Path) -> Path:
    """Where a cell's probes lie: a part for every time that readouts were added."""
    return out / "cells" / planned.name / f"probe-{planned.probe_key}"


def save_part(results: Results, planned: Planned, out: Path, readouts: Sequence[Readout], seconds: float) -> None:
    """Keeps what some of a cell's readouts found; a part counts from its results.csv on, which is written last."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU thread(s)"
    record = {
        "readouts": [dataclasses.asdict(readout) for readout in readouts],
        "made": f"probed on {device}, torch {torch.__version__}, {date.today()}, in {seconds / 60:.1f} min",
    }
    probe = _probe_folder(planned, out)
    part = probe / f"part-{len(list(probe.glob('part-*')))}"
    part.mkdir(parents=True)
    write_text(part / _RECORD, json.dumps(record))
    results.save(part)


def _finished(probe: Path) -> list[Path]:
    """The parts of a probe that are complete, in their order."""
    parts = [part for part in probe.glob("part-*") if (part / "results.csv").is_file()]
    return sorted(parts, key=lambda part: int(part.name.split("-")[1]))


def _record(part: Path) -> dict[str, Any]:
    return json.loads((part / _RECORD).read_text(encoding="utf-8"))


def readouts_left(planned: Planned, out: Path) -> list[Readout]:
    """The readouts that have not been made."""
    parts = _finished(_probe_folder(planned, out))
    made = [Readout(**readout) for part in parts for readout in _record(part)["readouts"]]
    return [readout for readout in planned.cell.readouts if readout not in made]


def write_plan(study: Study, out: Path) -> None:
    """Writes down what the study is, so that its results can be joined by whoever has the folder."""
    out.mkdir(parents=True, exist_ok=True)
    cells = {
        planned.name: {
            "scores": str(scores_folder(planned, Path())) if planned.cell.fit else None,
            "probe": str(_probe_folder(planned, Path())),
            "how": _how(planned.cell),
            "readouts": [dataclasses.asdict(readout) for readout in planned.cell.readouts],
        }
        for planned in study.cells
    }
    write_text(out / PLAN, json.dumps({"cells": cells, "missing": study.missing}, indent=1))


def _how(cell: Cell) -> str:
    """What a reader of the results needs to know of a cell, in words."""
    words = [f"{cell.image_size} px", f"{cell.limit_train or 'all'} images to train readouts on"]
    usual = Cell()
    for option in ("grid", "epochs", "batch_size", "stages"):
        if getattr(cell, option) != getattr(usual, option):
            words.append(f"{option} {getattr(cell, option)}")
    if cell.fit:
        words.append(", ".join([f"trained by {cell.fit}", *(f"{k}={v}" for k, v in cell.overrides.items())]))
    return "; ".join(words)


def load_results(out: str | Path) -> Results:
    """What a study has found so far, and what it has not and why.

    Args:
        out: a study's folder, see :func:`write_plan`.
    """
    out = Path(out)
    plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    parts = []
    notes = [("missing", name, why) for name, why in plan["missing"].items()]
    for name, cell in plan["cells"].items():
        scores, probes = cell["scores"], _finished(out / cell["probe"])
        if scores and (out / scores / "results.csv").is_file():
            parts.append(Results.load(out / scores))
        readouts = [Readout(**readout) for readout in cell["readouts"]]
        for part in probes:
            found = Results.load(part)
            found.rows = found.rows[[_asked(row, readouts) for row in found.rows.to_dict("records")]]
            parts.append(found)
        log = out / "cells" / name / "error.log"
        if log.is_file():
            notes.append(("missing", name, f"failed: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}"))
        elif not probes:
            notes.append(("missing", name, "not run yet"))
        else:
            notes.append(("how", name, "; ".join([cell["how"], *(_record(part)["made"] for part in probes)])))
    joined = Results.join(parts)
    for table in ("rows", "profile"):  # parts of one cell share their controls
        frame = getattr(joined, table)
        labels = [column for column in frame if column not in ("value", "ci_low", "ci_high")]
        setattr(joined, table, frame.drop_duplicates(labels, ignore_index=True))
    joined.notes = pd.DataFrame(notes, columns=list(NOTES))
    return joined


def _asked(row: dict[Any, Any], readouts: Sequence[Readout]) -> bool:
    """Whether a row is of one of these readouts, of its control, or of none."""
    if row["readout"] in ("", "variance"):
        return True
    shape = (row["readout"], row["kernel_size"], row["depth"], row["head_padding"])
    stages = row["stages"]
    return any(
        shape == (readout.name, readout.kernel_size, readout.depth, readout.padding)
        and (stages in (readout.stages, "rgb") or (readout.stages == "each" and re.fullmatch(r"f\d+", stages)))
        for readout in readouts
    )
