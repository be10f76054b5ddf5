"""The report's tables as text: what stands in each cell, and the sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from padprobe.maps import TARGETS
from padprobe.report.paper import paper_numbers
from padprobe.report.tables import READOUT, RGB, RUN, gaps, short, targets_of

ABSENT = "\N{EN DASH}"


@dataclass
class Table:
    """A table of text. ``rows``: (kind: "run", "gap" or "control"; cells); the first line of a cell is its value, the
    others qualify it. ``groups``: (label, columns spanned) above the header."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    labels: int = 1
    groups: list[tuple[str, int]] = field(default_factory=list)

    @property
    def flat_columns(self) -> list[str]:
        """The header in one line, for Markdown: each column with its group."""
        above = [label for label, span in self.groups for _ in range(span)] or [""] * len(self.columns)
        return [f"{group} {column}".strip() for group, column in zip(above, self.columns, strict=True)]


@dataclass
class Figure:
    """A drawn figure: its file name without suffix, what it shows, and the PNG."""

    name: str
    alt: str
    png: bytes


@dataclass
class Section:
    """A heading, one sentence on how to read what follows, tables, figures, and a note after them."""

    title: str
    reading: str
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    note: str = ""


def number(value: float, digits: int = 3, sign: str = "") -> str:
    """A number as the paper prints it, ".742"; a dash for NaN. ``sign="+"`` shows a plus."""
    if pd.isna(value):
        return ABSENT
    text = f"{round(float(value), digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no "-.000"
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text


def readout_name(row: Any) -> str:
    """A readout in words: "posenet 3x3", and what is not as in the paper."""
    kind, comma, variant = row["readout"].partition(",")
    name = kind + (f" {row['kernel_size']}x{row['kernel_size']}" if row["kernel_size"] else "") + comma + variant
    name += f", {row['depth']} layers" if row["depth"] > 1 else ""
    name += f", padded by {row['head_padding']}" if row["head_padding"] else ""
    return name + (f", stages {row['stages']}" if row["stages"] not in ("all", "rgb", "") else "")


def headline_rows(head: pd.DataFrame) -> Iterator[tuple[str, str, dict[Any, Any], pd.DataFrame]]:
    """The headline table's lines in order: (kind, name, labels, columns of ``head`` by target).

    A pair's gaps (zeros - valid, in SPC, with nothing but ``spc``) follow the pair; the RGB control comes last.
    """
    targets = targets_of(head)
    gap = gaps(head)
    for pair, family_rows in head.groupby("pair", sort=False):
        for _, rows in family_rows.groupby([*RUN, *READOUT, "stimulus"], sort=False):
            row = rows.iloc[0].to_dict()
            kind = "control" if row["run"] == RGB else "run"
            yield kind, row["run"], row, rows.set_index("target").reindex(targets)
        for padding, mine in gap[gap["pair"] == pair].groupby("padding", sort=False):
            name = f"gap {mine['pair_name'].iloc[0]}"
            row = {**dict.fromkeys([*RUN, "stimulus"], ""), "task": mine["task"].iloc[0], "padding": f"zeros-{padding}"}
            values = mine.rename(columns={"gap": "spc"}).set_index("target")[["spc"]]
            yield "gap", name, row, values.reindex(index=targets, columns=head.columns)


def readout_sections(table: pd.DataFrame, head: pd.DataFrame) -> list[Section]:
    """The headline, and its readout on every stimulus; none where nothing was read out."""
    own = table.merge(head[[*RUN, *READOUT]].drop_duplicates())
    return [_headline_section(head), _position_section(own)] if len(table) else []


def _headline_section(head: pd.DataFrame) -> Section:
    targets = targets_of(head)
    compared = bool(head["delta"].notna().any())
    runs = head[head["run"] != RGB]
    facts, labels = [], ["run", "task", "padding"]
    for column in ("encoder", "weights", "stimulus"):
        values = runs[column].map(short)
        if values.nunique() == 1:
            facts += [f"{column} {values.iloc[0]}"] if values.iloc[0] else []
        elif not all(value in run for value, run in zip(values, runs["run"], strict=True)):  # names say it already
            labels.append(column)
    rows = []
    for kind, name, row, by_target in headline_rows(head):
        cells = [name, *(short(row[c]) for c in labels[1:])]
        for _, cell in by_target.iterrows():
            spc = number(cell["spc"], sign="+" if kind == "gap" else "") + interval(cell)
            cells.append(spc + _line("Δ", cell, "delta") + _line("sel", cell, "selectivity"))
        rows.append((kind, cells))
    facts += [f"readout {name}" for name in dict.fromkeys(readout_name(row) for row in runs.to_dict("records"))]
    facts += ["[95% interval over images]"]
    facts += [f"low … high over {runs['seeds'].max()} seeds"] if (runs["seeds"] > 1).any() else []
    reading = (
        "SPC is 1 where the predicted map ranks its pixels as the target does, 0 where nothing is known: before SPC "
        "itself read Δ, how far training moved it from the untrained encoder's of the same padding; a score near the "
        "RGB-only readout's, which sees the image without an encoder, is content and not position."
    )
    if head["selectivity"].notna().any():
        reading += (
            " Selectivity (sel) is SPC minus the SPC of the same readout on one fixed random permutation of the "
            "target's cells: near SPC itself the readout found position, near 0 it could as well have learnt any map "
            "by heart."
        )
    notes = []
    if "valid+context" in set(runs["padding"]):
        notes.append(
            "valid+context: the unpadded encoder sees the image with its real surroundings, and its stages are cropped "
            "to the sizes of the padded ones; zeros-valid+context is padding's share, where zeros-valid also "
            "holds the resolution that an unpadded encoder loses."
        )
    if len(runs) and not compared:
        notes.append(
            "Δ is missing: these results have no untrained encoder of the same architecture and padding. Probe one "
            "(--weights untrained) and report both folders together."
        )
    title = "How much position each encoder holds"
    return Section(title, reading, [Table("; ".join(facts), labels + targets, rows, len(labels))], note=" ".join(notes))


def _position_section(table: pd.DataFrame) -> Section:
    """Every target x encoder x stimulus, the paper's value in the same cell (the shape of the paper's table 6)."""
    stimuli = list(table["stimulus"].unique())
    shown = table.assign(readout_name=[readout_name(row) for row in table.to_dict("records")])
    extra = [c for c in ("readout_name", "paper") if shown[c].nunique() > 1 or (c == "paper" and any(shown[c]))]
    keys = [*RUN, *READOUT]
    parts = []
    for target in targets_of(table):
        rows = []
        for _, run in shown[shown["target"] == target].groupby(keys, sort=False):
            first = run.iloc[0]
            paper = " / ".join(dict.fromkeys(name for name in run["paper"] if name))
            cells = [first["run"], first["padding"], *(paper if c == "paper" else short(first[c]) for c in extra)]
            by_stimulus = run.drop_duplicates("stimulus").set_index("stimulus")
            for stimulus in stimuli:
                cells += (
                    _position_cells(by_stimulus.loc[stimulus]) if stimulus in by_stimulus.index else [ABSENT, ABSENT]
                )
            rows.append(("control" if first["run"] == RGB else "run", cells))
        labels = ["run", "padding", *({"readout_name": "readout", "paper": "paper's network"}.get(c, c) for c in extra)]
        counts = table.groupby("stimulus")["n"].max()
        groups = [("", len(labels)), *((f"{s} (n = {counts[s]})", 2) for s in stimuli)]
        parts.append(Table(f"Target {target}", labels + ["SPC", "MAE"] * len(stimuli), rows, len(labels), groups))
    reading = (
        "Each cell is ours; below it stand [the 95% bootstrap interval over images] (with several seeds the mean, and "
        "the range over seeds as low … high), nMAE = MAE / MAE of the best constant (1 means nothing learnt), and the "
        "paper's value where the paper has that network and stimulus."
    )
    note = (
        "SPC compares with the paper's for all five targets. MAE does for H and V, and nearly for G (its best constant "
        "errs by .197 here and .186 in the paper); the paper's MAE of HS and VS is not shown, because its stripes look "
        "like targets on [-1, 1] where ours are on [0, 1]. HS varies along y, VS along x. A constant prediction counts "
        "as SPC 0."
    )
    return Section("Position by encoder and stimulus", reading, parts, note=note)


def _line(name: str, cell: pd.Series, column: str) -> str:
    """A line with a difference of SPC and its interval, where it was measured."""
    if pd.isna(cell[column]):
        return ""
    low, high = (number(cell[f"{column}_{end}"]) for end in ("low", "high"))
    return f"\n{name} {number(cell[column], sign='+')}" + (f" [{low}, {high}]" if low != ABSENT else "")


def _position_cells(cell: pd.Series) -> list[str]:
    mae = number(cell["mae"]) + ("" if pd.isna(cell["nmae"]) else f"\nnMAE {number(cell['nmae'])}")
    mae += "" if pd.isna(cell["paper_mae"]) else f"\npaper {number(cell['paper_mae'])}"
    return [spc_cell(cell), mae]


def spc_cell(cell: pd.Series) -> str:
    """SPC, its interval, how many predictions are constant, and the paper's value."""
    spc = number(cell["spc"]) + interval(cell)
    if cell["constant"] > 0:
        spc += "\nconstant" if cell["n"] == 1 else f"\n{cell['constant']:g} of {cell['n']} constant"
    return spc + ("" if pd.isna(cell["paper_spc"]) else f"\npaper {number(cell['paper_spc'])}")


def interval(cell: pd.Series) -> str:
    """A line with the range over seeds (low … high) or the interval over images [low, high], where there is one."""
    if pd.isna(cell["low"]):
        return ""
    low, high = number(cell["low"]), number(cell["high"])
    return f"\n{low} … {high}" if cell["spread"] == "seeds" else f"\n[{low}, {high}]"


def task_section(scores: pd.DataFrame) -> Section | None:
    """Task scores padded beside unpadded, and the paper's table 5 as its own table; None where no task was scored."""
    if scores.empty:
        return None
    scores = scores if scores["encoder"].nunique() > 1 else scores.drop(columns="encoder")
    columns = [str(column) for column in scores]
    labels = columns[: columns.index("metric") + 1]
    rows = []
    for row in scores.to_dict("records"):
        names = [row[c] for c in labels[:-1]] + [_metric(row["metric"])]
        values = [number(row[c], sign="+" if c == "difference" else "") for c in columns[len(labels) :]]
        rows.append(("run", names + values))
    parts = [Table("Measured here", columns, rows, len(labels)), *_paper_table5(set(scores["task"]))]
    reading = (
        "The difference is padded (zeros) minus unpadded (valid): above 0 the network does better at its task with "
        "padding (below 0 for an MAE)."
    )
    note = (
        "The paper's table 5 is another data set at another scale: its absolute values do not compare with ours, the "
        "direction of the difference does."
    )
    return Section("What padding does to the task", reading, parts, note=note if len(parts) > 1 else "")


def _paper_table5(tasks: set[str]) -> list[Table]:
    paper = paper_numbers()
    names = ("VGG", "VGG w/o padding")
    lines = [
        ("SOD", data, label, *(paper["table5a"][name][data][metric] for name in names))
        for data in paper["table5a"]["VGG"]
        for metric, label in (("Fm", "F-measure"), ("MAE", "MAE"))
    ]
    lines.append(("SS", "VOC 2012", "mIoU (%)", *(paper["table5b_percent"][name] for name in names)))
    rows = []
    for task, data, metric, zeros, valid in lines:
        digits = 1 if metric.endswith("(%)") else 2
        values = [number(zeros, digits), number(valid, digits), number(zeros - valid, digits, "+")]
        if task in tasks:
            rows.append(("run", [task, data, _metric(metric), *values]))
    columns = ["task", "data", "metric", "zeros (VGG)", "valid (VGG w/o padding)", "difference"]
    return [Table("The paper's table 5: VGG16 from scratch, real data", columns, rows, 3)] if rows else []


def _metric(name: str) -> str:
    return f"{name} (lower is better)" if name.lower().startswith("mae") else name


def trajectory_lines(trajectory: pd.DataFrame) -> Table:
    """SPC over training steps beside the task's metrics, a line a run and step.

    Of a long training eight steps are shown, the first and the last that were logged among them.

    Args:
        trajectory: :func:`padprobe.report.tables.trajectory_table`'s, not empty.
    """
    targets = [t for t in TARGETS if t in set(trajectory["target"])]
    metrics = list(trajectory.loc[trajectory["target"] == "", "metric"].unique())
    table = Table("SPC over training steps", ["run", "padding", "step", *targets, *metrics], [], labels=3)
    for (run, padding), rows in trajectory.groupby(["run", "padding"], sort=False):
        values = rows.set_index(["step", "target", "metric"])["value"]
        logged = sorted(rows["step"].unique())
        last = len(logged) - 1
        for i in sorted({round(k * last / 7) for k in range(8)}):
            cells = []
            for target, metric in [*((t, "spc") for t in targets), *(("", m) for m in metrics)]:
                delta = values.get((logged[i], target, "delta"), float("nan"))
                cell = number(values.get((logged[i], target, metric), float("nan")))
                cells.append(cell if pd.isna(delta) else f"{cell}\n{number(delta, 2, '+')}")
            table.rows.append(("run", [str(run), str(padding), f"{logged[i]:.0f}", *cells]))
    return table
