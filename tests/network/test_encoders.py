import pytest
import torch
import torchvision

from padprobe import find_stages, load_encoder
from padprobe.network.encoders import find_encoder
from padprobe.network.padding import list_padding
from padprobe.network.twins import untrained_twin


def test_encoders_of_every_library_run(vgg_options):
    for name, options in (("torchvision:vgg11", {}), ("smp:vgg11", vgg_options), ("timm:convnext_atto", {})):
        encoder = load_encoder(name, options=options)
        assert not encoder.training
        assert len(find_stages(encoder)) >= 3


def test_untrained_weights_depend_on_the_seed_alone(vgg_options):
    state = torch.get_rng_state()
    first, same, other = (load_encoder("smp:vgg11", seed=s, options=vgg_options).state_dict() for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_options_shape_the_encoder(vgg_options):
    encoder = load_encoder("smp:vgg11", options=vgg_options)
    shapes = [f.shape for f in encoder(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(1, 8, 32, 32), (1, 16, 16, 16), (1, 32, 8, 8)]


def test_padding_is_set(vgg_options):
    assert list_padding(load_encoder("smp:vgg11", padding="valid", options=vgg_options)) == []


def test_a_state_dict_is_loaded_even_without_the_head(tmp_path, vgg_options):
    source = load_encoder("smp:vgg11", seed=3, options=vgg_options)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    loaded = load_encoder("smp:vgg11", tmp_path / "w.pth", options=vgg_options)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())


def test_weights_that_do_not_fit_are_refused(tmp_path, vgg_options):
    source = load_encoder("smp:vgg11", options=vgg_options).state_dict()
    torch.save({k: v for k, v in source.items() if k != "features.0.weight"}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"lacks features\.0\.weight"):
        load_encoder("smp:vgg11", tmp_path / "part.pth", options=vgg_options)
    torch.save(source, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other shapes for"):
        load_encoder("smp:vgg11", tmp_path / "other.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"cannot read .*junk\.pth"):
        load_encoder("smp:vgg11", tmp_path / "junk.pth", options=vgg_options)


def test_a_file_that_would_run_code_is_refused(tmp_path, vgg_options):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot read"):
        load_encoder("smp:vgg11", tmp_path / "evil.pth", options=vgg_options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("torchvision:vgg61",), "unknown torchvision encoder 'vgg61'; did you mean 'vgg1"),
        (("smp:resnet43",), "unknown smp encoder 'resnet43'; did you mean 'resnet34'"),
        (("timm:convnext_atom",), "unknown timm encoder 'convnext_atom'; did you mean 'convnext_atto'"),
        (("torchvison:vgg16",), "unknown encoder library 'torchvison'; did you mean 'torchvision'"),
        (("vgg16",), "expected 'torchvision:NAME'"),
        (("torchvision:vgg11", "IMAGENET1K_V7"), "unknown weights 'IMAGENET1K_V7'; did you mean 'IMAGENET1K_V1'"),
        (("torchvision:vgg11", "missing.pth"), "unknown weights 'missing.pth'"),
        (("smp:vgg11", "untrained", "same"), "unknown padding mode 'same'"),
        (("missing.ckpt",), "no checkpoint 'missing.ckpt'"),
    ],
)
def test_unknown_names_are_named_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(*arguments)


def test_real_vgg16_weights_load(data):
    encoder = load_encoder("torchvision:vgg16", data / "weights" / "vgg16_imagenet_features.pth")
    stored = torch.load(data / "weights" / "vgg16_imagenet_features.pth", weights_only=True)
    assert len(stored) == 26
    assert all(torch.equal(encoder.get_parameter(name), value) for name, value in stored.items())


def test_the_encoder_of_a_task_is_the_one_that_lies_least_deep():
    net = torch.nn.ModuleDict(
        {"net": torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"backbone": torch.nn.ReLU()})})}
    )
    assert find_encoder(net) == "net.encoder"
    assert find_encoder(torch.nn.ReLU()) == ""


def test_an_untrained_twin_keeps_the_architecture_and_padding_and_nothing_else():
    encoder = load_encoder("torchvision:resnet18", padding="reflect", seed=1)
    random = torch.get_rng_state()
    twin = untrained_twin(encoder, 0)
    assert torch.equal(random, torch.get_rng_state())
    assert list_padding(twin) == list_padding(encoder)
    for (name, mine), theirs in zip(encoder.named_parameters(), twin.parameters(), strict=True):
        assert mine.shape == theirs.shape
        assert "conv" not in name or not torch.equal(mine, theirs)
    again, other = untrained_twin(encoder, 0), untrained_twin(encoder, 1)
    assert torch.equal(twin.conv1.weight, again.conv1.weight)
    assert not torch.equal(twin.conv1.weight, other.conv1.weight)
    with pytest.raises(ValueError, match=r"layer '.*' \(CNBlock\) has parameters and no reset_parameters"):
        untrained_twin(load_encoder("torchvision:convnext_tiny"), 0)


def test_smps_encoders_take_torchvisions_weights_and_timms_models(monkeypatch):
    theirs = torchvision.models.vgg11(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models.VGG11_Weights, "get_state_dict", lambda self, **_: dict(theirs))
    encoder = load_encoder("smp:vgg11", "IMAGENET1K_V1")
    assert torch.equal(encoder.features[0].weight, theirs["features.0.weight"])
    assert torch.equal(encoder.features[18].weight, theirs["features.18.weight"])
    with pytest.raises(ValueError, match=r"unknown weights 'IMAGENET1K_V2'.*'IMAGENET1K_V1'"):
        load_encoder("smp:vgg11", "IMAGENET1K_V2")
    timm_encoder = load_encoder("smp:tu-resnet10t", options={"depth": 3})
    assert len(timm_encoder(torch.rand(1, 3, 32, 32))) == 4
    with pytest.raises(ValueError, match=r"unknown timm encoder 'resnet10'"):
        load_encoder("smp:tu-resnet10")


@pytest.mark.parametrize("prefix", ["", "module.", "net.encoder.", "_orig_mod."])
def test_a_state_dict_may_be_part_of_another_and_lack_or_change_its_head(tmp_path, prefix):
    source = load_encoder("torchvision:shufflenet_v2_x0_5", seed=3).state_dict()
    state = {prefix + key: value for key, value in source.items() if not key.startswith("fc.")}
    state[f"{prefix}fc.weight"] = torch.zeros(2, 1024)
    if prefix:
        state["decoder.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pth")
    loaded = load_encoder("torchvision:shufflenet_v2_x0_5", tmp_path / "w.pth").state_dict()
    assert all(torch.equal(loaded[key], source[key]) for key in source if not key.startswith("fc."))


def test_a_state_dict_that_is_not_whole_is_refused_with_its_keys(tmp_path, vgg_options):
    source = load_encoder("smp:vgg11", options=vgg_options).state_dict()
    first = "features.0.weight"
    step_counts = {key: value for key, value in source.items() if not key.endswith("num_batches_tracked")}
    part = dict(list(source.items())[:8])
    cases = {
        r"lacks features\.\d+\.\w+.* of 24 keys": part,
        r"has keys that it lacks: features\.99\.weight \(1 of": {**source, "features.99.weight": source[first]},
        r"features\.0\.weight has NaN": {**source, first: source[first] * torch.nan},
        r"features\.0\.weight is torch\.int8; expected floating": {**source, first: source[first].to(torch.int8)},
        r"hold 2 networks .* student\., teacher\.: save": {
            f"{p}.{k}": v for p in ("student", "teacher") for k, v in source.items()
        },
        r"holds no state dict": [source],
    }
    torch.save(step_counts, tmp_path / "w.pth")
    load_encoder("smp:vgg11", tmp_path / "w.pth", options=vgg_options)
    for message, state in cases.items():
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            load_encoder("smp:vgg11", tmp_path / "w.pth", options=vgg_options)
