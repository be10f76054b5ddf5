"""Readouts side by side, their controls and what needs no readout: the page says what was measured, and no more."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from padprobe.report import figures, main_table, write_report
from padprobe.report.contents import readout_name
from padprobe.report.measurements import headline, measurements, profile_table
from padprobe.results import COLUMNS, PROFILE, Results
from tests.report.conftest import Page, run_row

TARGETS = ("H", "V", "G", "HS", "VS")
LEVEL = {"zeros": 0.74, "valid": 0.38, "context": 0.21}
PAPERS = ("posenet", 3, 1, 0, "unit", "all")
RIDGE = ("ridge", 3, 1, 0, "unit", "all")
ON_SCENES = "H (n = 200)"
VARIANTS = {  # (readout, kernel, depth, head padding, scale, stages): what it adds to the headline's SPC
    PAPERS: 0.0,
    ("posenet", 3, 1, 0, "paper", "all"): 0.01,
    ("posenet", 1, 1, 0, "unit", "all"): -0.18,
    ("ridge", 1, 1, 0, "unit", "all"): -0.11,
    RIDGE: 0.05,
    ("posenet", 7, 1, 0, "unit", "all"): 0.08,
    ("posenet", 3, 2, 0, "unit", "all"): 0.06,
    ("posenet", 3, 1, 1, "unit", "all"): 0.02,
    ("posenet", 3, 1, 0, "unit", "f1"): -0.39,
    ("posenet", 3, 1, 0, "unit", "f2"): -0.35,
    ("posenet", 3, 1, 0, "unit", "f5"): -0.08,
    ("posenet", 3, 1, 0, "unit", "f2+f4"): -0.15,
    ("posenet", 3, 1, 0, "unit", "rgb"): -0.7,
    ("posenet", 3, 1, 2, "unit", "rgb"): -0.3,
    ("posenet", 7, 1, 0, "unit", "rgb"): -0.65,
}
STAGES = ("f1", "f2", "f3", "f4", "f5")
REACH = dict(zip(STAGES, (0.035, 0.104, 0.325, 0.673, 0.98), strict=True))


def measured(padding: str, weights: str = "imagenet", seed: int = 0) -> Results:
    """What one `padprobe probe` gives of one encoder; a twin (untrained) scores .2 less and has two readouts."""
    twin = weights == "untrained"
    run, group = (f"vgg16-{weights}-{padding}" + f"-seed{seed}" * twin, f"vgg16-{weights}-{padding}")
    mode = "valid" if padding == "context" else padding
    label = (run, "torchvision:vgg16", weights, "untrained" if twin else "", mode, seed)
    base = LEVEL[padding] - 0.2 * twin + 0.01 * seed
    rows, profile, maps = [], [], {}
    for stimulus, n in (("PASCAL-S", 200), ("black", 1)):
        for readout, more in VARIANTS.items():
            if twin and readout not in (PAPERS, RIDGE):
                continue
            for i, target in enumerate(TARGETS):
                spc = base + more - 0.1 * i - 0.1 * (n == 1)
                values = {"spc": spc, "mae": 0.25 - spc / 8, "nmae": 1 - spc / 2, "constant": 0.0}
                values |= {"selectivity": spc - 0.013} | ({} if twin or readout[5] == "rgb" else {"delta": 0.123})
                for metric, value in values.items():
                    width = 0.004 if n > 1 and metric != "constant" else np.nan
                    rows.append((*label, *readout, stimulus, target, metric, value, value - width, value + width, n))
        for i, stage in enumerate(STAGES):
            place = (*label, "variance", np.nan, np.nan, np.nan, "")
            share = (0.02 + 0.09 * i) * base
            rows.append((*place, stage, stimulus, "", "eta2", share, np.nan, np.nan, n))
            maps[f"{label[0]}/{stimulus}/{stage}/eta2"] = np.full((28, 28), share, np.float32)
            for distance in range(4, 112, 8):
                near = np.exp(-distance / (8 + 20 * i))
                value = share * (0.3 + near)
                profile.append((run, seed, *place[6:], stage, stimulus, "", distance, "eta2", value, np.nan, np.nan, n))
                if stimulus == "black":
                    reached = near if padding == "zeros" else 0.0
                    nothing = (run, seed, "", np.nan, np.nan, np.nan, "", stage, "", "", distance)
                    profile.append((*nothing, "reach", reached, np.nan, np.nan, 0))
        rows.append((*place, "all", stimulus, "", "eta2", 0.3 * base, np.nan, np.nan, n))
        for target in TARGETS:
            for distance in range(4, 112, 8):
                value = base * np.exp(-distance / 90)
                bounds = (value - 0.02, value + 0.02) if n > 1 else (np.nan, np.nan)
                profile.append((run, seed, *PAPERS, stimulus, target, distance, "spc", value, *bounds, n))
    for stage, share in REACH.items():
        value = share if padding == "zeros" else 0.0
        rows.append((*place, stage, "", "", "reach", value, np.nan, np.nan, 0))
    if not twin:
        ramp = np.linspace(0, 1, 8, dtype=np.float32)[None].repeat(8, 0)
        for stimulus in ("PASCAL-S", "black"):
            maps |= {f"{label[0]}/{stimulus}/{t}/{kind}": ramp for t in TARGETS for kind in ("prediction", "error")}
    tidy = pd.DataFrame(rows, columns=list(COLUMNS))
    pair = f"vgg16-{weights}"
    runs = run_row(*label, group=group, pair=pair, shown_px=404 if padding == "context" else 96)
    return Results(tidy, runs=runs, profile=pd.DataFrame(profile, columns=list(PROFILE)), maps=maps)


@pytest.fixture(scope="module")
def results() -> Results:
    parts = [measured(padding) for padding in LEVEL]
    parts += [measured(padding, "untrained", seed) for padding in ("zeros", "context") for seed in (0, 1, 2)]
    return Results.join(parts)


@pytest.fixture(scope="module")
def page(results, tmp_path_factory) -> Page:
    """The page of all that a probe can give."""
    return Page(write_report(results, tmp_path_factory.mktemp("full")))


def variants(page: Page, run: str) -> list[list[list[str]]]:
    """The lines of a run's table of readouts."""
    start = page.captions.index(f"{run} on PASCAL-S")
    return page.tables[start]


def test_the_headline_has_interval_selectivity_delta_and_both_gaps(page, results):
    h = page.rows[0].index([ON_SCENES])
    row = page.row("vgg16-imagenet-zeros")
    # the measured delta, not .74 - .55
    assert row[h] == [".740", "[.736, .744]", "Δ +.12 [.12, .13]", "sel +.73 [.72, .73]"]
    assert page.row("gap vgg16-imagenet: zeros - valid")[h][0] == "+.360"
    assert page.row("gap vgg16-imagenet: zeros - valid + context")[h][0] == "+.530"
    order = [row[0][0] for row in page.tables[0][1:] if row[0][0].startswith("vgg16-imagenet")]
    assert order == ["vgg16-imagenet-zeros", "vgg16-imagenet-valid", "vgg16-imagenet-context (valid + context)"]
    assert page.row("vgg16-untrained-zeros")[h][:2] == [".550", ".540 … .560"]
    text = main_table(results)
    assert re.search(r"gap vgg16-imagenet: zeros - valid \+ context +\+\.530 ", text)
    assert re.search(r"vgg16-imagenet-zeros +\.740 \+\.12 ", text)
    assert max(map(len, text.splitlines())) <= 100


def test_long_names_are_shortened_on_the_terminal_and_stay_different():
    parts = [measured(padding, w) for w in ("vgg16_imagenet_features" * 3, "untrained") for padding in LEVEL]
    lines = main_table(Results.join(parts)).splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split("  ")[0] for line in lines[2:] if not line.startswith("gap")]
    assert len(set(names)) == len(parts) + 1  # and the image alone


def test_only_the_headline_readout_and_its_control_stand_outside_the_comparison(page):
    names = [row[1][0] for row in page.tables[2][1:] if row[0] == ["H"]]
    assert len(names) == len(set(names)) == len(LEVEL) + 2 + 1
    assert len(page.tables[0]) == 1 + len(LEVEL) + 2 + 3 + 1  # header, runs, twins, gaps, the image alone


def test_every_readout_stands_in_the_comparison(page):
    lines = {row[0][0]: row[1:] for row in variants(page, "vgg16-imagenet-zeros")[1:]}
    assert len(lines) == len(VARIANTS) + 1  # ridge gaps share a name
    for readout, more in VARIANTS.items():
        row = dict(zip(("readout", "kernel_size", "depth", "head_padding", "scale", "stages"), readout, strict=True))
        shown = [cell[0] for cell in lines[readout_name(row)]]
        assert shown == [f"{0.74 + more - 0.1 * i:.3f}".replace("0.", ".") for i in range(len(TARGETS))]
    names = [name for name in lines if "alone" not in name]
    assert names[-4:] == [f"posenet 3x3, stages {s}" for s in ("f1", "f2", "f5", "f2+f4")]
    assert "vgg16-untrained-zeros on PASCAL-S" not in page.captions  # it is in delta


def test_the_gap_of_ridge_is_positive_where_training_stopped_short(page):
    lines = variants(page, "vgg16-imagenet-zeros")
    gaps = [(lines[i - 1][0], row[1][:1]) for i, row in enumerate(lines) if row[0] == ["ridge - posenet"]]
    assert gaps == [(["ridge 1x1"], ["+.070"]), (["ridge 3x3"], ["+.050"])]


def test_what_position_explains_stands_by_stage_with_what_the_padding_reaches(page):
    start = page.captions.index("η² on PASCAL-S")
    header, *lines = page.tables[start]
    assert header == [["run"], *([f"{s} (n = 200)"] for s in (*STAGES, "all"))]
    by_run = {row[0][0]: [cell[0] for cell in row[1:]] for row in lines}
    expected = [(0.02 + 0.09 * i) * 0.74 for i in range(5)] + [0.3 * 0.74]
    assert by_run["vgg16-imagenet-zeros"] == [f"{v:.3f}".replace("0.", ".", 1) for v in expected]
    reached = [f"{v:.3f}".replace("0.", ".", 1) for v in REACH.values()]
    assert by_run["receptive field reaches the padding (vgg16-imagenet-zeros)"][:5] == reached
    assert len(lines) == len(LEVEL) + 2 + 1


def test_variance_is_no_task_score_and_no_position(results, page):
    assert not [heading for heading in page.headings if "task" in heading]
    assert set(headline(measurements(results))["readout"]) == {"posenet"}
    assert "Task scores" not in main_table(results)
    assert "eta2" not in main_table(results)


def test_without_the_new_rows_no_new_section_or_word_appears(results, tmp_path):
    old = results.rows
    old = old[old["metric"].isin(["spc", "mae", "nmae", "constant"]) & (old["readout"] == "posenet")]
    old = old[(old["kernel_size"] == 3) & (old["depth"] == 1) & (old["head_padding"] == 0) & (old["scale"] == "unit")]
    old = old[old["stages"].isin(["all", "rgb"]) & ~old["run"].str.contains("context")]
    runs = results.runs[results.runs["run"].isin(old["run"])].assign(how="")
    page = Page(write_report(Results(old, runs=runs), tmp_path))
    assert [heading.split(". ")[1] for heading in page.headings] == [
        "How much position each encoder holds",
        "Where it comes from",
        "Position by encoder and stimulus",
    ]
    assert not [word for word in ("sel +", "context", "η²", "ridge") if word in page.text]
    row = page.row("vgg16-imagenet-zeros")
    # joined: .74 less the twins' mean, .55; their standard deviation is .01
    assert "Δ +.19 [.14, .24]" in [line for cell in row for line in cell]


def test_where_position_is_known_is_drawn_from_the_profile_of_each_run(results):
    profile = profile_table(results, headline(measurements(results)))
    assert set(profile["stimulus"]) == {"PASCAL-S", ""}
    drawn = figures.draw_spc_profile(profile)
    assert [axis.get_ylabel() for axis in drawn.axes] == ["SPC within the ring"] * 3
    lines = [line for line in drawn.axes[0].lines if len(line.get_xdata()) == 14]
    assert len(lines) == len(LEVEL) + 2
    assert {line.get_linestyle() for line in lines} == {"-", "--", "-."}
    first = [line for line in lines if np.isclose(line.get_ydata()[0], 0.74 * np.exp(-4 / 90))]
    twin = [line for line in lines if np.isclose(line.get_ydata()[0], 0.55 * np.exp(-4 / 90))]  # mean of three seeds
    assert [line.get_linestyle() for line in (*first, *twin)] == ["-", "-"]
    drawn = figures.draw_variance_profile(profile)
    shown = [axis for axis in drawn.axes if axis.lines]
    assert [axis.get_title() for axis in shown] == [f"stage {stage}" for stage in STAGES]
    [reach] = figures.draw_reach(profile).axes
    assert reach.get_title() == "vgg16-imagenet-zeros"
    assert len([line for line in reach.lines if len(line.get_xdata()) == 14]) == len(STAGES)


def test_maps_are_the_headline_readouts_alone(results):
    maps = figures.collect_maps(results)
    assert {key[3] for key in maps} == {"prediction", "error"}
    assert {key[0] for key in maps} == {f"vgg16-imagenet-{padding}" for padding in LEVEL}
    shared = results.rows.assign(
        run=results.rows["run"].str.replace(r"untrained-(\w+)-seed0", r"imagenet-\1", regex=True)
    )
    left = figures.collect_maps(Results(shared, maps=results.maps))
    assert {key[0] for key in left} == {"vgg16-imagenet-valid"}  # the others share their name with a twin


def test_all_is_written_beside_the_page_and_reported_again(results, page, tmp_path):
    results.save(tmp_path)
    assert Page(write_report(Results.load(tmp_path), tmp_path)).text == page.text
    assert (page.folder / "profile.csv").read_text() == (tmp_path / "profile.csv").read_text()
    assert len(Results.load(tmp_path).profile) == len(results.profile)
