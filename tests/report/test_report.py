"""The report says what the results say, beside their controls, on one page that needs nothing else."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from padprobe.maps import position_maps
from padprobe.report import figures, main_table, write_report
from padprobe.report.contents import source_sections
from padprobe.report.measurements import headline, measurements, trajectory_table
from padprobe.results import COLUMNS, TRAJECTORY, Results
from tests.report.conftest import TARGETS, Page, probed, run_row

ALONE = "the image alone (of untrained-zeros)"
STUDY = {  # run: (encoder, weights, task, padding, SPC of H on scenes)
    "untrained-zeros": ("smp:vgg11", "untrained", "untrained", "zeros", 0.51),
    "untrained-valid": ("smp:vgg11", "untrained", "untrained", "valid", 0.13),
    "sod-zeros": ("smp:vgg11", "trained", "SOD", "zeros", 0.93),
    "sod-valid": ("smp:vgg11", "trained", "SOD", "valid", 0.17),
    "ss-zeros": ("smp:vgg11", "trained", "SS", "zeros", 0.95),
    "ss-valid-p0": ("smp:vgg11", "trained", "SS", "valid", 0.05),
}


def scored(run, encoder, weights, task, padding, score, seed=0) -> Results:
    """One run's task score, a prediction's from position alone, and what its training logged."""
    place = (run, encoder, weights, task, padding, seed, "", np.nan, np.nan, np.nan, "")
    what = ("scenes, position dependence 1", "", "max F-measure")
    rows = [(*place, "", *what, score, np.nan, np.nan, 40), (*place, "position alone", *what, 0.07, np.nan, np.nan, 40)]
    logged = [
        (run, step, target, metric, 0.1 * step)
        for step in (1, 2)
        for target, metric in (("H", "spc"), ("H", "mae"), ("", "max F-measure"))
    ]
    runs = run_row(run, encoder, weights, task, padding, seed, pair=PAIRS.get(run))
    tables = pd.DataFrame(rows, columns=list(COLUMNS)), pd.DataFrame(logged, columns=list(TRAJECTORY))
    return Results(tables[0], runs=runs, trajectory=tables[1])


PAIRS = {run: run.replace("-zeros", "").replace("-valid", "") for run in STUDY}


@pytest.fixture(scope="module")
def study() -> Results:
    parts = [probed(run, *cell, pair=PAIRS[run]) for run, cell in STUDY.items()]
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
    assert outside == []
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
    assert ".020" in [line for cell in page.row(ALONE) for line in cell]
    assert ALONE in text
    assert max(map(len, text.splitlines())) <= 100


def test_delta_is_against_the_untrained_encoder_of_the_same_padding_and_architecture(study, tmp_path):
    other = probed("other-untrained-zeros", "smp:vgg13", "untrained", "untrained", "zeros", 0.3)
    more = Results.join([study, other, probed("other-ss-valid", "smp:vgg13", "trained", "SS", "valid", 0.4)])
    page = Page(write_report(Results(more.rows, runs=more.runs), tmp_path))
    h = page.rows[0].index(["H (n = 40)"])
    assert page.row("sod-zeros (smp:vgg11)")[h][-1] == "Δ +.42"  # one twin: no interval
    assert page.row("sod-valid (smp:vgg11)")[h][-1] == "Δ +.04"
    assert page.row("ss-valid-p0 (smp:vgg11)")[h][-1] == "Δ -.08"
    names = ["untrained-zeros (smp:vgg11)", "untrained-valid (smp:vgg11)", "other-untrained-zeros (smp:vgg13)"]
    for run in (*names, "other-ss-valid (smp:vgg13)"):
        assert not [line for line in page.row(run)[h] if "Δ" in line]
    assert ".930 +.42" in main_table(more)
    fewer = more.rows.copy()
    fewer.loc[fewer["run"].eq("untrained-zeros") & fewer["n"].gt(1), "n"] = 20
    assert "Δ" not in str(Page(write_report(Results(fewer, runs=more.runs), tmp_path)).row("sod-zeros (smp:vgg11)")[h])


def test_the_gap_is_padded_minus_unpadded_of_a_pair_with_its_interval(page):
    h = page.rows[0].index(["H (n = 40)"])
    assert page.row("gap sod: zeros - valid")[h] == ["+.760", "[.746, .774]"]
    assert page.row("gap untrained: zeros - valid")[h] == ["+.380", "[.366, .394]"]
    assert not [row for row in page.rows if row[0][:1] and row[0][0].startswith("gap ss")]  # ss-zeros, ss-valid-p0


@pytest.mark.parametrize("column", ["source_px", "source_width"])
def test_a_pair_is_what_the_runs_state_and_not_what_their_names_say(column):
    cell = ("torchvision:vgg16", "IMAGENET1K_V1", "")
    a, b, c = (probed(run, *cell, "zeros" if run == "a" else "valid", 0.5, pair="x") for run in "abc")
    assert "gap x: zeros - valid" in main_table(Results.join([a, b]))
    same = [probed(f"net-{padding}", *cell, padding, 0.5) for padding in ("zeros", "valid")]
    assert "gap" not in main_table(Results.join(same))
    a.runs[column] = 128  # other images than the unpadded run's
    assert "gap" not in main_table(Results.join([a, b]))
    assert main_table(Results.join([c, b])).count("gap") == 0


def test_task_scores_stand_padded_beside_unpadded_with_those_of_position_alone(page):
    data = "scenes, position dependence 1"
    rows = [["".join(cell) for cell in row] for row in page.rows if row[0] == [data]]
    assert rows == [
        [data, "max F-measure", "sod", ".810", ".620", "+.190"],
        [data, "max F-measure", "sod, position alone", ".070", ".070", "+.000"],
    ]


def test_sections_come_in_order_and_those_without_data_are_left_out(page, tmp_path):
    whole = page.headings
    assert whole == [
        "1. How much position each encoder holds",
        "2. Where it comes from",
        "3. Position by encoder and stimulus",
        "4. What padding does to the task",
        "5. Position during training",
        "6. Predicted maps beside their targets",
        "7. Content loss",
        "8. How each run was made",
    ]
    single = probed("vgg11", "smp:vgg11", "trained", "SS", "zeros", 0.9)
    single.maps = {}
    small = Page(write_report(single, tmp_path / "single"))
    assert [h.split(". ")[1] for h in small.headings] == [whole[i].split(". ")[1] for i in (0, 1, 2, 7)]
    assert "img" not in small.tags
    assert "Δ is missing" in small.text
    assert not [line for row in small.rows for cell in row for line in cell if "Δ" in line]
    assert "![" not in (tmp_path / "single" / "report.md").read_text()
    tasks_only = scored("sod-zeros", *STUDY["sod-zeros"][:4], 0.81)
    assert len(Page(write_report(tasks_only, tmp_path / "task")).headings) == 3
    assert ".810" in main_table(tasks_only)


def test_intervals_and_constant_predictions_stand_under_the_value(page):
    cells = [cell for row in page.rows if row[:2] == [["H"], ["sod-zeros"]] for cell in row]
    assert cells[3][:2] == [".930", "[.920, .940]"]
    assert cells[2][:2] == [".930", "MAE .017"]  # one black image has no interval
    cells = [cell for row in page.rows if row[:2] == [["H"], [ALONE]] for cell in row]
    assert cells[3] == [".020", "[.010, .030]", "MAE .245", "nMAE .980", "7 of 40 constant"]


def test_seeds_are_averaged_under_their_groups_name_with_their_range(tmp_path):
    cell = ("smp:vgg11", "trained", "SS", "zeros")
    parts = [probed(f"ss-{s}", *cell, 0.8 + 0.1 * s, seed=s, group="ss") for s in (0, 1)]
    page = Page(write_report(Results.join(parts), tmp_path))
    assert [".850", ".800 … .900"] in page.row("ss")
    assert "ss-1" not in [row[0][0] for table in page.tables[:2] for row in table]
    alike = [probed(f"ss-seed{s}", *cell, 0.8 + 0.1 * s, seed=s) for s in (0, 1)]
    assert "ss-seed1" in main_table(Results.join(alike))  # a name is no group


def test_trained_and_untrained_results_under_one_name_are_told_apart():
    trained = probed("vgg16-zeros", "torchvision:vgg16", "a/imagenet.pth", "", "zeros", 0.8)
    untrained = probed("vgg16-zeros", "torchvision:vgg16", "untrained", "", "zeros", 0.5)
    text = main_table(Results.join([trained, untrained]))
    assert re.search(r"vgg16-zeros \(imagenet.pth\) +\.800 \+\.30", text)
    assert re.search(r"vgg16-zeros \(untrained\) +\.500 ", text)


def test_the_headline_is_on_natural_images_where_there_are_any():
    cell = ("smp:vgg11", "trained", "SS", "zeros")
    assert "on scenes" in main_table(probed("x", *cell, 0.5)).splitlines()[0]
    assert "on black" in main_table(probed("x", *cell, 0.5, stimuli=("black",))).splitlines()[0]


def test_maps_stand_beside_their_targets_and_content_loss_is_the_mean_error_on_one_scale(study):
    maps = figures.collect_maps(study)
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


def test_trajectories_are_solid_with_padding_and_dashed_without_in_one_colour_per_pair(study):
    panels = [axis for axis in figures.draw_trajectory(trajectory_table(study)).axes if len(axis.lines) > 1]
    assert [panel.get_ylabel() for panel in panels] == ["SPC", "max F-measure"]
    zeros, valid = [line for line in panels[0].lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 1]
    assert (zeros.get_linestyle(), valid.get_linestyle()) == ("-", "--")
    assert zeros.get_color() == valid.get_color()


def test_trajectories_are_a_table_of_spc_beside_the_tasks_metric(study, tmp_path):
    """Of a long training eight steps, the first and the last among them; the small readout's gain in small print."""
    long = [("sod-zeros", step, "H", "spc", step / 1000) for step in range(0, 1000, 10)]
    long += [("sod-zeros", 990, "H", "delta", 0.125), ("sod-zeros", 990, "", "mIoU", 0.5)]
    logged = pd.DataFrame(long, columns=list(TRAJECTORY))
    page = Page(write_report(Results(study.rows, runs=study.runs, trajectory=logged), tmp_path))
    [lines] = [t for t, caption in zip(page.tables, page.captions, strict=True) if "over training steps" in caption]
    assert lines[0] == [["run"], ["padding"], ["step"], ["H"], ["mIoU"]]
    assert len(lines) == 9
    assert lines[1][2:4] == [["0"], [".000"]]
    assert lines[-1][2:] == [["990"], [".990", "Δ +.12"], [".500"]]


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


def embedded(mode, spc, weights="trained"):
    """A ViT of one pair whose position embedding has a mode; no layer of it pads."""
    run = f"vit-{weights}-{mode}"
    return probed(run, "timm:vit", weights, "", "valid", spc, pair=f"vit-{weights}", embedding=mode)


def sources(results):
    """The section that says where position comes from."""
    table = measurements(results)
    (section,) = source_sections(table, headline(table))
    return section


def test_runs_that_differ_only_in_their_position_embedding_are_compared(tmp_path):
    results = Results.join([embedded("none", 0.03), embedded("learned", 0.83), embedded("shuffled", 0.73)])
    results.save(tmp_path)
    section = sources(Results.load(tmp_path))
    rows = {cells[0]: cells[1] for _, cells in section.tables[0].rows}
    gap = "vit-trained: valid, embedding learned - valid, embedding"
    assert rows == {f"{gap} none": "+.800\n[.786, .814]", f"{gap} shuffled": "+.100\n[.086, .114]"}
    assert "not measured" not in section.text.lower()
    assert main_table(results).count("+.800") == len(TARGETS)


def test_the_page_says_which_source_of_position_was_not_measured():
    assert sources(embedded("learned", 0.83)).text.endswith(
        "Not measured yet is what the position embedding brings to vit-trained."
    )
    shuffled = Results.join([embedded("learned", 0.83), embedded("shuffled", 0.8)])
    assert "what the position embedding brings to vit-trained" in sources(shuffled).text
    assert "Neither padding nor position embedding have vit-trained." in sources(embedded("none", 0.03)).text
    padded = probed("vgg", "smp:vgg11", "trained", "", "zeros", 0.8)
    assert sources(padded).text.endswith("Not measured yet is what the padding brings to vgg.")


def test_delta_is_against_the_untrained_encoder_of_the_same_embedding():
    parts = [embedded(mode, spc, w) for w, mode, spc in [("trained", "none", 0.1), ("untrained", "learned", 0.7)]]
    assert not (measurements(Results.join(parts))["metric"] == "delta").any()
    table = measurements(Results.join([*parts, embedded("none", 0.04, "untrained")]))
    deltas = table[(table["metric"] == "delta") & (table["target"] == "H")]
    assert deltas["value"].round(3).tolist() == [0.06] * 2  # on each stimulus


def test_a_folder_written_before_position_embeddings_were_known_is_read(tmp_path):
    new = probed("vgg", "smp:vgg11", "trained", "", "zeros", 0.8)
    new.save(tmp_path)
    runs = pd.read_csv(tmp_path / "runs.csv").drop(columns="position_embedding")
    runs.to_csv(tmp_path / "runs.csv", index=False)
    assert main_table(Results.load(tmp_path)) == main_table(new)
    assert set(measurements(Results.load(tmp_path))["mode"]) == {"zeros"}
