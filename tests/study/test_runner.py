import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import pandas as pd
import pytest
import yaml
from filelock import FileLock

from padprobe.network.encoders import load_encoder
from padprobe.probe.encoder import probe_encoder
from padprobe.results import Results
from padprobe.study import runner
from padprobe.study.folder import load_results
from padprobe.study.plan import read_study
from padprobe.study.runner import dry_run
from tests.study.conftest import OPTIONS, edit, run, write


def test_a_study_trains_probes_scores_and_runs_each_cell_once(study, tmp_path):
    out = tmp_path / "out"
    results, failed, messages = run(study, out)
    assert failed == 0
    rows = results.rows
    assert set(rows.run) == {"untrained-valid", "sod-valid"}
    assert set(rows.padding) == {"valid"}
    assert set(rows[rows.run == "sod-valid"].weights) == {"trained"}
    scores = rows[rows.readout == ""]
    assert {"max F-measure", "MAE", "S-measure", "max E-measure"} <= set(scores[scores.stages == ""].metric)
    assert {"max F-measure", "MAE"} <= set(scores[scores.stages == "position alone"].metric)
    assert set(scores.stages) == {"", "position alone"}
    assert set(scores.target) == set(scores.scale) == {""}
    runs = results.runs.set_index("run")
    assert runs.index.tolist() == ["untrained-valid", "sod-valid"]
    assert runs.pair.tolist() == runs.group.tolist() == runs.index.tolist()
    assert runs.image_px.tolist() == [32, 32]
    assert "trained by" in runs.how["sod-valid"]
    assert results.missing.empty
    black = rows[(rows.stimulus == "black") & (rows.metric == "spc")]
    assert black.value.abs().max() < 1e-9
    trajectory = results.trajectory
    assert {"spc", "mae", "nmae", "start", "change", "max F-measure", "MAE"} <= set(trajectory.metric)
    assert sorted(trajectory[(trajectory.target == "H") & (trajectory.metric == "spc")].step) == [1, 3]
    assert "sod-valid/scenes/G/error" in results.maps

    again, _, messages = run(study, out)
    assert messages == ["1/2 untrained-valid: done before", "2/2 sod-valid: done before"]
    assert again.rows.equals(Results.load(out).rows)

    edit(study, lambda s: s["encoders"]["untrained-valid"].update(padding="zeros"))
    _, _, messages = run(study, out)
    assert messages == ["1/2 untrained-valid: done", "2/2 sod-valid: done before"]
    edit(study, lambda s: s["encoders"]["untrained-valid"].update(padding="valid"))
    assert run(study, out)[0].rows.equals(again.rows)  # what was found under the old options is found again


def test_a_change_reruns_only_what_it_changes(study, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []
    first, _, _ = run(study, out)
    trained = list(out.glob("cells/*/training-*/*.ckpt"))
    monkeypatch.setattr(runner, "probe_encoder", spy(calls, "probe", runner.probe_encoder))
    monkeypatch.setattr(runner, "score", spy(calls, "score", runner.score))

    edit(study, lambda s: s.update(limit_test=4))  # a training is not a matter of how it is probed
    results, _, _ = run(study, out)
    assert [name for name, _ in calls] == ["probe", "probe"]
    assert list(out.glob("cells/*/training-*/*.ckpt")) == trained
    calls.clear()

    edit(study, lambda s: s["encoders"]["sod-valid"].update(readouts=[{}, {"kernel_size": 1}]))
    more, _, messages = run(study, out)
    assert messages == ["1/2 untrained-valid: done before", "2/2 sod-valid: done"]
    assert [[r.kernel_size for r in given[3].readouts] for _, given in calls] == [[1]]
    assert set(more.rows[more.rows.run == "sod-valid"].kernel_size.dropna()) == {1, 3}
    old = more.rows[more.rows.kernel_size != 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(old, results.rows, check_dtype=False)
    calls.clear()

    edit(study, lambda s: s["encoders"]["sod-valid"].update(readouts=[{"kernel_size": 1}], scores={"again": {}}))
    fewer, _, _ = run(study, out)
    assert [name for name, _ in calls] == ["score"]
    assert set(fewer.rows[fewer.rows.run == "sod-valid"].kernel_size.dropna()) == {1}
    assert set(fewer.rows[fewer.rows.metric == "MAE"].stimulus) == {"again"}
    assert first.trajectory.equals(fewer.trajectory)


def test_a_readout_that_is_added_leaves_the_first_ones_maps_and_profile(study, tmp_path):
    def readouts(*given):
        def change(s):
            s["encoders"] = {"untrained-valid": {**s["encoders"]["untrained-valid"], "readouts": list(given)}}

        return change

    out = tmp_path / "out"
    first, _, _ = run(edit(study, readouts({})), out)
    more, _, _ = run(edit(study, readouts({}, {"kernel_size": 1})), out)
    assert all((more.maps[key] == first.maps[key]).all() for key in first.maps)
    pd.testing.assert_frame_equal(more.profile, first.profile)
    other, _, _ = run(edit(study, readouts({"kernel_size": 1}, {})), out)  # now the other one is the headline
    fresh, _, _ = run(study, tmp_path / "fresh")
    assert any((other.maps[key] != first.maps[key]).any() for key in first.maps)
    assert all((other.maps[key] == fresh.maps[key]).all() for key in fresh.maps)
    pd.testing.assert_frame_equal(other.profile, fresh.profile)


def test_studies_that_share_a_folder_are_joined(study, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.yaml"
    content = yaml.safe_load(study.read_text())
    write(other, {**content, "encoders": {"untrained-valid": content["encoders"]["untrained-valid"]}})
    edit(other, lambda s: s["encoders"]["untrained-valid"].update(readouts=[{}, {"kernel_size": 1}]))
    edit(study, lambda s: s["encoders"].pop("sod-valid"))
    edit(study, lambda s: s["encoders"].update({"b": {**s["encoders"]["untrained-valid"], "padding": "zeros"}}))
    run(study, out)
    both, _, messages = run(other, out)
    assert messages == ["1/1 untrained-valid: done"]
    assert set(both.rows.run) == {"untrained-valid", "b"}
    again, _, _ = run(study, out)  # of a cell that both have, the readouts of both
    assert set(again.rows.kernel_size.dropna()) == {1, 3}
    # one cell at another scale leaves the others what they are
    scaled, _, _ = run(study, out, only=["b"], changes=["limit_train=10"])
    assert set(scaled.rows.run) == {"untrained-valid", "b"}
    assert scaled.missing.empty
    assert run([study, other], tmp_path / "new")[2] == ["1/2 untrained-valid: done", "2/2 b: done"]


def test_a_cell_that_another_process_runs_is_left_to_it(study, tmp_path):
    lock = tmp_path / "out" / "cells" / "untrained-valid-seed0" / "lock"
    lock.parent.mkdir(parents=True)
    edit(study, lambda s: s["encoders"].pop("sod-valid"))
    with FileLock(lock):
        results, failed, messages = run(study, tmp_path / "out")
    assert (len(results.rows), failed) == (0, 0)
    assert messages == ["1/1 untrained-valid: another process is running it"]
    assert run(study, tmp_path / "out")[2] == ["1/1 untrained-valid: done"]


def test_a_training_that_was_killed_before_it_was_recorded_is_scored(study, tmp_path):
    out = tmp_path / "out"
    whole, _, _ = run(study, out)
    (record,) = out.glob("cells/*/*/trained.json")
    record.unlink()
    edit(study, lambda s: s["encoders"]["sod-valid"].update(scores={"again": {}}))
    again, failed, _ = run(study, out)
    assert failed == 0
    assert again.trajectory.equals(whole.trajectory)


def test_an_encoder_from_a_checkpoint_is_trained(study, tmp_path):
    run(study, tmp_path / "out")
    (checkpoint,) = tmp_path.glob("out/cells/*/*/resume.ckpt")

    def probe_it(s):
        s["encoders"] = {"again": {"encoder": str(checkpoint)}, "sod-valid": s["encoders"]["sod-valid"]}

    rows = run(edit(study, probe_it), tmp_path / "out")[0].rows
    rows = rows[(rows.metric == "spc") & (rows.stimulus == "scenes")]
    assert set(rows.weights) == {"trained"}
    assert not (rows.task == "untrained").any()
    one, other = (rows[rows.run == name].value.tolist() for name in ("again", "sod-valid"))
    assert one == other


def spy(calls, name, function):
    def called(*args, **kwargs):
        calls.append((name, args))
        return function(*args, **kwargs)

    return called


def test_the_best_weights_are_scored_and_probed_where_the_config_says_what_is_best(study, tmp_path):
    def keep_the_first(s):
        callback = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "epoch", "mode": "min", "filename": "best", "save_last": True},
        }
        s["encoders"]["sod-valid"]["overrides"]["trainer.callbacks"] = [callback]
        s["encoders"] = {"sod-valid": s["encoders"]["sod-valid"]}

    out = tmp_path / "out"
    best, failed, _ = run(edit(study, keep_the_first), out)
    assert failed == 0
    (record,) = out.glob("cells/sod-valid-seed0/training-*/trained.json")
    assert json.loads(record.read_text()) == {"weights": "best.ckpt"}
    edit(study, lambda s: s["encoders"]["sod-valid"]["overrides"].update({"trainer.callbacks": []}))
    last, _, _ = run(study, out)
    rows = [r.rows[(r.rows.readout == "") & (r.rows.metric == "MAE") & (r.rows.stages == "")] for r in (best, last)]
    assert rows[0].value.item() != rows[1].value.item()


def test_cells_can_be_chosen_listed_and_run_in_any_order(study, tmp_path):
    out, beside = tmp_path / "out", set(os.listdir())
    edit(study, lambda s: s["encoders"].update({"seeds": {**s["encoders"]["untrained-valid"], "seeds": [0, 1]}}))
    names = ["untrained-valid", "sod-valid", "seeds-seed0", "seeds-seed1"]
    assert list(dry_run(read_study(study), out)) == [f"{name}: to do" for name in names]
    for name in ("seeds-seed1", "untrained-*"):
        results, _, messages = run(study, out, only=[name])
        assert len(messages) == 1
    assert set(results.rows.run) == {"seeds-seed1", "untrained-valid"}
    assert results.missing.values.tolist() == [["sod-valid", "not run yet"], ["seeds-seed0", "not run yet"]]
    assert list(dry_run(read_study(study), out)) == [
        "untrained-valid: done, took 1 min",
        "sod-valid: to do",
        "seeds-seed0: to do; untrained-valid took 1 min",
        "seeds-seed1: done, took 1 min",
    ]
    whole, _, _ = run(study, out)
    assert set(whole.rows.run) == set(names)
    assert whole.runs.set_index("run").group["seeds-seed1"] == "seeds"
    assert load_results(out).rows.equals(Results.load(out).rows)
    assert set(os.listdir()) == beside


def test_claims_tables_and_references_stay_with_the_results(study, tmp_path):
    row = {"label": "untrained", "run": "untrained-valid"}
    table = {"name": "one", "title": "One", "rows": [row], "columns": [{"label": "black", "stimulus": "black"}]}
    value = {"run": "untrained-valid", "stimulus": "black", "target": "H"}
    claim = {"name": "blind", "says": "Without padding nothing is seen on black", "value": value, "equals": 0}
    reference = {"run": "untrained-valid", "stimulus": "black", "target": "H", "metric": "spc", "value": 0.25}
    pd.DataFrame([reference]).to_csv(tmp_path / "paper.csv", index=False)

    def state(s):
        del s["encoders"]["sod-valid"]
        s.update(title="Blind", tables=[table], claims=[claim], references={"file": "paper.csv", "tolerance": 0.1})

    results, _, _ = run(edit(study, state), tmp_path / "out")
    for found in (results, load_results(tmp_path / "out"), Results.load(tmp_path / "out")):
        assert found.about["title"] == "Blind"
        assert (found.about["tables"], found.about["claims"], found.about["tolerance"]) == ([table], [claim], 0.1)
        assert found.references.value.tolist() == [0.25]
        assert found.claims.claim.tolist() == ["blind"]


def test_a_pair_is_renamed_without_a_run(study, tmp_path):
    edit(study, lambda s: s["encoders"].pop("sod-valid"))
    edit(study, lambda s: s.update(train="noise", test={"black": "black"}, limit_train=8))
    edit(study, lambda s: s["encoders"]["untrained-valid"].update(context=True, padding="zeros"))
    run(study, tmp_path / "out")
    edit(study, lambda s: s["encoders"]["untrained-valid"].update(pair="vgg"))
    results, _, messages = run(study, tmp_path / "out")
    assert messages == ["1/1 untrained-valid: done before"]
    assert results.runs.run.tolist() == ["untrained-valid", "untrained-valid-context"]
    assert set(results.runs.pair) == {"vgg"}


def test_a_file_of_trained_readouts_can_be_probed_with(study, tmp_path):
    path = tmp_path / "readouts.safetensors"
    encoder = load_encoder("smp:vgg11", padding="valid", options=OPTIONS)
    probe_encoder(
        encoder, "noise", image_size=32, grid=8, epochs=1, limit_train=8, untrained=0, targets=["H"], save_to=path
    )
    edit(study, lambda s: s["encoders"].pop("sod-valid"))
    results, failed, _ = run(edit(study, lambda s: s.update(readouts=str(path))), tmp_path / "out")
    assert failed == 0
    assert set(results.rows[results.rows.readout == "posenet"].target) == {"H"}
    assert run(study, tmp_path / "out")[2] == ["1/1 untrained-valid: done before"]


def test_a_folder_of_version_0_1_is_refused(study, tmp_path):
    plan = tmp_path / "out" / "studies" / "study.json"
    plan.parent.mkdir(parents=True)
    plan.write_text(json.dumps({"cells": {}, "missing": {}}))
    for act in (lambda: run(study, tmp_path / "out"), lambda: load_results(tmp_path / "out")):
        with pytest.raises(ValueError, match=r"by another version of padprobe.*use another --out folder"):
            act()


def test_a_training_that_broke_goes_on_from_its_last_epoch_and_ends_as_one_that_did_not(study, tmp_path):
    def breaks(whole):
        def change(s):
            overrides = s["encoders"]["sod-valid"]["overrides"]
            init = {"log": str(tmp_path / f"{whole}.log"), "whole": whole}
            overrides["trainer.max_epochs"] = 4
            overrides["trainer.callbacks"] = [
                {"class_path": "padprobe.PositionProbeCallback", "init_args": {"image_size": 32, "grid": 8}},
                {"class_path": "tests.study.conftest.Breaks", "init_args": init},
            ]
            s["encoders"] = {"sod-valid": s["encoders"]["sod-valid"]}

        return change

    whole, failed, _ = run(edit(study, breaks(True)), tmp_path / "whole")
    assert failed == 0
    broken, failed, _ = run(edit(study, breaks(False)), tmp_path / "out")
    assert failed == 1
    assert "failed: RuntimeError: the machine went away" in broken.missing.why.item()
    again, failed, _ = run(study, tmp_path / "out")
    assert failed == 0
    assert (tmp_path / "False.log").read_text().split() == ["0", "1", "2", "2", "3"]
    assert again.rows.equals(whole.rows)
    assert again.trajectory.equals(whole.trajectory)
    assert len(again.trajectory)


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_as_one_that_is_not(study, tmp_path):
    def start(out):
        command = [sys.executable, "-m", "padprobe.cli", "study", str(study), "--out", str(out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    begun = time.perf_counter()
    whole = start(tmp_path / "whole")
    assert (whole.communicate()[1], whole.returncode)[1] == 0
    duration, rng, messages = time.perf_counter() - begun, random.Random(0), ""
    for _ in range(4):
        process = start(tmp_path / "killed")
        time.sleep(duration * rng.uniform(0.3, 0.9))
        process.kill()
        messages += process.communicate()[1]
    process = start(tmp_path / "killed")
    messages += process.communicate()[1]
    assert process.returncode == 0
    for name in ("untrained-valid", "sod-valid"):
        assert messages.count(f"{name}: done\n") <= 1
        (probe,) = (tmp_path / "killed" / "cells" / f"{name}-seed0").glob("probe-*")
        assert len(list(probe.glob("*/results.csv"))) == 1
    for file in ("results.csv", "trajectory.csv", "profile.csv"):
        assert (tmp_path / "killed" / file).read_text() == (tmp_path / "whole" / file).read_text()
    maps = [Results.load(tmp_path / name).maps for name in ("killed", "whole")]
    assert maps[0].keys() == maps[1].keys()
    assert all((maps[0][key] == maps[1][key]).all() for key in maps[0])


def test_a_failed_cell_leaves_a_log_and_the_others_go_on(study, tmp_path):
    # the images fit the encoder, but the logged metric that the checkpoint waits for never comes
    def fail(s):
        s["encoders"]["sod-valid"]["overrides"]["trainer.callbacks"] = [
            {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "nothing"}}
        ]
        s["encoders"] = dict(reversed(list(s["encoders"].items())))

    out = tmp_path / "out"
    results, failed, messages = run(edit(study, fail), out)
    assert failed == 1
    assert "FAILED" in messages[0]
    assert "nothing" in (out / "cells" / "sod-valid-seed0" / "error.log").read_text()
    assert set(results.rows.run) == {"untrained-valid"}
    assert not (out / "cells" / "sod-valid-seed0" / "results.csv").exists()


def test_weights_that_cannot_be_fetched_fail_their_own_cell_alone(study, tmp_path, monkeypatch):
    def fetch(name, weights, *args, **options):
        if weights == "IMAGENET1K_V1":
            raise URLError("no network")
        return load_encoder(name, weights, *args, **options)

    monkeypatch.setattr(runner, "load_encoder", fetch)

    def need_network(s):
        del s["encoders"]["sod-valid"]
        s["encoders"] = {"far": {"encoder": "torchvision:vgg11", "weights": "IMAGENET1K_V1"}, **s["encoders"]}

    lines = list(dry_run(read_study(edit(study, need_network)), tmp_path / "out"))
    assert lines[0] == "far: cannot run: <urlopen error no network>"
    assert lines[1] == "untrained-valid: to do"
    results, failed, messages = run(study, tmp_path / "out")
    assert failed == 1
    assert messages[0].startswith("far: FAILED: <urlopen error no network>")
    assert set(results.rows.run) == {"untrained-valid"}
    assert list(results.missing.what) == ["far"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(targetz=["H"]), "targetz"),
        (lambda s: s["encoders"]["sod-valid"].update(paddng="valid"), "paddng"),
        (lambda s: s["encoders"]["sod-valid"].update(fit="nothing.yaml"), r"'sod-valid': no config 'nothing\.yaml'"),
        (
            lambda s: s["encoders"]["untrained-valid"].update(encoder="smp:vgg61"),
            "'untrained-valid': unknown smp encoder",
        ),
        (lambda s: s["encoders"]["sod-valid"]["overrides"].update({"model.init_args.pading": "x"}), "pading"),
        (lambda s: s["test"].update(black="blakc"), "did you mean black"),
        (lambda s: s.update(targets=["H", "Q"]), "unknown target 'Q'"),
        (lambda s: s["encoders"]["sod-valid"].update(weights="imagenet"), "For a training state them as overrides"),
        (lambda s: s["encoders"]["sod-valid"].update(padding="valdi", overrides={}), "valdi"),
        (
            lambda s: s["encoders"]["sod-valid"]["overrides"].update(
                {
                    "trainer.callbacks": [
                        {"class_path": "padprobe.PositionProbeCallback", "init_args": {"encoder": "ent"}}
                    ]
                }
            ),
            "unknown encoder 'ent'",
        ),
        (lambda s: s.update(image_size=8), "too small"),
    ],
)
def test_bad_studies_are_named_before_anything_runs(study, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(edit(study, change), tmp_path / "out")
    assert not list((tmp_path / "out").glob("cells/*/results.csv"))


@pytest.mark.parametrize("path", sorted(Path("configs/study").rglob("*.yaml")), ids=str)
def test_every_study_can_be_read(path):
    if "encoders" in path.read_text() or "include" in path.read_text():
        assert read_study(path).name == path.stem


def test_the_quick_study_is_valid_and_names_all_its_cells():
    cells = {c.name: c.cell for c in read_study("configs/study/quick.yaml").cells}
    tasks = ("untrained", "classification", "sod", "ss", "ss-p0")
    assert list(cells) == [f"{task}-{mode}" for task in tasks for mode in ("zeros", "valid")]
    assert all(set(cell.test) == {"scenes", "black", "white", "noise"} for cell in cells.values())
    assert all(cell.targets == ["H", "V", "G", "HS", "VS"] for cell in cells.values())
