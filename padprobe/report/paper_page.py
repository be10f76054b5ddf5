"""The paper's tables with ours beside them: ``paper.md``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pandas as pd

from padprobe.report import tables
from padprobe.report.paper import PAPER_SCALE, paper_numbers
from padprobe.report.sections import ABSENT, Section, Table, number
from padprobe.report.tables import RGB

STIMULI = ("PASCAL-S", "black", "white", "noise")
CLOSE = 0.05
"""SPC this near to the paper's counts as the same."""

Row = dict[Any, Any]


def paper_sections(results_rows: pd.DataFrame, notes: pd.DataFrame) -> list[Section]:
    """A section for every table of the paper that something was measured for; none without an ImageNet VGG16.

    Args:
        results_rows: cleaned rows, see :func:`padprobe.report.tables.clean`.
        notes: :attr:`~padprobe.results.Results.notes`.
    """
    table = _measured(results_rows)
    if not any(_is_vgg(row) for row in table.to_dict("records")):
        return []
    pairs: list[Row] = []
    sections = [
        _table1(table, pairs),
        _ablation(results_rows, pairs, "2a", "depth of the readout", "layers", "depth", (1, 2, 3)),
        _ablation(results_rows, pairs, "2b", "kernel of the readout", "kernel", "kernel_size", (1, 3, 7)),
        _table3(table, pairs),
        _table4(table, pairs),
        _table5(results_rows),
        _table6(table, pairs),
    ]
    return [_reading(pairs, table), *(section for section in sections if section), *_how(notes)]


def paper_places(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(run, stimulus) of the paper's figures: ImageNet's VGG16 on every stimulus, other networks on natural images.

    Args:
        rows: cleaned rows, see :func:`padprobe.report.tables.clean`.
    """
    plain = [row for row in rows.to_dict("records") if row["target"] and _plain(row) and row["stages"] == "all"]
    vgg = [(row["group"], row["stimulus"]) for row in plain if _is_vgg(row)]
    first = [place for place in vgg if place[0] == vgg[0][0]]
    others = [(row["group"], row["stimulus"]) for row in plain if row["stimulus"] == STIMULI[0] and not _is_vgg(row)]
    return list(dict.fromkeys([*first, *others]))


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The position table, its image-alone rows those of the ImageNet VGG16's runs, whose images are the paper's; of
    several such runs, of the one with most images."""
    table = tables.position_table(rows)
    own = rows[[_is_vgg(row) for row in rows.to_dict("records")]].sort_values("n", ascending=False, kind="stable")
    if own.empty:
        return table
    alone = tables.position_table(own.drop_duplicates([*tables.READOUT, "seed", "stimulus", "target", "metric"]))
    return pd.concat([table[table["run"] != RGB], alone[alone["run"] == RGB]], ignore_index=True)


def _is_vgg(row: Row) -> bool:
    """Whether a row is of VGG16 with ImageNet weights, padded as it was trained."""
    return _is_imagenet(row) and row["padding"] == "zeros" and str(row["encoder"]).lower().endswith("vgg16")


def _is_imagenet(row: Row) -> bool:
    return row["weights"] not in ("", "untrained", "trained") and row["task"] not in ("SOD", "SS")


def _plain(row: Row) -> bool:
    """Whether a row's readout is the paper's first: 3 x 3, one layer, no padding, all stages."""
    readout = (row["readout"], row["kernel_size"], row["depth"], row["head_padding"])
    return readout == ("posenet", 3, 1, 0) and row["stages"] in ("all", "rgb")


def _paper(table: str, target: str, name: str, stimulus: str) -> Row:
    """A cell of the paper: SPC and MAE, NaN where it has none."""
    none = {"SPC": float("nan"), "MAE": float("nan")}
    return paper_numbers()[table].get(target, {}).get(name, {}).get(stimulus, none)


def _compare(
    caption: str,
    table: pd.DataFrame,
    pairs: list[Row],
    paper: str,
    lines: Iterable[tuple[str, str, Callable[[Row], bool]]],
) -> Table | None:
    """A table of ours beside the paper's: a line a target and network, a column a stimulus.

    Args:
        caption: of the table.
        table: :func:`_measured`'s.
        pairs: where each of our values that the paper has too is written down.
        paper: its table's name in ``paper.json``.
        lines: what we call a network, what the paper does ("" where it has none), and which rows are its own.
    """
    records = [{**row, "place": _place(row)} for row in table.to_dict("records")]
    chosen = [(label, name, [row for row in records if row["place"] and mine(row)]) for label, name, mine in lines]
    counts = {s: max((r["n"] for *_, rows in chosen for r in rows if r["place"] == s), default=0) for s in STIMULI}
    stimuli = [s for s in STIMULI if counts[s]]
    found = []
    for target in tables.targets_of(table):
        for label, name, rows in chosen:
            by_stimulus: dict[str, Row] = {}
            for row in sorted((r for r in rows if r["target"] == target), key=lambda r: -r["n"]):
                by_stimulus.setdefault(row["place"], row)  # of several runs the one of most images, the first of these
            if by_stimulus:
                cells = []
                for stimulus in stimuli:
                    ours, theirs = by_stimulus.get(stimulus), _paper(paper, target, name, stimulus)
                    cells.append(_cell(ours, theirs, counts[stimulus]))
                    if ours and not pd.isna(theirs["SPC"]):
                        pairs.append(
                            {**ours, "table": paper, "label": label, "place": stimulus, "theirs": theirs["SPC"]}
                        )
                found.append(("run", [target, label, *cells]))
    columns = ["target", "network", *(f"{s} (n = {counts[s]})" for s in stimuli)]
    return Table(caption, columns, found, 2) if found else None


def _place(row: Row) -> str:
    """Which of the paper's stimuli a row is of; "" for another, such as the larger images of a run with context."""
    stimulus = str(row["stimulus"])
    if row["padding"] == "valid+context":
        stimulus = stimulus.partition(" (")[0]
    return stimulus if stimulus in STIMULI else ""


def _cell(row: Row | None, paper: Row, n: int) -> str:
    """SPC, its interval, the paper's and the difference; then MAE, where it compares; then delta and selectivity."""
    if row is None:
        return ABSENT
    text = f"**{number(row['spc'])}**"
    if not pd.isna(row["low"]):
        text += f" [{number(row['low'])}, {number(row['high'])}]"
    text += f" n = {row['n']}" if row["n"] != n else ""
    if not pd.isna(paper["SPC"]):
        text += f"; paper {number(paper['SPC'])}, {number(row['spc'] - paper['SPC'], sign='+')}"
    if row["target"] not in ("HS", "VS") or row["readout"] == PAPER_SCALE:
        text += f"; MAE {number(row['mae'])}"
        text += "" if pd.isna(paper["MAE"]) else f", paper {number(paper['MAE'])}"
    for name, column in (("Δ", "delta"), ("sel", "selectivity")):
        text += "" if pd.isna(row[column]) else f"; {name} {number(row[column], 2, '+')}"
    return text


def _table1(table: pd.DataFrame, pairs: list[Row]) -> Section | None:
    def of(network: str, untrained: bool) -> Callable[[Row], bool]:
        def mine(row: Row) -> bool:
            blank = row["weights"] == "untrained"
            right = _plain(row) and row["padding"] == "zeros" and str(row["encoder"]).lower().endswith(network)
            return right and (blank if untrained else _is_imagenet(row))

        return mine

    lines = [
        ("PosENet (the image alone)", "PosENet", lambda row: row["run"] == RGB and _plain(row)),
        ("VGG16, ImageNet", "VGG", lambda row: _is_vgg(row) and _plain(row)),
        ("VGG16, untrained", "", of("vgg16", True)),
        ("ResNet-152, ImageNet", "ResNet", of("resnet152", False)),
        ("ResNet-152, untrained", "", of("resnet152", True)),
    ]
    found = _compare("", table, pairs, "table1", lines)
    reading = "Untrained encoders stand beside the paper's networks: what they score, the architecture has by itself."
    return Section("Table 1: position in classification encoders", reading, [found]) if found else None


def _ablation(
    rows: pd.DataFrame, pairs: list[Row], which: str, title: str, word: str, column: str, values: tuple[int, ...]
) -> Section | None:
    """Tables 2a and 2b: a readout's option at several values, of the one run that has most of them."""
    usual = {"kernel_size": 3, "depth": 1, "head_padding": 0}
    own = rows[(rows["readout"] == "posenet") & rows["stages"].isin(["all", "rgb"])]
    for other in usual.keys() - {column}:
        own = own[own[other] == usual[other]]
    own = own[[_is_vgg(row) and bool(_place(row)) for row in own.to_dict("records")]]
    runs = own.groupby("group").agg(values=(column, "nunique"), n=("n", "max")).sort_values(["values", "n"])
    if runs.empty or runs["values"].iloc[-1] < 2:
        return None
    table = tables.position_table(own[own["group"] == runs.index[-1]])

    def of(alone: bool, value: int) -> Callable[[Row], bool]:
        return lambda row: (row["run"] == RGB) == alone and row[column] == value and row["stimulus"] == STIMULI[0]

    lines = [
        (f"{label}, {value} {word}", f"{label} {word}={value}", of(label == "PosENet", value))
        for label in ("PosENet", "VGG")
        for value in values
    ]
    found = _compare("", table, pairs, f"table{which}", lines)
    return Section(f"Table {which}: {title}", "", [found]) if found else None


def _table3(table: pd.DataFrame, pairs: list[Row]) -> Section | None:
    def of(stage: str) -> Callable[[Row], bool]:
        return lambda row: (
            _is_vgg(row)
            and _plain({**row, "stages": "all"})
            and row["stages"] == stage
            and row["stimulus"] == STIMULI[0]
        )

    stages = tables.stages_of(table[[_is_vgg(row) for row in table.to_dict("records")]])
    lines = [(f"VGG, {stage}", f"VGG {stage}", of(stage)) for stage in stages]
    found = _compare("", table, pairs, "table3", lines) if stages else None
    return Section("Table 3: one stage at a time", "", [found]) if found else None


def _table4(table: pd.DataFrame, pairs: list[Row]) -> Section | None:
    def alone(pad: int) -> Callable[[Row], bool]:
        return lambda row: row["run"] == RGB and _plain({**row, "head_padding": 0}) and row["head_padding"] == pad

    def of(padding: str, untrained: bool) -> Callable[[Row], bool]:
        def mine(row: Row) -> bool:
            right = str(row["encoder"]).lower().endswith("vgg16") and row["padding"] == padding
            return right and _plain(row) and (row["weights"] == "untrained" if untrained else _is_imagenet(row))

        return mine

    modes = ("zeros", "valid", "valid+context", "reflect", "replicate", "circular")
    names = {"zeros": "VGG16", "valid": "VGG16 w/o padding"}
    lines = [(f"PosENet, padded by {pad}", f"PosENet pad={pad}", alone(pad)) for pad in (0, 1, 2)]
    lines += [(f"VGG16, {mode}", names.get(mode, ""), of(mode, False)) for mode in modes]
    lines += [(f"VGG16, {mode}, untrained", "", of(mode, True)) for mode in modes]
    natural = table["stimulus"].str.startswith(STIMULI[0])
    parts = (
        _compare("On natural images", table[natural], pairs, "table4", lines),
        _compare("On images without content", table[~natural], pairs, "table4", lines),
    )
    reading = (
        "Valid is the paper's VGG16 without padding, not retrained; valid+context is the same shown the image with its "
        "surroundings, at the padded one's resolution. Without padding, an image without content has nothing to go by."
    )
    found = [part for part in parts if part]
    return Section("Table 4: padding", reading, found) if found else None


def _table5(rows: pd.DataFrame) -> Section | None:
    scores = tables.task_table(rows)
    if scores.empty:
        return None
    scores = scores[~scores["metric"].str.startswith("IoU of")]
    paper, lines = paper_numbers(), []
    for row in scores.to_dict("records"):
        cells = [row["task"], row["data"], row["encoder"], row["metric"]]
        numbers = [row.get(column, float("nan")) for column in ("zeros", "valid", "difference")]
        cells += [number(value, sign="+" if i == 2 else "") for i, value in enumerate(numbers)]
        key = {"max F-measure": "Fm", "MAE": "MAE"}.get(row["metric"])
        both = [paper["table5a"][name].get(row["data"], {}).get(key) for name in ("VGG", "VGG w/o padding")]
        if row["metric"] == "mIoU" and "VOC" in row["data"]:
            both = [paper["table5b_percent"][name] / 100 for name in ("VGG", "VGG w/o padding")]
        cells += [number(value) if value is not None else ABSENT for value in both]
        lines.append(("run", cells))
    columns = [
        "task",
        "data",
        "encoder",
        "metric",
        "zeros",
        "valid",
        "zeros - valid",
        "paper, VGG",
        "paper, w/o padding",
    ]
    reading = (
        "From scratch, with zero padding and without, stretched. The paper trains SOD on MSRA and SS on VOC 2012 and "
        'does not say which F-measure it takes; values compare by direction, not by size. "Position alone" is the mean '
        "training mask (SOD) or the class prior of each pixel (SS), which see no image."
    )
    return Section("Table 5: what padding does to the tasks", reading, [Table("", columns, lines, 4)])


def _table6(table: pd.DataFrame, pairs: list[Row]) -> Section | None:
    def of(run: str) -> Callable[[Row], bool]:
        return lambda row: row["run"] == run and row["padding"] == "zeros" and _plain(row)

    def blank(encoder: str) -> Callable[[Row], bool]:
        return lambda row: (row["encoder"], row["weights"]) == (encoder, "untrained") and of(row["run"])(row)

    trained = table[table["task"].isin(["SOD", "SS"]) & (table["padding"] == "zeros")]
    if trained.empty:
        return None
    runs = dict.fromkeys(zip(trained["run"], trained["task"], trained["encoder"], strict=True))
    blanks = dict.fromkeys(table.loc[table["weights"] == "untrained", "encoder"])
    lines: list[tuple[str, str, Callable[[Row], bool]]] = [
        ("VGG16, ImageNet", "VGG", lambda row: _is_vgg(row) and _plain(row)),
        *((f"VGG-{task} ({run}: {encoder})", f"VGG-{task}", of(run)) for run, task, encoder in runs),
        *((f"{encoder}, untrained", "", blank(encoder)) for encoder in blanks if "vgg" in encoder),
    ]
    found = _compare("", table, pairs, "table6", lines)
    reading = (
        "Δ is SPC minus that of the untrained encoder of the same architecture: what the training added. A black image "
        "leaves an untrained network without BatchNorm all zeros, so Δ says nothing there. Networks trained here saw "
        "other data than the paper's, at the scale that stands below for each run."
    )
    return Section("Table 6: position in encoders trained for SOD and SS", reading, [found]) if found else None


def _reading(pairs: list[Row], table: pd.DataFrame) -> Section:
    """Where we agree with the paper, where not, and why, as far as the numbers say it."""
    orders = list(_orders(pairs))
    unique: dict[tuple[Any, ...], Row] = {}  # what several of the paper's tables have counts once
    for pair in pairs:
        unique.setdefault(tuple(pair[c] for c in (*tables.RUN, *tables.READOUT, "place", "target", "theirs")), pair)
    pairs = [pair for pair in unique.values() if pair["task"] not in ("SOD", "SS")]  # other networks than the paper's
    near = [pair for pair in pairs if abs(pair["spc"] - pair["theirs"]) <= CLOSE]
    lines = [
        f"Of {len(pairs)} values of SPC of the paper's own networks, {len(near)} are within {number(CLOSE, 2)} of the "
        "paper; the others:"
    ]
    far = sorted((p for p in pairs if p not in near), key=lambda p: -abs(p["spc"] - p["theirs"]))
    rows = [("run", [p["table"].replace("table", ""), p["target"], p["label"], p["place"], *_numbers(p)]) for p in far]
    columns = ["table", "target", "network", "images", "ours", "paper", "difference"]
    parts = [Table(lines[0], columns, rows, 4)]
    if orders:
        columns = ["table", "target", "the paper's order", "ours", "turned round"]
        parts.append(Table("Orders of the ablations on natural images", columns, orders, 3))
    known = [
        "What is known of the differences. MAE: the paper's stripes (HS, VS) look like targets on [-1, 1], ours are on "
        "[0, 1], so their MAE is not compared. f1 alone (table 3): the paper's readout seems to sample the stage "
        "inside the border, ours at it (docs/ablations.md). PosENet: its 27 weights end where their start leads, so "
        "one seed says little (padded by 1, eight seeds give G .12 to .35 and H -.00 to .28, docs/ablations.md). Black "
        "and white are one image each, and our noise is not the authors' image."
    ]
    known += _controls(table)
    return Section("Reading", "", parts, note="\n\n".join(known))


def _numbers(pair: Row) -> list[str]:
    difference = number(pair["spc"] - pair["theirs"], sign="+")
    between: str = "" if pd.isna(pair["low"]) else f" [{number(pair['low'])}, {number(pair['high'])}]"
    return [number(pair["spc"]) + between, number(pair["theirs"]), difference]


def _orders(pairs: list[Row]) -> Iterator[tuple[str, list[str]]]:
    """A line for each ablation and target: the paper's order of the networks, ours, and the neighbours that change
    places, with their intervals' overlap."""
    frame = pd.DataFrame([p for p in pairs if p["table"] in ("table2a", "table2b", "table3", "table4")])
    if frame.empty:
        return
    frame = frame[frame["place"] == STIMULI[0]]
    frame["network"] = frame["label"].str.split(",").str[0]
    for (name, target, _), rows in frame.groupby(["table", "target", "network"], sort=False):
        if len(rows) > 1:
            theirs, ours = rows.sort_values("theirs"), rows.sort_values("spc")
            turned = [
                f"{a['label']} {number(a['spc'])} > {b['label']} {number(b['spc'])}"
                + (" (intervals overlap)" if b["high"] >= a["low"] else "")
                for a, b in itertools.pairwise(theirs.to_dict("records"))
                if a["spc"] > b["spc"]
            ]
            cells = [str(name).replace("table", ""), str(target), " < ".join(theirs["label"])]
            same = list(theirs["label"]) == list(ours["label"])
            yield "run", [*cells, "the same" if same else " < ".join(ours["label"]), "; ".join(turned)]


def _controls(table: pd.DataFrame) -> list[str]:
    """What the controls say that the paper does not have."""
    vgg = [row for row in table.to_dict("records") if str(row["encoder"]).lower().endswith("vgg16") and _plain(row)]
    rows = sorted((row for row in vgg if _place(row) == STIMULI[0]), key=lambda row: row["n"])  # most images last

    def values(padding: str, untrained: bool) -> str:
        found = {
            row["target"]: number(row["spc"])
            for row in rows
            if row["padding"] == padding and (row["weights"] == "untrained" if untrained else _is_imagenet(row))
        }
        return ", ".join(f"{target} {found[target]}" for target in ("H", "V", "G") if target in found)

    said = []
    if twin := values("zeros", True):
        said.append(
            f"Untrained twins: a VGG16 that was never trained reads {twin}, ImageNet's {values('zeros', False)}. A "
            "score without its twin's is of the architecture as much as of the training."
        )
    trained: dict[str, list[str]] = {}
    for row in table[table["task"].isin(["SOD", "SS"]) & (table["padding"] == "zeros")].to_dict("records"):
        if row["stimulus"] == STIMULI[0] and row["target"] in ("H", "V", "G") and _plain(row):
            change = "" if pd.isna(row["delta"]) else f" ({number(row['delta'], 2, '+')})"
            trained.setdefault(row["run"], []).append(f"{row['target']} {number(row['spc'])}{change}")
    if trained:
        lines = "; ".join(f"{run} {', '.join(values)}" for run, values in trained.items())
        said.append(f"Trained from scratch here, in brackets what that added to the untrained twin: {lines}.")
    if valid := values("valid", False):
        text = (
            f"Without padding VGG16 keeps {valid}. This is no proof of position: at 224 px its stages have 220, 106, "
            "47, 17 and 2 pixels a side, stretched over the target, and images have content (sky is up)."
        )
        if context := values("valid+context", False):
            text += f" Shown the image's surroundings, at the padded one's resolution, it has {context}."
        said.append(text)
    return said


def _how(notes: pd.DataFrame) -> list[Section]:
    missing, how = (notes[notes["kind"] == kind] for kind in ("missing", "how"))
    sections = []
    if len(missing):
        lines = [("run", [row["what"], row["text"]]) for row in missing.to_dict("records")]
        sections.append(Section("What was not run, and why", "", [Table("", ["what", "why"], lines, 2)]))
    if len(how):
        lines = [("run", [row["what"], row["text"]]) for row in how.to_dict("records")]
        sections.append(Section("How each run was made", "", [Table("", ["run", "how"], lines, 2)]))
    return sections
