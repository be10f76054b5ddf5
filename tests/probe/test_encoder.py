import functools
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torchvision
from lightning.fabric import Fabric
from torch import nn

from padprobe import load_encoder, probe_encoder, set_padding
from padprobe.probe.options import ProbeOptions
from padprobe.readout.spec import Readout
from padprobe.results import COLUMNS, PROFILE, RUNS, Results

SMALL = {"image_size": 48, "grid": 14, "epochs": 8, "limit_train": 120, "limit_test": 40}


@pytest.fixture(scope="module")
def probed():
    """An untrained small VGG, with and without padding, read out on dead leaves."""
    found = {}
    for padding in ("zeros", "valid"):
        found[padding] = probe_encoder(small_vgg(padding), labels={"run": padding}, untrained=0, **SMALL)
    return found


def small_vgg(padding="zeros", seed=0):
    options = {"config": [8, "M", 16, 16, "M", 32], "out_channels": [8, 16, 32], "depth": 2, "batch_norm": True}
    return load_encoder("smp:vgg11", padding=padding, seed=seed, options=options)


def value(results: Results, stimulus, target, metric="spc", stages="all", **others):
    wanted = {"stimulus": stimulus, "target": target, "metric": metric, "stages": stages, **others}
    chosen = results.rows
    for column, content in wanted.items():
        chosen = chosen[chosen[column] == content]
    assert len(chosen) == 1, (wanted, chosen)
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
    assert set(rows.readout) == {"posenet", "variance"}
    assert set(rows[rows.readout == "variance"].metric) == {"eta2", "reach"}
    images = rows[(rows.stimulus == "dead_leaves") & (rows.readout == "posenet")]
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
    probe_encoder(encoder, images, test, image_size=32, grid=8, epochs=3, batch_size=8, untrained=0)
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
    probe_encoder(encoder, images, {}, normalize=True, image_size=32, grid=8, epochs=1, untrained=0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[0], (images - mean[:, None, None]) / std[:, None, None], atol=1e-6)


def test_bad_input_is_named_before_the_encoder_runs(vgg_options, tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match="the mine images are an empty data set"):
        probe_encoder(encoder, test={"mine": torch.rand(0, 3, 48, 48)}, **SMALL)
    with pytest.raises(ValueError, match=r"has shape \(3, 40, 40\); expected \(3, 48, 48\)"):
        probe_encoder(encoder, test={"mine": torch.rand(2, 3, 40, 40)}, **SMALL)
    with pytest.raises(ValueError, match=r"save_to needs the folder '.*nowhere', which does not exist"):
        probe_encoder(encoder, save_to=tmp_path / "nowhere" / "readouts.safetensors", **SMALL)
    with pytest.raises(ValueError, match="cache_dir needs the folder"):
        probe_encoder(encoder, cache_dir=tmp_path / "nowhere", **SMALL)
    with pytest.raises(ValueError, match=r"the twin's stages have channels .*: make a twin of the same architecture"):
        probe_encoder(encoder, twin=lambda seed: load_encoder("smp:vgg11", options={**vgg_options, **WIDER}), **SMALL)
    with pytest.raises(ValueError, match="cache_dir needs to write into the folder '/proc'"):
        probe_encoder(encoder, cache_dir="/proc", **SMALL)
    with pytest.raises(ValueError, match=r"save_to needs to write into the folder '/proc'"):
        probe_encoder(encoder, save_to="/proc/readouts.safetensors", **SMALL)
    with pytest.raises(ValueError, match="unknown label 'rnu'; did you mean 'run'"):
        probe_encoder(encoder, labels={"rnu": "a"}, **SMALL)
    with pytest.raises(ValueError, match="two of the test sets 1, 1 have the same name"):
        probe_encoder(encoder, test={1: "black", "1": "white"}, **SMALL)
    with pytest.raises(ValueError, match=r"the mine images are torch\.uint8; expected floating-point numbers"):
        probe_encoder(encoder, test={"mine": torch.zeros(2, 3, 48, 48, dtype=torch.uint8)}, **SMALL)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"the features of 120 images need .* GB in .*raise cache_gb"):
        probe_encoder(encoder, cache_dir=tmp_path, cache_gb=0, **SMALL)
    encoder.scale = Scale()
    with pytest.raises(ValueError, match=r"layer 'scale' \(Scale\) has parameters and no reset_parameters"):
        probe_encoder(encoder, **SMALL)
    assert not any(layer._forward_hooks for name, layer in encoder.named_modules() if name)


WIDER = {"config": [8, "M", 16, 16, "M", 48], "out_channels": [8, 16, 48]}


class Scale(nn.Module):
    """A parameter that nothing can draw anew."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def test_features_beyond_half_precision_are_refused(vgg_options):
    encoder = load_encoder("smp:vgg11", options={**vgg_options, "batch_norm": False})
    torch.nn.init.constant_(encoder.features[0].bias, 1e6)
    with pytest.raises(ValueError, match="half precision"):
        probe_encoder(encoder, torch.rand(4, 3, 32, 32), {}, image_size=32, grid=8, epochs=1)


def test_images_of_another_size_are_named():
    with pytest.raises(ValueError, match=r"has shape \(3, 32, 32\); expected \(3, 48, 48\) for image_size 48"):
        probe_encoder(small_vgg(), torch.rand(4, 3, 32, 32), {}, image_size=48)


TINY = {"image_size": 32, "grid": 8, "epochs": 2, "batch_size": 8, "limit_train": 25, "limit_test": 10}


@pytest.fixture(scope="module")
def several():
    """Every kind of readout, two seeds, two untrained twins and the context control in one run."""
    readouts = [Readout(), Readout(kernel_size=1), Readout("ridge", kernel_size=1), Readout(stages="each")]
    more = [Readout(stages="f1+f3"), Readout(kernel_size=5, scale="paper"), Readout(depth=2, padding=1)]
    arguments = {"readouts": readouts + more, "seeds": (0, 1), "untrained": 2, "context": True, **TINY}
    return probe_encoder(small_vgg(), labels={"run": "vgg-random-zeros", "weights": "random"}, **arguments)


def test_one_more_readout_or_seed_changes_no_result(several):
    alone = probe_encoder(small_vgg(), readouts=[Readout(stages="f1+f3")], untrained=0, context=True, **TINY)
    for target in ("H", "G", "VS"):
        for stages in ("f1+f3", "rgb"):
            expected = value(alone, "dead_leaves", target, stages=stages, padding="zeros")
            same = {"stages": stages, "readout": "posenet", "kernel_size": 3, "depth": 1, "seed": 0}
            assert value(several, "dead_leaves", target, run="vgg-random-zeros", **same) == expected


def test_every_variant_is_there_with_its_control_and_nothing_twice(several):
    rows = several.rows[several.rows.run == "vgg-random-zeros"]
    keys = ["readout", "kernel_size", "depth", "head_padding", "stages", "seed", "stimulus", "target", "metric"]
    assert not several.rows.duplicated(["run", *keys]).any()
    trained = rows[(rows.metric == "spc") & (rows.seed == 1)]
    found = set(
        trained[["readout", "kernel_size", "depth", "head_padding", "stages"]].itertuples(index=False, name=None)
    )
    paper = ("posenet", 3, 1, 0)
    expected = {(*paper, stages) for stages in ("all", "f1", "f2", "f3", "f1+f3", "rgb")}
    others = [("posenet", 1, 1, 0), ("posenet", 5, 1, 0), ("posenet", 3, 2, 1)]
    assert found == expected | {(*other, stages) for other in others for stages in ("all", "rgb")}
    ridge = rows[(rows.readout == "ridge") & (rows.metric == "spc")]
    assert set(ridge.seed) == {0}  # there is nothing random in it
    assert set(ridge.stages) == {"all", "rgb"}


def test_delta_is_the_difference_from_the_mean_twin(several):
    same = {"readout": "posenet", "kernel_size": 3, "depth": 1}
    for target in ("H", "HS"):
        for stages in ("all", "f2"):
            mine = {"stages": stages, **same, "run": "vgg-random-zeros", "seed": 1}
            twins = [
                value(
                    several, "dead_leaves", target, stages=stages, **same, run=f"vgg-random-zeros-untrained-seed{seed}"
                )
                for seed in (0, 1)
            ]
            delta = value(several, "dead_leaves", target, "delta", **mine)
            expected = value(several, "dead_leaves", target, **mine) - sum(twins) / 2
            assert delta == pytest.approx(expected, abs=1e-6)
    rgb = several.rows[(several.rows.metric == "delta") & (several.rows.stages == "rgb")]
    assert rgb.empty  # the image alone has no encoder
    twin_rows = several.rows[several.rows.run.str.startswith("vgg-random-zeros-untrained-")]
    assert set(twin_rows.weights) == set(twin_rows.task) == {"untrained"}
    assert twins[0] != twins[1]


def test_selectivity_is_what_a_readout_gets_right_beyond_a_permuted_target(several):
    rows = several.rows[(several.rows.run == "vgg-random-zeros") & (several.rows.stimulus == "dead_leaves")]
    spc = rows[(rows.metric == "spc") & (rows.stages == "all")].value
    selectivity = rows[(rows.metric == "selectivity") & (rows.stages == "all")].value
    assert len(spc) == len(selectivity)
    ridge = {"readout": "ridge", "run": "vgg-random-zeros"}
    chosen = [value(several, "dead_leaves", "H", metric, **ridge) for metric in ("spc", "selectivity")]
    assert chosen[0] > 0.4
    assert chosen[1] > 0.3


def test_with_real_context_the_unpadded_encoder_reads_no_position(several):
    run = {"run": "vgg-random-zeros-context", "padding": "valid"}
    for target in ("H", "V", "G"):
        assert abs(value(several, "dead_leaves", target, readout="ridge", **run)) < 0.2
        assert value(several, "dead_leaves", target, readout="ridge", run="vgg-random-zeros") > 0.35
    assert value(several, "black", "H", "constant", readout="ridge", **run) == 1


def test_eta_squared_needs_no_readout_and_finds_the_padding(several):
    eta2 = {
        run: value(several, "dead_leaves", "", "eta2", run=run)
        for run in ("vgg-random-zeros", "vgg-random-zeros-context")
    }
    assert eta2["vgg-random-zeros"] > 0.1
    assert abs(eta2["vgg-random-zeros-context"]) < 0.05
    cells = several.maps["vgg-random-zeros/dead_leaves/f3/eta2"]
    assert cells.mean() == pytest.approx(
        value(several, "dead_leaves", "", "eta2", "f3", run="vgg-random-zeros"), abs=1e-6
    )
    reach = [value(several, "", "", "reach", f"f{i}", run="vgg-random-zeros") for i in (1, 2, 3)]
    assert 0 < reach[0] < reach[1] < reach[2] <= 1


def test_the_border_profile_is_tidy_and_adds_up(several):
    profile = several.profile
    assert tuple(profile.columns) == PROFILE
    assert not profile.duplicated(
        ["run", "seed", "readout", "stages", "stimulus", "target", "metric", "distance"]
    ).any()
    mine = profile[(profile.run == "vgg-random-zeros") & (profile.stimulus == "dead_leaves")]
    mae = mine[(mine.metric == "mae") & (mine.target == "H")].sort_values("distance")
    assert mae.distance.tolist() == [2.0, 6.0, 10.0, 14.0]
    pixels = torch.tensor([448.0, 320.0, 192.0, 64.0])  # of the rings of 32 x 32
    whole = (torch.tensor(mae.value.tolist()) * pixels).sum() / 1024
    headline = {"readout": "posenet", "kernel_size": 3, "depth": 1, "run": "vgg-random-zeros", "seed": 0}
    assert whole == pytest.approx(value(several, "dead_leaves", "H", "mae", **headline), abs=1e-5)


def test_runs_say_what_each_run_is(several):
    runs = several.runs.set_index("run")
    assert tuple(several.runs.columns) == RUNS
    name = "vgg-random-zeros"
    assert list(runs.index) == [name, f"{name}-context", f"{name}-untrained-seed0", f"{name}-untrained-seed1"]
    assert set(several.rows.run) == set(several.profile.run) == set(runs.index)
    untrained = f"{name}-untrained"
    assert runs.group.tolist() == [name, f"{name}-context", untrained, untrained]
    assert runs.pair.tolist() == [name, name, untrained, untrained]  # context differs from the main run by padding
    assert runs.padding.tolist() == ["zeros", "valid", "zeros", "zeros"]
    assert runs.weights.tolist() == ["random", "random", "untrained", "untrained"]
    assert runs.seed.tolist() == [0, 0, 0, 1]
    assert set(runs.image_px) == {32}
    assert set(runs.source_px) == {50}  # what the small VGG needs around 32 px
    assert runs.shown_px.tolist() == [32, 50, 32, 32]
    assert set(runs.n_train) == {25}
    for how in runs.how:
        assert re.search(rf"on .* with torch {re.escape(torch.__version__)}, \d{{4}}-\d\d-\d\d, in \d+ (s|min)", how)
    assert set(several.rows.stimulus) == {"dead_leaves", "black", "white", "noise", ""}
    assert {key.split("/")[0] for key in several.maps} == {name, f"{name}-context"}


def test_an_untrained_network_scores_the_same_as_a_module_and_by_name():
    options = {**TINY, "image_size": 64, "targets": ["H"]}
    module = load_encoder("timm:resnet10t")
    before = {key: values.clone() for key, values in module.state_dict().items()}
    by_name = probe_encoder("timm:resnet10t", **options)
    as_module = probe_encoder(module, settle=True, labels={"weights": "whatever"}, **options)
    assert by_name.rows.value.tolist() == as_module.rows.value.tolist()
    assert all(torch.equal(before[key], values) for key, values in module.state_dict().items())
    as_it_is = probe_encoder(module, untrained=0, labels={"weights": "untrained"}, **options)
    assert as_it_is.rows.value.tolist() != by_name.rows.value.tolist()  # a label changes no measurement
    assert "delta" not in set(by_name.rows.metric)


def test_two_equal_probes_give_equal_tables_whatever_their_time():
    probes = [probe_encoder(small_vgg(), untrained=1, targets=["H"], **TINY) for _ in range(2)]
    for name in ("rows", "profile"):
        pd.testing.assert_frame_equal(getattr(probes[0], name), getattr(probes[1], name))


def test_options_come_in_one_object_or_by_name():
    options = ProbeOptions(targets=["H"], untrained=0, **{**TINY, "epochs": 1})
    together = probe_encoder(small_vgg(), options=options, epochs=2)
    apart = probe_encoder(small_vgg(), targets=["H"], untrained=0, **TINY)
    assert together.rows.value.tolist() == apart.rows.value.tolist()
    assert options.epochs == 1


def test_an_untrained_encoder_is_its_own_twin():
    results = probe_encoder("torchvision:squeezenet1_1", targets=["H"], **{**TINY, "image_size": 64})
    assert "delta" not in set(results.rows.metric)
    assert results.rows.run.nunique() == 1


def test_a_function_of_the_coordinates_is_a_target_like_any_other():
    results = probe_encoder(small_vgg(), targets=["H", to_the_corner], untrained=0, **TINY)
    assert set(results.rows.target) == {"H", "to_the_corner", ""}
    assert value(results, "dead_leaves", "to_the_corner", "mae") > 0


def to_the_corner(y, x):
    return (x**2 + y**2).sqrt()


def probe_here(fabric, readouts, cache_gb, folder):
    results = probe_encoder(small_vgg(), readouts=readouts, untrained=1, cache_gb=cache_gb, fabric=fabric, **TINY)
    if fabric.global_rank == 0:
        results.save(folder)


def test_two_processes_give_the_results_of_one(tmp_path):
    """25 and 10 images: the shares differ in size. Ridge in closed form and by gradients, trained readouts, eta2."""
    readouts = [Readout(), Readout("ridge", kernel_size=1), Readout("ridge", kernel_size=7)]
    found = []
    for devices, cache_gb in ((1, 8.0), (2, 0.0)):
        work = functools.partial(probe_here, readouts=readouts, cache_gb=cache_gb, folder=tmp_path / str(devices))
        Fabric(accelerator="cpu", devices=devices, strategy="ddp_spawn" if devices > 1 else "auto").launch(work)
        found.append(Results.load(tmp_path / str(devices)))
    one, both = found
    keys = ["run", "readout", "kernel_size", "stages", "seed", "stimulus", "target", "metric"]
    for ours, theirs in ((one.rows, both.rows), (one.profile, both.profile)):
        if "distance" in ours:
            keys = [*keys, "distance"]
        joined = ours.merge(theirs, on=keys, how="outer", suffixes=("", "_both"), indicator=True)
        assert (joined["_merge"] == "both").all()
        assert (joined.n.fillna(0) == joined.n_both.fillna(0)).all()
        joined["difference"] = (joined.value - joined.value_both).abs()
        # on images unlike those that the readouts are made on, ranks hang on rounding: constants are all near ties
        firm = joined[(joined.stimulus == "dead_leaves") | (joined.metric == "mae")]
        assert firm.difference.max() < 5e-3, firm.nlargest(5, "difference")[[*keys, "value", "difference"]]
        assert not (firm[(firm.readout == "ridge") & (firm.kernel_size == 1)].difference > 1e-4).any()
        exact = joined[joined.metric.isin(["eta2", "reach", "constant"])]
        assert (exact.value - exact.value_both).abs().max() < 1e-6
    assert one.maps.keys() == both.maps.keys()


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
            untrained=0,
        )
        scores[padding] = {t: value(results, "PASCAL-S", t) for t in ("H", "V", "G")}
    assert all(score > 0.4 for score in scores["zeros"].values())
    assert scores["zeros"]["H"] > scores["valid"]["H"] + 0.15
    assert scores["zeros"]["G"] > scores["valid"]["G"] + 0.15


def test_what_cannot_be_asked_for_is_named():
    for options, message in (
        ({"readouts": []}, "readouts is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"targets": ["H", "H"]}, "share a name"),
        ({"stages": "all"}, "stages is 'all'; expected 'auto', 'each_block', 'paper'"),
        ({"readouts": [Readout("ridge")], "limit_train": 4}, r"4 training image\(s\) and a ridge readout"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_encoder(small_vgg(), **{**TINY, **options})


def test_context_needs_an_encoder_that_can_do_without_padding():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pool, self.second = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.pool(self.first(nn.functional.pad(x, (1, 1, 1, 1))).relu())
            return self.second(nn.functional.pad(x, (1, 1, 1, 1)))

    with pytest.raises(ValueError, match=r"calls F.pad in its forward\(\)"):
        probe_encoder(Padded(), context=True, untrained=0, **TINY)


def test_a_deep_untrained_residual_network_does_not_explode():
    results = probe_encoder("torchvision:resnet152", targets=["H"], **{**TINY, "image_size": 64, "epochs": 1})
    assert value(results, "dead_leaves", "", "eta2") > 0.01


def test_what_a_probe_checks_beforehand_draws_no_random_number(vgg_options):
    """A data set that draws gives the images that it would have given, and the caller's random state is its own."""

    class Drawing(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            drawn.append(torch.rand(()).item())
            return torch.rand(3, 32, 32)

    def twin(seed):
        torch.rand(5)
        return load_encoder("smp:vgg11", options=vgg_options, seed=seed)

    drawn: list[float] = []
    torch.manual_seed(0)
    next(iter(torch.utils.data.DataLoader(Drawing(), 8)))
    expected = drawn.copy()
    drawn.clear()
    torch.manual_seed(0)
    small = {"image_size": 32, "grid": 8, "epochs": 1, "untrained": 1, "targets": ["H"], "twin": twin}
    probe_encoder(load_encoder("smp:vgg11", options=vgg_options), Drawing(), {}, **small)
    assert drawn[1:9] == expected  # the first draw is the check's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ["features.3", "features.3"]}, "expected each layer once"),
        ({"seeds": None}, "seeds is None; expected list"),
        ({"targets": ["Z"]}, "unknown target 'Z'"),
        ({"train": ""}, "the name of the image folder is empty"),
        ({"save_to": "."}, "save_to is the folder"),
    ],
)
def test_what_cannot_work_is_refused(vgg_options, changes, message):
    encoder = load_encoder("smp:vgg11", options=vgg_options)
    with pytest.raises(ValueError, match=message):
        probe_encoder(encoder, **{**SMALL, "untrained": 0, **changes})


def test_a_name_may_be_any_object(vgg_options):
    encoder = load_encoder("smp:vgg11", options=vgg_options)
    small = {**SMALL, "epochs": 1, "limit_train": 8, "untrained": 0, "targets": ["H"]}
    results = probe_encoder(encoder, test={1: "black"}, labels={"run": 5}, **small)
    assert set(results.rows.run) == {"5"}
    assert "5/1/H/error" in results.maps


def test_a_residual_network_without_padding_is_probed_and_reads_nothing_on_a_constant_image():
    head = list(torchvision.models.resnet18(weights=None).children())[:5]
    encoder = set_padding(nn.Sequential(*head), "valid")
    options = {"stages": ["2", "4"], "grid": 8, "epochs": 1, "selectivity": False, "settle": True}
    rows = probe_encoder(encoder, "noise", {"white": "white"}, image_size=96, limit_train=4, **options).rows
    assert (rows[(rows.metric == "spc") & (rows.stages == "all")].value == 0).all()


def test_a_twin_must_be_another_network():
    encoder = small_vgg()
    for twin, message in ((None, "a NoneType"), (encoder, "the encoder itself")):
        with pytest.raises(ValueError, match=f"function `twin` returns {message}"):
            probe_encoder(encoder, untrained=1, twin=lambda seed, twin=twin: twin, **TINY)
