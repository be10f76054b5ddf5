import contextlib
import copy
import io

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import AvgPool2dSame, Conv2dSame, ScaledStdConv2dSame, StdConv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from padprobe import find_stages, load_encoder, set_padding
from padprobe.network.padding import as_built, list_padding, padding_of
from padprobe.network.reach import padding_reach
from padprobe.network.tap import StageTap


def spread(encoder: nn.Module, image: torch.Tensor) -> dict[str, float]:
    """(max - min) over space of each stage's features, as a fraction of their scale: the worst channel."""
    found = {}

    def keep(name):
        def hook(module, args, output):
            found[name] = ((output.amax((2, 3)) - output.amin((2, 3))).max() / output.abs().max()).item()

        return hook

    handles = [encoder.get_submodule(s).register_forward_hook(keep(s)) for s in find_stages(encoder)]
    with torch.no_grad():
        encoder(image)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def vgg16() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.vgg16().features.eval()


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_an_unpadded_vgg16_is_blind_on_a_constant_image_and_a_padded_one_is_not(vgg16, value):
    """A black image too: biases alone are constant, but they are zero in an untrained VGG, so give them values."""
    for layer in vgg16:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.bias, 0.05)
    image = torch.full((1, 3, 224, 224), value)
    blind = spread(set_padding(vgg16, "valid"), image)
    seeing = spread(set_padding(vgg16, "zeros"), image)
    assert len(blind) == 5
    assert max(blind.values()) < 1e-5
    assert all(s > 0.01 for s in list(seeing.values())[1:])
    assert next(iter(seeing.values())) > 1e-3


def test_real_vgg16_weights_without_padding_are_blind_on_a_constant_image(data):
    from padprobe import load_encoder

    weights = data / "weights" / "vgg16_imagenet_features.pth"
    image = torch.full((1, 3, 224, 224), 0.5)
    assert max(spread(load_encoder("torchvision:vgg16", weights, "valid").features, image).values()) < 1e-5
    assert min(spread(load_encoder("torchvision:vgg16", weights).features, image).values()) > 0.01


@pytest.mark.parametrize("mode", ["zeros", "valid", "reflect", "replicate", "circular"])
def test_a_mode_is_what_a_convolution_built_with_it_does(mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, (5, 3), dilation=(1, 2), padding=(2, 2))
    amount = (0, 0) if mode == "valid" else (2, 2)
    twin = nn.Conv2d(3, 4, (5, 3), dilation=(1, 2), padding=amount, padding_mode="zeros" if mode == "valid" else mode)
    twin.load_state_dict(conv.state_dict())
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(set_padding(conv, mode)(image), twin(image))


def test_modes_can_follow_one_another_and_zeros_gives_the_built_network_back():
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    image = torch.rand(1, 3, 64, 64)
    before = network(image)
    for mode in ("circular", "valid", "reflect", "valid", "zeros"):
        assert set_padding(network, mode) is network
    assert torch.equal(network(image), before)


def test_as_built_is_temporary():
    network = set_padding(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.MaxPool2d(3, 1, 1)), "valid")
    image = torch.rand(1, 1, 9, 9)
    with as_built(network):
        assert network(image).shape[-1] == 9
    assert network(image).shape[-1] == 5


def test_same_padding_is_understood():
    network = nn.Conv2d(1, 1, 3, padding="same")
    image = torch.rand(1, 1, 8, 8)
    before = network(image)
    assert set_padding(network, "valid")(image).shape[-1] == 6
    assert torch.equal(set_padding(network, "zeros")(image), before)


def test_the_audit_lists_what_pads():
    network = torchvision.models.resnet18()
    rows = list_padding(network)
    assert rows[0] == ("conv1", (3, 3), "zeros")
    assert ("maxpool", (1, 1), "MaxPool2d") in rows
    assert list_padding(set_padding(network, "valid")) == []


def test_what_cannot_be_set_is_named():
    with pytest.raises(ValueError, match=r"'reflct'; did you mean 'reflect'"):
        set_padding(nn.Conv2d(1, 1, 3), "reflct")
    with pytest.raises(ValueError, match="'0' is a ZeroPad2d, which pads for another layer"):
        set_padding(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 1, 3)), "partial")
    with pytest.raises(ValueError, match="unknown axis 'x'"):
        set_padding(nn.Conv2d(1, 1, 3), "valid", axis="x")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("inception_v3", r"'Mixed_5b' \(InceptionA\) calls avg_pool2d"),
        ("swin_t", r"'features.1.0.attn' .* calls F.pad"),
    ],
)
def test_a_module_that_pads_in_its_forward_is_named_before_anything_is_changed(name, layer):
    options = {"init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        network = getattr(torchvision.models, name)(weights=None, **options)
    before = [dict(vars(module)) for module in network.modules()]
    with pytest.raises(ValueError, match=layer):
        set_padding(network, "valid")
    assert [dict(vars(module)) for module in network.modules()] == before


def test_taps_do_not_keep_the_encoder_from_changing_its_padding():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    tap = StageTap(encoder, ["1"], 8)
    encoder(torch.rand(1, 3, 16, 16))
    padded = tap.take()
    set_padding(encoder, "valid")(torch.rand(1, 3, 16, 16))
    assert tap.take().shape == padded.shape


def test_the_cells_of_vgg16_that_padding_reaches_are_the_protocols():
    encoder = torchvision.models.vgg16().eval()
    reach = padding_reach(encoder, find_stages(encoder))
    assert [round(100 * mask.float().mean().item(), 1) for mask in reach.values()] == [3.5, 10.4, 32.5, 67.3, 98.0]
    assert not any(mask.any() for mask in padding_reach(set_padding(encoder, "valid"), find_stages(encoder)).values())


@pytest.mark.parametrize("architecture", ["vgg11_bn", "resnet18", "regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_padding_reaches_the_cells_that_change_with_the_values_in_it(architecture):
    """Independent of any geometry: pad with other values, and see what changes. (squeeze-excite is taken as local)"""
    torch.manual_seed(0)
    encoder = getattr(torchvision.models, architecture)(weights=None).eval()
    for layer in encoder.modules():
        if isinstance(layer, torchvision.ops.SqueezeExcitation):
            layer.forward = lambda x: x
    encoder.double()
    stages = find_stages(encoder, 96)
    image = torch.rand(1, 3, 96, 96, dtype=torch.float64) + 0.5
    before, after = ({}, {})
    for found, mode in ((before, "zeros"), (after, "circular")):
        set_padding(encoder, mode)
        hooks = [
            encoder.get_submodule(s).register_forward_hook(lambda m, a, out, s=s, f=found: f.update({s: out.clone()}))
            for s in stages
        ]
        with torch.no_grad():
            encoder(image)
        for hook in hooks:
            hook.remove()
    for stage, mask in padding_reach(encoder, stages, 96).items():
        changed = ((before[stage] - after[stage]).abs() > 1e-13)[0].any(0)
        assert not (changed & ~mask).any()
        assert (changed & mask).sum() >= 0.95 * mask.sum()  # a max-pool or ReLU may hide a change
    assert not any(module._forward_hooks for module in encoder.modules())


def test_padding_that_a_layer_works_out_for_itself_reaches_too():
    """torch's "same" and smp's Conv2dStaticSamePadding; and an encoder that normalises its input has no mark there."""
    same = nn.Sequential(nn.Conv2d(3, 2, 3, padding="same"), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    assert padding_reach(same, ["1"], 10)["1"].sum() == 100 - 64
    assert padding_reach(same, ["2"], 10)["2"].sum() == 25 - 9

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.same = same

        def forward(self, image):
            return self.same((image - 0.5) / 0.2)

    assert padding_reach(Normalised(), ["same.1"], 10)["same.1"].sum() == 36
    efficientnet = load_encoder("smp:efficientnet-b0")
    first = find_stages(efficientnet, 64)[0]
    mask = padding_reach(efficientnet, [first], 64)[first]
    assert not mask[1:-1, 1:-1].all()
    assert mask[-1].all() or mask[0].all()


# every layer that pads, and the padding (before, after) along height and width that it needs for 11 x 12 cells
LAYERS = {
    "conv": (lambda: nn.Conv2d(2, 3, (5, 3), 2, (2, 1), dilation=(1, 2)), ((2, 2), (1, 1))),
    "conv same, even kernel": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), ((1, 2), (1, 1))),
    "conv built circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), ((1, 1), (1, 1))),
    "Conv2dSame": (lambda: Conv2dSame(2, 3, 3, 2), ((1, 1), (0, 1))),
    "StdConv2dSame": (lambda: StdConv2dSame(2, 3, 3, 2), ((1, 1), (0, 1))),
    "ScaledStdConv2dSame": (lambda: ScaledStdConv2dSame(2, 3, 4, 1), ((1, 2), (1, 2))),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1), ((1, 1), (1, 1))),
    "MaxPool2dSame": (lambda: MaxPool2dSame(3, 2), ((1, 1), (0, 1))),
    "avg pool": (lambda: nn.AvgPool2d(3, 2, 1), ((1, 1), (1, 1))),
    "avg pool without its padding": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), ((1, 1), (1, 1))),
    "AvgPool2dSame": (lambda: AvgPool2dSame(3, 2), ((1, 1), (0, 1))),
    "ZeroPad2d": (lambda: nn.ZeroPad2d((1, 2, 3, 0)), ((3, 0), (1, 2))),
    "ConstantPad2d": (lambda: nn.ConstantPad2d((1, 2, 3, 0), 7.0), ((3, 0), (1, 2))),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d((1, 2, 3, 0)), ((3, 0), (1, 2))),
}
NUMPY = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap", "symmetric": "symmetric"}


def padded_by_hand(maps, sides, modes):
    """numpy's padding, width after height; a mode of None leaves the axis alone."""
    array = maps.numpy()
    for axis, (amounts, mode) in enumerate(zip(sides, modes, strict=True)):
        if mode not in (None, "valid"):
            widths = [(0, 0)] * 4
            widths[2 + axis] = amounts
            array = np.pad(array, widths, mode=NUMPY[mode])
    return torch.from_numpy(array)


def without_padding(layer, maps):
    """What a layer computes without its padding."""
    options = {"stride": layer.stride, "dilation": layer.dilation} if hasattr(layer, "dilation") else {}
    if isinstance(layer, nn.Conv2d):
        weight = layer.weight
        if isinstance(layer, (StdConv2dSame, ScaledStdConv2dSame)):
            flat = layer.weight.flatten(1)
            flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + layer.eps).sqrt()
            weight = flat.view_as(weight) * (layer.gain * layer.scale if hasattr(layer, "gain") else 1)
        return F.conv2d(maps, weight, layer.bias, **options)
    if isinstance(layer, nn.MaxPool2d):
        return F.max_pool2d(maps, layer.kernel_size, **options)
    return F.avg_pool2d(maps, layer.kernel_size, layer.stride) if isinstance(layer, nn.AvgPool2d) else maps


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_pads_as_it_is_told_along_both_axes_or_one_and_forgets_it(name):
    build, sides = LAYERS[name]
    torch.manual_seed(0)
    layer, maps = build().requires_grad_(False), torch.rand(2, 2, 11, 12)
    before, attributes = layer(maps), {k: v for k, v in vars(layer).items() if not k.startswith("_param")}
    filled = not isinstance(layer, nn.MaxPool2d) and getattr(layer, "count_include_pad", True)
    for mode in ("valid", *NUMPY):
        if mode != "valid" and not filled:
            assert torch.equal(set_padding(layer, mode)(maps), before)
            continue
        expected = without_padding(layer, padded_by_hand(maps, sides, (mode, mode)))
        assert torch.allclose(set_padding(layer, mode)(maps), expected, atol=1e-6)
        assert (list_padding(layer) == []) == (mode == "valid")
        assert padding_of(layer) == ("valid" if isinstance(layer, nn.AvgPool2d) else mode) or not filled
        if filled:
            one = set_padding(set_padding(layer, "symmetric"), mode, axis="width")
            expected = without_padding(layer, padded_by_hand(maps, sides, ("symmetric", mode)))
            assert torch.allclose(one(maps), expected, atol=1e-6)
            with as_built(layer):
                assert torch.equal(layer(maps), before)
            assert torch.allclose(layer(maps), expected, atol=1e-6)
            expected = without_padding(layer, padded_by_hand(maps, sides, ("valid", mode)))
            assert torch.allclose(set_padding(layer, "valid", axis="height")(maps), expected, atol=1e-6)
    with as_built(layer):
        assert {k: v for k, v in vars(layer).items() if not k.startswith("_param")} == attributes
    if name not in ("conv built circular", "ConstantPad2d", "ReflectionPad2d"):
        assert torch.equal(set_padding(layer, "zeros")(maps), before)
        assert {k: v for k, v in vars(layer).items() if not k.startswith("_param")} == attributes


def test_padding_that_differs_between_sides_is_listed_with_both():
    same = nn.Conv2d(1, 1, (4, 3), padding="same")
    assert list_padding(same)[0].padding == ((1, 2), 1)
    network = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 1, 3, 2))
    assert list_padding(network) == [("0", ((0, 1), (0, 1)), "zeros")]
    assert padding_of(network) == "zeros"
    assert padding_of(set_padding(network, "circular", axis="height")) == "height circular, width zeros"


@pytest.mark.parametrize("name", ["conv", "conv same, even kernel", "Conv2dSame", "avg pool"])
def test_partial_padding_is_the_mean_over_what_the_window_sees(name):
    """Against the definition, with masks (Liu et al. 2018): sum(W x) * size of window / valid cells + bias."""
    build, sides = LAYERS[name]
    torch.manual_seed(0)
    layer, maps = build().requires_grad_(False), torch.rand(2, 2, 11, 12)
    bias = layer.bias[:, None, None] if isinstance(layer, nn.Conv2d) else 0
    zeros = without_padding(layer, padded_by_hand(maps, sides, ("zeros", "zeros")))
    seen = padded_by_hand(torch.ones(1, 1, 11, 12), sides, ("zeros", "zeros"))
    window = torch.ones(1, 1, *nn.modules.utils._pair(layer.kernel_size))
    seen = F.conv2d(seen, window, stride=layer.stride, dilation=getattr(layer, "dilation", 1))
    expected = (zeros - bias) * window.numel() / seen + bias
    assert torch.allclose(set_padding(layer, "partial")(maps), expected, atol=1e-6)
    assert padding_of(layer) == ("valid" if name == "avg pool" else "partial")
    if isinstance(layer, nn.Conv2d):  # with equal weights a constant image stays constant
        nn.init.constant_(layer.weight, 0.5)
        flat = layer(torch.ones(1, 2, 11, 12))
        assert (flat.amax((2, 3)) - flat.amin((2, 3))).max() < 1e-5


NETWORKS = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "densenet121": torchvision.models.densenet121,
    "convnext_tiny": torchvision.models.convnext_tiny,
    "regnet_y_400mf": torchvision.models.regnet_y_400mf,
    **{
        f"timm {name}": lambda name=name: timm.create_model(name)
        for name in ("resnet18", "tf_efficientnet_b0", "mobilenetv3_small_100", "convnext_atto")
    },
}
TOO_SMALL = ("Kernel size can't be greater", "no cell left", "Output size is too small")


class TooSmall(Exception):
    """A map has no cell left."""


QUICK = ("resnet18", "regnet_y_400mf", "timm mobilenetv3_small_100")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NETWORKS]
)
def test_networks_with_shortcuts_compute_without_padding_what_they_compute_where_padding_does_not_reach(name):
    """So crops are exact. On a constant image, features are constant. With zeros again, all is as it was."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias, 0, 0.1)
    image, flat = torch.rand(1, 3, 160, 160), torch.full((1, 3, 160, 160), 0.5)
    gates = [m for m in network.modules() if type(m).__name__ in ("SqueezeExcitation", "SqueezeExcite")]
    stages = [
        stage
        for stage, layer in network.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.Sequential)) and ".se." not in stage and "head" not in stage
    ]
    before, state = outputs(network, stages, image), list(network.state_dict())
    stages = [stage for stage in stages if stage in before]
    with torch.no_grad():
        logits = network(image)
    for gate in gates:  # they see the whole map, padding and all
        gate.forward = lambda x: x
    padded, reach = outputs(network, stages, image), padding_reach(network, stages, 160)
    set_padding(network, "valid")
    unpadded = outputs(network, stages, image)
    compared = 0
    for stage, maps in unpadded.items():
        inside = ~reach[stage]
        if inside.any():
            rows, columns = inside.any(1).sum(), inside.any(0).sum()
            assert maps.shape[-2:] == (rows, columns), stage
            expected = padded[stage][..., inside].view_as(maps)
            assert (maps - expected).abs().max() <= 1e-4 * padded[stage].abs().max(), stage
            compared += 1
    assert compared > 2
    for gate in gates:
        del gate.forward
    for maps in outputs(network, stages, flat).values():
        assert (maps.amax((2, 3)) - maps.amin((2, 3))).max() <= 1e-5 * maps.abs().max()
    set_padding(network, "zeros")
    with torch.no_grad():
        assert torch.equal(network(image), logits)
    assert list(network.state_dict()) == state
    assert not any("padprobe" in key or key == "forward" for m in network.modules() for key in vars(m))


def outputs(network, stages, image):
    """The maps of stages, as far as the network comes before a map is too small."""
    kept = {}

    def keep(stage):
        return lambda module, args, output: kept.update({stage: output.clone()}) if output.ndim == 4 else None

    hooks = [network.get_submodule(stage).register_forward_hook(keep(stage)) for stage in stages]
    with torch.no_grad(), contextlib.suppress(TooSmall):
        try:
            network(image)
        except (RuntimeError, ValueError) as error:
            raise (TooSmall if any(words in str(error) for words in TOO_SMALL) else type(error))(str(error)) from error
    for hook in hooks:
        hook.remove()
    return kept


def test_an_unpadded_network_can_be_copied_saved_compiled_trained_and_used_in_parts():
    torch.manual_seed(0)
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    image = torch.rand(1, 3, 288, 288)
    before = network.state_dict()
    expected = set_padding(network, "valid")(image)
    assert list(network.state_dict()) == list(before)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for twin in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert torch.equal(twin(image), expected)
        nn.init.zeros_(twin.conv1.weight)  # of the twin alone
        assert not torch.equal(twin(image), expected)
        assert set_padding(twin, "zeros")(image).shape == expected.shape
    assert torch.allclose(torch.compile(network, backend="eager")(image), expected, atol=1e-5)
    network.train()(image.expand(2, -1, -1, -1)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    block = network.layer2[0]  # called alone, its shortcut still fits
    assert block(torch.rand(1, 64, 20, 20)).shape[-2:] == (7, 7)
    user = network.layer1.register_forward_hook(lambda module, args, output: None)
    set_padding(set_padding(network, "symmetric"), "zeros")
    assert list(network.layer1._forward_hooks) == [user.id]


def test_position_along_one_axis_can_be_taken_away_from_a_network_with_shortcuts():
    torch.manual_seed(0)
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    set_padding(network, "valid", axis="width")
    maps = outputs(network, ["layer3"], torch.full((1, 3, 96, 288), 0.5))["layer3"]
    assert (maps.amax(3) - maps.amin(3)).max() <= 1e-5 * maps.abs().max()
    assert (maps.amax(2) - maps.amin(2)).max() > 0.01 * maps.abs().max()
    reach = padding_reach(network, ["layer1"], (96, 288))["layer1"]
    assert reach[0].all()
    assert not reach[reach.shape[0] // 2].any()


@pytest.mark.parametrize(
    "name", ["conv same, even kernel", "Conv2dSame", "StdConv2dSame", "ZeroPad2d", "AvgPool2dSame"]
)
def test_asymmetric_padding_reaches_the_cells_that_change_with_its_values(name):
    torch.manual_seed(0)
    layer, image = LAYERS[name][0](), torch.rand(1, 2, 12, 12)
    network = nn.Sequential(layer, nn.Conv2d(3 if isinstance(layer, nn.Conv2d) else 2, 2, 2)).requires_grad_(False)
    reach = padding_reach(network, ["1"], 12)["1"]
    changed = (set_padding(network, "zeros")(image) - set_padding(network, "replicate")(image)).abs() > 1e-7
    assert torch.equal(changed[0].any(0), reach)
    assert torch.equal(padding_reach(set_padding(network, "symmetric"), ["1"], 12)["1"], reach)
    assert not padding_reach(set_padding(network, "valid"), ["1"], 12)["1"].any()


def test_a_layer_that_pads_and_cannot_be_changed_is_named():
    for layer in (
        nn.Unfold(3, padding=1),
        nn.Conv3d(3, 4, 3, padding=1),
        torchvision.ops.DeformConv2d(3, 4, 3, padding=1),
    ):
        with pytest.raises(ValueError, match=f"layer '0' \\({type(layer).__name__}\\) pads by"):
            set_padding(nn.Sequential(layer), "valid")


def test_a_compiled_network_is_changed_inside_or_refused():
    plain = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), backend="eager")
    assert set_padding(plain, "valid") is plain
    assert plain(torch.rand(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    with pytest.raises(ValueError, match=r"set its padding before torch.compile"):
        set_padding(torch.compile(torchvision.models.resnet18(), backend="eager"), "valid")
