"""Readouts side by side, their controls and what needs no readout: the page says what was measured, and no more."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from padprobe.report import figures, main_table, tables, write_report
from padprobe.report.paper import paper_cell
from padprobe.report.sections import readout_name
from padprobe.results import COLUMNS, PROFILE, Results
from tests.report.conftest import Page

TARGETS = ("H", "V", "G", "HS", "VS")
LEVEL = {"zeros": 0.74, "valid": 0.38, "valid+context": 0.21}
PAPERS = ("posenet", 3, 1, 0, "all")
RIDGE = ("ridge", 3, 1, 0, "all")
VARIANTS = {  # (readout, kernel, depth, head padding, stages): what it adds to the headline's SPC
    PAPERS: 0.0,
    ("posenet, paper scale", 3, 1, 0, "all"): 0.01,
    ("posenet", 1, 1, 0, "all"): -0.18,
    ("ridge", 1, 1, 0, "all"): -0.11,
    RIDGE: 0.05,
    ("posenet", 7, 1, 0, "all"): 0.08,
    ("posenet", 3, 2, 0, "all"): 0.06,
    ("posenet", 3, 1, 1, "all"): 0.02,
    ("posenet", 3, 1, 0, "f1"): -0.39,
    ("posenet", 3, 1, 0, "f2"): -0.35,
    ("posenet", 3, 1, 0, "f5"): -0.08,
    ("posenet", 3, 1, 0, "f2+f4"): -0.15,
    ("posenet", 3, 1, 0, "rgb"): -0.7,
    ("posenet", 3, 1, 2, "rgb"): -0.3,
    ("posenet", 7, 1, 0, "rgb"): -0.65,
}
STAGES = ("f1", "f2", "f3", "f4", "f5")
REACH = dict(zip(STAGES, (0.035, 0.104, 0.325, 0.673, 0.98), strict=True))


def measured(padding: str, weights: str = "imagenet", seed: int = 0) -> Results:
    """What one `padprobe probe` gives of one encoder; a twin (untrained) scores .2 less and has two readouts."""
    twin = weights == "untrained"
    label = (f"vgg16-{weights}-{padding}", "torchvision:vgg16", weights, "untrained" if twin else "", padding, seed)
    base = LEVEL[padding] - 0.2 * twin + 0.01 * seed
    rows, profile, maps = [], [], {}
    for stimulus, n in (("PASCAL-S", 200), ("black", 1)):
        for readout, more in VARIANTS.items():
            if twin and readout not in (PAPERS, RIDGE):
                continue
            for i, target in enumerate(TARGETS):
                spc = base + more - 0.1 * i - 0.1 * (n == 1)
                values = {"spc": spc, "mae": 0.25 - spc / 8, "nmae": 1 - spc / 2, "constant": 0.0}
                values |= {"selectivity": spc - 0.013} | ({} if twin or readout[4] == "rgb" else {"delta": 0.123})
                for metric, value in values.items():
                    width = 0.004 if n > 1 and metric != "constant" else np.nan
                    rows.append((*label, *readout, stimulus, target, metric, value, value - width, value + width, n))
        for i, stage in enumerate(STAGES):
            place = (*label, "variance", np.nan, np.nan, np.nan)
            share = (0.02 + 0.09 * i) * base
            rows.append((*place, stage, stimulus, "", "eta2", share, np.nan, np.nan, n))
            maps[f"{label[0]}/{stimulus}/{stage}/eta2"] = np.full((28, 28), share, np.float32)
            for distance in range(4, 112, 8):
                near = np.exp(-distance / (8 + 20 * i))
                value = share * (0.3 + near)
                profile.append((*place, stage, stimulus, "", distance, "eta2", value, np.nan, np.nan, n))
                if stimulus == "black":
                    reached = near if padding == "zeros" else 0.0
                    nothing = (*label, "", np.nan, np.nan, np.nan, stage, "", "", distance)
                    profile.append((*nothing, "reach", reached, np.nan, np.nan, 0))
        rows.append((*place, "all", stimulus, "", "eta2", 0.3 * base, np.nan, np.nan, n))
        for target in TARGETS:
            for distance in range(4, 112, 8):
                value = base * np.exp(-distance / 90)
                bounds = (value - 0.02, value + 0.02) if n > 1 else (np.nan, np.nan)
                profile.append((*label, *PAPERS, stimulus, target, distance, "spc", value, *bounds, n))
    for stage, share in REACH.items():
        value = share if padding == "zeros" else 0.0
        rows.append((*place, stage, "", "", "reach", value, np.nan, np.nan, 0))
    if not twin:
        ramp = np.linspace(0, 1, 8, dtype=np.float32)[None].repeat(8, 0)
        for stimulus in ("PASCAL-S", "black"):
            maps |= {f"{label[0]}/{stimulus}/{t}/{kind}": ramp for t in TARGETS for kind in ("prediction", "error")}
    tidy = pd.DataFrame(rows, columns=list(COLUMNS))
    return Results(tidy, profile=pd.DataFrame(profile, columns=list(PROFILE)), maps=maps)


@pytest.fixture(scope="module")
def results() -> Results:
    parts = [measured(padding) for padding in LEVEL]
    parts += [measured(padding, "untrained", seed) for padding in ("zeros", "valid+context") for seed in (0, 1, 2)]
    return Results.join(parts)


@pytest.fixture(scope="module")
def page(results, tmp_path_factory) -> Page:
    """The page of all that a probe can give."""
    return Page(write_report(results, tmp_path_factory.mktemp("full")))


def variants(page: Page, run: str) -> list[list[list[str]]]:
    """The lines of a run's table of readouts."""
    start = page.captions.index(f"{run} on PASCAL-S (n = 200)")
    return page.tables[start]


def test_the_headline_has_interval_selectivity_delta_and_both_gaps(page, results):
    row = page.row("vgg16-imagenet-zeros")
    # the measured delta, not .74 - .55
    first = row.index([".740", "[.736, .744]", "Δ +.123 [.119, .127]", "sel +.727 [.723, .731]"])
    gaps = [row for row in page.rows if row[0] == ["gap vgg16-imagenet"]]
    assert [(row[2], row[first]) for row in gaps] == [
        (["zeros-valid"], ["+.360"]),
        (["zeros-valid+context"], ["+.530"]),
    ]
    order = [row[0][0] for row in page.tables[0][1:] if row[0][0].startswith("vgg16-imagenet")]
    assert order == ["vgg16-imagenet-zeros", "vgg16-imagenet-valid", "vgg16-imagenet-valid+context"]
    assert page.row("vgg16-untrained-zeros")[first][:2] == [".550", ".540 … .560"]
    text = main_table(results)
    assert re.search(r"gap vgg16-imagenet +zeros-valid\+context +\+\.530 ", text)
    assert re.search(r"vgg16-imagenet-zeros +zeros +\.740 \+\.12 ", text)
    assert max(map(len, text.splitlines())) <= 100


def test_long_names_are_shortened_on_the_terminal_and_stay_different():
    named = {
        f"vgg16-{weights}-{padding}": measured(padding, weights)
        for weights in ("vgg16_imagenet_features", "untrained")
        for padding in LEVEL
    }
    lines = main_table(Results.join(named.values())).splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split("  ")[0] for line in lines[2:] if not line.startswith("gap")]
    assert len(set(names)) == len(named) + 1  # and RGB only


def test_only_the_headline_readout_and_its_rgb_control_stand_outside_the_comparison(page):
    names = [row[0][0] for row in page.tables[page.captions.index("Target H")][2:]]
    assert len(names) == len(set(names)) == len(LEVEL) + 2 + 1
    assert len(page.tables[0]) == 1 + len(LEVEL) + 2 + 3 + 1  # header, runs, twins, gaps, RGB


def test_every_readout_stands_in_the_comparison_with_the_papers_value_where_it_has_one(page):
    lines = {row[0][0]: row[1:] for row in variants(page, "vgg16-imagenet-zeros")[1:]}
    assert len(lines) == len([v for v in VARIANTS if v[4] != "rgb"]) + 1  # ridge gaps share a name
    for (readout, kernel, depth, padding, stages), more in VARIANTS.items():
        if stages != "rgb":
            row = {"readout": readout, "kernel_size": kernel, "depth": depth, "head_padding": padding, "stages": stages}
            shown = [cell[0] for cell in lines[readout_name(row)]]
            assert shown == [f"{0.74 + more - 0.1 * i:.3f}".replace("0.", ".") for i in range(len(TARGETS))]

    assert list(lines)[-4:] == [f"posenet 3x3, stages {s}" for s in ("f1", "f2", "f5", "f2+f4")]

    def paper(name: str) -> list[str]:
        return [next((line for line in cell if line.startswith("paper ")), "") for cell in lines[name]]

    assert paper("posenet 3x3") == ["paper .742", "paper .816", "paper .814", "paper .405", "paper .374"]
    assert paper("posenet 7x7") == ["paper .828", "", "paper .816", "paper .487", ""]
    assert paper("posenet 3x3, 2 layers") == ["paper .797", "", "paper .828", "paper .483", ""]
    assert paper("posenet 3x3, stages f2") == ["paper .344", "", "paper .404", "", ""]
    for name in ("ridge 3x3", "posenet 3x3, padded by 1", "posenet 3x3, stages f2+f4"):
        assert paper(name) == [""] * 5
    assert "paper MAE .556" in lines["posenet 3x3, paper scale"][3]
    assert not [line for line in lines["posenet 3x3"][3] if "MAE" in line]
    rgb = {row[0][0]: row[1:] for row in variants(page, tables.RGB)[1:]}
    assert "paper .397" in rgb["posenet 3x3, padded by 2"][0]
    assert "paper .060" in rgb["posenet 7x7"][0]
    assert not [c for row in variants(page, "vgg16-imagenet-valid")[1:] for c in row[1:] if "paper .828" in c]
    assert "vgg16-untrained-zeros on PASCAL-S (n = 200)" not in page.captions  # it is in delta


@pytest.mark.parametrize(
    "change",
    [
        {"readout": "ridge"},
        {"kernel_size": 5},
        {"kernel_size": 7, "depth": 2},
        {"kernel_size": 7, "stages": "f1"},
        {"depth": 2, "head_padding": 1},
        {"stages": "f6"},
        {"stages": "f1+f2"},
        {"head_padding": 1},
        {"depth": 2, "padding": "valid"},
        {"stages": "f1", "padding": "valid+context"},
        {"padding": "valid+context"},
        {"kernel_size": 7, "stimulus": "black"},
        {"kernel_size": 7, "encoder": "torchvision:resnet152"},
        {"kernel_size": 7, "weights": "untrained"},
        {"kernel_size": 7, "task": "SOD", "weights": "trained"},
    ],
)
def test_the_paper_has_no_value_for_what_it_did_not_measure(change):
    place = dict(zip(("readout", "kernel_size", "depth", "head_padding", "stages"), PAPERS, strict=True))
    place |= {"encoder": "torchvision:vgg16", "weights": "imagenet", "task": "", "padding": "zeros"}
    place |= {"stimulus": "PASCAL-S", "target": "H"}
    assert paper_cell(place) is not None
    assert paper_cell({**place, **change}) is None


def test_the_gap_of_ridge_is_positive_where_training_stopped_short(page):
    lines = variants(page, "vgg16-imagenet-zeros")
    gaps = [
        (lines[i - 1][0], row[1]) for i, row in enumerate(lines) if row[0][0].startswith("ridge") and "-" in row[0][0]
    ]
    assert gaps == [(["ridge 1x1"], ["+.070"]), (["ridge 3x3"], ["+.050"])]


def test_what_position_explains_stands_by_stage_with_what_the_padding_reaches(page):
    start = page.captions.index("η² on PASCAL-S (n = 200)")
    header, *lines = page.tables[start]
    assert header == [["run"], ["padding"], *([s] for s in (*STAGES, "all"))]
    by_run = {row[0][0]: [cell[0] for cell in row[2:]] for row in lines}
    expected = [(0.02 + 0.09 * i) * 0.74 for i in range(5)] + [0.3 * 0.74]
    assert by_run["vgg16-imagenet-zeros"] == [f"{v:.3f}".replace("0.", ".", 1) for v in expected]
    reached = [f"{v:.3f}".replace("0.", ".", 1) for v in REACH.values()]
    assert by_run["receptive field reaches the padding"][:5] == reached
    assert len(lines) == len(LEVEL) + 2 + 1


def test_variance_is_no_task_score_and_no_position(results, page):
    rows = tables.clean(results.rows)
    assert tables.task_table(rows).empty
    assert "" not in set(tables.position_table(rows)["target"])
    assert "variance" not in set(tables.position_table(rows)["readout"])
    assert not [heading for heading in page.headings if "task" in heading]
    assert "Task scores" not in main_table(results)
    assert "eta2" not in main_table(results)


def test_without_the_new_rows_no_new_section_or_word_appears(results, tmp_path):
    old = results.rows
    old = old[old["metric"].isin(["spc", "mae", "nmae", "constant"]) & (old["readout"] == "posenet")]
    old = old[(old["kernel_size"] == 3) & (old["depth"] == 1) & (old["head_padding"] == 0)]
    old = old[old["stages"].isin(["all", "rgb"]) & old["padding"].isin(["zeros", "valid"])]
    page = Page(write_report(Results(old), tmp_path))
    assert [heading.split(". ")[1] for heading in page.headings] == [
        "How much position each encoder holds",
        "Position by encoder and stimulus",
    ]
    assert not [word for word in ("sel +", "electivity", "context", "η²", "ridge") if word in page.text]
    row = page.row("vgg16-imagenet-zeros")
    assert "Δ +.190" in [line for cell in row for line in cell]  # joined: .74 less the twins' mean, .55


def test_where_position_is_known_is_drawn_from_the_profile_of_each_run(results):
    rows = tables.clean(results.rows)
    head = tables.headline(tables.position_table(rows))
    profile = tables.profile_table(results.profile, rows, head)
    assert set(profile["stimulus"]) == {"PASCAL-S", ""}
    drawn = figures.draw_spc_profile(profile)
    assert [axis.get_ylabel() for axis in drawn.axes] == ["SPC within the ring"] * 3
    lines = [line for line in drawn.axes[0].lines if len(line.get_xdata()) == 14]
    styles = {line.get_linestyle() for line in lines}
    assert len(lines) == len(LEVEL) + 2
    assert styles == {"-", "--", "-."}
    np.testing.assert_allclose(lines[0].get_ydata()[0], 0.74 * np.exp(-4 / 90))
    twin = next(line for line in lines if np.isclose(line.get_ydata()[0], 0.55 * np.exp(-4 / 90)))
    assert twin.get_linestyle() == "-"  # the mean of three seeds
    drawn = figures.draw_variance_profile(profile)
    shown = [axis for axis in drawn.axes if axis.lines]
    assert [axis.get_title() for axis in shown[:5]] == [f"stage {stage}" for stage in STAGES]
    assert [line.get_label() for line in shown[5].lines] == list(STAGES)
    assert len({axis.get_ylim() for axis in shown[:5]}) == 1


def test_maps_are_the_headline_readouts_alone(results):
    rows = tables.clean(results.rows)
    maps = figures.collect_maps(rows, results.maps)
    assert {key[3] for key in maps} == {"prediction", "error"}
    assert {key[0] for key in maps} == {f"vgg16-imagenet-{padding}" for padding in LEVEL}
    shared = rows.assign(run=rows["run"].str.replace("untrained", "imagenet"))
    of_one = {"vgg16-imagenet-valid"}  # the others share their name with a twin
    assert {key[0] for key in figures.collect_maps(shared, results.maps)} == of_one


def test_all_is_written_beside_the_page_and_reported_again(results, page, tmp_path):
    results.save(tmp_path)
    assert Page(write_report(Results.load(tmp_path), tmp_path)).text == page.text
    assert (page.folder / "profile.csv").read_text() == (tmp_path / "profile.csv").read_text()
    assert len(Results.load(tmp_path).profile) == len(results.profile)
