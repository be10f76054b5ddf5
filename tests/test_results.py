import numpy as np
import pandas as pd
import pytest

from padprobe.results import COLUMNS, Results, write_atomically


def results(run="a", value=0.5):
    row = dict.fromkeys(COLUMNS, "") | {"run": run, "target": "H", "metric": "spc", "value": value, "n": 3, "seed": 0}
    rows = pd.DataFrame([row | {"ci_low": np.nan, "ci_high": np.nan, "kernel_size": 3, "depth": 1, "head_padding": 0}])
    trajectory = pd.DataFrame([{"run": run, "step": 1, "target": "H", "metric": "spc", "value": 0.1}])
    profile = pd.DataFrame([{"run": run, "target": "H", "distance": 4.0, "metric": "mae", "value": 0.2}])
    runs = pd.DataFrame([{"run": run, "group": run, "pair": run, "image_px": 224, "how": "by hand"}])
    maps = {f"{run}/black/H/error": np.ones((4, 4), np.float32)}
    return Results(rows, runs, trajectory, maps, profile, about={"title": "A study"})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    results().save(tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded.rows.value.tolist() == [0.5]
    assert loaded.rows.weights.tolist() == [""]
    assert loaded.rows.ci_low.isna().all()
    assert loaded.runs[["run", "image_px", "how"]].values.tolist() == [["a", 224, "by hand"]]
    assert loaded.about == {"title": "A study"}
    assert loaded.trajectory.value.tolist() == [0.1]
    assert loaded.profile.distance.tolist() == [4.0]
    assert np.array_equal(loaded.maps["a/black/H/error"], np.ones((4, 4)))


def test_results_join():
    joined = Results.join([results("a"), Results(), results("b", 0.25)])
    assert joined.runs.run.tolist() == ["a", "b"]
    assert joined.rows.run.tolist() == ["a", "b"]
    assert joined.trajectory.run.tolist() == ["a", "b"]
    assert joined.profile.run.tolist() == ["a", "b"]
    assert set(joined.maps) == {"a/black/H/error", "b/black/H/error"}


def test_a_run_in_several_results_has_one_row_with_what_any_of_them_knows():
    scored, probed = results("a"), results("a")
    scored.runs = scored.runs.assign(image_px=np.nan)
    joined = Results.join([scored, probed])
    assert len(joined.rows) == 2
    assert joined.runs[["run", "image_px"]].values.tolist() == [["a", 224]]


def test_results_of_version_0_1_are_read(tmp_path):
    results().save(tmp_path)
    old = pd.read_csv(tmp_path / "results.csv").drop(columns="scale").assign(readout="posenet, paper scale")
    old.to_csv(tmp_path / "results.csv", index=False)
    (tmp_path / "runs.csv").unlink()
    loaded = Results.load(tmp_path)
    assert loaded.rows[["readout", "scale"]].values.tolist() == [["posenet", "paper"]]
    assert loaded.runs[["run", "group", "pair"]].values.tolist() == [["a", "a", "a"]]


def test_runs_without_widths_had_square_images(tmp_path):
    ours = results()
    ours.runs = ours.runs.assign(source_px=300, shown_px=260)
    ours.save(tmp_path)
    widths = ["image_width", "source_width", "shown_width"]
    assert not set(widths).intersection(pd.read_csv(tmp_path / "runs.csv"))
    assert Results.load(tmp_path).runs[widths].values.tolist() == [[224, 300, 260]]


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


def test_a_name_of_digits_stays_text(tmp_path):
    ours = results("18")
    ours.rows["encoder"] = ours.runs["encoder"] = "50"
    ours.save(tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded.rows[["run", "encoder"]].values.tolist() == [["18", "50"]]
    assert loaded.runs[["run", "group", "encoder"]].values.tolist() == [["18", "18", "50"]]
    assert loaded.rows[["value", "n", "seed"]].values.tolist() == [[0.5, 3, 0]]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("about.json", "[1]"),
        ("about.json", "{"),
        ("runs.csv", ""),
        ("maps.npz", "no maps"),
        ("results.csv", ",".join(COLUMNS) + "\n" + ",".join("high" for _ in COLUMNS) + "\n"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content):
    results().save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"cannot read '.*{file}'"):
        Results.load(tmp_path)
