"""The report says what the results say, beside their controls, on one page that needs nothing else."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from padprobe.maps import position_maps
from padprobe.report import figures, main_table, tables, write_report
from padprobe.results import COLUMNS, TRAJECTORY, Results
from tests.report.conftest import TARGETS, Page, probed

STUDY = {  # run: (encoder, weights, task, padding, SPC of H on scenes)
    "untrained-zeros": ("smp:vgg11", "untrained", "untrained", "zeros", 0.51),
    "untrained-valid": ("smp:vgg11", "untrained", "untrained", "valid", 0.13),
    "sod-zeros": ("smp:vgg11", "trained", "SOD", "zeros", 0.93),
    "sod-valid": ("smp:vgg11", "trained", "SOD", "valid", 0.17),
    "ss-zeros": ("smp:vgg11", "trained", "SS", "zeros", 0.95),
    "ss-valid-p0": ("smp:vgg11", "trained", "SS", "valid", 0.05),
}


def scored(run, encoder, weights, task, padding, score, seed=0) -> Results:
    """One run's task score and what its training logged."""
    place = (run, encoder, weights, task, padding, seed, "", np.nan, np.nan, np.nan, "")
    rows = [(*place, "scenes, position dependence 1", "", "max F-measure", score, np.nan, np.nan, 40)]
    logged = [
        (run, task, padding, step, target, metric, 0.1 * step)
        for step in (1, 2)
        for target, metric in (("H", "spc"), ("H", "mae"), ("", "max F-measure"))
    ]
    return Results(pd.DataFrame(rows, columns=list(COLUMNS)), pd.DataFrame(logged, columns=list(TRAJECTORY)))


@pytest.fixture(scope="module")
def study() -> Results:
    parts = [probed(run, *cell) for run, cell in STUDY.items()]
    parts += [scored("sod-zeros", *STUDY["sod-zeros"][:4], 0.81), scored("sod-valid", *STUDY["sod-valid"][:4], 0.62)]
    return Results.join(parts)


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> Page:
    """The study's page."""
    return Page(write_report(study, tmp_path_factory.mktemp("study")))


def test_the_page_needs_nothing_but_itself(page):
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import", page.text)
    outside = [link for link in page.links if not link.startswith("data:image/png;base64,")]
    assert outside == ["https://arxiv.org/abs/2001.08248"]
    assert page.tags.count("img") == 3


def test_every_run_and_number_of_the_main_table_is_on_the_page_and_on_the_terminal(study, page):
    text = main_table(study)
    markdown = (page.folder / "report.md").read_text()
    for run, (*_, spc) in STUDY.items():
        cells = [line for cell in page.row(run) for line in cell]
        line = next(line for line in text.splitlines() if line.startswith(run + " "))
        for i in range(len(TARGETS)):
            shown = f"{spc - 0.001 * i:.3f}".removeprefix("0")
            assert shown in cells
            assert shown in line
            assert shown in next(line for line in markdown.splitlines() if line.startswith(f"| {run} |"))
    assert ".020" in [line for cell in page.row(tables.RGB) for line in cell]
    assert "RGB only" in text
    assert max(map(len, text.splitlines())) <= 100


def test_delta_is_against_the_untrained_encoder_of_the_same_padding_and_architecture(study, tmp_path):
    other = probed("other-untrained-zeros", "smp:vgg13", "untrained", "untrained", "zeros", 0.3)
    more = Results.join([study, other, probed("other-ss-valid", "smp:vgg13", "trained", "SS", "valid", 0.4)])
    page = Page(write_report(Results(more.rows), tmp_path))
    h = page.rows[0].index(["H"])
    assert page.row("sod-zeros")[h][-1] == "Δ +.420"
    assert page.row("sod-valid")[h][-1] == "Δ +.040"
    assert page.row("ss-valid-p0")[h][-1] == "Δ -.080"
    for run in ("untrained-zeros", "untrained-valid", "other-untrained-zeros", "other-ss-valid"):
        assert not [line for line in page.row(run)[h] if "Δ" in line]
    assert ".930 +.42" in main_table(more)
    fewer = more.rows.copy()
    fewer.loc[fewer["run"].eq("untrained-zeros") & fewer["n"].gt(1), "n"] = 20
    assert "Δ" not in str(Page(write_report(Results(fewer), tmp_path)).row("sod-zeros")[h])


def test_the_gap_is_padded_minus_unpadded_of_runs_that_differ_by_padding_alone(page):
    h = page.rows[0].index(["H"])
    assert page.row("gap sod")[h] == ["+.760"]
    assert page.row("gap untrained")[h] == ["+.380"]
    assert not [row for row in page.rows if row[0][:1] and row[0][0].startswith("gap ss")]  # ss-zeros, ss-valid-p0


def test_runs_whose_names_do_not_say_the_padding_are_paired_where_there_is_no_doubt():
    a = probed("a", "torchvision:vgg16", "IMAGENET1K_V1", "", "zeros", 0.8)
    b = probed("b", "torchvision:vgg16", "IMAGENET1K_V1", "", "valid", 0.3)
    c = probed("c", "torchvision:vgg16", "IMAGENET1K_V1", "", "valid", 0.2)
    assert "gap a" in main_table(Results.join([a, b]))
    assert "gap" not in main_table(Results.join([a, b, c]))


def test_task_scores_stand_padded_beside_unpadded_and_the_papers_beside_them(page):
    data = "scenes, position dependence 1"
    assert ["".join(cell) for cell in page.row("sod")] == ["sod", "SOD", data, "max F-measure", ".810", ".620", "+.190"]
    assert [["SOD"], ["ECSSD"], ["F-measure"], [".78"], [".36"], ["+.42"]] in page.rows
    assert not [row for row in page.rows if row[0] == ["SS"]]  # no SS score of ours to set the paper's beside


def test_sections_come_in_order_and_those_without_data_are_left_out(page, tmp_path):
    whole = page.headings
    assert whole == [
        "1. How much position each encoder holds",
        "2. What padding does to the task",
        "3. Position by encoder and stimulus",
        "4. Position during training",
        "5. Predicted maps beside their targets",
        "6. Content loss",
    ]
    single = probed("vgg11", "smp:vgg11", "trained", "SS", "zeros", 0.9)
    single.maps = {}
    small = Page(write_report(single, tmp_path / "single"))
    assert [h.split(". ")[1] for h in small.headings] == [whole[0].split(". ")[1], whole[2].split(". ")[1]]
    assert "img" not in small.tags
    assert "Δ is missing" in small.text
    assert not [line for row in small.rows for cell in row for line in cell if "Δ" in line]
    assert "![" not in (tmp_path / "single" / "report.md").read_text()
    tasks_only = scored("sod-zeros", *STUDY["sod-zeros"][:4], 0.81)
    assert len(Page(write_report(tasks_only, tmp_path / "task")).headings) == 2
    assert ".810" in main_table(tasks_only)


def test_the_papers_value_stands_beside_the_run_that_it_describes(tmp_path):
    def network(run, encoder, weights, task, padding):
        return probed(run, encoder, weights, task, padding, 0.7, stimuli=("PASCAL-S", "black"))

    runs = [
        network("vgg16-zeros", "torchvision:vgg16", "data/vgg16.pth", "", "zeros"),
        network("vgg16-valid", "torchvision:vgg16", "IMAGENET1K_V1", "classification", "valid"),
        network("untrained-zeros", "torchvision:vgg16", "untrained", "", "zeros"),
        network("bn-zeros", "torchvision:vgg16_bn", "IMAGENET1K_V1", "", "zeros"),
        network("sod-zeros", "smp:vgg11", "trained", "SOD", "zeros"),
        network("sod-valid", "smp:vgg11", "trained", "SOD", "valid"),
    ]
    page = Page(write_report(Results(Results.join(runs).rows), tmp_path))

    def paper(run, target):
        return [line for cell in page.row(run, 1 + TARGETS.index(target)) for line in cell if line.startswith("paper ")]

    assert paper("vgg16-zeros", "H") == ["paper .742", "paper .149", "paper .751", "paper .164"]
    assert paper("vgg16-zeros", "HS") == ["paper .405", "paper .532"]  # its MAE is on another scale
    assert paper("vgg16-valid", "H") == ["paper .381", "paper .223"]
    assert paper("vgg16-valid", "V") == []
    assert paper("sod-zeros", "G") == ["paper .948", "paper .067", "paper .904", "paper .086"]
    assert ["VGG-SOD (VGG16, real data)"] in page.row("sod-zeros", 1)
    assert paper(tables.RGB, "V") == ["paper .131", "paper .248", "paper .000", "paper .251"]
    for run in ("untrained-zeros", "bn-zeros", "sod-valid"):
        assert paper(run, "H") == []


def test_intervals_and_constant_predictions_stand_under_the_value(page):
    assert [".930", "[.920, .940]"] in page.row("sod-zeros", 1)
    assert [".170"] in page.row("sod-valid", 1)  # one black image has no interval
    assert [".020", "[.010, .030]", "7 of 40 constant"] in page.row(tables.RGB, 1)


def test_seeds_are_averaged_with_their_range_whether_or_not_the_name_has_the_seed(tmp_path):
    cell = ("smp:vgg11", "trained", "SS", "zeros")
    named = [probed(f"ss-zeros-seed{s}", *cell, 0.8 + 0.1 * s, seed=s) for s in (0, 1)]
    unnamed = [probed("ss-zeros", *cell, 0.8 + 0.1 * s, seed=s) for s in (0, 1)]
    for name, parts in (("named", named), ("unnamed", unnamed)):
        page = Page(write_report(Results(Results.join(parts).rows), tmp_path / name))
        assert [".850", ".800 … .900"] in page.row("ss-zeros")
    assert "ss-zeros-seed1" in main_table(named[1])


def test_trained_and_untrained_results_under_one_name_are_told_apart():
    trained = probed("vgg16-zeros", "torchvision:vgg16", "a/imagenet.pth", "", "zeros", 0.8)
    untrained = probed("vgg16-zeros", "torchvision:vgg16", "untrained", "", "zeros", 0.5)
    text = main_table(Results.join([trained, untrained]))
    assert re.search(r"vgg16-zeros \(imagenet.pth\) +zeros +\.800 \+\.30", text)
    assert re.search(r"vgg16-zeros \(untrained\) +zeros +\.500 ", text)


def test_the_headline_is_on_natural_images_where_there_are_any():
    cell = ("smp:vgg11", "trained", "SS", "zeros")
    assert main_table(probed("x", *cell, 0.5)).startswith("SPC on scenes")
    assert main_table(probed("x", *cell, 0.5, stimuli=("black",))).startswith("SPC on black")


def test_maps_stand_beside_their_targets_and_content_loss_is_the_mean_error_on_one_scale(study):
    maps = figures.collect_maps(tables.clean(study.rows), study.maps)
    drawn = figures.draw_maps(maps, [("untrained-zeros", "scenes"), ("sod-zeros", "scenes")])
    tiles = [axis for axis in drawn.axes if axis.images]
    for i, target in enumerate(TARGETS):
        shown = [np.asarray(axis.images[0].get_array()) for axis in tiles[3 * i : 3 * i + 3]]
        np.testing.assert_array_equal(shown[0], position_maps(8, [target])[0])
        np.testing.assert_array_equal(shown[2], study.maps[f"sod-zeros/scenes/{target}/prediction"])
    drawn = figures.draw_content_loss(maps)
    tiles = [axis.images[0] for axis in drawn.axes if axis.images]
    assert len(tiles) == 2 * len(STUDY)
    assert len({image.get_clim() for image in tiles}) == 1
    expected = np.mean([study.maps[f"untrained-zeros/black/{t}/error"] for t in "HVG"], axis=0)
    np.testing.assert_allclose(tiles[0].get_array(), expected)


def test_trajectories_are_solid_with_padding_and_dashed_without_in_one_colour_a_task(study):
    table = tables.trajectory_table(study.trajectory, tables.clean(study.rows))
    panels = [axis for axis in figures.draw_trajectory(table).axes if axis.lines]
    assert [panel.get_ylabel() for panel in panels] == ["SPC", "max F-measure"]
    zeros, valid = [line for line in panels[0].lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 1]
    assert (zeros.get_linestyle(), valid.get_linestyle()) == ("-", "--")
    assert zeros.get_color() == valid.get_color()


def test_trajectories_are_a_table_of_spc_beside_the_tasks_metric(study, tmp_path):
    """Of a long training eight steps, the first and the last among them; the small readout's gain in small print."""
    long = [("sod-zeros", "SOD", "zeros", step, "H", "spc", step / 1000) for step in range(0, 1000, 10)]
    long += [
        ("sod-zeros", "SOD", "zeros", 990, "H", "delta", 0.125),
        ("sod-zeros", "SOD", "zeros", 990, "", "mIoU", 0.5),
    ]
    study.trajectory = pd.DataFrame(long, columns=list(TRAJECTORY))
    page = Page(write_report(study, tmp_path))
    [lines] = [t for t, caption in zip(page.tables, page.captions, strict=True) if "over training steps" in caption]
    assert lines[0] == [["run"], ["padding"], ["step"], ["H"], ["mIoU"]]
    assert len(lines) == 9
    assert lines[1][2:4] == [["0"], [".000"]]
    assert lines[-1][2:] == [["990"], [".990", "+.12"], [".500"]]


def test_the_numbers_are_written_beside_the_page_and_can_be_reported_again(tmp_path):
    cell = STUDY["sod-zeros"]
    study = Results.join([probed("sod-zeros", *cell), scored("sod-zeros", *cell[:4], 0.8)])
    study.save(tmp_path)
    first = write_report(Results.load(tmp_path), tmp_path).read_text()
    loaded = Results.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.rows, study.rows, check_dtype=False)
    assert write_report(loaded, tmp_path).read_text() == first
    assert {"results.csv", "trajectory.csv", "report.md", "figures"} <= {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        re.search(r"figures/(\S+?)\)", line)[1]
        for line in (tmp_path / "report.md").read_text().splitlines()
        if line.startswith("![")
    }


def test_names_from_outside_are_text_and_nothing_else(tmp_path):
    page = write_report(probed("<script>a|b", "smp:vgg11", "trained", "SS", "zeros", 0.5), tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;a|b" in page
    assert "| <script>a\\|b |" in (tmp_path / "report.md").read_text()


def test_nothing_measured_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match="no measurement"):
        write_report(Results(), tmp_path)
