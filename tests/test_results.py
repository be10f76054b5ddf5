import numpy as np
import pandas as pd
import pytest

from padprobe.results import COLUMNS, Results, write_atomically


def results(run="a", value=0.5):
    row = dict.fromkeys(COLUMNS, "") | {"run": run, "target": "H", "metric": "spc", "value": value, "n": 3, "seed": 0}
    rows = pd.DataFrame([row | {"ci_low": np.nan, "ci_high": np.nan, "kernel_size": 3, "depth": 1, "head_padding": 0}])
    trajectory = pd.DataFrame(
        [{"run": run, "task": "", "padding": "", "step": 1, "target": "H", "metric": "spc", "value": 0.1}]
    )
    profile = pd.DataFrame([{"run": run, "target": "H", "distance": 4.0, "metric": "mae", "value": 0.2}])
    return Results(rows, trajectory, {f"{run}/black/H/error": np.ones((4, 4), np.float32)}, profile)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    results().save(tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded.rows.value.tolist() == [0.5]
    assert loaded.rows.weights.tolist() == [""]
    assert loaded.rows.ci_low.isna().all()
    assert loaded.trajectory.value.tolist() == [0.1]
    assert loaded.profile.distance.tolist() == [4.0]
    assert np.array_equal(loaded.maps["a/black/H/error"], np.ones((4, 4)))


def test_results_join(tmp_path):
    joined = Results.join([results("a"), Results(), results("b", 0.25)])
    assert joined.rows.run.tolist() == ["a", "b"]
    assert joined.trajectory.run.tolist() == ["a", "b"]
    assert joined.profile.run.tolist() == ["a", "b"]
    assert set(joined.maps) == {"a/black/H/error", "b/black/H/error"}


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no results\.csv"):
        Results.load(tmp_path)
    (tmp_path / "results.csv").write_text("run,value\na,1\n")
    with pytest.raises(ValueError, match="lacks the column"):
        Results.load(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("old")

    def fail(temporary):
        with open(temporary, "w") as file:
            file.write("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]
