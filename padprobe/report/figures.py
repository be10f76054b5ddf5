"""The report's figures, drawn without pyplot's global state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from padprobe.maps import TARGETS, position_maps
from padprobe.report.tables import stages_of

Maps = dict[tuple[str, str, str, str], np.ndarray]
"""Mean maps by (run, stimulus, target, "prediction" or "error")."""

_AXIS = {
    "H": "left to right",
    "V": "top to bottom",
    "G": "to the centre",
    "HS": "stripes along y",
    "VS": "stripes along x",
}
_DASHES = {"zeros": "-", "valid": "--", "valid+context": "-."}
_DISTANCE = "distance to the nearest border (pixels)"
_MARKERS = ("", "o", "s", "^", "D", "v")


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def collect_maps(rows: pd.DataFrame, maps: dict[str, np.ndarray]) -> Maps:
    """The maps of a result by the group of their run, means over seeds; none of a run whose name several groups share.

    Args:
        rows: cleaned rows, see :func:`padprobe.report.tables.clean`.
        maps: :attr:`~padprobe.results.Results.maps`.
    """
    found: dict[tuple[str, str, str, str], list[np.ndarray]] = {}
    places = rows.loc[rows["target"] != "", ["group", "run", "stimulus", "target"]].drop_duplicates()
    places = places[places.groupby("run")["group"].transform("nunique") == 1]
    for group, run, stimulus, target in places.itertuples(index=False, name=None):
        for kind in ("prediction", "error"):
            key = f"{run}/{stimulus}/{target}/{kind}"
            if key in maps:
                found.setdefault((group, stimulus, target, kind), []).append(maps[key])
    return {key: np.mean(values, axis=0) for key, values in found.items()}


def draw_trajectory(table: pd.DataFrame) -> Figure:
    """SPC over training steps, one panel a target (H, V and G where they are there), then one a task metric.

    Args:
        table: :func:`padprobe.report.tables.trajectory_table`'s, not empty. Colour is the task, solid lines are padded
            with zeros, dashed ones unpadded (dash-dotted with the image's surroundings); markers tell runs with the
            same task and padding apart.
    """
    targets = [t for t in TARGETS if t in set(table["target"])]
    targets = [t for t in targets if t in ("H", "V", "G")] or targets
    panels = [(t, "spc") for t in targets] + [("", m) for m in table.loc[table["target"] == "", "metric"].unique()]
    figure, axes = _panels(len(panels))
    styles = _line_styles(table)
    for axis, (target, metric) in zip(axes, panels, strict=True):
        shown = table[(table["target"] == target) & (table["metric"] == metric)]
        for run, line in shown.groupby("run", sort=False):
            line = line.sort_values("step")
            axis.plot(line["step"], line["value"], markersize=4, **styles[run])
        axis.set(title=f"{target}: {_AXIS[target]}" if target else f"task: {metric}", xlabel="training step")
        if target:
            axis.set_ylim(min(-0.05, shown["value"].min() - 0.05), 1.02)
            axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.set_ylabel("SPC" if target else metric)
    _legend(figure, styles)
    return figure


def draw_spc_profile(profile: pd.DataFrame) -> Figure | None:
    """SPC within rings of pixels by their distance to the border: a panel for each of H, V and G, a line a run with its
    interval; None without such measurements.

    Args:
        profile: :func:`padprobe.report.tables.profile_table`'s. Lines are styled as in :func:`draw_trajectory`.
    """
    scored = profile[profile["metric"] == "spc"]
    targets = [target for target in ("H", "V", "G") if target in set(scored["target"])]
    if not targets:
        return None
    figure, axes = _panels(len(targets))
    styles = _line_styles(profile)
    for axis, target in zip(axes, targets, strict=True):
        _draw_lines(axis, scored[scored["target"] == target], styles)
        axis.set(title=f"{target}: {_AXIS[target]}", ylabel="SPC within the ring")
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    _share_limits(axes)
    _legend(figure, {run: style for run, style in styles.items() if run in set(scored["run"])})
    return figure


def draw_variance_profile(profile: pd.DataFrame) -> Figure | None:
    """What position explains of each stage's variance by distance to the border: a panel a stage, a line a run; last
    the fraction of cells that the padding reaches, a line a stage. None without such measurements.

    Args:
        profile: :func:`padprobe.report.tables.profile_table`'s.
    """
    shares, reach = profile[profile["metric"] == "eta2"], profile[profile["metric"] == "reach"]
    reach = reach[reach["padding"] == "zeros"]
    stages = stages_of(shares)
    if not stages:
        return None
    figure, axes = _panels(len(stages) + (len(reach) > 0))
    styles = _line_styles(profile)
    for axis, stage in zip(axes, stages, strict=False):
        _draw_lines(axis, shares[shares["stages"] == stage], styles)
        axis.set(title=f"stage {stage}", ylabel="η² (share of variance)")
    _share_limits(axes[: len(stages)])
    if len(reach):
        reach = reach[reach["encoder"] == reach["encoder"].iloc[0]].drop_duplicates(["stages", "distance"])
        names = stages_of(reach)
        shades = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
        for stage, shade in zip(names, shades, strict=True):
            line = reach[reach["stages"] == stage].sort_values("distance")
            axes[-1].plot(line["distance"], line["value"], color=shade, label=stage)
        axes[-1].set(title="receptive field reaches the padding", ylabel="fraction of cells", xlabel=_DISTANCE)
        axes[-1].legend(frameon=False, fontsize=8)
    _legend(figure, {run: style for run, style in styles.items() if run in set(shares["run"])})
    return figure


def _draw_lines(axis, table: pd.DataFrame, styles: dict[str, dict[str, Any]]) -> None:
    for run, line in table.groupby("run", sort=False):
        line = line.sort_values("distance")
        axis.plot(line["distance"], line["value"], markersize=4, **styles[str(run)])
        axis.fill_between(
            line["distance"], line["low"], line["high"], color=styles[str(run)]["color"], alpha=0.15, lw=0
        )
    axis.set_xlabel(_DISTANCE)


def _share_limits(axes: np.ndarray) -> None:
    lows, highs = zip(*(axis.get_ylim() for axis in axes), strict=True)
    for axis in axes:
        axis.set_ylim(min(lows), max(highs))


def _panels(count: int) -> tuple[Figure, np.ndarray]:
    """A figure with so many axes, at most three in a line."""
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 0.9 + 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _legend(figure: Figure, styles: dict[str, dict[str, Any]]) -> None:
    handles = [Line2D([], [], label=run, markersize=4, **style) for run, style in styles.items()]
    columns = max(1, min(len(handles), 120 // max(len(run) + 8 for run in styles), 4))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _line_styles(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    runs = list(table[["run", "task", "padding"]].drop_duplicates("run").itertuples(index=False, name=None))
    tasks = list(dict.fromkeys(task for _, task, _ in runs))
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    styles = {}
    for run, task, padding in runs:
        alike = [r for r, t, p in runs if (t, p) == (task, padding)]
        styles[run] = {
            "color": colours[tasks.index(task) % len(colours)],
            "linestyle": _DASHES.get(padding, ":"),
            "marker": _MARKERS[alike.index(run) % len(_MARKERS)],
        }
    return styles


def draw_maps(maps: Maps, shown: Sequence[tuple[str, str]]) -> Figure | None:
    """Each target's ground truth, then each run's mean prediction, on one colour scale from 0 to 1.

    Args:
        maps: :func:`collect_maps`'.
        shown: (run, stimulus), one a column; those without maps are left out.
    """
    shown = [place for place in shown if any(key[:2] == place and key[3] == "prediction" for key in maps)]
    targets = [t for t in TARGETS if any((*place, t, "prediction") in maps for place in shown)]
    if not targets:
        return None
    size = next(v.shape[0] for k, v in maps.items() if k[3] == "prediction")
    truth = dict(zip(targets, position_maps(size, targets).numpy(), strict=True))
    figure, axes = _tiles(len(targets), 1 + len(shown))
    image = None
    for line, target in zip(axes, targets, strict=True):
        line[0].set_ylabel(f"{target}\n{_AXIS[target]}", fontsize=8)
        for axis, values in zip(
            line, [truth[target], *(maps.get((*p, target, "prediction")) for p in shown)], strict=True
        ):
            image = _show(axis, values, 1) or image
    runs = [run for run, _ in shown]
    names = [run if runs.count(run) == 1 else f"{run} {stimulus}" for run, stimulus in shown]
    for axis, title in zip(axes[0], ["target", *names], strict=True):
        axis.set_title(_wrapped(title), fontsize=8)
    figure.colorbar(image, ax=axes, label="position (0 to 1)", fraction=0.03, pad=0.01, aspect=30)  # type: ignore[arg-type]
    return figure


def draw_content_loss(maps: Maps) -> Figure | None:
    """The mean of the absolute error maps of H, V and G: a column a run, a row a stimulus, one colour scale.

    Args:
        maps: :func:`collect_maps`'; a run and stimulus that lacks one of the three maps is left out.

    Source: paper, figures 6 and 7 (content loss heat maps).
    """
    places = list(dict.fromkeys(key[:2] for key in maps))
    losses = {
        place: np.mean([maps[(*place, t, "error")] for t in ("H", "V", "G")], axis=0)
        for place in places
        if all((*place, t, "error") in maps for t in ("H", "V", "G"))
    }
    if not losses:
        return None
    runs, stimuli = (list(dict.fromkeys(place[i] for place in losses)) for i in (0, 1))
    largest = max(float(loss.max()) for loss in losses.values())
    figure, axes = _tiles(len(stimuli), len(runs))
    image = None
    for line, stimulus in zip(axes, stimuli, strict=True):
        line[0].set_ylabel(_wrapped(stimulus), fontsize=8)
        for axis, run in zip(line, runs, strict=True):
            image = _show(axis, losses.get((run, stimulus)), largest, "magma") or image
    for axis, run in zip(axes[0], runs, strict=True):
        axis.set_title(_wrapped(run), fontsize=8)
    label = "mean absolute error of H, V, G"
    figure.colorbar(image, ax=axes, label=_wrapped(label, 18), fraction=0.03, pad=0.01, aspect=30)  # type: ignore[arg-type]
    return figure


def _tiles(lines: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(1.5 + 1.25 * columns, 0.6 + 1.25 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def _show(axis, values: np.ndarray | None, largest: float, colours: str = "viridis"):
    return None if values is None else axis.imshow(values, vmin=0, vmax=largest, cmap=colours)


def _wrapped(name: str, width: int = 14) -> str:
    return "\n".join(textwrap.wrap(name.replace("-", "- "), width)).replace("- ", "-") or " "
