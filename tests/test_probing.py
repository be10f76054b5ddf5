import pytest
import torch

from padprobe import load_encoder, probe_encoder
from padprobe.results import COLUMNS, Results

SMALL = {"image_size": 48, "grid": 14, "epochs": 8, "limit_train": 120, "limit_test": 40}


@pytest.fixture(scope="module")
def probed():
    """An untrained small VGG, with and without padding, read out on dead leaves."""
    options = {"config": [8, "M", 16, 16, "M", 32], "out_channels": [8, 16, 32], "depth": 2, "batch_norm": True}
    found = {}
    for padding in ("zeros", "valid"):
        encoder = load_encoder("smp:vgg11", padding=padding, options=options)
        found[padding] = probe_encoder(encoder, labels={"run": padding}, **SMALL)
    return found


def value(results: Results, stimulus, target, metric="spc", stages="all"):
    rows = results.rows
    chosen = rows[
        (rows.stimulus == stimulus) & (rows.target == target) & (rows.metric == metric) & (rows.stages == stages)
    ]
    assert len(chosen) == 1
    return chosen.value.item()


def test_padding_is_what_an_untrained_encoder_knows_position_from(probed):
    for target in ("H", "V", "G"):
        assert value(probed["zeros"], "dead_leaves", target) > 0.3
        assert abs(value(probed["valid"], "dead_leaves", target)) < 0.1


def test_an_unpadded_encoder_scores_zero_on_constant_images(probed):
    for stimulus in ("black", "white"):
        for target in ("H", "V", "G", "HS", "VS"):
            assert abs(value(probed["valid"], stimulus, target)) < 1e-9
            assert value(probed["valid"], stimulus, target, "constant") == 1


def test_the_rgb_control_knows_no_position_on_a_stationary_stimulus(probed):
    for target in ("H", "V", "G", "HS", "VS"):
        assert abs(value(probed["zeros"], "dead_leaves", target, stages="rgb")) < 0.05


def test_rows_are_tidy(probed):
    rows = probed["zeros"].rows
    assert tuple(rows.columns) == COLUMNS
    assert set(rows.padding) == {"zeros"}
    assert set(probed["valid"].rows.padding) == {"valid"}
    assert set(rows.readout) == {"posenet"}
    images = rows[rows.stimulus == "dead_leaves"]
    assert set(images.n) == {40}
    spc = images[images.metric == "spc"]
    assert ((spc.ci_low <= spc.value) & (spc.value <= spc.ci_high)).all()
    assert not rows.duplicated(["stages", "stimulus", "target", "metric"]).any()


def test_maps_are_means_over_the_stimulus(probed):
    maps = probed["zeros"].maps
    assert maps["zeros/dead_leaves/H/prediction"].shape == (48, 48)
    error = value(probed["zeros"], "dead_leaves", "H", "mae")
    assert maps["zeros/dead_leaves/H/error"].mean() == pytest.approx(error, abs=1e-5)


def test_the_encoder_is_left_as_it_was_and_sees_every_image_once(vgg_options):
    encoder = load_encoder("smp:vgg11", options=vgg_options).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    seen = []
    handle = encoder.register_forward_hook(
        lambda m, args, out: seen.append(len(args[0])) if not args[0].is_meta else None
    )
    images = torch.rand(20, 3, 32, 32)
    test = {"a": images[:6], "black": "black"}
    probe_encoder(encoder, images, test, image_size=32, grid=8, epochs=3, batch_size=8)
    handle.remove()
    assert sum(seen) == 20 + 6 + 1
    assert encoder.training
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert not any(m._forward_hooks for m in encoder.modules())


def test_normalisation_is_that_of_imagenet(vgg_options):
    images = torch.rand(8, 3, 32, 32)
    encoder = load_encoder("smp:vgg11", options=vgg_options)
    seen = []
    encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0]) if not args[0].is_meta else None)
    probe_encoder(encoder, images, {}, normalize=True, image_size=32, grid=8, epochs=1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[0], (images - mean[:, None, None]) / std[:, None, None], atol=1e-6)


def test_bad_input_is_named_before_the_encoder_runs(vgg_options, tmp_path):
    encoder = load_encoder("smp:vgg11", padding="valid", options=vgg_options)
    encoder.register_forward_hook(lambda m, args, out: pytest.fail("it ran") if not args[0].is_meta else None)
    with pytest.raises(ValueError, match="unknown target 'X'"):
        probe_encoder(encoder, targets=["X"], **SMALL)
    with pytest.raises(ValueError, match=r"unknown layer 'features\.99'"):
        probe_encoder(encoder, stages=["features.99"], **SMALL)
    with pytest.raises(ValueError, match=r"16 x 16 image is too small .*: the smallest that works is"):
        probe_encoder(encoder, **{**SMALL, "image_size": 16})
    with pytest.raises(ValueError, match="no images in folder"):
        probe_encoder(encoder, test={"empty": tmp_path}, **SMALL)


def test_features_beyond_half_precision_are_refused(vgg_options):
    encoder = load_encoder("smp:vgg11", options={**vgg_options, "batch_norm": False})
    torch.nn.init.constant_(encoder.features[0].bias, 1e6)
    with pytest.raises(ValueError, match="half precision"):
        probe_encoder(encoder, torch.rand(4, 3, 32, 32), {}, image_size=32, grid=8, epochs=1)


@pytest.mark.slow
def test_real_vgg16_reads_out_as_the_paper_says_and_less_without_padding(data):
    """60 images and three epochs are few: the order is what must hold."""
    weights = data / "weights" / "vgg16_imagenet_features.pth"
    scores = {}
    for padding in ("zeros", "valid"):
        encoder = load_encoder("torchvision:vgg16", weights, padding)
        results = probe_encoder(
            encoder,
            data / "DUTS-TR" / "images",
            {"PASCAL-S": data / "PASCAL-S" / "images"},
            limit_train=60,
            limit_test=16,
        )
        scores[padding] = {t: value(results, "PASCAL-S", t) for t in ("H", "V", "G")}
    assert all(score > 0.4 for score in scores["zeros"].values())
    assert scores["zeros"]["H"] > scores["valid"]["H"] + 0.15
    assert scores["zeros"]["G"] > scores["valid"]["G"] + 0.15
