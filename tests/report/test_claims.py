"""Claims and tables are read from declarations, refused where they are wrong, and evaluated by their intervals."""

from __future__ import annotations

import datetime
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from padprobe.report.claims import evaluate, verdict
from padprobe.report.declared import BOUNDS, read_claims, read_tables
from padprobe.report.measurements import Estimate, measurements
from padprobe.report.references import beside, matched, read_references
from padprobe.results import COLUMNS, REFERENCES, RUNS, Results

TABLE = {"name": "t", "title": "T", "rows": [{"run": "a"}], "columns": [{"stimulus": "black"}]}
CLAIM = {"name": "c", "says": "S", "value": {"run": "a", "stimulus": "scenes", "target": "H"}, "at_least": 0.4}


def results(*claims, **spc) -> Results:
    """Runs by name with their SPC of H on scenes as (value, half-width) or a number; "-s0", "-s1" are seeds."""
    rows, runs = [], []
    for run, level in spc.items():
        level, half = level if isinstance(level, tuple) else (level, math.nan)
        group, _, seed = run.partition("_s")
        place = (run, "net", "trained", "", "zeros", int(seed or 0), "posenet", 3, 1, 0, "unit", "all", "scenes", "H")
        rows.append((*place, "spc", level, level - half, level + half, 10))
        runs.append((run, group, group, *place[1:5], "", place[5], *6 * (96,), 10, ""))
    tables = pd.DataFrame(rows, columns=list(COLUMNS)), pd.DataFrame(runs, columns=list(RUNS))
    return Results(tables[0], runs=tables[1], about={"claims": list(claims)})


def compared(ours: pd.DataFrame, references: pd.DataFrame) -> list[dict[str, float]]:
    return beside(matched(ours, references, {}), len(ours))


def only(results: Results) -> dict:
    [row] = evaluate(results).to_dict("records")
    return row


@pytest.mark.parametrize(
    ("bound", "limit", "interval", "expected"),
    [
        ("at_least", 0.4, (0.5, 0.4, 0.6), "held"),
        ("at_least", 0.4, (0.3, 0.2, 0.4), "undecided"),
        ("at_least", 0.4, (0.3, 0.2, 0.39), "not held"),
        ("above", 0.4, (0.5, 0.4, 0.6), "undecided"),
        ("above", 0.4, (0.3, 0.2, 0.4), "not held"),
        ("at_most", 0.4, (0.3, 0.2, 0.4), "held"),
        ("at_most", 0.4, (0.5, 0.41, 0.6), "not held"),
        ("below", 0.4, (0.3, 0.2, 0.4), "undecided"),
        ("below", 0.4, (0.3, 0.2, 0.39), "held"),
        ("below", 0.4, (0.5, 0.4, 0.6), "not held"),
        ("equals", 0.0, (0.0, 0.0, 0.0), "held"),
        ("equals", 0.0, (0.0, -0.1, 0.1), "undecided"),
        ("equals", 0.0, (0.2, 0.1, 0.3), "not held"),
        ("equals", 0.5, (0.5 + 1e-12, 0.5 + 1e-12, 0.5 + 1e-12), "held"),
        ("equals", 0.5, (0.51, 0.51, 0.51), "not held"),
        ("above", 0.0, (math.nan, math.nan, math.nan), "not measured"),
        ("above", 0.0, (math.inf, math.inf, math.inf), "not measured"),
    ],
)
def test_a_bound_holds_where_the_whole_interval_is_within(bound, limit, interval, expected):
    assert verdict(Estimate(*interval), bound, limit) == expected
    assert verdict(None, bound, limit) == "not measured"


def test_a_difference_has_the_intervals_added_in_quadrature():
    row = only(results({**CLAIM, "minus": {"run": "b"}}, a=(0.9, 0.03), b=(0.4, 0.04)))
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((0.5, 0.45, 0.55))
    assert (row["part"], row["bound"], row["verdict"], row["claim_verdict"]) == ("", ">= 0.4", "held", "held")


def test_a_value_minus_itself_is_exactly_zero():
    row = only(results({**CLAIM, "at_least": 0, "minus": {"run": "a"}}, a=(0.9, 0.03)))
    assert (row["value"], row["ci_low"], row["ci_high"], row["verdict"]) == (0, 0, 0, "held")


def test_seeds_are_averaged_under_the_groups_name_and_each_has_its_own():
    claims = [{**CLAIM, "name": run, "value": {**CLAIM["value"], "run": run}} for run in ("a", "a_s1", "a_s7")]
    table = evaluate(results(*claims, a_s0=(0.5, 0.001), a_s1=(0.7, 0.001), b=0.1))
    assert table["value"].tolist()[:2] == pytest.approx([0.6, 0.7])
    assert (table["ci_low"][0], table["ci_high"][0]) == (0.5, 0.7)  # the range over seeds, wider than over images
    assert table["verdict"].tolist() == ["held", "held", "not measured"]


def test_an_order_compares_each_with_the_one_before():
    order = {"order": [{"run": "a"}, {"run": "b"}, {"run": "c"}]}
    claim = {key: value for key, value in CLAIM.items() if key != "at_least"} | order
    table = evaluate(results(claim, a=(0.1, 0.01), b=(0.2, 0.01), c=(0.19, 0.02)))
    assert table["part"].tolist() == ["b > a", "c > b"]
    assert table["verdict"].tolist() == ["held", "undecided"]
    assert set(table["claim_verdict"]) == {"undecided"}
    assert table["bound"].tolist() == ["> 0", "> 0"]


def test_the_worst_comparison_decides_and_what_was_not_measured_says_so():
    claim = {**CLAIM, "value": {"stimulus": "scenes", "target": "H"}, "each": {"run": ["a", "x"], "target": ["H", "V"]}}
    table = evaluate(results(claim, a=0.9))
    assert table["part"].tolist() == ["a, H", "a, V", "x, H", "x, V"]
    assert table["verdict"].tolist() == ["held", "not measured", "not measured", "not measured"]
    assert set(table["claim_verdict"]) == {"not measured"}


def test_a_selection_that_names_several_values_is_not_measured_and_says_what_to_add():
    several = results(CLAIM, a=0.9)
    several.rows = pd.concat([several.rows, several.rows.assign(n=20, task="SOD")])
    row = only(several)
    assert row["verdict"] == "not measured"
    assert row["part"] == "2 values match, state task too"


def test_a_twins_spread_gives_delta_where_it_was_not_measured():
    both = results({**CLAIM, "value": {**CLAIM["value"], "metric": "delta"}}, a=0.9, twin_s0=0.3, twin_s1=0.5)
    both.rows.loc[both.rows["run"] != "a", "weights"] = "untrained"
    assert only(both)["value"] == pytest.approx(0.5)
    smaller = both.runs["run"] != "a"
    both.runs.loc[smaller, "image_px"] = 64
    assert only(both)["verdict"] == "not measured"  # twins at another size are none


def test_a_delta_from_twins_takes_in_their_spread():
    claim = {**CLAIM, "value": {**CLAIM["value"], "metric": "delta"}}
    both = results(claim, a=(0.9, 0.03), twin_s0=(0.3, 0.04), twin_s1=(0.4, 0.04), twin_s2=(0.5, 0.04), b=0.7)
    both.rows.loc[both.rows["run"].str.startswith("twin"), "weights"] = "untrained"
    row, half = only(both), math.hypot(0.03, 0.04, t.ppf(0.975, 2) * 0.1 * math.sqrt(4 / 3))
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert row["verdict"] == "undecided"
    alone = both.rows[~both.rows["run"].isin(["twin_s1", "twin_s2"])]
    both.rows = alone
    row = only(both)  # one twin: no interval, although one is needed
    assert row["value"] == pytest.approx(0.6)
    assert math.isnan(row["ci_low"])
    assert row["verdict"] == "undecided"
    assert measurements(both).query("metric == 'delta'")["ci_low"].isna().all()


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_number_that_needs_an_interval_and_has_none_is_undecided(bound):
    assert verdict(Estimate(0.5, math.nan, math.nan), bound, 0.4) == "undecided"
    assert verdict(Estimate(0.5, 0.4, 0.6) - Estimate(0.1, math.nan, math.nan), bound, 0.4) == "undecided"


def test_twins_were_read_out_with_as_many_images_and_are_of_one_group():
    claim = {**CLAIM, "value": {**CLAIM["value"], "metric": "delta"}}
    both = results(claim, a=0.9, twin=0.4, other=0.2)
    both.rows.loc[both.rows["run"] != "a", "weights"] = "untrained"
    assert only(both)["verdict"] == "not measured"  # two groups are twins
    both.runs.loc[both.runs["run"] == "other", "n_train"] = 20
    assert only(both)["value"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at_lest": 1}, "unknown key of claim 'c': 'at_lest'; did you mean 'at_least'"),
        ({"above": 1}, "states at_least and above: state exactly one"),
        ({"at_least": "much"}, "at_least is 'much', expected a number"),
        ({"value": {"runs": "a"}}, "unknown column in claim 'c', value: 'runs'; did you mean 'run'"),
        ({"value": {"run": "a", "target": "H"}}, "does not say which stimulus"),
        ({"value": {"run": "a", "stimulus": "x", "readout": ""}}, "does not say which metric"),
        ({"each": {"target": "H"}}, "each target is 'H', expected a list"),
        ({"says": ""}, "claim 'c' lacks says"),
        ({"says": 5}, "says is 5, expected text"),
        ({"says": datetime.date(2026, 1, 1)}, "says is datetime.date.*, expected text"),
        ({"name": [1]}, "name is .1., expected text"),
        ({"at_least": math.nan}, "at_least is nan, expected a number"),
        ({"at_least": math.inf}, "at_least is inf, expected a number"),
        ({"value": {**CLAIM["value"], "kernel_size": "3"}}, "value: kernel_size is '3', expected a number"),
        ({"value": {**CLAIM["value"], "context": "true"}}, "value: context is 'true', expected true or false"),
        ({"value": {**CLAIM["value"], "run": [[1]]}}, "value: run is .1., expected text"),
        ({"minus": {"padding": False}}, "minus: padding is False, expected text"),
        ({"each": {"target": []}}, "each: target is an empty list"),
    ],
)
def test_a_claim_declared_wrongly_is_refused_by_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message) as error:
        read_claims([{**CLAIM, **change}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": []}, "unknown key of table 't': 'colums'"),
        ({"columns": [{"stimuli": "black"}]}, "unknown column in table 't', columns: 'stimuli'"),
        (
            {"columns": [{"stimulus": "black", "minus": {"pad": 1}}]},
            "unknown column in table 't', columns, minus: 'pad'",
        ),
        ({"rows": []}, "table 't' lacks rows"),
        ({"show": "mae"}, "show is 'mae', expected a list"),
        ({"rows": [{"run": "a", "minus": 5}]}, "rows, minus is 5, expected a mapping"),
        ({"rows": [{"run": "a", "label": ["x"]}]}, "label is .'x'., expected text"),
        ({"text": 5}, "text is 5, expected text"),
    ],
)
def test_a_table_declared_wrongly_is_refused_by_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        read_tables([{**TABLE, **change}])


def test_a_name_is_declared_once_and_a_label_defaults_to_what_is_selected():
    [spec] = read_tables([TABLE])
    assert [row["label"] for row in spec.rows + spec.columns] == ["a", "black"]
    with pytest.raises(ValueError, match="claim 'c' is declared twice"):
        read_claims([CLAIM, CLAIM])


def test_references_stand_beside_what_agrees_in_every_column_that_the_file_has(tmp_path):
    ours = results(a=0.9, b=0.8).rows.assign(kernel_size=[3.0, 1.0])
    (tmp_path / "them.csv").write_text("run,kernel_size,target,metric,value\na,3,H,spc,0.5\nb,3,H,spc,0.6\n")
    (tmp_path / "last.csv").write_text("stimulus,metric,value,source\nscenes,spc,0.2,May\nscenes,spc,0.2,May\n")
    tables = [read_references(tmp_path / name) for name in ("them.csv", "last.csv")]
    assert list(tables[0]) == list(REFERENCES)
    both = compared(ours, pd.concat(tables, ignore_index=True))
    assert both == [{"them": 0.5, "May": 0.2}, {"May": 0.2}]
    again = pd.concat(tables).fillna({"stages": np.nan}).replace({None: ""})
    assert compared(ours, again) == both


@pytest.mark.parametrize("column", ["encoder", "weights", "task", "padding"])
def test_references_of_another_encoder_weights_task_or_padding_do_not_match(tmp_path, column):
    ours = results(a=0.9, b=0.9).rows.assign(run="a")
    ours[column] = ["x", "y"]
    (tmp_path / "r.csv").write_text(f"run,{column},metric,value\na,x,spc,0.5\na,z,spc,0.6\n")
    assert compared(ours, read_references(tmp_path / "r.csv")) == [{"r": 0.5}, {}]


def test_a_key_that_a_reference_leaves_empty_does_not_count_but_a_task_score_is_no_readout(tmp_path):
    ours = results(a=0.9, b=0.8, c=0.7, d=0.6).rows.assign(metric="m", readout=["posenet", "posenet", "", ""])
    ours["stages"] = ["all", "rgb", "", "position alone"]
    text = (
        "readout,stages,stimulus,target,metric,value\nposenet,,scenes,H,m,1\nposenet,rgb,scenes,H,m,2\n,,scenes,H,m,3\n"
    )
    (tmp_path / "r.csv").write_text(text)
    assert compared(ours, read_references(tmp_path / "r.csv")) == [{"r": 1}, {"r": 2}, {"r": 3}, {}]


def test_two_files_of_results_are_two_sources_and_their_seeds_are_averaged(tmp_path):
    ours = results(a_s0=(0.9, 0.1), a_s1=(0.8, 0.1))
    for folder, spc in (("may", (0.5, 0.3)), ("june", (0.7, 0.5))):
        (tmp_path / folder).mkdir()
        results(a_s0=spc[0], a_s1=spc[1]).rows.to_csv(tmp_path / folder / "results.csv", index=False)
    files = [read_references(tmp_path / folder / "results.csv") for folder in ("may", "june")]
    ours.references = pd.concat(files, ignore_index=True)
    table = measurements(ours)
    shown = table[~table["single"]]["references"].item()
    assert shown == pytest.approx({"may/results": 0.4, "june/results": 0.6})
    ours.references = pd.concat(files, ignore_index=True).assign(source="same")
    with pytest.raises(ValueError, match=r"value is 0.7, but an earlier row has 0.5 .*run a_s0.* its own `source`"):
        measurements(ours)


def test_rows_of_a_file_that_contradict_each_other_are_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("run,metric,value\na,spc,0.5\nb,spc,0.5\na,spc,0.6\n")
    with pytest.raises(ValueError, match=r"line 4: value is 0.6, but an earlier row has 0.5 for .*run a"):
        read_references(path)
    path.write_text("run,seed,metric,value\na,0,spc,0.5\na,1,spc,0.6\na,1,spc,0.6\n")
    assert read_references(path)["value"].tolist() == [pytest.approx(1.7 / 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run,value\na,1\n", "lacks the column.s. metric"),
        ("run,metric,value\na,spc,x\n", "line 2: value is x, expected"),
        ("run,metric,value\na,spc,inf\n", "value is inf"),
    ],
)
def test_a_file_of_references_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_references(tmp_path / "r.csv")
    with pytest.raises(ValueError, match="no file"):
        read_references(tmp_path / "other.csv")
