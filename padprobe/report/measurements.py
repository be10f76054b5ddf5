"""Results as tables of numbers: means over seeds, with their intervals, their delta and the references beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from padprobe.maps import TARGETS
from padprobe.report.declared import Selection, completed
from padprobe.report.references import beside, matched
from padprobe.results import READOUT, Results, twins_half_width

_SIZES = ["image_px", "source_px", "shown_px", "image_width", "source_width", "shown_width"]
RUN = ["run", "pair", "encoder", "weights", "task", "padding", "position_embedding", *_SIZES, "context", "mode"]
"""What is known of a run: ``run`` is the name of its group, ``context`` whether the encoder was shown more than the
image, ``mode`` the padding in words, with the context and the position embedding."""
PLACE = [*READOUT, "stimulus", "target", "metric"]
Row = Mapping[Any, Any]
"""A row of a table, by column."""
Rows = dict[str, list[Row]]
"""Rows by run."""
_LABELS = ["run", "encoder", "weights", "task", "padding"]
_ADDED = ["group", "pair", "position_embedding", *_SIZES, "n_train"]
_NUMBERS = ("value", "ci_low", "ci_high", "distance", "step", *_ADDED[3:])
_COUNTS = ("seed", "kernel_size", "depth", "head_padding", "n")
_TEXTS = ("pair", *_LABELS, "position_embedding", "readout", "scale", "stages", "stimulus", "target", "metric")
_TWIN = ["encoder", "padding", *_ADDED[2:], *READOUT, "stimulus", "target", "n"]
_BLANK = ("black", "white", "noise")


class Estimate(NamedTuple):
    """A number with its 95% interval.

    Example:
        >>> difference = Estimate(0.9, 0.87, 0.93) - Estimate(0.4, 0.36, 0.44)
        >>> [round(end, 2) for end in difference]
        [0.5, 0.45, 0.55]
    """

    value: float
    low: float
    high: float

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference; its half-widths are the two intervals', added in quadrature."""
        value = self.value - other.value
        below = math.hypot(self.value - self.low, other.high - other.value)
        above = math.hypot(self.high - self.value, other.value - other.low)
        return Estimate(value, value - below, value + above)


def typed(rows: pd.DataFrame, results: Results) -> pd.DataFrame:
    """Rows of any table of the results with :data:`RUN`, one type per column and no missing labels.

    ``run`` becomes the group's name and ``single`` keeps the run's own. A run that runs.csv does not have is a group
    and a pair of its own.
    """
    known = results.rows[_LABELS].drop_duplicates()
    known = known.merge(results.runs[["run", *_ADDED]], on="run", how="left")
    shared = [column for column in _LABELS if column in rows]
    rows = rows.merge(known.drop_duplicates(shared), on=shared, how="left")
    for column in ("group", "pair"):
        rows[column] = rows[column].where(rows[column].notna() & rows[column].ne(""), rows["run"])
    alone = rows.groupby("group")["pair"].transform("nunique") > 1
    rows["pair"] = rows["pair"].mask(alone, rows["group"])  # seeds that state no pair in common
    rows["single"], rows["run"] = rows["run"], rows.pop("group")
    for column in rows.columns:
        if column in _NUMBERS:
            rows[column] = pd.to_numeric(rows[column], errors="coerce")
        elif column in _COUNTS:
            rows[column] = pd.to_numeric(rows[column], errors="coerce").fillna(0).astype(int)
        elif column in _TEXTS:
            rows[column] = rows[column].astype(object).fillna("").astype(str)
    rows["context"] = (rows["shown_px"] > rows["image_px"]) | (rows["shown_width"] > rows["image_width"])
    rows["mode"] = rows["padding"] + rows["context"].map({True: " + context", False: ""})
    embedding = rows["position_embedding"]
    rows["mode"] += (", embedding " + embedding).where(embedding != "", "")
    return rows


def measurements(results: Results) -> pd.DataFrame:
    """All measurements, one row per group of runs that differ in their seed alone (``single`` is False), and one more
    per run of a group with several (``single`` is True, ``run`` the run's own name).

    Returns:
        :data:`RUN`, :data:`PLACE`, what :func:`averaged` gives, ``single`` and ``references`` (numbers by source).
        ``attrs["unmatched"]`` is, by source, how many references it has and how many of them match no row. The metric
        "delta" is SPC minus the mean SPC of the untrained twins; where the probe did not measure it image by image, it
        is taken from the untrained runs of the same encoder, padding, position embedding and image sizes, read out
        alike with as many images, and so is the spread of the twins. There is none where several groups of untrained
        runs are such twins.
    """
    rows = _with_delta(typed(results.rows, results))
    apart = rows[rows["single"] != rows["run"]]
    parts = [averaged(rows, [*RUN, *PLACE]).assign(single=False)]
    parts += [averaged(apart.assign(run=apart["single"]), [*RUN, *PLACE]).assign(single=True)] if len(apart) else []
    table = pd.concat(parts, ignore_index=True)
    groups = dict(zip(rows["single"], rows["run"], strict=True))
    references, pairs = results.references["source"], matched(table, results.references, groups)
    left = references[~np.isin(np.arange(len(references)), pairs["reference"])].value_counts()
    table = table.assign(references=pd.Series(beside(pairs, len(table)), index=table.index, dtype=object))
    sources = references.value_counts(sort=False)
    table.attrs["unmatched"] = {str(source): (int(n), int(left.get(source, 0))) for source, n in sources.items()}
    return table


def averaged(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Means over seeds of rows that agree in ``keys``.

    Returns:
        The keys, ``value``, ``ci_low`` and ``ci_high`` (the 95% interval over images), ``low`` and ``high`` (with
        several seeds their range, ``spread`` "seeds"; otherwise that interval, "images"), ``n`` and ``seeds``.
    """
    named = {"low": "min", "high": "max", "ci_low": "mean", "ci_high": "mean", "n": "max", "seeds": "nunique"}
    source = {"low": "value", "high": "value", "seeds": "seed"}
    table = (
        rows.groupby(keys, sort=False, dropna=False)
        .agg(value=("value", "mean"), **{name: (source.get(name, name), how) for name, how in named.items()})
        .reset_index()
    )
    repeated = table["high"] - table["low"] > 5e-4  # several seeds that differ in the digits shown
    table["spread"] = repeated.map({True: "seeds", False: "images"})
    table["low"] = table["low"].where(repeated, table["ci_low"])
    table["high"] = table["high"].where(repeated, table["ci_high"])
    return table


def by_run(table: pd.DataFrame) -> Rows:
    """The rows of :func:`measurements` by the name of their run, to select from."""
    rows: Rows = {}
    for row in table.to_dict("records"):
        rows.setdefault(str(row["run"]), []).append(row)
    return rows


def select(rows: Rows, selection: Selection) -> list[Row]:
    """The measurements that a selection, completed with its defaults, names."""
    values = {key: value if isinstance(value, list) else [value] for key, value in completed(selection).items()}
    if "run" in values:
        candidates = [row for run in values.pop("run") for row in rows.get(run, [])]
    else:
        candidates = [row for alike in rows.values() for row in alike if not row["single"]]
    return [row for row in candidates if all(row[key] in values[key] for key in values)]


def estimate(row: Row) -> Estimate:
    """A row's value with the wider of its intervals, over images and over seeds.

    It is (value, value) where there is none, and (NaN, NaN) for delta and eta2, whose noise is never known from a
    single number: there is none for delta against one twin, nor for eta2 of fewer than 10 images.
    """
    if row["metric"] in ("delta", "eta2") and pd.isna(row["ci_low"]):
        return Estimate(float(row["value"]), math.nan, math.nan)
    ends = [end for end in (row["low"], row["high"], row["ci_low"], row["ci_high"]) if not pd.isna(end)]
    return Estimate(float(row["value"]), float(min(ends, default=row["value"])), float(max(ends, default=row["value"])))


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The SPC rows that answer "how much position": for each run one stimulus and one readout, the run's pair together
    and padded before unpadded.

    The stimulus is the first that is not black, white or noise; the readout is the paper's on all stages. A run that
    lacks either is represented by its own first.
    """
    scores = table[(table["metric"] == "spc") & (table["stages"] != "rgb") & ~table["single"]]
    paper = pd.DataFrame([completed({})])[[*READOUT]]
    natural = [stimulus for stimulus in scores["stimulus"].unique() if stimulus not in _BLANK]
    chosen = []
    for _, rows in scores.groupby(RUN, sort=False, dropna=False):
        rows = rows[rows["stages"] == "all"] if "all" in set(rows["stages"]) else rows
        usual = rows.merge(paper)
        rows = rows.merge((usual if len(usual) else rows)[[*READOUT]].head(1))
        stimuli = list(rows["stimulus"].unique())
        chosen.append(rows[rows["stimulus"] == next((s for s in natural if s in stimuli), stimuli[0])])
    return _in_pairs(pd.concat(chosen, ignore_index=True)) if chosen else scores


def profile_table(results: Results, head: pd.DataFrame) -> pd.DataFrame:
    """Measurements by distance to the border, for each run of the headline on its stimulus: :data:`RUN`, ``stages,
    stimulus, target, metric, distance`` and what :func:`averaged` gives. ``metric`` is "spc" or "mae" (of a target),
    "eta2" or "reach" (of a stage, without stimulus)."""
    profile = typed(results.profile, results)
    places = head[["run", "stimulus"]].drop_duplicates()
    profile = profile.merge(pd.concat([places, places.assign(stimulus="")]).drop_duplicates())
    return _in_pairs(averaged(profile, [*RUN, "stages", "stimulus", "target", "metric", "distance"]))


def trajectory_table(results: Results) -> pd.DataFrame:
    """What trainings logged, means over seeds: SPC and delta of the targets, and the tasks' metrics."""
    table = typed(results.trajectory, results)
    table = table[(table["target"] == "") | table["metric"].isin(["spc", "delta"])].dropna(subset=["step", "value"])
    keys = ["run", "pair", "padding", "position_embedding", "context", "mode", "target", "metric", "step"]
    return table.groupby(keys, sort=False)["value"].mean().reset_index()


def targets_of(table: pd.DataFrame) -> list[str]:
    """The targets that a table has, the paper's first and in its order."""
    present = [target for target in table["target"].unique() if target]
    return [t for t in TARGETS if t in present] + [t for t in present if t not in TARGETS]


def stages_of(table: pd.DataFrame) -> list[str]:
    """The single stages that a table has, in order of depth."""
    return sorted({s for s in table["stages"] if re.fullmatch(r"f\d+", s)}, key=lambda stage: int(stage[1:]))


def _in_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a pair together, padded before unpadded before unpadded with context, and those whose position
    embedding was changed last."""
    changed = table["position_embedding"].map({"none": 4, "shuffled": 8}).fillna(0)
    order = table.assign(
        pairs=pd.factorize(table["pair"])[0],
        rank=table["padding"].map({"zeros": 0, "valid": 1}).fillna(2) + table["context"] + changed,
        name=pd.factorize(table["run"])[0],
    ).sort_values(["pairs", "rank", "name"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def _with_delta(rows: pd.DataFrame) -> pd.DataFrame:
    scores = rows[(rows["metric"] == "spc") & (rows["encoder"] != "") & (rows["stages"] != "rgb")]
    untrained = scores["weights"] == "untrained"
    ends = {"twin": ("value", "mean"), "spread": ("value", "std"), "k": ("value", "size"), "groups": ("run", "nunique")}
    ends |= {"ci_from": ("ci_low", "mean"), "ci_to": ("ci_high", "mean")}
    twins = scores[untrained].groupby(_TWIN, dropna=False, sort=False).agg(**ends).reset_index()
    twins = twins[twins["groups"] == 1]  # of several groups none is the twin
    delta = scores[~untrained].merge(twins, on=_TWIN)
    if delta.empty:
        return rows
    scored = [delta[column].fillna(delta["value"]) for column in ("value", "ci_low", "ci_high")]
    widths = [twins_half_width(spread, k) for spread, k in zip(delta["spread"], delta["k"], strict=True)]
    over_images = [(delta["twin"] - delta["ci_from"]).fillna(0), (delta["ci_to"] - delta["twin"]).fillna(0)]
    below, above = (np.hypot(half, widths) for half in over_images)
    against = [delta["twin"], delta["twin"] - below, delta["twin"] + above]
    pairs = zip(zip(*scored, strict=True), zip(*against, strict=True), strict=True)
    differences = pd.DataFrame([Estimate(*ours) - Estimate(*theirs) for ours, theirs in pairs], index=delta.index)
    delta["value"], delta["metric"] = differences["value"], "delta"
    delta["ci_low"], delta["ci_high"] = differences["low"], differences["high"]
    place = ["single", "seed", *READOUT, "stimulus", "target"]
    measured = pd.MultiIndex.from_frame(rows.loc[rows["metric"] == "delta", place])
    delta = delta[~pd.MultiIndex.from_frame(delta[place]).isin(measured)][rows.columns]
    return pd.concat([rows, delta], ignore_index=True) if len(delta) else rows
