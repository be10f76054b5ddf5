"""Puts the tables and figures on one page, and the main table on the terminal."""

from __future__ import annotations

import base64
import dataclasses
import textwrap
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader

from padprobe.errors import require
from padprobe.report import contents, statements
from padprobe.report.claims import evaluate
from padprobe.report.measurements import by_run, headline, measurements, profile_table, trajectory_table
from padprobe.report.sections import Figure, Section, Table, render
from padprobe.results import Results, write_atomically, write_text

_TITLE = "How much position the encoders hold"
_TRAINING = "Position during training"
_WIDTH = 100  # of the terminal


def write_report(results: Results, out: Path) -> Path:
    """Writes a results' page into a folder: ``report.html`` (all in one file), ``report.md`` with ``figures/``, and the
    results themselves, with the claims evaluated, so that the folder can be reported again.

    Args:
        results: of a study or a probe, or several joined; ``about`` has the title, text, tables and claims.
        out: made if need be; files of an earlier report are replaced.

    Returns:
        The path of the HTML page.

    Raises:
        ValueError: for results without any measurement, or with a table or claim declared wrongly.
    """
    _check(results)
    results = dataclasses.replace(results, claims=evaluate(results))
    out = Path(out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    sections = page_sections(results)
    for figure in (figure for section in sections for figure in section.figures):
        path = out / "figures" / f"{figure.name}.png"
        write_atomically(path, lambda temporary, png=figure.png: Path(temporary).write_bytes(png))  # type: ignore[misc]
    for name in ("report.md", "report.html"):
        write_text(out / name, fill_template(f"{name}.jinja", results, sections))
    results.save(out)
    return out / "report.html"


def page_sections(results: Results) -> list[Section]:
    """All sections of a page, in order; those without data are left out."""
    table = measurements(results)
    head = headline(table)
    return [
        *statements.claims_section(results.claims),
        *statements.declared_sections(results, table),
        *contents.readout_sections(table, head),
        *contents.task_sections(table),
        *contents.variants_sections(table, head),
        *contents.variance_sections(table),
        *_figure_sections(results, head),
        *statements.difference_sections(table, results.about.get("tolerance")),
        *statements.record_sections(results),
    ]


def fill_template(name: str, results: Results, sections: list[Section]) -> str:
    """The text of the page, from ``report.md.jinja`` or ``report.html.jinja``."""
    environment = Environment(
        loader=PackageLoader("padprobe.report", "."),
        autoescape=lambda name: name == "report.html.jinja",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    environment.filters["cell"] = _markdown_cell
    runs = results.runs if len(results.runs) else results.rows
    return environment.get_template(name).render(
        sections=sections,
        title=results.about.get("title") or _TITLE,
        text=(results.about.get("text") or "").strip().split("\n\n"),
        runs=list(runs["run"].unique()),
        seeds=sorted({f"{seed:g}" for seed in pd.to_numeric(results.rows["seed"]).dropna().unique()}),
    )


def main_table(results: Results) -> str:
    """The headline as text of at most 100 columns: SPC per target (and Δ where there is one), what padding and
    position embedding add, the task scores and the claims' verdicts.

    Raises:
        ValueError: for results without any measurement.
    """
    _check(results)
    table = measurements(results)
    head = headline(table)
    parts = []
    if len(head):
        shown = render(contents.headline_spec(table, head), by_run(table))
        note = ", then Δ to the untrained encoder" if (table["metric"] == "delta").any() else ""
        parts += [_aligned(shown.caption + note, shown)] if shown else []
    if scores := contents.task_table(table):
        parts.append(_aligned("Task scores, padded and unpadded", scores))
    claims = evaluate(results).drop_duplicates("claim")
    if len(claims):
        lines = [f"{row['claim_verdict']:<13} {row['claim']}" for row in claims.to_dict("records")]
        parts.append("\n".join(["Claims", *lines]))
    return "\n\n".join(parts)


def _check(results: Results) -> None:
    if not len(results.rows):
        raise ValueError("nothing to report: the results have no measurement")


def _figure_sections(results: Results, head: pd.DataFrame) -> list[Section]:
    """The sections that are figures: profiles, trajectories, predicted maps, content loss."""
    with require("report"):
        from padprobe.report import figures  # matplotlib

    profile = profile_table(results, head)
    trajectory = trajectory_table(results)
    maps = figures.collect_maps(results)
    places = list(head[["run", "stimulus"]].drop_duplicates().itertuples(index=False, name=None))
    drawn = [
        (
            "Where",
            "By distance to the nearest border: SPC within rings of pixels, η² of each stage, and the cells that the "
            "padding reaches. Padding enters at the border, so what it brings reaches the middle only as far as the "
            "receptive fields do; a position embedding enters at every cell. Shaded are the intervals.",
            [
                ("where_spc", "SPC by distance to the border", figures.draw_spc_profile(profile)),
                ("where_variance", "η² by stage and distance", figures.draw_variance_profile(profile)),
                ("where_reach", "cells that the padding reaches, by stage", figures.draw_reach(profile)),
            ],
        ),
        (
            _TRAINING,
            "SPC of a readout that is trained beside the network. The distance from solid lines (zero padding, learned "
            "position embedding) to dashed ones (none) is its share. Δ is what a small readout of one batch gained "
            "since before the first step.",
            [("trajectory", "SPC over training steps", figures.draw_trajectory(trajectory))],
        ),
        (
            "Predicted maps beside their targets",
            "Mean prediction over the images. The more a tile looks like its target, the more position the encoder "
            "holds; a flat tile is a readout that found none.",
            [("maps", "Predicted position maps beside their targets", figures.draw_maps(maps, places))],
        ),
        (
            "Content loss",
            "Where position is lost: the mean of the absolute error maps of H, V and G. Dark is exact; errors that "
            "grow away from the border say that position enters there.",
            [("content_loss", "Content-loss heat maps by run and stimulus", figures.draw_content_loss(maps))],
        ),
    ]
    sections = []
    for title, text, panels in drawn:
        pictures = [Figure(name, alt, figures.to_png(figure)) for name, alt, figure in panels if figure]
        tables = [contents.trajectory_lines(trajectory)] if title == _TRAINING and pictures else []
        sections += [Section(title, text, tables, pictures)] if pictures else []
    return sections


def _markdown_cell(text: str) -> str:
    """A cell in one line: its interval after a space, the other lines after a semicolon."""
    first, *lines = text.split("\n")
    joined = first + "".join((" " if line.startswith("[") or " … " in line else "; ") + line for line in lines)
    return joined.replace("|", "\\|")


def _aligned(caption: str, table: Table) -> str:
    """A table for the terminal: of each cell the value, and Δ without its interval."""
    lines = [[column.split(" (n = ")[0] for column in table.columns]]
    for _, cells in table.rows:
        values = cells[: table.labels]
        for cell in cells[table.labels :]:
            first, *others = cell.split("\n")
            delta = next((line.split()[1] for line in others if line.startswith("Δ")), "")
            values.append(f"{first} {delta}".strip())
        lines.append(values)
    room = max(16, _WIDTH - sum(max(len(line[i]) for line in lines) + 2 for i in range(1, len(lines[0]))))
    names = [line[0] for line in lines]
    half = room // 2
    names = [name if len(name) <= room else f"{name[: room - half - 1]}…{name[-half:]}" for name in names]
    lines = [[name, *line[1:]] for name, line in zip(names, lines, strict=True)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([textwrap.fill(caption, _WIDTH), *text])
