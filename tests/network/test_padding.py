import pytest
import torch
import torchvision
from torch import nn

from padprobe import find_stages, load_encoder, set_padding
from padprobe.network.padding import PADDING_MODES, as_built, list_padding
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


@pytest.mark.parametrize("mode", PADDING_MODES)
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
    with pytest.raises(ValueError, match="'0' is a ZeroPad2d"):
        set_padding(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 1, 3)), "valid")


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
