import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import padprobe
from padprobe import PositionProbeCallback, load_encoder
from padprobe.cli import main
from padprobe.network.padding import list_padding
from padprobe.results import Results

OPTIONS = {"config": [8, "M", 16, "M", 16], "out_channels": [8, 16, 16], "depth": 2, "batch_norm": True}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(images / f"{i}.png")
    return images


def probe(folder, *options):
    common = ["--image-size", "64", "--epochs", "1", "--train", str(folder), "--out", str(folder.parent / "out")]
    return main(["probe", "--encoder", "torchvision:squeezenet1_1", "--test", f"mine={folder}", *common, *options])


def test_probe_writes_results_and_a_report(folder, capsys):
    assert probe(folder, "--limit-train", "8", "--limit-test", "4", "--targets", "H", "G") == 0
    results = Results.load(folder.parent / "out")
    trained = results.rows[results.rows.readout == "posenet"]
    assert set(trained.stimulus) == {"mine", "black", "white", "noise"}
    assert set(trained.target) == {"H", "G"}
    assert results.rows[results.rows.stimulus == "mine"].n.max() == 4
    printed = capsys.readouterr().out
    assert "report:" in printed
    assert (folder.parent / "out" / "report.html").is_file()


def test_readouts_controls_and_processes_are_options(folder):
    data = folder.parent / "weights.pth"
    torch.save(load_encoder("torchvision:squeezenet1_1", seed=5).state_dict(), data)
    more = ["--readouts", "posenet", "kernel_size=1,stages=f1", "ridge,kernel_size=1", "--untrained", "2"]
    assert probe(folder, "--weights", str(data), *more, "--devices", "2", "--strategy", "ddp_spawn") == 0
    results = Results.load(folder.parent / "out")
    rows = results.rows[results.rows.metric == "spc"]
    name = "squeezenet1_1-weights-zeros"
    assert set(rows.run) == {name, f"{name}-untrained-seed0", f"{name}-untrained-seed1"}
    assert results.runs.pair.tolist() == ["squeezenet1_1-weights", *["squeezenet1_1-weights-untrained"] * 2]
    assert set(rows[rows.run.str.contains("untrained")].seed) == {0, 1}
    assert set(zip(rows.readout, rows.kernel_size, rows.stages, strict=True)) == {
        *(("posenet", 3, stages) for stages in ("all", "rgb")),
        *(("posenet", 1, stages) for stages in ("f1", "rgb")),
        *(("ridge", 1, stages) for stages in ("all", "rgb")),
    }
    assert {"selectivity", "delta", "eta2"} <= set(results.rows.metric)
    assert not list((folder.parent / "out").glob("padprobe-*"))  # no features are left behind


def test_a_run_has_the_name_it_is_given_and_its_readouts_can_be_used_again(folder):
    file = folder.parent / "readouts.safetensors"
    common = ("--targets", "H", "--padding", "reflect")
    assert probe(folder, *common, "--name", "first", "--save-readouts", str(file)) == 0
    first = Results.load(folder.parent / "out")
    assert first.runs[["run", "pair", "padding"]].values.tolist() == [["first", "squeezenet1_1-untrained", "reflect"]]
    assert "BatchNorm statistics from a batch of training images" in first.runs.how.item()  # --weights untrained
    assert probe(folder, *common, "--readouts", str(file)) == 0
    again = Results.load(folder.parent / "out")
    assert again.runs.run.tolist() == ["squeezenet1_1-untrained-reflect"]
    assert again.runs.n_train.isna().all()
    assert again.rows.value.tolist() == first.rows.value.tolist()


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"padprobe {padprobe.__version__}\n"


def test_a_report_is_rebuilt_from_results_alone(folder, tmp_path, capsys):
    probe(folder, "--targets", "H")
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.html").is_file()
    assert (tmp_path / "again" / "report.md").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--padding", "valdi"], "unknown padding mode 'valdi'; did you mean 'valid'"),
        (["--targets", "HV"], "unknown target 'HV'"),
        (["--stages", "features.77"], "unknown layer 'features.77'"),
        (["--test", "/no/such/folder"], "'/no/such/folder' is neither a folder"),
        (["--weights", "nothing.pth"], "unknown weights 'nothing.pth'"),
        (["--limit-train", "0"], "limit_train is 0; expected 1 or more"),
        (["--readouts", "kernel_size=2"], "kernel_size is 2"),
        (["--readouts", "stages=f9"], "unknown stage 'f9'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, options, message):
    assert probe(folder, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("padprobe: ")
    assert message in error


def test_an_image_too_small_for_an_unpadded_vgg_names_the_smallest_that_works(folder, capsys):
    command = ["probe", "--encoder", "torchvision:vgg11", "--padding", "valid", "--image-size", "64"]
    assert main([*command, "--train", str(folder), "--out", str(folder.parent / "out")]) == 2
    error = capsys.readouterr().err
    smallest = re.search(r"64 x 64 image is too small for VGG.*the smallest that works is (\d+) x \1", error)
    assert smallest
    assert 64 < int(smallest.group(1)) < 224


@pytest.fixture
def config(tmp_path):
    """A two-step training, as a YAML."""
    content = {
        "model": {
            "class_path": "tasks.saliency.SaliencyTask",
            "init_args": {"encoder": "smp:vgg11", "encoder_options": OPTIONS, "image_size": 32},
        },
        "data": {
            "class_path": "tasks.data.scenes.ScenesDataModule",
            "init_args": {"train": 16, "val": 8, "test": 8, "image_size": 32, "batch_size": 8},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": str(tmp_path),
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "padprobe.PositionProbeCallback", "init_args": {"image_size": 32, "grid": 8}}],
        },
    }
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_fit_trains_from_yaml_and_its_checkpoint_can_be_probed_and_tested(config, tmp_path):
    assert main(["fit", "--config", str(config), "--model.init_args.encoder_padding=valid"]) == 0
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    encoder = load_encoder(checkpoint)
    assert list_padding(encoder) == []
    assert encoder.out_channels == [8, 16, 16]
    assert (
        main(
            ["test", "--config", str(config), "--model.init_args.encoder_padding=valid", "--ckpt_path", str(checkpoint)]
        )
        == 0
    )
    command = ["probe", "--encoder", str(checkpoint), "--image-size", "32", "--limit-train", "8", "--limit-test", "4"]
    script = Path(sys.executable).with_name(
        "padprobe"
    )  # in a process of its own: pytest's sys.path hides what it needs
    subprocess.run([script, *command, "--out", tmp_path / "out"], check=True, capture_output=True)
    assert set(Results.load(tmp_path / "out").rows.padding) == {"valid"}


@pytest.mark.slow
def test_a_named_run_is_trained_by_two_processes_resumed_and_never_overwritten(config, tmp_path):
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"].append(
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "best", "monitor": "val/max_fmeasure", "mode": "max", "save_last": True},
        }
    )
    config.write_text(yaml.safe_dump(content))
    (tmp_path / "tasks").symlink_to(Path(__file__).parents[1] / "tasks")
    script = Path(sys.executable).with_name("padprobe")
    command = [script, "fit", "--config", config, "--run", "first"]

    def fit(*options: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, env=environment)

    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    done = fit(*two)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "checkpoints" / "first"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1  # 16 images, 8 for each process

    refused = fit()
    assert refused.returncode
    assert "has checkpoints of an earlier run: resume it with --ckpt_path last" in refused.stderr
    refused = fit("--ckpt_path=last", "--model.init_args.encoder_padding=valid")
    assert "is of a run with encoder_padding 'zeros', and now it is 'valid'" in refused.stderr
    done = fit(*two, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert load_encoder(folder / "best.ckpt").out_channels == [8, 16, 16]


def test_an_unknown_key_in_a_config_is_named(config, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--model.init_args.pading=valid"])
    assert "pading" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys; from padprobe.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("fit", "validate", "test", "probe", "study", "report"):
        assert command in result.stdout


def test_a_study_that_could_run_nothing_says_what_is_missing_and_fails(tmp_path, capsys):
    config = tmp_path / "study.yaml"
    data = {"W": {"path": str(tmp_path / "w.pth"), "what": "VGG16's weights", "published": "http://a.b"}}
    encoders = {"vgg": {"encoder": "torchvision:vgg16", "weights": "${W}"}}
    config.write_text(yaml.safe_dump({"data": data, "encoders": encoders}))
    assert main(["study", str(config), "--only", "vgg", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "missing: " in error
    assert "VGG16's weights" in error


def test_every_option_of_the_callback_is_explained(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/quick/ss.yaml", "--trainer.callbacks.help", "padprobe.PositionProbeCallback"])
    words = " ".join(capsys.readouterr().out.split())
    for name in inspect.signature(PositionProbeCallback.__init__).parameters.keys() - {"self"}:
        explained = re.search(rf"--trainer\.callbacks\.{name} (.*?)\(type", words)
        assert explained, name
        assert re.search("[a-z]{2,} [a-z]{2,}", explained[1]), name


def test_the_callback_is_made_from_yaml(tmp_path, capsys):
    """Any module, any of its options."""
    config = yaml.safe_load(Path("configs/quick/ss.yaml").read_text())
    options = {"image_size": 96, "readout": "ridge", "kernel_size": 1, "each_stage": True, "every_n_steps": 2}
    config["trainer"]["callbacks"] = [{"class_path": "padprobe.PositionProbeCallback", "init_args": options}]
    config["trainer"] |= {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 1, "logger": False}
    config["trainer"] |= {"enable_checkpointing": False, "enable_progress_bar": False}
    config["data"]["init_args"] |= {"train": 32, "val": 16, "test": 16}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]) == 0
