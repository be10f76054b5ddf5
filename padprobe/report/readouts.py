"""The report's sections on the readout itself: its variants side by side, and what needs no readout at all."""

from __future__ import annotations

from typing import Any

import pandas as pd

from padprobe.report.paper import PAPER_SCALE
from padprobe.report.sections import Section, Table, interval, number, readout_name, spc_cell
from padprobe.report.tables import READOUT, RGB, stages_of, targets_of


def variants_section(table: pd.DataFrame, head: pd.DataFrame) -> Section | None:
    """Every readout of the runs that have more than one, on the headline's stimulus; None where no run has.

    Args:
        table: :func:`~padprobe.report.tables.position_table`'s.
        head: :func:`~padprobe.report.tables.headline`'s. Where it has Δ, untrained runs are in that.
    """
    places = head[["run", "stimulus"]]
    shown = table.merge(pd.concat([places, places.assign(run=RGB)]).drop_duplicates())
    if head["delta"].notna().any():
        shown = shown[shown["weights"] != "untrained"]
    targets = targets_of(shown)
    parts = []
    for (run, stimulus), rows in shown.groupby(["run", "stimulus"], sort=False):
        if len(rows[READOUT].drop_duplicates()) > 1:
            caption = f"{run} on {stimulus} (n = {rows['n'].max()})"
            parts.append(Table(caption, ["readout", *targets], _variants(rows, targets)))
    if not parts:
        return None
    reading = (
        "How much of the score is the readout's doing: SPC of each readout, its interval, selectivity and Δ as above, "
        "and the paper's value where its tables 2, 3 and 4 have that cell. A grey line ridge - posenet is the "
        "optimisation error of the trained readout: above 0 its training stopped short of the best linear readout of "
        "the same features (ridge, closed form)."
    )
    note = "Runs stand here on one stimulus; the others are in results.csv."
    if PAPER_SCALE in set(shown["readout"]):
        note += " Paper scale has the stripes on [-1, 1], where the paper's MAE of HS and VS seems to be measured."
    return Section("Readouts compared", reading, parts, note=note)


def _variants(rows: pd.DataFrame, targets: list[str]) -> list[tuple[str, list[str]]]:
    """A line a readout: all stages first, then single ones, then several; after a ridge its gap to the trained one."""
    stages = sorted(set(rows["stages"]), key=lambda s: (s not in ("all", "rgb"), len(s), s))
    order = ["stages", *READOUT[1:-1], "readout"]
    rows = rows.sort_values(order, key=lambda c: c.map(stages.index) if c.name == "stages" else c)
    lines = []
    for _, alike in rows.groupby(READOUT[1:], sort=False):
        spc: dict[str, pd.Series] = {}
        for readout, own in alike.groupby("readout", sort=False):
            own = own.set_index("target")
            cells = [_variant_cell(cell) for _, cell in own.reindex(targets).iterrows()]
            lines.append(("run", [readout_name(own.iloc[0]), *cells]))
            spc[str(readout)] = own["spc"]
        if {"ridge", "posenet"} <= set(spc):
            gap = (spc["ridge"] - spc["posenet"]).reindex(targets)
            lines.append(("gap", ["ridge - posenet", *(number(value, sign="+") for value in gap)]))
    return lines


def _variant_cell(cell: pd.Series) -> str:
    differences = [
        f"{name} {number(cell[column], 2, '+')}"
        for name, column in (("Δ", "delta"), ("sel", "selectivity"))
        if not pd.isna(cell[column])
    ]
    text = spc_cell(cell) + ("\n" + ", ".join(differences) if differences else "")
    if cell["readout"] == PAPER_SCALE and cell.name in ("HS", "VS"):
        text += f"\nMAE {number(cell['mae'])}"
        text += "" if pd.isna(cell["paper_mae"]) else f"\npaper MAE {number(cell['paper_mae'])}"
    return text


def variance_section(variance: pd.DataFrame) -> Section | None:
    """The share of each stage's variance that position explains, beside what of it the padding reaches.

    Args:
        variance: :func:`~padprobe.report.tables.variance_table`'s.
    """
    shares, reach = (variance[variance["metric"] == metric] for metric in ("eta2", "reach"))
    if shares.empty:
        return None
    columns = [*stages_of(variance), *(["all"] if "all" in set(shares["stages"]) else [])]
    reached = []
    for encoder, rows in reach[reach["value"] > 0].drop_duplicates(["encoder", "padding", "stages"]).groupby("encoder"):
        for padding, own in rows.groupby("padding", sort=False):
            name = "receptive field reaches the padding" + (f" ({encoder})" if reach["encoder"].nunique() > 1 else "")
            reached.append(("control", [name, str(padding), *_stage_cells(own, columns)]))
    parts = []
    for stimulus, rows in shares.groupby("stimulus", sort=False):
        lines: list[tuple[str, list[str]]] = []
        for _, own in rows.groupby("run", sort=False):
            first: Any = own.iloc[0]
            lines.append(("run", [first["run"], first["padding"], *_stage_cells(own, columns)]))
        caption = f"η² on {stimulus} (n = {rows['n'].max()})"
        parts.append(Table(caption, ["run", "padding", *columns], [*lines, *reached], 2))
    reading = (
        "η² is the share of a stage's variance, over images and cells, that the position of the cell alone explains: 0 "
        "where the features do not depend on it, 1 where they depend on nothing else; no readout is trained, so none "
        "can be too weak or too strong."
    )
    note = (
        "The last line is the fraction of the stage's cells whose receptive field reaches the padding, from the "
        "architecture alone: where it is 0, padding cannot be the source."
    )
    return Section("No readout at all: η²", reading, parts, note=note if reached else "")


def _stage_cells(rows: pd.DataFrame, stages: list[str]) -> list[str]:
    by_stage = rows.set_index("stages").reindex(stages)
    return [number(cell["value"]) + interval(cell) for _, cell in by_stage.iterrows()]
