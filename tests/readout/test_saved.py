from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from padprobe import load_encoder, probe_encoder
from padprobe.maps import shuffled
from padprobe.readout.posenet import PosENet
from padprobe.readout.saved import load_readouts, save_readouts
from padprobe.readout.spec import Readout

LABELS = {"encoder": "small", "weights": "given", "run": "small"}


def images(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((n, 3, 24, 32), np.float32))


def small(width=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 8, 3, padding=1)
    )


def probe(encoder, path, **options):
    common = {"train": images(12), "test": {"new": images(5, 1)}, "image_size": (24, 32), "grid": 8, "untrained": 0}
    return probe_encoder(encoder, labels=LABELS, **{**common, "epochs": 2, "targets": ["H", "V"], **options})


def test_saved_readouts_score_an_encoder_as_they_did_when_they_were_trained(tmp_path):
    path = tmp_path / "readouts.safetensors"
    readouts = [Readout(), Readout(kernel_size=1, stages="each"), Readout(depth=2), Readout("ridge")]
    trained = probe(small(), path, readouts=readouts, seeds=[0, 3], save_to=path)
    again = probe_encoder(small(), "no folder", {"new": images(5, 1)}, readouts=path, labels=LABELS)
    rows = trained.rows[trained.rows.readout != "ridge"].reset_index(drop=True)
    assert len(rows)
    assert again.rows.equals(rows)
    assert all((again.maps[key] == trained.maps[key]).all() for key in again.maps)
    assert again.maps.keys() == trained.maps.keys()
    assert again.maps["small/new/H/error"].shape == (24, 32)


def test_they_read_the_layers_that_they_were_trained_on(tmp_path):
    path = tmp_path / "readouts.safetensors"
    trained = probe(small(), path, stages=["1", "3"], save_to=path)
    default = probe(small(), path, stages=["0", "3"], save_to=tmp_path / "other.safetensors")
    again = probe(small(), path, readouts=path)
    assert again.rows.equals(trained.rows)
    assert not again.rows.equals(default.rows)


def test_they_score_another_network_of_the_same_architecture_without_training(tmp_path):
    path = tmp_path / "readouts.safetensors"
    trained = probe(small(), path, save_to=path)
    other = small()
    nn.init.zeros_(other[3].weight)
    scored = probe(other, path, readouts=path)
    key = ["stages", "target", "metric", "stimulus"]
    both = trained.rows.merge(scored.rows, on=key, suffixes=("", "_other"))
    spc = both[(both.metric == "spc")].set_index("stages")
    assert (spc.loc["all"].value != spc.loc["all"].value_other).all()
    assert (spc.loc["rgb"].value == spc.loc["rgb"].value_other).all()


def test_what_they_do_not_fit_is_named(tmp_path):
    path = tmp_path / "readouts.safetensors"
    probe(small(), path, save_to=path)
    with pytest.raises(ValueError, match="reads 14 channels, and those of Sequential have 17"):
        probe(small(9), path, readouts=path)
    with pytest.raises(ValueError, match="leave context"):
        probe(small(), path, readouts=path, context=True)
    with pytest.raises(ValueError, match="no file of readouts"):
        load_readouts(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match="holds no readouts"):
        load_readouts(tmp_path / "text.safetensors")


def diagonal(y, x):
    return (x + y) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"targets": [diagonal]}, "cannot be saved"), ({"readouts": [Readout("ridge")]}, "no trained readouts")],
)
def test_what_cannot_be_saved_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        probe(small(), tmp_path, save_to=tmp_path / "readouts.safetensors", **options)


@pytest.mark.parametrize("depth", [1, 2])
def test_controls_of_an_older_permutation_are_left_out(tmp_path, monkeypatch, depth):
    made = PosENet(4, ["H", "V", shuffled("H", 6), shuffled("V", 6)], 3, depth, 1, 6, 12).eval()
    facts = {"grid": 6, "image_size": 12, "normalize": False, "selectivity": True, "layers": ["0"]}
    monkeypatch.setattr("padprobe.readout.saved.PERMUTATION", 1)
    save_readouts(tmp_path / "old.safetensors", {(Readout(depth=depth), 0): made}, ["H", "V"], **facts)
    monkeypatch.undo()
    old = load_readouts(tmp_path / "old.safetensors")
    targets_alone = PosENet(4, ["H", "V"], 3, depth, 1, 6, 12).eval()
    targets_alone.load_state_dict(old.states[0])
    features = torch.rand(2, 4, 6, 6)
    assert not old.selectivity
    assert torch.allclose(targets_alone(features), made(features)[:, :2])


def test_the_shipped_readouts_are_small_and_read_position_out_of_vgg16(data):
    path = Path("checkpoints/vgg16_readouts.safetensors")
    assert path.stat().st_size < 1e6
    encoder = load_encoder("torchvision:vgg16", data / "weights" / "vgg16_imagenet_features.pth")
    results = probe_encoder(encoder, test={"PASCAL-S": data / "PASCAL-S" / "images"}, readouts=path, limit_test=12)
    rows = results.rows[(results.rows.metric == "spc") & (results.rows.stages == "all")].set_index("target").value
    assert (rows[["H", "V", "G"]] > 0.6).all()
    assert (rows[["HS", "VS"]] > 0.25).all()
    # without padding nothing is left of it but content
    blind = probe_encoder(
        load_encoder("torchvision:vgg16", data / "weights" / "vgg16_imagenet_features.pth", "valid"),
        test={"black": "black"},
        readouts=path,
    )
    assert blind.rows[(blind.rows.metric == "spc")].value.abs().max() == 0
