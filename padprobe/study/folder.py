"""The folder of a study's results: where each cell writes, and how its tables are joined."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from padprobe.readout.spec import Readout
from padprobe.report.claims import evaluate
from padprobe.report.references import read_references
from padprobe.results import COLUMNS, MISSING, READOUT, Results, read_json, write_text
from padprobe.study.cell import Planned
from padprobe.study.plan import Study

PLANS = "studies"
_FORMAT = 2
_RECORD = "part.json"


def scores_folder(planned: Planned, out: Path) -> Path:
    """Where a trained cell's task scores lie."""
    return out / "cells" / planned.folder / f"scores-{planned.scores_key}"


def error_log(planned: Planned, out: Path) -> Path:
    """The file that says why a cell failed."""
    return out / "cells" / planned.folder / "error.log"


def _probe_folder(planned: Planned, out: Path) -> Path:
    """Where a cell's probe lies: one part for each time that readouts were added."""
    return out / "cells" / planned.folder / f"probe-{planned.probe_key}"


def save_part(results: Results, planned: Planned, out: Path, readouts: Sequence[Readout] | str, seconds: float) -> None:
    """Saves the results of some of a cell's readouts; the part counts once its results.csv, the last file, is there."""
    part = _probe_folder(planned, out) / f"part-{time.time_ns()}"
    part.mkdir(parents=True)
    write_text(part / _RECORD, json.dumps({"readouts": readouts, "seconds": seconds}, default=dataclasses.asdict))
    results.save(part)


def readouts_left(planned: Planned, out: Path) -> list[Readout] | str:
    """The readouts that are still to be made; a file of trained readouts is one thing."""
    return _left(planned.cell.readouts, _records(_probe_folder(planned, out)))


def seconds_taken(planned: Planned, out: Path) -> float:
    """How long a cell has run so far."""
    return sum(record["seconds"] for record in _records(_probe_folder(planned, out)).values())


def _read(readouts: Any) -> list[Readout] | str:
    """Readouts from JSON."""
    return readouts if isinstance(readouts, str) else [Readout(**readout) for readout in readouts]


def _records(probe: Path) -> dict[Path, dict[str, Any]]:
    """The readouts and seconds of a probe's complete parts by folder, oldest first."""
    records = {}
    for part in sorted(probe.glob("part-*"), key=lambda part: int(part.name.split("-")[1])):
        if (part / "results.csv").is_file():
            record = read_json(part / _RECORD)
            records[part] = {**record, "readouts": _read(record["readouts"])}
    return records


def _left(asked: list[Readout] | str, records: dict[Path, dict[str, Any]]) -> list[Readout] | str:
    """The readouts that no part has. The first asked for must be the first of a part, which keeps its maps."""
    if isinstance(asked, str):
        return [] if records else asked
    made = [record["readouts"] for record in records.values()]
    done = {readouts[0] for readouts in made} | {readout for readouts in made for readout in readouts} - {asked[0]}
    return [readout for readout in asked if readout not in done]


def write_plan(study: Study, out: Path) -> None:
    """Writes what a study is into the folder, so that its results can be joined without its YAML.

    Cells that are not chosen keep their entry from an earlier run of the study, which may be at another scale.
    """
    place = out / PLANS / f"{study.name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_file() and _read_plan(place).get("paths", study.paths) != study.paths:  # another study has this name
        place = place.with_stem(f"{study.name}-{hashlib.sha256(repr(study.paths).encode()).hexdigest()[:8]}")
    earlier = _read_plan(place)["cells"] if place.is_file() else {}
    cells = {}
    for planned in study.cells:
        cells[planned.name] = {
            "scores": str(scores_folder(planned, Path())) if planned.cell.fit else None,
            "probe": str(_probe_folder(planned, Path())),
            "log": str(error_log(planned, Path())),
            "group": planned.group,
            "pairs": planned.pairs,
            "how": planned.how,
            "readouts": planned.cell.readouts,
        }
        if planned not in study.chosen:
            cells[planned.name] = earlier.get(planned.name, cells[planned.name])
    references = [row for path in study.references for row in read_references(path).to_dict("records")]
    plan = {"format": _FORMAT, "paths": study.paths, "about": study.about, "references": references, "cells": cells}
    write_text(place, json.dumps({**plan, "missing": study.missing}, indent=1, default=dataclasses.asdict))


def _read_plan(place: Path) -> dict[str, Any]:
    plan = read_json(place)
    if plan.get("format") != _FORMAT:
        raise ValueError(
            f"{str(place)!r} was written by another version of padprobe, and its study cannot be continued or joined: "
            "use another --out folder. To report its results alone, move its results.csv to a folder without 'studies'"
        )
    return plan


def load_results(out: str | Path) -> Results:
    """The results of all studies in a folder so far, with what is missing and the verdicts of the studies' claims.

    A cell of several studies has the readouts of all, if the studies agree on everything else about it. Otherwise the
    latest study's cell counts.

    Raises:
        ValueError: for a folder that another version of padprobe wrote.
    """
    out = Path(out)
    places = sorted((out / PLANS).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    plans = [_read_plan(place) for place in places]
    missing = {name: why for plan in plans for name, why in plan["missing"].items()}
    parts = []
    for name, cell in _join_cells(plans).items():
        results, why = _load_cell(cell, out)
        parts.append(results)
        if why:
            missing[name] = why
    joined = Results.join(parts)
    for table in ("rows", "profile"):  # parts of one cell have the same controls
        frame = getattr(joined, table)
        labels = [column for column in frame if column not in ("value", "ci_low", "ci_high")]
        setattr(joined, table, frame.drop_duplicates(labels, ignore_index=True))
    joined.missing = pd.DataFrame(missing.items(), columns=list(MISSING))
    joined.about = _join_about([plan["about"] for plan in plans])
    references = [row for plan in plans for row in plan["references"]]
    joined.references = pd.DataFrame(references, columns=joined.references.columns).drop_duplicates(ignore_index=True)
    joined.claims = evaluate(joined)
    return joined


def join_folders(folders: Sequence[Path]) -> Results:
    """The results of several folders of `padprobe study` or `padprobe probe`, such as the shares of several machines.

    Raises:
        ValueError: for a folder that cannot be read, or a run that has other numbers in two folders.
    """
    parts = [load_results(folder) if Path(folder, PLANS).is_dir() else Results.load(folder) for folder in folders]
    if len(parts) == 1:
        return parts[0]
    joined = Results.join(parts)
    for table in ("rows", "trajectory", "profile", "missing", "references"):
        setattr(joined, table, getattr(joined, table).drop_duplicates(ignore_index=True))
    labels = [column for column in COLUMNS if column not in ("value", "ci_low", "ci_high", "n")]
    twice = joined.rows["run"][joined.rows.duplicated(labels)]
    if len(twice):
        raise ValueError(
            f"run {twice.iloc[0]!r} has other numbers in two of the folders {', '.join(map(str, folders))}: report one "
            "of them, and give the other's numbers with --beside FOLDER/results.csv"
        )
    complete = {run for part in parts for run in set(part.runs["run"]) - set(part.missing["what"])}
    made = joined.missing["what"].isin(complete) & joined.missing["why"].str.endswith("not run yet")
    joined.missing = joined.missing[~made].reset_index(drop=True)
    joined.about = _join_about([part.about for part in parts if part.about])
    joined.claims = evaluate(joined)
    return joined


def _join_cells(plans: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cells of several plans by name."""
    cells: dict[str, dict[str, Any]] = {}
    for plan in plans:
        groups = {cell.get("group", name) for name, cell in plan["cells"].items()}
        cells = {
            name: cell
            for name, cell in cells.items()
            if name in plan["cells"] or cell.get("group", name) not in groups  # other seeds of a group are out of date
        }
        for name, cell in plan["cells"].items():
            earlier = cells.get(name, {"probe": None})
            if isinstance(cell["readouts"], list) and all(earlier[key] == cell[key] for key in ("probe", "scores")):
                cell["readouts"] += [readout for readout in earlier["readouts"] if readout not in cell["readouts"]]
            cells[name] = cell
    return cells


def _join_about(abouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several studies say about themselves: the latest's title and text, and all tables and claims.

    Another table or claim of the same name gets a number.
    """
    joined = {key: value for about in abouts for key, value in about.items()}
    for part in ("tables", "claims") if joined else ():
        entries: dict[str, dict[str, Any]] = {}
        for entry in [entry for about in abouts for entry in about.get(part) or []]:
            names = itertools.chain([entry["name"]], (f"{entry['name']}-{i}" for i in itertools.count(2)))
            name = next(name for name in names if entries.get(name, {**entry, "name": name}) == {**entry, "name": name})
            entries[name] = {**entry, "name": name}
        joined[part] = list(entries.values())
    return joined


def _load_cell(cell: dict[str, Any], out: Path) -> tuple[Results, str]:
    """A cell's results, and why some are missing ("" if none are)."""
    readouts, records = _read(cell["readouts"]), _records(out / cell["probe"])
    parts = []
    for part, record in records.items():
        results = Results.load(part)
        if isinstance(readouts, list):
            results.rows = results.rows[[_asked(row, readouts) for row in results.rows.to_dict("records")]]
            if record["readouts"][0] != readouts[0]:  # maps and profiles are the first readout's
                results.maps, results.profile = {}, results.profile[:0]
        parts.append(results)
    scored = not cell["scores"] or (out / cell["scores"] / "results.csv").is_file()
    if cell["scores"] and scored:
        parts.append(Results.load(out / cell["scores"]))
    for results in parts:
        _rename(results, cell)
    joined = Results.join(parts)
    made = [(run["run"], run["how"]) for results in parts for run in results.runs.to_dict("records")]
    joined.runs["pair"] = joined.runs["run"].map(cell["pairs"])
    joined.runs["how"] = [
        "; ".join([cell["how"], *(how for name, how in made if name == run and how)]) for run in joined.runs["run"]
    ]
    left = _left(readouts, records)
    if (out / cell["log"]).is_file():
        return joined, "failed: " + (out / cell["log"]).read_text(encoding="utf-8").strip().splitlines()[-1]
    if records and scored and left:
        return joined, f"{len(left)} of its readouts not run yet"
    return joined, "not run yet" if left or not scored else ""


def _rename(results: Results, cell: dict[str, Any]) -> None:
    """Gives a cell's runs their present names: "a" is "a-seed0" once the study has more seeds."""
    now, *_ = cell["pairs"]
    earlier = (cell.get("group", now), Path(cell["probe"]).parent.name)
    names = {old + run.removeprefix(now): run for old in earlier for run in cell["pairs"]}
    for name in ("rows", "runs", "trajectory", "profile"):
        table = getattr(results, name)
        setattr(results, name, table.assign(run=table["run"].replace(names)))
    keys = {key: key.partition("/") for key in results.maps}
    results.maps = {f"{names.get(run, run)}/{rest}": results.maps[key] for key, (run, _, rest) in keys.items()}


def _asked(row: dict[Any, Any], readouts: Sequence[Readout]) -> bool:
    """Whether a row belongs to one of these readouts, to its control, or to none."""
    if row["readout"] in ("", "variance"):
        return True
    shape, stages = tuple(row[column] for column in READOUT[:-1]), row["stages"]
    return any(
        shape == (readout.kind, readout.kernel_size, readout.depth, readout.padding, readout.scale)
        and (stages in (readout.stages, "rgb") or (readout.stages == "each" and re.fullmatch(r"f\d+", stages)))
        for readout in readouts
    )
