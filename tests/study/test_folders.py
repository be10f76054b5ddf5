"""What a folder of a study keeps: of several runs, of several studies, of damage."""

import datetime
import re

import pytest
import torch
import yaml

from padprobe.network.encoders import load_encoder
from padprobe.study.folder import join_folders, load_results
from padprobe.study.plan import read_study
from padprobe.study.runner import dry_run
from tests.study.conftest import OPTIONS, edit, run, write


@pytest.fixture
def tiny(study):
    """A study of one untrained encoder that takes a second."""
    edit(study, lambda s: s["encoders"].pop("sod-valid"))
    return edit(study, lambda s: s.update(train="noise", test={"black": "black"}, limit_train=8, targets=["H"]))


def only(name, **options):
    return lambda s: s.update(encoders={name: {**next(iter(s["encoders"].values())), **options}})


def test_a_file_of_weights_called_untrained_is_not_untrained(tiny, tmp_path):
    encoder = load_encoder("smp:vgg11", padding="valid", options=OPTIONS)
    torch.save(encoder.state_dict(), tmp_path / "untrained.pth")
    results, failed, _ = run(edit(tiny, only("a", weights=str(tmp_path / "untrained.pth"))), tmp_path / "out")
    assert failed == 0
    assert set(results.rows.weights) == set(results.runs.weights) == {"untrained.pth"}


def test_the_latest_study_says_which_seeds_a_group_has(tiny, tmp_path):
    other = write(tmp_path / "other.yaml", yaml.safe_load(tiny.read_text()))
    run(edit(tiny, only("u", limit_train=4)), tmp_path / "out")
    results, _, _ = run(edit(other, only("u", seeds=[0, 1])), tmp_path / "out")
    assert set(results.rows.run) == {"u-seed0", "u-seed1"}
    results, _, _ = run(tiny, tmp_path / "out")
    assert set(results.rows.run) == {"u"}


def test_two_studies_of_one_name_keep_their_results(tiny, tmp_path):
    out, content = tmp_path / "out", yaml.safe_load(tiny.read_text())
    table = {"name": "one", "title": "One", "rows": [{"label": "a", "run": "a"}], "columns": [{"stimulus": "black"}]}
    (tmp_path / "b").mkdir()
    other = write(tmp_path / "b" / "study.yaml", {**content, "tables": [{**table, "title": "Other"}, table]})
    edit(other, lambda s: s["tables"].pop())
    edit(tiny, lambda s: s.update(tables=[table]))
    run(edit(tiny, only("a")), out)
    for _ in range(2):
        both, _, _ = run(edit(other, only("b")), out)
        assert set(both.rows.run) == {"a", "b"}
        assert [(t["name"], t["title"]) for t in both.about["tables"]] == [("one", "One"), ("one-2", "Other")]
    assert len(list((out / "studies").glob("*.json"))) == 2


def test_folders_that_split_a_study_are_joined(tiny, tmp_path):
    claim = {"says": "Nothing", "value": {"stimulus": "black", "target": "H"}, "each": {"run": ["a", "b"]}, "equals": 0}
    table = {"name": "t", "title": "A", "rows": [{"label": "a", "run": "a"}], "columns": [{"stimulus": "black"}]}
    edit(tiny, lambda s: s.update(claims=[{**claim, "name": "none"}], tables=[table]))
    edit(tiny, lambda s: s.update(encoders={n: s["encoders"]["untrained-valid"] for n in ("a", "b", "c")}))
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        run(tiny, folder, only=[folder.name])
    joined = join_folders([*folders, folders[0]])
    assert joined.missing.values.tolist() == [["c", "not run yet"]]
    assert joined.rows.run.drop_duplicates().tolist() == ["a", "b"]
    assert len(joined.rows) == sum(len(load_results(folder).rows) for folder in folders)
    assert joined.claims.verdict.tolist() == ["held", "held"]
    assert len(joined.about["tables"]) == 1

    edit(tiny, lambda s: s.update(tables=[{**table, "title": "B"}], title="Other"))
    run(tiny, tmp_path / "other", only=["c"])
    joined = join_folders([*folders, tmp_path / "other"])
    assert joined.missing.empty
    assert [t["title"] for t in joined.about["tables"]] == ["A", "B"]

    run(tiny, tmp_path / "more", only=["a"], changes=["test={black: white}", "limit_train=12"])
    with pytest.raises(ValueError, match=r"run 'a' has other numbers in two of the folders .*--beside"):
        join_folders([*folders, tmp_path / "more"])
    with pytest.raises(ValueError, match=r"no results\.csv"):
        join_folders([tmp_path])


@pytest.mark.parametrize(
    "change",
    [
        only("a", options={"config": 5}),
        *(lambda s, train=train: s.update(train=train) for train in (5, [], {"class_path": "nope.X"})),
        lambda s: s.update(test={"x": 5}),
        lambda s: s.update(image_size=2**70),
        lambda s: s.update(train=datetime.date(2020, 1, 1)),
    ],
)
def test_a_dry_run_says_in_one_line_what_cannot_run(tiny, tmp_path, change):
    edit(tiny, change)
    (line,) = dry_run(read_study(tiny), tmp_path / "out")
    assert re.fullmatch(r"(a|untrained-valid): cannot run: .+", line)
    with pytest.raises(ValueError, match=r"encoder '(a|untrained-valid)': "):
        run(tiny, tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "{", "5"])
def test_a_damaged_plan_is_named(tiny, tmp_path, content):
    run(tiny, tmp_path / "out")
    for place in ("studies/study.json", "cells/untrained-valid-seed0/probe-*/part-*/part.json"):
        (file,) = (tmp_path / "out").glob(place)
        whole = file.read_text()
        file.write_text(content)
        with pytest.raises(ValueError, match=re.escape(str(file))):
            load_results(tmp_path / "out")
        file.write_text(whole)


def test_a_seed_that_gets_company_is_renamed_without_a_run(tiny, tmp_path):
    run(edit(tiny, only("u", context=True, padding="zeros")), tmp_path / "out")
    for seeds, names in (([0, 1], ["u-seed0", "u-seed1"]), ([0], ["u"])):
        results, _, messages = run(edit(tiny, only("u", seeds=seeds)), tmp_path / "out")
        assert messages[0].endswith("done before")
        expected = {label for name in names for label in (name, f"{name}-context")}
        assert set(results.rows.run) == set(results.runs.run) == set(results.profile.run) == expected
        assert {key.split("/")[0] for key in results.maps} == expected
        assert set(results.runs.pair) == {"u"}
        assert results.runs.how.str.contains("32 px").all()
