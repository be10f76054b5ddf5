"""The tables of a page that any results have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

import pandas as pd

from padprobe.report.declared import Selection, TableSpec
from padprobe.report.measurements import RUN, Row, by_run, stages_of, targets_of
from padprobe.report.sections import Section, Table, number, render, sections_with_tables
from padprobe.results import READOUT

_ALONE = "the image alone"
_SOURCES = {"padding": "zeros", "position_embedding": "learned"}
"""The sources of position, by the column that states them, and its value where the network has the source."""


def readout_name(row: Row) -> str:
    """A readout in words: "posenet 3x3", and in what it differs from the paper's.

    Example:
        >>> place = {"kernel_size": 3, "depth": 2, "head_padding": 0, "scale": "unit", "stages": "f1"}
        >>> readout_name({"readout": "posenet", **place})
        'posenet 3x3, 2 layers, stages f1'
    """
    name = row["readout"] + (f" {row['kernel_size']}x{row['kernel_size']}" if row["kernel_size"] else "")
    name += f", {row['depth']} layers" if row["depth"] > 1 else ""
    name += f", padded by {row['head_padding']}" if row["head_padding"] else ""
    name += f", scale {row['scale']}" if row["scale"] not in ("unit", "") else ""
    stages = {"all": "", "": "", "rgb": f" on {_ALONE}"}.get(row["stages"], f", stages {row['stages']}")
    return name + stages


def headline_spec(table: pd.DataFrame, head: pd.DataFrame) -> TableSpec:
    """The table "how much position": a row per run, one per pair for what padding and position embedding add, and the
    image alone."""
    name = _namer(head)
    lines: list[Row] = head.drop_duplicates([*RUN, *READOUT, "stimulus"]).to_dict("records")  # type: ignore[assignment]
    rows: list[Selection] = []
    for i, row in enumerate(lines):
        rows.append({"label": name(row), **_selection(row), "stimulus": row["stimulus"]})
        if i + 1 == len(lines) or lines[i + 1]["pair"] != row["pair"]:
            rows += _gaps([line for line in lines if line["pair"] == row["pair"]])
    rows += _alone(table, head)
    columns = [{"label": target, "target": target} for target in targets_of(head)]
    fixed = [_short(head[c].iloc[0]) for c in ("encoder", "weights") if head[c].nunique() == 1]
    fixed += [f"on {head['stimulus'].iloc[0]}"] if head["stimulus"].nunique() == 1 else []
    fixed += dict.fromkeys(readout_name(row) for row in lines)
    title = "SPC: " + ", ".join(filter(None, fixed))
    return TableSpec("headline", title, rows, columns, show=("delta", "selectivity"))


def readout_sections(table: pd.DataFrame, head: pd.DataFrame) -> list[Section]:
    """The headline, and its readout on every stimulus; none where nothing was read out."""
    if head.empty:
        return []
    text = (
        "SPC is 1 where the predicted map ranks its pixels as the target does, and 0 where nothing is known. In "
        "brackets is the 95% interval over images (n of them); low … high is the range over seeds. Read Δ before SPC: "
        "it is SPC minus that of untrained encoders with the same padding and embedding, and its interval takes in "
        "their spread. Selectivity (sel) is SPC minus the SPC of the same readout on a permuted target: near 0, the "
        "readout could have learnt any map by heart. A score near that of the image alone is content, not position. A "
        "gap is "
        "the run of a pair with a source of position minus a run without it."
    )
    if not (table["metric"] == "delta").any():
        text += (
            " Δ is missing: there is no untrained encoder of the same architecture, padding and image size here. Probe "
            "one and report the two folders together."
        )
    if head["context"].any():
        text += (
            " With context, the unpadded encoder sees the image with its real surroundings, at the padded one's "
            "resolution."
        )
    name = _namer(head.assign(stimulus=""))
    scores = table[(table["metric"] == "spc") & ~table["single"]]
    rows = [
        {"label": name(row), **_selection(row)} for row in head.drop_duplicates([*RUN, *READOUT]).to_dict("records")
    ]
    rows += [{k: v for k, v in row.items() if k != "stimulus"} for row in _alone(table, head)]
    stimuli = [s for s in scores["stimulus"].unique() if s]
    columns = [{"label": stimulus, "stimulus": stimulus} for stimulus in stimuli]
    each = {"target": targets_of(head)}
    spec = TableSpec("position", "", rows, columns, each=each, show=("mae", "nmae", "constant"))
    note = (
        "SPC, then MAE and nMAE, which is MAE divided by the MAE of the best constant: 1 means that nothing was "
        "learnt. A constant prediction counts as SPC 0."
    )
    return [
        *sections_with_tables(
            ("How much position each encoder holds", text, [render(headline_spec(table, head), by_run(table))])
        ),
        *source_sections(table, head),
        *sections_with_tables(("Position by encoder and stimulus", note, [render(spec, by_run(table))])),
    ]


def source_sections(table: pd.DataFrame, head: pd.DataFrame) -> list[Section]:
    """Where the position comes from: SPC with padding minus without, and with position embedding minus without. It
    names the sources that no run is without. Untrained runs are left out where there are others."""
    lines: list[Row] = head.drop_duplicates([*RUN, *READOUT, "stimulus"]).to_dict("records")  # type: ignore[assignment]
    lines = [line for line in lines if line["weights"] != "untrained"] or lines
    pairs = {line["pair"]: [row for row in lines if row["pair"] == line["pair"]] for line in lines}
    rows: list[Selection] = []
    notes: dict[str, list[str]] = {}
    for pair, alike in pairs.items():
        rows += [{**row, "label": row["label"].removeprefix("gap ")} for row in _gaps(alike)]
        for source, used in _SOURCES.items():
            has = any(line[source] == used for line in alike)
            without = [other for other in alike if any(_lacks(other, line, source) for line in alike)]
            if has and all(other["position_embedding"] == "shuffled" for other in without):
                notes.setdefault(f"Not measured yet is what the {source.replace('_', ' ')} brings to", []).append(pair)
        if all(line["padding"] == "valid" and line["position_embedding"] in ("", "none") for line in alike):
            notes.setdefault("Neither padding nor position embedding have", []).append(pair)
    text = (
        "SPC of a run with a source of position, padding or position embedding, minus that of the same encoder without "
        "it. What is left without either comes from the content of the image. "
    )
    if any(line["position_embedding"] == "shuffled" for line in lines):
        text += "A shuffled embedding still tells the patches apart: what is lost is the order that training gave it. "
    text += " ".join(f"{note} {', '.join(names)}." for note, names in notes.items())
    columns = [{"label": target, "target": target} for target in targets_of(head)]
    shown = render(TableSpec("sources", "", rows, columns, show=()), by_run(table), "pair") if rows else None
    return [Section("Where it comes from", text.strip(), [shown] if shown else [])] if rows or notes else []


def task_sections(table: pd.DataFrame) -> list[Section]:
    """Task scores, a column per padding, and what zero padding adds."""
    text = (
        "The difference is padded minus unpadded: above 0 the network does better at its task with padding (below 0 "
        "for an error). Position alone is a prediction that depends on position and sees no image."
    )
    return sections_with_tables(("What padding does to the task", text, [task_table(table)]))


def task_table(table: pd.DataFrame) -> Table | None:
    """Task scores: a row per pair of runs, a column per padding; None where no task was scored."""
    scores = table[(table["readout"] == "") & (table["target"] == "") & ~table["single"]]
    name = _namer(scores.assign(mode="", stimulus=""))
    names = {row["pair"]: name({**row, "run": row["pair"]}) for row in scores.to_dict("records")}
    rows = [
        {"label": ", ".join(filter(None, (names[pair], stages))), "pair": pair, "stages": stages, "readout": ""}
        for pair, stages in scores[["pair", "stages"]].drop_duplicates().itertuples(index=False)
    ]
    kept = ["padding", "context", "position_embedding"]
    modes = scores[["mode", *kept]].drop_duplicates().to_dict("records")
    modes = sorted(modes, key=lambda mode: (mode["padding"] != "zeros", mode["padding"] != "valid", mode["context"]))
    columns: list[Selection] = [{"label": mode["mode"], **{key: mode[key] for key in kept}} for mode in modes]
    if {"zeros", "valid"} <= {mode["mode"] for mode in modes}:
        columns.append({"label": "zeros - valid", "padding": "zeros", "minus": {"padding": "valid"}})
    each = {column: list(scores[column].unique()) for column in ("stimulus", "metric")}
    return render(TableSpec("tasks", "", rows, columns, each=each, show=()), by_run(scores), "pair")


def variants_sections(table: pd.DataFrame, head: pd.DataFrame) -> list[Section]:
    """Every readout of the runs that have more than one, on the headline's stimulus. Untrained runs are left out where
    the others have Δ, which is taken from them."""
    places = head[["run", "encoder", "weights", "stimulus"]].drop_duplicates()
    shown = table[(table["metric"] == "spc") & ~table["single"]].merge(places)
    if (table["metric"] == "delta").any():
        shown = shown[shown["weights"] != "untrained"]
    parts = []
    for (run, stimulus), scores in shown.groupby(["run", "stimulus"], sort=False):
        if len(scores.loc[scores["stages"] != "rgb", [*READOUT]].drop_duplicates()) > 1:
            columns = [{"label": target, "target": target} for target in targets_of(scores)]
            spec = TableSpec("readouts", f"{run} on {stimulus}", _variants(scores), columns)
            parts.append(render(spec, by_run(table), "readout"))
    text = (
        "How much of a score is due to the readout. A row ridge - posenet is what the trained readout misses: above 0, "
        "its training stopped short of the best linear readout of the same features (ridge, in closed form)."
    )
    return sections_with_tables(("Readouts compared", text, parts))


def variance_sections(table: pd.DataFrame) -> list[Section]:
    """The share of each stage's variance that position explains, and how much of the stage the padding reaches."""
    table = table[(table["readout"] == "variance") & ~table["single"]]
    shares, reach = table[table["metric"] == "eta2"], table[(table["metric"] == "reach") & (table["value"] > 0)]
    stages = [*stages_of(table), *(["all"] if "all" in set(shares["stages"]) else [])]
    columns = [{"label": stage, "stages": stage} for stage in stages]
    parts = []
    for stimulus, scores in shares.groupby("stimulus", sort=False):
        kinds: list[tuple[str, pd.DataFrame]] = [
            ("eta2", scores),
            ("reach", reach.drop_duplicates(["encoder", "padding", "context"])),
        ]
        rows = [
            {
                "label": row["run"] if metric == "eta2" else f"receptive field reaches the padding ({row['run']})",
                **{key: row[key] for key in ("run", "encoder", "weights", "context", "readout", "stimulus")},
                "metric": metric,
            }
            for metric, lines in kinds
            for row in lines.drop_duplicates(RUN).to_dict("records")
        ]
        parts.append(render(TableSpec("variance", f"η² on {stimulus}", rows, columns, show=()), by_run(table)))
    text = (
        "η² is the share of a stage's variance, over images and cells, that the position of the cell explains: 0 where "
        "the features do not depend on it, 1 where they depend on nothing else. No readout is trained. The last rows "
        "are the fraction of a stage's cells whose receptive field reaches the padding, from the architecture alone: "
        "where it is 0, padding cannot be the source."
    )
    return sections_with_tables(("No readout at all: η²", text, parts))


def trajectory_lines(trajectory: pd.DataFrame) -> Table:
    """SPC over training steps beside the task's metrics: at most eight steps per run, the first and last among them.

    Args:
        trajectory: :func:`padprobe.report.measurements.trajectory_table`'s, not empty.
    """
    targets = targets_of(trajectory)
    metrics = list(trajectory.loc[trajectory["target"] == "", "metric"].unique())
    table = Table("SPC over training steps", ["run", "padding", "step", *targets, *metrics], [], labels=3)
    for (run, mode), rows in trajectory.groupby(["run", "mode"], sort=False):
        values = rows.set_index(["step", "target", "metric"])["value"]
        steps = sorted(rows["step"].unique())
        for i in sorted({round(k * (len(steps) - 1) / 7) for k in range(8)}):
            cells = []
            for target, metric in [*((t, "spc") for t in targets), *(("", m) for m in metrics)]:
                delta = values.get((steps[i], target, "delta"), float("nan"))
                cell = number(values.get((steps[i], target, metric), float("nan")))
                cells.append(cell if pd.isna(delta) else f"{cell}\nΔ {number(delta, 2, '+')}")
            table.rows.append(("run", [str(run), str(mode), f"{steps[i]:.0f}", *cells]))
    return table


def _short(label: str) -> str:
    """A path by its file name; any other label as it is."""
    return PurePath(label).name if "/" in label else label


def _namer(runs: pd.DataFrame) -> Callable[[Row], str]:
    """Names a run, and adds what tells it from the others of a table and its name does not say."""
    varying = [c for c in ("task", "mode", "encoder", "weights", "stimulus") if runs[c].nunique() > 1]

    def name(row: Row) -> str:
        facts = [_short(row[column]) for column in varying if row[column] not in ("", "trained")]
        facts = [fact for fact in facts if fact.lower() not in row["run"].lower()]
        return row["run"] + (f" ({', '.join(facts)})" if facts else "")

    return name


def _selection(row: Row) -> Selection:
    """What names a run and its readout."""
    return {key: row[key] for key in ("run", "encoder", "weights", "context", *READOUT)}


def _gaps(lines: list[Row]) -> list[Selection]:
    """Rows with the SPC of a pair's run that has a source of position, its padding or its position embedding, minus
    that of each run without it, read out alike on the same images."""
    rows: list[Selection] = []
    for other in lines:
        for source in _SOURCES:
            used = [line for line in lines if _lacks(other, line, source)]
            same = ("source_px", "source_width", "stimulus", *READOUT)
            if len(used) == 1 and all(str(used[0][key]) == str(other[key]) for key in same):
                row = {"label": f"gap {other['pair']}: {used[0]['mode']} - {other['mode']}"}
                minus = {key: other[key] for key in ("run", "encoder", "weights", "context")}
                rows.append({**row, "stimulus": other["stimulus"], **_selection(used[0]), "minus": minus})
    return rows


def _lacks(other: Row, line: Row, source: str) -> bool:
    """Whether a run differs from another in that it lacks a source of position (or has it changed)."""
    (kept,) = {*_SOURCES} - {source}
    alike = line[kept] == other[kept] and (kept == "position_embedding" or line["context"] == other["context"])
    return bool(alike and line[source] == _SOURCES[source] and other[source] not in ("", _SOURCES[source]))


def _alone(table: pd.DataFrame, head: pd.DataFrame) -> list[Selection]:
    """Rows of the image alone: of the first run for each image size and stimulus of the headline."""
    keys = ["run", "encoder", "weights", *READOUT[:-1], "stimulus"]
    rgb = table[(table["stages"] == "rgb") & (table["metric"] == "spc") & ~table["single"]]
    sizes = ["image_px", "image_width", "source_px", "source_width"]
    rgb = rgb.merge(head[keys].drop_duplicates()).drop_duplicates([*sizes, *READOUT, "stimulus"])
    return [
        {"label": f"{_ALONE} (of {row['run']})", **_selection(row), "stimulus": row["stimulus"]}
        for row in rgb.to_dict("records")
    ]


def _variants(scores: pd.DataFrame) -> list[Selection]:
    """A row per readout of a run: all stages first, then single ones, then several; after a ridge what it adds."""
    order = {stage: i for i, stage in enumerate(["all", *stages_of(scores)])}
    readouts = scores.drop_duplicates([*READOUT]).to_dict("records")
    readouts.sort(
        key=lambda row: (
            row["stages"] == "rgb",
            order.get(row["stages"], len(order)),
            row["stages"],
            *(row[key] for key in READOUT[1:-1]),
            row["readout"],
        )
    )
    rows: list[Selection] = []
    for row in readouts:
        rows.append({"label": readout_name(row), **_selection(row), "stimulus": row["stimulus"]})
        twin = {**row, "readout": "posenet"}
        if row["readout"] == "ridge" and any(all(r[c] == twin[c] for c in READOUT) for r in readouts):
            rows.append({**rows[-1], "label": "ridge - posenet", "minus": {"readout": "posenet"}})
    return rows
