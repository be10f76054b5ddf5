"""The report's figures, drawn without pyplot's global state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from padprobe.maps import TARGETS, position_maps
from padprobe.report.measurements import stages_of, targets_of, typed
from padprobe.results import Results

Maps = dict[tuple[str, str, str, str], np.ndarray]
"""Mean maps by (run, stimulus, target, "prediction" or "error")."""

_DISTANCE = "distance to the nearest border (pixels)"
_MAIN = ("H", "V", "G")
_STYLES = {"zeros": "-", "learned": "-", "valid": "--", "none": "--"}  # by position embedding, else by padding


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def collect_maps(results: Results) -> Maps:
    """The maps by the group of their run, means over seeds; none of a run's name that several networks share."""
    rows = typed(results.rows, results)
    rows = rows[rows.groupby("single")["weights"].transform("nunique") == 1]
    by_place: dict[tuple[str, str, str, str], list[np.ndarray]] = {}
    places = rows.loc[rows["target"] != "", ["run", "single", "stimulus", "target"]].drop_duplicates()
    for run, single, stimulus, target in places.itertuples(index=False, name=None):
        for kind in ("prediction", "error"):
            key = f"{single}/{stimulus}/{target}/{kind}"
            if key in results.maps:
                by_place.setdefault((run, stimulus, target, kind), []).append(results.maps[key])
    return {key: np.mean(values, axis=0) for key, values in by_place.items()}


def draw_trajectory(table: pd.DataFrame) -> Figure | None:
    """SPC over training steps: a panel for each of H, V and G (or of the targets that there are), then one for each
    metric of the task.

    Args:
        table: :func:`padprobe.report.measurements.trajectory_table`'s.
    """
    targets = targets_of(table)
    targets = [t for t in targets if t in _MAIN] or targets
    scores, metrics = table[table["metric"] == "spc"], table[table["target"] == ""]
    panels = [(target, "SPC", scores[scores["target"] == target]) for target in targets]
    panels += [("task", str(metric), rows) for metric, rows in metrics.groupby("metric", sort=False)]
    return _draw_lines(panels, "step", "training step")


def draw_spc_profile(profile: pd.DataFrame) -> Figure | None:
    """SPC within rings of pixels by their distance to the border: a panel for each of H, V and G.

    Args:
        profile: :func:`padprobe.report.measurements.profile_table`'s.
    """
    scores = profile[(profile["metric"] == "spc") & profile["target"].isin(_MAIN)]
    panels = [(target, "SPC within the ring", scores[scores["target"] == target]) for target in targets_of(scores)]
    return _draw_lines(panels, "distance", _DISTANCE)


def draw_variance_profile(profile: pd.DataFrame) -> Figure | None:
    """What position explains of each stage's variance by distance to the border: a panel per stage."""
    shares = profile[profile["metric"] == "eta2"]
    panels = [(f"stage {s}", "η² (share of variance)", shares[shares["stages"] == s]) for s in stages_of(shares)]
    return _draw_lines(panels, "distance", _DISTANCE)


def draw_reach(profile: pd.DataFrame) -> Figure | None:
    """The fraction of cells that the padding reaches, by distance to the border: a panel per network, a line per
    stage."""
    reach = profile[profile["metric"] == "reach"]
    reach = reach[reach.groupby("run")["value"].transform("max") > 0]
    lines = reach.assign(run=reach["stages"], pair=reach["stages"])
    networks = reach.groupby("encoder", sort=False)["run"].first()
    return _draw_lines(
        [(run, "fraction of cells", lines[reach["run"] == run]) for run in networks], "distance", _DISTANCE
    )


def _draw_lines(panels: Sequence[tuple[str, str, pd.DataFrame]], x: str, label: str) -> Figure | None:
    """A line per run in each panel (title, y label, rows), with its interval, at most three panels in a line; None
    without panels. Colour is the pair; lines are solid with zero padding or a learned position embedding, dashed
    without, dash-dotted with context, dotted for other paddings and a shuffled embedding."""
    if not panels:
        return None
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 0.9 + 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    runs = pd.concat([rows for *_, rows in panels]).drop_duplicates("run").to_dict("records")
    pairs = list(dict.fromkeys(row["pair"] for row in runs))
    styles: dict[str, dict[str, Any]] = {
        row["run"]: {
            "color": f"C{pairs.index(row['pair'])}",
            "linestyle": "-." if row["context"] else _STYLES.get(row["position_embedding"] or row["padding"], ":"),
        }
        for row in runs
    }
    for axis, (title, y_label, rows) in zip(axes, panels, strict=False):
        for run, line in rows.sort_values(x).groupby("run", sort=False):
            axis.plot(line[x], line["value"], **styles[str(run)])
            if "low" in line:
                axis.fill_between(line[x], line["low"], line["high"], color=styles[str(run)]["color"], alpha=0.15, lw=0)
        axis.set(title=title, xlabel=label, ylabel=y_label)
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], label=run, **style) for run, style in styles.items()]
    columns = max(1, min(len(handles), 120 // max(len(run) + 8 for run in styles), 4))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def draw_maps(maps: Maps, shown: Sequence[tuple[str, str]]) -> Figure | None:
    """Each target's ground truth, then each run's mean prediction, on one colour scale from 0 to 1.

    Args:
        maps: :func:`collect_maps`'.
        shown: (run, stimulus), one per column; those without maps are left out.
    """
    shown = [place for place in shown if any(key[:2] == place and key[3] == "prediction" for key in maps)]
    targets = [t for t in TARGETS if any((*place, t, "prediction") in maps for place in shown)]
    if not targets:
        return None
    height, width = next(v.shape for k, v in maps.items() if k[3] == "prediction")
    truth = dict(zip(targets, position_maps((height, width), targets).numpy(), strict=True))
    runs = [run for run, _ in shown]
    names = [run if runs.count(run) == 1 else f"{run} {stimulus}" for run, stimulus in shown]
    tiles = {("target", target): truth[target] for target in targets}
    for name, place in zip(names, shown, strict=True):
        tiles |= {(name, t): maps[(*place, t, "prediction")] for t in targets if (*place, t, "prediction") in maps}
    return _tiles(tiles, 1.0, "viridis", "position (0 to 1)")


def draw_content_loss(maps: Maps) -> Figure | None:
    """The mean of the absolute error maps of H, V and G: a column per run, a row per stimulus, one colour scale.

    Args:
        maps: :func:`collect_maps`'; a run and stimulus that lacks one of the three maps is left out.

    Source: paper, figures 6 and 7 (content loss heat maps).
    """
    losses = {
        place: np.mean([maps[(*place, t, "error")] for t in _MAIN], axis=0)
        for place in dict.fromkeys(key[:2] for key in maps)
        if all((*place, t, "error") in maps for t in _MAIN)
    }
    if not losses:
        return None
    largest = max(float(loss.max()) for loss in losses.values())
    return _tiles(losses, largest, "magma", "mean absolute error\nof H, V, G")


def _tiles(tiles: dict[tuple[str, str], np.ndarray], largest: float, colours: str, label: str) -> Figure:
    """Maps by (column, row), all from 0 to ``largest``."""
    columns, rows = (list(dict.fromkeys(place[i] for place in tiles)) for i in (0, 1))
    figure = Figure(figsize=(1.5 + 1.25 * len(columns), 0.6 + 1.25 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    image: Any = None
    for line, row in zip(axes, rows, strict=True):
        line[0].set_ylabel(_wrapped(row), fontsize=8)
        for axis, column in zip(line, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if (column, row) in tiles:
                image = axis.imshow(tiles[column, row], vmin=0, vmax=largest, cmap=colours)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(_wrapped(column), fontsize=8)
    figure.colorbar(image, ax=axes, label=label, fraction=0.03, pad=0.01, aspect=30)  # type: ignore[arg-type]
    return figure


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name.replace("-", "- "), 14)).replace("- ", "-") or " "
