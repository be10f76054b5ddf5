import json

import pytest
import yaml

from padprobe.results import Results
from padprobe.study import load_study, run_study

SCENES = "tasks.data.scenes"
OPTIONS = {"config": [8, "M", 16, "M", 16], "out_channels": [8, 16, 16], "depth": 2, "batch_norm": True}


@pytest.fixture
def study(tmp_path):
    """A study of an untrained and a trained encoder that takes a few seconds."""
    fit = {
        "model": {
            "class_path": "tasks.saliency.SaliencyTask",
            "init_args": {"encoder": "smp:vgg11", "encoder_options": OPTIONS, "image_size": 32},
        },
        "data": {
            "class_path": f"{SCENES}.ScenesDataModule",
            "init_args": {"train": 16, "val": 8, "test": 8, "image_size": 32, "batch_size": 8},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "callbacks": [{"class_path": "padprobe.PositionProbeCallback", "init_args": {"image_size": 32, "grid": 8}}],
        },
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(fit))
    content = {
        "image_size": 32,
        "targets": ["H", "G"],
        "train": {"class_path": f"{SCENES}.Scenes", "init_args": {"n": 24, "image_size": 32}},
        "test": {
            "scenes": {"class_path": f"{SCENES}.Scenes", "init_args": {"n": 8, "image_size": 32}},
            "black": "black",
        },
        "encoders": {
            "untrained-valid": {"encoder": "smp:vgg11", "options": OPTIONS, "padding": "valid"},
            "sod-valid": {
                "encoder": "smp:vgg11",
                "task": "SOD",
                "data": "scenes",
                "fit": str(tmp_path / "fit.yaml"),
                "overrides": {"model.init_args.encoder_padding": "valid"},
            },
        },
    }
    return write(tmp_path / "study.yaml", content)


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def edit(path, change):
    content = yaml.safe_load(path.read_text())
    change(content)
    return write(path, content)


def run(path, out):
    said = []
    results, failed = run_study(path, out, lambda *args: None, said.append)
    return results, failed, said


def test_a_study_trains_probes_scores_and_runs_each_cell_once(study, tmp_path):
    out = tmp_path / "out"
    results, failed, said = run(study, out)
    assert failed == 0
    rows = results.rows
    assert set(rows.run) == {"untrained-valid", "sod-valid"}
    assert set(rows.padding) == {"valid"}
    assert set(rows[rows.run == "sod-valid"].weights) == {"trained"}
    of_task = {"max F-measure", "mean F-measure", "adaptive F-measure", "MAE"}
    alone = {f"{metric}, position alone" for metric in of_task}
    assert set(rows[rows.readout == ""].metric) == of_task | alone | {"S-measure", "max E-measure"}
    black = rows[(rows.stimulus == "black") & (rows.metric == "spc")]
    assert black.value.abs().max() < 1e-9
    trajectory = results.trajectory
    assert set(trajectory.metric) == {"spc", "mae", "nmae", "before", "delta"} | of_task
    assert sorted(trajectory[(trajectory.target == "H") & (trajectory.metric == "spc")].step) == [1, 3]
    assert "sod-valid/scenes/G/error" in results.maps

    again, _, said = run(study, out)
    assert said == ["1/2 untrained-valid: done before", "2/2 sod-valid: done before"]
    assert again.rows.equals(Results.load(out).rows)

    edit(study, lambda s: s["encoders"]["untrained-valid"].update(padding="zeros"))
    _, _, said = run(study, out)
    assert said == ["1/2 untrained-valid: done", "2/2 sod-valid: done before"]


def test_a_failed_cell_leaves_a_log_and_the_others_go_on(study, tmp_path):
    # the images fit the encoder, but the logged metric that the checkpoint waits for never comes
    def fail(s):
        s["encoders"]["sod-valid"]["overrides"]["trainer.callbacks"] = [
            {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "nothing"}}
        ]
        s["encoders"] = dict(reversed(list(s["encoders"].items())))

    out = tmp_path / "out"
    results, failed, said = run(edit(study, fail), out)
    assert failed == 1
    assert "FAILED" in said[0]
    assert "nothing" in (out / "cells" / "sod-valid" / "error.log").read_text()
    assert set(results.rows.run) == {"untrained-valid"}
    assert not (out / "cells" / "sod-valid" / "results.csv").exists()


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
        (lambda s: s["encoders"]["sod-valid"].update(padding="valid"), "say them of a training as overrides"),
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


def test_the_quick_study_is_valid_and_names_all_its_cells():
    study = load_study("configs/study/quick.yaml")
    kinds = {name.rsplit("-", 1)[0] for name in study.encoders if not name.endswith("-p0")}
    assert kinds == {"untrained", "classification", "sod", "ss"}
    assert {name.rsplit("-", 1)[1] for name in study.encoders if not name.endswith("-p0")} == {"zeros", "valid"}
    assert set(study.test) == {"scenes", "black", "white", "noise"}
    assert json.dumps(study.targets) == '["H", "V", "G", "HS", "VS"]'
