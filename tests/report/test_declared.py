"""A page shows what the study declares, of any network, and states nothing of its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import padprobe.report
from padprobe.report import main_table, write_report
from padprobe.report.references import read_references
from padprobe.results import COLUMNS, REFERENCES, Results
from tests.report.conftest import Page, probed, run_row

ROOT = Path(__file__).parents[2]
CARRIED = ROOT / "docs" / "results" / "paper"
FIGURE = re.compile(r"(?<![\w.])\d*\.\d{2,}\b|\d+ px")
ABOUT = {
    "title": "Does the lynx know where it is?",
    "text": "One paragraph.\n\nAnd another.",
    "tables": [
        {
            "name": "padding",
            "title": "Padding of the lynx",
            "text": "Read it from left to right.",
            "rows": [
                {"label": "lynx", "run": "lynx"},
                {"label": "lynx, bare", "run": "lynx-bare"},
                {"label": "not run", "run": "x"},
            ],
            "each": {"target": ["H", "V"]},
            "columns": [
                {"label": "scenes", "stimulus": "scenes"},
                {"label": "black", "stimulus": "black"},
                {"label": "less bare", "stimulus": "scenes", "minus": {"run": "lynx-bare"}},
            ],
            "show": ["mae"],
        }
    ],
    "claims": [
        {
            "name": "padding",
            "says": "Padding makes the lynx see",
            "value": {"run": "lynx", "stimulus": "scenes"},
            "minus": {"run": "lynx-bare"},
            "each": {"target": ["H", "V"]},
            "at_least": 0.4,
        },
        {
            "name": "blind",
            "says": "The bare lynx is blind",
            "value": {"run": "lynx-bare", "stimulus": "black", "target": "H"},
            "equals": 0,
        },
    ],
    "tolerance": 0.05,
}


@pytest.fixture
def lynx() -> Results:
    """A study of another network than the paper's, with references."""
    parts = [
        probed("lynx", "timm:lynx", "trained", "", "zeros", 0.9, pair="lynx"),
        probed("lynx-bare", "timm:lynx", "trained", "", "valid", 0.3, pair="lynx"),
    ]
    results = Results.join(parts)
    references = [
        ("lynx", "posenet", 3, 1, 0, "unit", "all", "scenes", "H", "spc", 0.7, "Cat 2030", "9"),
        ("lynx", "posenet", 3, 1, 0, "unit", "all", "scenes", "H", "mae", 0.02, "Cat 2030", "9"),
        ("lynx-bare", "posenet", 3, 1, 0, "unit", "all", "scenes", "H", "spc", 0.31, "Cat 2030", "9"),
        ("lynx", "posenet", 7, 1, 0, "unit", "all", "scenes", "H", "spc", 0.99, "Cat 2030", "9"),
    ]
    names = [column for column in REFERENCES if column not in ("encoder", "weights", "task", "padding")]
    results.references = pd.DataFrame(references, columns=names).reindex(columns=list(REFERENCES)).fillna("")
    results.missing = pd.DataFrame({"what": ["puma"], "why": ["no puma here"]})
    results.about = ABOUT
    return results


def table(page: Page, header: str) -> list[list[list[str]]]:
    [lines] = [lines for lines in page.tables if [header] in lines[0]]
    return lines


def test_a_declared_table_has_values_intervals_references_and_differences(lynx, tmp_path):
    page = Page(write_report(lynx, tmp_path))
    header, *lines = table(page, "less bare (n = 40)")
    assert header == [["target"], ["network"], ["scenes (n = 40)"], ["black (n = 1)"], ["less bare (n = 40)"]]
    assert [[line[0], line[1]] for line in lines] == [[[t], [n]] for t in "HV" for n in ("lynx", "lynx, bare")]
    scenes = [".900", "[.890, .910]", "Cat 2030 .700, +.200", "MAE .025, Cat 2030 .020"]
    assert lines[0][2:] == [scenes, [".900", "MAE .025"], ["+.600", "[.586, .614]", "Cat 2030 +.390"]]
    assert lines[2][2] == [".899", "[.889, .909]", "MAE .025"]
    assert "Read it from left to right." in page.text
    markdown = (tmp_path / "report.md").read_text()
    assert "| H | lynx | .900 [.890, .910]; Cat 2030 .700, +.200; MAE .025, Cat 2030 .020 |" in markdown


def test_claims_come_first_with_their_numbers_and_are_saved(lynx, tmp_path):
    page = Page(write_report(lynx, tmp_path))
    assert page.headings[0] == "1. Claims"
    assert table(page, "verdict")[1:] == [
        [["Padding makes the lynx see"], ["held"], ["H"], [".600", "[.586, .614]"], [">= 0.4"], ["held"]],
        [[], [], ["V"], [".600", "[.586, .614]"], [">= 0.4"], ["held"]],
        [["The bare lynx is blind"], ["not held"], [], [".300"], ["= 0"], ["not held"]],
    ]
    saved = Results.load(tmp_path)
    assert saved.claims["claim_verdict"].tolist() == ["held", "held", "not held"]
    assert saved.about == ABOUT
    assert (Page(write_report(saved, tmp_path / "again"))).text == page.text
    assert re.search(r"not held +blind", main_table(lynx))


def test_differences_from_references_are_counted_and_the_large_ones_listed(lynx, tmp_path):
    page = Page(write_report(lynx, tmp_path))
    assert "spc: 2 values have a reference (Cat 2030), 1 of them within 0.05." in page.text
    assert "mae: 1 values have a reference (Cat 2030), 1 of them within 0.05." in page.text
    far = [
        ["lynx"],
        ["posenet 3x3"],
        ["scenes"],
        ["H"],
        ["spc"],
        [".900", "[.890, .910]"],
        ["Cat 2030 .700"],
        ["+.200"],
    ]
    assert table(page, "difference")[1:] == [far]
    lynx.about = {**ABOUT, "tolerance": None}
    page = Page(write_report(lynx, tmp_path))
    assert [line[7] for line in table(page, "difference")[1:]] == [["+.200"], ["-.010"], ["+.005"]]
    sentence = "of the 4 references of Cat 2030 match no measurement."
    assert f"1 {sentence}" in page.text
    lynx.references["stimulus"] = "puma"
    page = Page(write_report(lynx, tmp_path))
    assert f"4 {sentence}" in page.text
    assert "Differences from the references" in page.text


def test_a_page_says_nothing_of_a_network_that_it_was_not_given(lynx, tmp_path):
    page = Page(write_report(lynx, tmp_path))
    text = re.sub(r"base64,[^\"]+", "", page.text) + (tmp_path / "report.md").read_text()
    assert not re.search("vgg|imagenet|paper|arxiv|resnet|PASCAL", text, re.IGNORECASE)
    assert page.text.count("Does the lynx know where it is?") == 2  # title and heading
    assert "<p>And another.</p>" in page.text
    assert [[line[0], line[1]] for line in table(page, "why")[1:]] == [[["puma"], ["no puma here"]]]
    assert table(page, "how")[1:] == [[[run], [f"how {run} was made"]] for run in ("lynx", "lynx-bare")]


def test_a_context_run_is_selected_by_its_column(tmp_path):
    padded = probed("a", "timm:lynx", "trained", "", "zeros", 0.9, pair="a")
    shown = probed("a-context", "timm:lynx", "trained", "", "valid", 0.2, pair="a", shown_px=160)
    results = Results.join([padded, shown])
    value = {"stimulus": "scenes", "target": "H"}
    claims = [
        {"name": "1", "says": "s", "value": {**value, "run": "a-context"}, "above": 0},
        {"name": "2", "says": "s", "value": {**value, "run": "a-context", "context": True}, "above": 0},
    ]
    results.about = {"claims": claims}
    write_report(results, tmp_path)
    assert Results.load(tmp_path).claims["verdict"].tolist() == ["held", "held"]  # a run that is named needs no context
    assert "gap a: zeros - valid + context" in main_table(results)


def test_position_alone_is_no_score_of_the_network(tmp_path):
    place = ("a", "timm:lynx", "trained", "SOD", "zeros", 0, "", np.nan, np.nan, np.nan, "")
    rows = [
        (*place, stages, "data", "", "mIoU", value, np.nan, np.nan, 9)
        for stages, value in (("", 0.8), ("position alone", 0.1))
    ]
    value = {"run": "a", "stimulus": "data", "readout": "", "metric": "mIoU"}
    claims = [
        {"name": "1", "says": "s", "value": value, "minus": {"stages": "position alone"}, "at_least": 0.69},
    ]
    results = Results(pd.DataFrame(rows, columns=list(COLUMNS)), runs=run_row(*place[:6]), about={"claims": claims})
    write_report(results, tmp_path)
    assert Results.load(tmp_path).claims["verdict"].tolist() == ["held"]


def test_no_figure_stands_in_the_reports_code_or_templates():
    folder = Path(padprobe.report.__file__).parent
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = [
            node.body[0].value for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
        ]
        alone = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]  # docstrings of attributes
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in [*docs, *alone]:
                assert not FIGURE.search(node.value), (path.name, node.value)
    for path in sorted(folder.glob("*.jinja")):
        text = re.sub("<style>.*?</style>", "", path.read_text(), flags=re.DOTALL)
        assert not FIGURE.search(text), path.name
    assert FIGURE.search("at .742")
    assert FIGURE.search("or 0.46")
    assert FIGURE.search("404 px")


def test_the_papers_page_is_made_from_its_tables(tmp_path):
    write_report(Results.load(CARRIED), tmp_path)
    assert (tmp_path / "report.md").read_text() == (CARRIED.parent / "paper.md").read_text(), (
        "docs/results/paper.md is not what padprobe report makes of docs/results/paper: write it again"
    )
    assert (tmp_path / "claims.csv").read_text() == (CARRIED / "claims.csv").read_text()
    assert sum(path.stat().st_size for path in CARRIED.iterdir()) < 2**21


def test_the_papers_numbers_are_as_printed():
    table = read_references(ROOT / "configs" / "study" / "paper" / "references.csv").fillna(0)
    table = table.drop(columns=["encoder", "weights", "task", "padding"])  # the paper's networks go by their runs
    numbers = {tuple(row[:-3]): row[-3] for row in table.itertuples(index=False, name=None)}
    assert len(numbers) == len(table) == 280  # no number is there twice
    all_of = ("posenet", 3, 1, 0, "unit", "all")
    printed = {
        ("vgg16", *all_of, "PASCAL-S", "H", "spc"): 0.742,
        ("vgg16", *all_of, "noise", "VS", "spc"): 0.526,
        ("resnet152", *all_of, "white", "H", "mae"): 0.078,
        ("vgg16", "posenet", 3, 1, 0, "paper", "all", "PASCAL-S", "HS", "mae"): 0.556,
        ("vgg16-depth", "posenet", 3, 3, 0, "unit", "all", "PASCAL-S", "G", "spc"): 0.835,
        ("vgg16", "posenet", 7, 1, 0, "unit", "rgb", "PASCAL-S", "H", "spc"): 0.06,
        ("vgg16", "posenet", 3, 1, 0, "unit", "f1", "PASCAL-S", "G", "spc"): 0.241,
        ("vgg16", "posenet", 3, 1, 2, "unit", "rgb", "PASCAL-S", "H", "spc"): 0.397,
        ("vgg16-valid", *all_of, "PASCAL-S", "HS", "spc"): 0.011,
        ("sod-zeros", *all_of, "black", "G", "spc"): 0.904,
        ("ss-voc-zeros", *all_of, "PASCAL-S", "H", "spc"): 0.982,
        ("sod-valid", "", 0, 0, 0, "", "", "DUT-OMRON", "", "max F-measure"): 0.25,
        ("ss-voc-zeros", "", 0, 0, 0, "", "", "VOC 2012 val", "", "mIoU"): 0.231,
    }
    assert {key: numbers[key] for key in printed} == printed
