"""Puts the tables and figures on one page, and the main table on the terminal."""

from __future__ import annotations

import base64
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from padprobe.report import tables
from padprobe.report.paper import paper_numbers
from padprobe.report.paper_page import paper_places, paper_sections
from padprobe.report.readouts import variance_section, variants_section
from padprobe.report.sections import (
    Figure,
    Section,
    headline_rows,
    number,
    readout_sections,
    task_section,
    trajectory_lines,
)
from padprobe.results import Results, write_atomically

_LOSS = "Content loss"


def write_report(results: Results, out: Path) -> Path:
    """Writes a results' page into a folder: ``report.html`` (all in one file), ``report.md`` with ``figures/``, the
    numbers as ``results.csv``, ``trajectory.csv`` and ``profile.csv``, and, where there is an ImageNet VGG16,
    ``paper.md``: the paper's tables beside ours.

    Args:
        results: of a study or a probe, or several joined.
        out: made if need be; files of an earlier report are replaced.

    Returns:
        The path of the HTML page.

    Raises:
        ValueError: for results without any measurement.
    """
    rows = _rows(results)
    out = Path(out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    table = tables.position_table(rows)
    head = tables.headline(table)
    sections = [*readout_sections(table, head)]
    if task := task_section(tables.task_table(rows)):
        sections.insert(min(1, len(sections)), task)
    more = (variants_section(table, head), variance_section(tables.variance_table(rows)))
    sections += [section for section in more if section]
    sections += _figures(results, rows, head)
    for figure in (figure for section in sections for figure in section.figures):
        _write(out / "figures" / f"{figure.name}.png", figure.png)

    runs = rows["group"].unique()
    seeds = sorted(rows["seed"].unique())
    environment = Environment(
        loader=PackageLoader("padprobe.report", "."),
        autoescape=lambda name: name == "report.html.jinja",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    environment.filters["cell"] = lambda text: text.replace("\n", " ").replace("|", "\\|")
    context = {"sections": sections, "runs": runs, "seeds": seeds, "paper": paper_numbers()}
    for name in ("report.md", "report.html"):
        _write(out / name, environment.get_template(f"{name}.jinja").render(context).encode())
    if beside := paper_sections(rows, results.notes):
        drawn = [section for section in sections if section.title == _LOSS]
        if maps := _paper_maps(results, rows):
            _write(out / "figures" / "paper_maps.png", maps.figures[0].png)
            drawn.insert(0, maps)
        context = {**context, "sections": beside + drawn, "title": "The paper's tables, and ours"}
        _write(out / "paper.md", environment.get_template("report.md.jinja").render(context).encode())
    write_atomically(out / "trajectory.csv", lambda path: results.trajectory.to_csv(path, index=False))
    write_atomically(out / "profile.csv", lambda path: results.profile.to_csv(path, index=False))
    write_atomically(out / "results.csv", lambda path: results.rows.to_csv(path, index=False))
    return out / "report.html"


def main_table(results: Results) -> str:
    """The headline and the task scores as plain text for a terminal, at most about 100 columns wide.

    Raises:
        ValueError: for results without any measurement.
    """
    rows = _rows(results)
    parts = []
    head = tables.headline(tables.position_table(rows))
    if len(head):
        targets = tables.targets_of(head)
        compared = head["delta"].notna().any()
        caption = f"SPC on {', '.join(head['stimulus'].unique())}"
        caption += ", and its difference from the untrained encoder's with the same padding" if compared else ""
        lines = [["run", "padding", *targets]]
        for kind, name, row, by_target in headline_rows(head):
            sign = "+" if kind == "gap" else ""
            cells = [
                number(s, sign=sign) + ("" if pd.isna(d) else f" {number(d, 2, '+')}")
                for s, d in zip(by_target["spc"], by_target["delta"], strict=True)
            ]
            lines.append([name, row["padding"], *cells])
        parts.append(_aligned(caption, lines))
    scores = tables.task_table(rows)
    if len(scores):
        columns = [c for c in scores if c not in ("encoder", "task")]
        numbers = [
            [v if isinstance(v, str) else number(v, sign="+" if c == "difference" else "") for c, v in row.items()]
            for row in scores[columns].to_dict("records")
        ]
        parts.append(_aligned("Task scores, padded and unpadded", [columns, *numbers]))
    return "\n\n".join(parts)


def _rows(results: Results) -> pd.DataFrame:
    if not len(results.rows):
        raise ValueError("nothing to report: the results have no measurement")
    return tables.clean(results.rows)


def _figures(results: Results, rows: pd.DataFrame, head: pd.DataFrame) -> list[Section]:
    """The sections that are figures: profiles, trajectories, predicted maps, content loss."""
    from padprobe.report import figures  # matplotlib

    sections = []
    profile = tables.profile_table(results.profile, rows, head)
    if len(profile):
        where = (
            ("where_spc", "SPC by distance to the border", figures.draw_spc_profile(profile)),
            (
                "where_variance",
                "η² and reach by distance to the border, by stage",
                figures.draw_variance_profile(profile),
            ),
        )
        reading = (
            f"Position by distance to the nearest border, on {', '.join(head['stimulus'].unique())}: padding enters "
            "there, so what it brings falls off inwards and reaches the middle only as far as the receptive fields do. "
            "SPC is taken within each ring of pixels; shaded are the intervals."
        )
        drawn = [Figure(name, alt, figures.to_png(figure)) for name, alt, figure in where if figure]
        sections += [Section("Where", reading, figures=drawn)] if drawn else []
    trajectory = tables.trajectory_table(results.trajectory, rows)
    if len(trajectory):
        reading = (
            "SPC of a readout that the callback trains beside the network: a rising line says that position becomes "
            "easier to read, and the distance from solid (zero padding) to dashed (no padding) is padding's share. In "
            "small print what a small readout of a training batch gained since before the first step."
        )
        figure = Figure("trajectory", "SPC over training steps", figures.to_png(figures.draw_trajectory(trajectory)))
        steps = trajectory_lines(trajectory)
        sections.append(Section("Position during training", reading, tables=[steps], figures=[figure]))
    maps = figures.collect_maps(rows, results.maps)
    shown = list(
        head.loc[head["run"] != tables.RGB, ["run", "stimulus"]].drop_duplicates().itertuples(index=False, name=None)
    )
    predicted = figures.draw_maps(maps, shown)
    if predicted:
        stimuli = ", ".join(dict.fromkeys(stimulus for _, stimulus in shown))
        reading = (
            f"Mean prediction over the images of {stimuli}: the more a tile looks like the target, the more "
            "position the encoder holds; a flat tile is a readout that found none."
        )
        figure = Figure("maps", "Predicted position maps beside their targets", figures.to_png(predicted))
        sections.append(Section("Predicted maps beside their targets", reading, figures=[figure]))
    loss = figures.draw_content_loss(maps)
    if loss:
        reading = (
            "Where position is lost: the mean of the absolute error maps of H, V and G; dark is exact, and errors that "
            "grow away from the border say that position enters there."
        )
        figure = Figure("content_loss", "Content-loss heat maps by run and stimulus", figures.to_png(loss))
        sections.append(Section(_LOSS, reading, figures=[figure]))
    return sections


def _paper_maps(results: Results, rows: pd.DataFrame) -> Section | None:
    """The maps predicted by the paper's networks on its stimuli: the section of its figures."""
    from padprobe.report import figures  # matplotlib

    shown = paper_places(rows)
    drawn = figures.draw_maps(figures.collect_maps(rows, results.maps), shown)
    if drawn is None:
        return None
    reading = "Mean prediction of each target; on black, white and noise there is nothing to go by but the padding."
    title = "Figures: predicted maps"
    return Section(title, reading, figures=[Figure("paper_maps", title, figures.to_png(drawn))])


def _aligned(caption: str, lines: list[list[Any]]) -> str:
    others = sum(max(len(line[i]) for line in lines) + 2 for i in range(1, len(lines[0])))
    room = max(16, 100 - others)  # of the names in the first column
    half = room // 2
    lines = [[n if len(n) <= room else f"{n[: room - half - 1]}…{n[-half:]}", *cells] for n, *cells in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([textwrap.fill(caption, 100), *text])


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))
