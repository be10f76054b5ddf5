"""The paper's tables beside ours: every value stands beside the paper's own, and what it means is said."""

import re

import pandas as pd
import pytest

from padprobe.report import write_report
from padprobe.results import NOTES, Results
from tests.report.conftest import probed
from tests.report.test_readouts import measured


@pytest.fixture
def page(tmp_path):
    parts = [measured("zeros"), measured("valid"), measured("zeros", "untrained")]
    for run, weights, task, spc in (("sod-zeros", "trained", "SOD", 0.9), ("blank", "untrained", "untrained", 0.8)):
        parts.append(probed(run, "smp:vgg16_bn", weights, task, "zeros", spc, stimuli=("PASCAL-S",), rgb=0.5))
    results = Results.join(parts)
    notes = [("missing", "ECSSD", "not here"), ("how", "vgg16-imagenet-zeros", "224 px; 2000 images")]
    results.notes = pd.DataFrame(notes, columns=list(NOTES))
    write_report(results, tmp_path)
    return (tmp_path / "paper.md").read_text()


def table(page, title):
    """The lines of a section's tables by their first two cells."""
    section = page.split(title)[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return {(line[0], line[1]): line[2:] for line in lines}


def test_each_value_stands_beside_the_papers_with_its_difference_and_interval(page):
    one = table(page, "Table 1")
    assert one["target", "network"] == ["PASCAL-S (n = 200)", "black (n = 1)"]
    ours = one["H", "VGG16, ImageNet"]
    assert ours[0].startswith("**.740** [.736, .744]; paper .742, -.002; MAE .158, paper .149; Δ +.12; sel +.73")
    assert ours[1].startswith("**.640**; paper .751, -.111")
    assert "paper" not in one["H", "VGG16, untrained"][0]
    assert "MAE" not in one["HS", "VGG16, ImageNet"][0]  # the paper's is on another scale
    # the image alone as the ImageNet network's run saw it, not as the other task's did
    assert one["H", "PosENet (the image alone)"][0].startswith("**.040** [.036, .044]; paper .012, +.028")

    kernel = table(page, "Table 2b")
    assert [kernel["H", f"VGG, {k} kernel"][0].split(";")[0][2:6] for k in (1, 3, 7)] == [".560", ".740", ".820"]
    assert "paper .828" in kernel["H", "VGG, 7 kernel"][0]
    assert ("H", "VGG, 3 layers") not in table(page, "Table 2a")
    assert "paper .797" in table(page, "Table 2a")["H", "VGG, 2 layers"][0]
    assert "paper .344" in table(page, "Table 3")["H", "VGG, f2"][0]
    four = table(page.split("On images without content")[0], "On natural images")
    assert "paper .381, -.001" in four["H", "VGG16, valid"][0]
    assert "paper .397" in four["H", "PosENet, padded by 2"][0]
    assert "paper" not in table(page, "On images without content")["H", "PosENet, padded by 2"][0]
    six = table(page, "Table 6")
    assert six["H", "VGG-SOD (sod-zeros: smp:vgg16_bn)"][0].startswith(
        "**.900** [.890, .910] n = 40; paper .969, -.069"
    )


def test_a_run_on_other_images_does_not_stand_beside_the_papers_number(tmp_path):
    other = measured("zeros")
    other.rows["run"] = "vgg16-shown-more"
    other.rows["stimulus"] += " (404 px)"
    fewer = measured("zeros")
    fewer.rows["run"] = "vgg16-few"
    fewer.rows["n"] = 1
    for rows in (other.rows, fewer.rows):
        rows["value"] -= 0.5
    write_report(Results.join([fewer, measured("zeros"), other]), tmp_path)
    page = (tmp_path / "paper.md").read_text()
    page = page.split("On images without content")[0] + page.split("On images without content")[1].split("## ", 1)[1]
    for title, label in (("Table 1", "VGG16, ImageNet"), ("Table 4", "VGG16, zeros"), ("Table 2b", "VGG, 3 kernel")):
        assert table(page, title)["H", label][0].startswith("**.740**"), title
    assert table(page, "Table 1")["H", "PosENet (the image alone)"][0].startswith("**.040**")
    assert "404 px" not in page.split("## 2.")[0]


def test_the_reading_counts_what_agrees_and_names_what_does_not(page):
    reading = page.split("## 2.")[0]
    count = re.search(r"Of (\d+) values of SPC of the paper's own networks, (\d+) are within", reading)
    listed = table(page, "## 1. Reading")
    far = [key for key in listed if key[0] in ("1", "2a", "2b", "3", "4")]
    assert ("6", "H") not in listed  # VGG-SOD is another network than the paper's
    assert "added to the untrained twin: sod-zeros H .900 (+.10), V .899 (+.10), G .898 (+.10)." in reading
    assert int(count[1]) > int(count[2]) > 0
    assert re.search(r"\| 1 \| H \| VGG16, ImageNet \| black \| \.640 \| \.751 \| -\.111 \|", reading)
    assert not re.search(r"\| 1 \| H \| VGG16, ImageNet \| PASCAL-S", reading)
    assert far
    orders = reading.split("Orders of the ablations")[1]
    assert re.search(r"\| 2b \| H \| VGG, 1 kernel < VGG, 3 kernel < VGG, 7 kernel \| the same \|", orders)


def test_an_order_that_is_not_the_papers_is_shown_with_what_changed_places(tmp_path):
    results = measured("zeros")
    rows = results.rows
    rows.loc[(rows.kernel_size == 7) & (rows.stages == "all"), ["value", "ci_low", "ci_high"]] -= 0.2
    write_report(Results(rows), tmp_path)
    page = (tmp_path / "paper.md").read_text()
    assert "VGG, 3 kernel .740 > VGG, 7 kernel .620 |" in page
    assert "intervals overlap" not in page.split("| 2b | H | VGG, 1")[1].split("\n")[0]


def test_what_was_not_run_and_how_the_rest_was_stands_at_the_end(page):
    assert table(page, "What was not run")["ECSSD", "not here"] == []
    assert table(page, "How each run")["vgg16-imagenet-zeros", "224 px; 2000 images"] == []


def test_there_is_no_such_page_without_the_papers_network(tmp_path):
    write_report(probed("a", "smp:vgg11", "trained", "SOD", "zeros", 0.9), tmp_path)
    assert not (tmp_path / "paper.md").exists()
