"""Where a study keeps what its cells find, and how that becomes one table."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from padprobe.readout.spec import Readout
from padprobe.results import NOTES, Results, write_text
from padprobe.study.plan import Cell, Planned, Study

PLANS = "studies"
_RECORD = "part.json"


def scores_folder(planned: Planned, out: Path) -> Path:
    """Where a trained cell's task scores lie."""
    return out / "cells" / planned.folder / f"scores-{planned.scores_key}"


def error_log(planned: Planned, out: Path) -> Path:
    """Where it stands why a cell failed."""
    return out / "cells" / planned.folder / "error.log"


def _probe_folder(planned: Planned, out: Path) -> Path:
    """Where a cell's probes lie: a part for every time that readouts were added."""
    return out / "cells" / planned.folder / f"probe-{planned.probe_key}"


def save_part(results: Results, planned: Planned, out: Path, readouts: Sequence[Readout], seconds: float) -> None:
    """Keeps what some of a cell's readouts found; a part counts from its results.csv on, which is written last."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU thread(s)"
    record = {
        "readouts": [dataclasses.asdict(readout) for readout in readouts],
        "made": f"probed on {device}, torch {torch.__version__}, {date.today()}, in {seconds / 60:.1f} min",
    }
    probe = _probe_folder(planned, out)
    part = probe / f"part-{time.time_ns()}"
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
    return _left(planned.cell.readouts, _finished(_probe_folder(planned, out)))


def _left(asked: Sequence[Readout], parts: Sequence[Path]) -> list[Readout]:
    """The readouts that none of the parts has made. The first counts only as a part's first, whose maps are kept."""
    found = [[Readout(**readout) for readout in _record(part)["readouts"]] for part in parts]
    made = {readout for readouts in found for readout in readouts if readout != asked[0]}
    return [r for r in asked if r not in made | {readouts[0] for readouts in found}]


def write_plan(study: Study, out: Path) -> None:
    """Writes down what the study is, so that its results can be joined by whoever has the folder.

    Cells that are not chosen stay as an earlier run of the study has written them: they may be at another scale.
    """
    place = out / PLANS / f"{study.name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(place.read_text(encoding="utf-8"))["cells"] if place.is_file() else {}
    cells = {}
    for planned in study.cells:
        cells[planned.name] = {
            "scores": str(scores_folder(planned, Path())) if planned.cell.fit else None,
            "probe": str(_probe_folder(planned, Path())),
            "log": str(error_log(planned, Path())),
            "how": _how(planned),
            "readouts": [dataclasses.asdict(readout) for readout in planned.cell.readouts],
        }
        if planned not in study.chosen:
            cells[planned.name] = earlier.get(planned.name, cells[planned.name])
    write_text(place, json.dumps({"cells": cells, "missing": study.missing}, indent=1))


def _how(planned: Planned) -> str:
    """What a reader of the results needs to know of a cell, in words."""
    cell = planned.cell
    words = [f"{cell.image_size} px", f"{cell.limit_train or 'all'} images to train readouts on"]
    usual = Cell()
    for option in ("grid", "epochs", "batch_size", "stages"):
        if getattr(cell, option) != getattr(usual, option):
            words.append(f"{option} {getattr(cell, option)}")
    if cell.fit:
        words.append(", ".join([f"trained by {cell.fit}", *(f"{k}={v}" for k, v in planned.overrides.items())]))
    return "; ".join(words)


def load_results(out: str | Path) -> Results:
    """What the studies in a folder have found so far, and what they have not and why.

    Of a cell that several studies have, all their readouts, if they agree on the rest of it; or else the latest
    study's.

    Args:
        out: the folder, see :func:`write_plan`.
    """
    out = Path(out)
    cells: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for place in sorted((out / PLANS).glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        plan = json.loads(place.read_text(encoding="utf-8"))
        missing |= plan["missing"]
        for name, cell in plan["cells"].items():
            earlier = cells.get(name)
            if earlier and all(earlier[key] == cell[key] for key in ("probe", "scores")):
                more = [readout for readout in earlier["readouts"] if readout not in cell["readouts"]]
                cell["readouts"] += more
            cells[name] = cell
    parts = []
    notes = [("missing", name, why) for name, why in missing.items()]
    for name, cell in cells.items():
        scores, probes = cell["scores"], _finished(out / cell["probe"])
        scored = not scores or (out / scores / "results.csv").is_file()
        if scores and scored:
            parts.append(Results.load(out / scores))
        readouts = [Readout(**readout) for readout in cell["readouts"]]
        for part in probes:
            found = Results.load(part)
            found.rows = found.rows[[_asked(row, readouts) for row in found.rows.to_dict("records")]]
            if Readout(**_record(part)["readouts"][0]) != readouts[0]:  # maps and profiles are of the first readout
                found.maps, found.profile = {}, found.profile[:0]
            parts.append(found)
        left = _left(readouts, probes)
        if (out / cell["log"]).is_file():
            why = (out / cell["log"]).read_text(encoding="utf-8").strip().splitlines()[-1]
            notes.append(("missing", name, f"failed: {why}"))
        elif left or not scored:
            few = probes and scored
            notes.append(("missing", name, f"not run yet: {len(left)} of its readouts" if few else "not run yet"))
        if probes:
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
