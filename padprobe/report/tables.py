"""The report's tables as numbers: what to average, what to subtract, what to set beside it."""

from __future__ import annotations

import re
from pathlib import PurePath

import pandas as pd

from padprobe.maps import TARGETS
from padprobe.report.paper import paper_cell
from padprobe.results import COLUMNS

RUN = ["run", "encoder", "weights", "task", "padding"]
READOUT = ["readout", "kernel_size", "depth", "head_padding", "stages"]
RGB = "RGB only"
"""The run name of the control: the readout on the image alone, without an encoder."""
PADDINGS = {"zeros": 0, "valid": 1, "valid+context": 2}
"""The order of a pair's runs; "valid+context" is the unpadded encoder shown the image with its surroundings."""

_COUNTS = ["seed", "kernel_size", "depth", "head_padding", "n"]
_REALS = ["value", "ci_low", "ci_high"]
_PAPER_READOUT = ("posenet", 3, 1, 0)
_BLANK = ("black", "white", "noise")


def clean(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with one type a column and no missing labels; ``group`` is the run's name without its seed.

    A run repeated under names that end with its seed ("sod-zeros-seed0", "sod-zeros-s1") is one group, as is a run
    whose rows have several seeds. A name that several encoders share, say trained and untrained ones probed apart, is
    followed by the weights.
    """
    rows = rows.copy()
    for column in _REALS:
        rows[column] = pd.to_numeric(rows[column], errors="coerce")
    for column in _COUNTS:
        rows[column] = pd.to_numeric(rows[column], errors="coerce").fillna(0).astype(int)
    for column in (c for c in COLUMNS if c not in [*_REALS, *_COUNTS]):
        rows[column] = rows[column].fillna("").astype(str)
    bare = [re.sub(rf"[-_ ]s(eed)?[-_ ]?{seed}$", "", run) for run, seed in zip(rows["run"], rows["seed"], strict=True)]
    seeds = rows["seed"].groupby(bare).nunique()
    rows["group"] = [name if seeds[name] > 1 else run for name, run in zip(bare, rows["run"], strict=True)]
    shared = rows.groupby("group")["weights"].transform("nunique") > 1
    rows.loc[shared, "group"] += " (" + rows.loc[shared, "weights"].map(short) + ")"
    return rows


def short(label: str) -> str:
    """A path by its file name; any other label as it is."""
    return PurePath(label).name if "/" in label else label


def pair_names(runs: pd.DataFrame) -> list[str]:
    """What the padded and the unpadded run of a pair have in common, for each line of a frame of :data:`RUN`.

    It is the run's name without its padding: "ss-p0" for "ss-zeros-p0", "ss-valid-p0" and "ss-valid+context-p0". Where
    names do not say the padding and an encoder has one run a padding for a task, these are a pair and share the first
    one's name.
    """
    bare = [
        re.sub(r"[-_ ]+", "-", run.replace(padding, "", 1)).strip("-") or run if padding else run
        for run, padding in zip(runs["run"], runs["padding"], strict=True)
    ]
    frame = runs[RUN].assign(bare=bare, untrained=runs["weights"] == "untrained", said=bare != runs["run"])
    names = pd.Series(bare, index=runs.index, dtype=str)
    for _, alike in frame.groupby(["encoder", "task", "untrained"]):
        if not alike["said"].all() and (alike.groupby("padding")["run"].nunique() == 1).all():
            names[alike.index] = alike["bare"].iloc[0]
    return names.tolist()


def position_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every position readout in one row: means over seeds, the untrained control, the paper's value.

    Args:
        rows: cleaned rows, see :func:`clean`.

    Returns:
        Columns :data:`RUN`, :data:`READOUT`, ``stimulus, target, seeds, n, pair, pair_name``; ``spc`` with ``low`` and
        ``high`` (``spread`` "seeds": their range; "images": the 95% bootstrap interval over images);
        ``mae, nmae, constant`` (images with a constant prediction); ``selectivity`` (SPC minus that on permuted cells);
        ``delta`` = SPC minus the SPC of the untrained encoder of the same architecture and padding on as many images,
        NaN where there is none, with ``delta_low`` and ``delta_high`` where the probe measured it image by image;
        ``paper`` (the paper's name of the network, or ""), ``paper_spc, paper_mae``. Padded stands before unpadded, the
        RGB control last.
    """
    rows = rows[rows["target"] != ""].copy()
    rows["run"] = rows["group"]
    rows.loc[rows["stages"] == "rgb", RUN] = [RGB, "", "", "", ""]
    keys = [*RUN, *READOUT, "stimulus", "target"]
    table = _averaged(rows[rows["metric"] == "spc"], keys).rename(columns={"value": "spc"})
    for metric in ("mae", "nmae", "constant", "selectivity", "delta"):
        means = rows[rows["metric"] == metric].groupby(keys, sort=False)[_REALS].mean()
        means.columns = [metric, f"{metric}_low", f"{metric}_high"]
        table = table.merge(means.reset_index(), on=keys, how="left")

    twin = ["encoder", "padding", *READOUT, "stimulus", "target", "n"]
    untrained = (table["weights"] == "untrained") & (table["encoder"] != "")
    control = table[untrained].groupby(twin)["spc"].mean().rename("control").reset_index()
    joined = table["spc"] - table.merge(control, on=twin, how="left")["control"].to_numpy()
    table["delta"] = table["delta"].fillna(joined).where(~untrained & (table["run"] != RGB))

    cells = [paper_cell(row) for row in table.to_dict("records")]
    table["paper"] = [cell.network if cell else "" for cell in cells]
    table["paper_spc"] = [cell.spc if cell else float("nan") for cell in cells]
    table["paper_mae"] = [cell.mae if cell else float("nan") for cell in cells]

    return _in_pairs(table)


def variance_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What needs no readout: per run and stage the share of the features' variance that position explains ("eta2"), and
    the fraction of cells whose receptive field reaches the padding ("reach", of no stimulus).

    Args:
        rows: cleaned rows, see :func:`clean`.

    Returns:
        Columns :data:`RUN`, ``stages, stimulus, metric, value, low, high, spread, n, seeds, pair, pair_name``.
    """
    rows = rows[rows["readout"] == "variance"]
    return _in_pairs(_averaged(rows.assign(run=rows["group"]), [*RUN, "stages", "stimulus", "metric"]))


def profile_table(profile: pd.DataFrame, rows: pd.DataFrame, head: pd.DataFrame) -> pd.DataFrame:
    """Measurements by distance to the border, for each run of the headline on its stimulus.

    Args:
        profile: :attr:`~padprobe.results.Results.profile`.
        rows: cleaned rows, which know the runs that differ by their seed alone.
        head: :func:`headline`'s.

    Returns:
        Columns :data:`RUN`, ``stages, stimulus, target, metric, distance, value, low, high, spread, n, seeds, pair,
        pair_name``; ``metric`` is "spc" or "mae" (of a target), "eta2" or "reach" (of a stage).
    """
    if not len(profile):
        return profile
    profile = clean(profile)
    profile["distance"] = pd.to_numeric(profile["distance"], errors="coerce")
    name = ["run", "weights", "seed"]
    groups = dict(zip(rows[name].itertuples(index=False, name=None), rows["group"], strict=True))
    profile["run"] = [groups.get(key, key[0]) for key in profile[name].itertuples(index=False, name=None)]
    places = head[["run", "stimulus"]]
    profile = profile.merge(pd.concat([places, places.assign(stimulus="")]).drop_duplicates())  # reach has no stimulus
    return _in_pairs(_averaged(profile, [*RUN, "stages", "stimulus", "target", "metric", "distance"]))


def _averaged(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Means over seeds: ``value``, ``low`` and ``high`` (``spread`` says of what), ``n``, ``seeds``."""
    named = {"low": "min", "high": "max", "ci_low": "mean", "ci_high": "mean", "n": "max", "seeds": "nunique"}
    source = {"low": "value", "high": "value", "seeds": "seed"}
    table = (
        rows.groupby(keys, sort=False)
        .agg(value=("value", "mean"), **{name: (source.get(name, name), how) for name, how in named.items()})
        .reset_index()
    )
    repeated = table["high"] - table["low"] > 5e-4
    table["spread"] = repeated.map({True: "seeds", False: "images"})
    table["low"] = table["low"].where(repeated, table["ci_low"])
    table["high"] = table["high"].where(repeated, table["ci_high"])
    return table.drop(columns=["ci_low", "ci_high"])


def _in_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with ``pair`` and ``pair_name``, sorted: padded before unpadded, the RGB control last."""
    table = table.assign(pair_name=pair_names(table))
    untrained = table["weights"] == "untrained"
    table["pair"] = table.groupby(["encoder", "task", untrained, "pair_name"], sort=False).ngroup()
    order = table.assign(
        control=table["run"] == RGB,
        rank=table["padding"].map(PADDINGS).fillna(len(PADDINGS)),
        name=pd.factorize(table["run"])[0],
    ).sort_values(["control", "pair", "rank", "name"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def targets_of(table: pd.DataFrame) -> list[str]:
    """The targets that a table has, the paper's first and in its order."""
    found = list(table["target"].unique())
    return [target for target in TARGETS if target in found] + [target for target in found if target not in TARGETS]


def stages_of(table: pd.DataFrame) -> list[str]:
    """The single stages that a table has, in order of depth."""
    return sorted({s for s in table["stages"] if re.fullmatch(r"f\d+", s)}, key=lambda stage: int(stage[1:]))


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`position_table` that answer "how much position": for each run one stimulus and one readout.

    The stimulus is the first that is not black, white or noise; the readout is the paper's on all stages. A run that
    lacks either is represented by its own first. The RGB control is kept for the stimuli and readouts chosen.
    """
    runs = table[table["run"] != RGB]
    natural = [s for s in runs["stimulus"].unique() if s not in _BLANK]
    chosen = []
    for _, rows in runs.groupby(RUN, sort=False):
        full = rows[rows["stages"] == "all"] if "all" in set(rows["stages"]) else rows
        readouts = list(full[READOUT].drop_duplicates().itertuples(index=False, name=None))
        readout = next((r for r in readouts if r[:4] == _PAPER_READOUT), readouts[0])
        full = full[[r == readout for r in full[READOUT].itertuples(index=False, name=None)]]
        own = list(full["stimulus"].unique())
        stimulus = next((s for s in natural if s in own), own[0])
        chosen.append(full[full["stimulus"] == stimulus])
    if not chosen:
        return table
    picked = pd.concat(chosen)
    rgb = table[table["run"] == RGB].merge(picked[[*READOUT[:-1], "stimulus"]].drop_duplicates())
    return pd.concat([picked, rgb], ignore_index=True)


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """SPC of the padded minus SPC of the unpadded run of each pair, without and with its surroundings: columns ``pair,
    pair_name, task, padding, target, gap``, where ``padding`` is the unpadded run's.

    Args:
        table: :func:`headline`'s. A pair has the same encoder and task, both trained or both untrained, see
            :func:`pair_names`; one measured on two stimuli or twice has no gap.
    """
    rows = []
    for _, pair in table[table["run"] != RGB].groupby("pair", sort=False):
        zeros = pair[pair["padding"] == "zeros"]
        for padding in ("valid", "valid+context"):
            valid = pair[pair["padding"] == padding]
            both = zeros.merge(valid, on=[*READOUT, "stimulus", "target"], suffixes=("", "_valid"))
            if zeros["run"].nunique() == valid["run"].nunique() == 1 and len(both):
                rows.append(both.assign(padding=padding, gap=both["spc"] - both["spc_valid"]))
    columns = ["pair", "pair_name", "task", "padding", "target", "gap"]
    return pd.concat(rows)[columns] if rows else pd.DataFrame(columns=columns)


def task_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Task scores, padded beside unpadded (the shape of the paper's table 5).

    Args:
        rows: cleaned rows, see :func:`clean`.

    Returns:
        Columns ``runs`` (the pair's common name), ``encoder, task, data, metric``, one a padding (zeros and valid
        first), and ``difference`` = zeros - valid where both are there. Means over seeds.
    """
    rows = rows[(rows["target"] == "") & (rows["readout"] == "") & (rows["metric"] != "")]
    if rows.empty:
        return pd.DataFrame()
    rows = rows.assign(runs=pair_names(rows.assign(run=rows["group"])), data=rows["stimulus"])
    paddings = sorted(rows["padding"].unique(), key=lambda p: PADDINGS.get(p, len(PADDINGS)))
    keys = ["runs", "encoder", "task", "data", "metric"]
    wide = rows.pivot_table(values="value", index=keys, columns="padding", aggfunc="mean", sort=False)[paddings]
    if {"zeros", "valid"} <= set(paddings):
        wide["difference"] = wide["zeros"] - wide["valid"]
    return wide.reset_index()


def trajectory_table(results_trajectory: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """A training's logged values with numbers as numbers: SPC and delta of the targets and task metrics, means over
    seeds.

    Args:
        results_trajectory: :attr:`~padprobe.results.Results.trajectory`.
        rows: cleaned rows, which know the runs that differ by their seed alone.
    """
    groups = dict(zip(rows["run"], rows["group"], strict=True))
    table = results_trajectory.assign(
        run=[groups.get(run, run) for run in results_trajectory["run"].fillna("").astype(str)],
        step=pd.to_numeric(results_trajectory["step"], errors="coerce"),
        value=pd.to_numeric(results_trajectory["value"], errors="coerce"),
    )
    table[["task", "padding", "target"]] = table[["task", "padding", "target"]].fillna("").astype(str)
    table = table[(table["target"] == "") | table["metric"].isin(["spc", "delta"])].dropna(subset=["step", "value"])
    keys = ["run", "task", "padding", "target", "metric", "step"]
    return table.groupby(keys, sort=False)["value"].mean().reset_index()
