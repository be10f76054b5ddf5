import itertools

import pytest
import torch
import torchvision
from torch import nn

from padprobe import find_stages, set_padding
from padprobe.network.padding import as_built
from padprobe.network.reach import padding_reach
from padprobe.network.stages import choose_layers
from padprobe.network.tap import StageTap, align, center_crop
from padprobe.network.trace import context_size, smallest_image, stage_shapes


def test_vgg16_stages_are_the_papers():
    network = torchvision.models.vgg16()
    stages = find_stages(network)
    assert stages == [f"features.{i}" for i in (3, 8, 15, 22, 29)]
    sizes = [(64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14)]
    assert stage_shapes(network, stages) == sizes


def test_unpadded_vgg16_has_the_same_stages_with_smaller_maps():
    network = set_padding(torchvision.models.vgg16().features, "valid")
    stages = find_stages(network)
    assert stages == ["3", "8", "15", "22", "29"]
    assert [height for _, height, _ in stage_shapes(network, stages)] == [220, 106, 47, 17, 2]
    assert [height for _, height, _ in stage_shapes(network, stages, 404)] == [400, 196, 92, 40, 14]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg11_bn", ["features.2", "features.6", "features.13", "features.20", "features.27"]),
        ("resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("resnet152", ["relu", "layer1", "layer2", "layer3", "layer4"]),  # inside a block the shortcut goes around
        ("regnet_y_400mf", ["stem", *(f"trunk_output.block{i}" for i in (1, 2, 3)), "trunk_output"]),
        ("googlenet", ["conv1", "conv3", "inception3b", "inception4e", "inception5b"]),
    ],
)
def test_stages_of_architectures_that_nobody_listed(name, expected):
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    assert find_stages(getattr(torchvision.models, name)(weights=None, **options)) == expected


def test_encoders_of_the_other_libraries_have_stages_that_halve():
    import segmentation_models_pytorch as smp
    import timm

    for network in (
        smp.encoders.get_encoder("vgg16", weights=None),
        smp.encoders.get_encoder("resnet34", weights=None),
        timm.create_model("convnext_atto", pretrained=False, features_only=True),
        timm.create_model("efficientnet_b0", pretrained=False, features_only=True),
    ):
        sizes = [height for _, height, _ in stage_shapes(network, find_stages(network))]
        assert all(a == 2 * b for a, b in itertools.pairwise(sizes)), (type(network), sizes)
        assert len(sizes) >= 4


def test_tracing_touches_neither_weights_nor_buffers_nor_random_states():
    network = torchvision.models.resnet18().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    random = torch.get_rng_state()
    find_stages(network)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network.training
    assert not any(m._forward_hooks for m in network.modules())


def test_too_small_an_image_names_the_smallest_that_works():
    network = set_padding(torchvision.models.vgg16().features, "valid")
    smallest = smallest_image(network)
    with pytest.raises(ValueError, match=f"100 x 100 image is too small.*{smallest} x {smallest}"):
        stage_shapes(network, ["3"], 100)
    image = torch.zeros(1, 3, smallest, smallest)
    with torch.no_grad():
        assert network(image).numel() > 0
        with pytest.raises(RuntimeError):
            network(image[..., 1:, 1:])


def test_wrong_layers_are_named_with_their_neighbours():
    network = torchvision.models.vgg16()
    with pytest.raises(ValueError, match=r"'features.31'; did you mean 'features.3"):
        stage_shapes(network, ["features.31"])
    with pytest.raises(ValueError, match=r"'classifier' gives an output of shape \(2, 1000\)"):
        stage_shapes(network, ["classifier"])
    with pytest.raises(ValueError, match="no stages found in Sequential"):
        find_stages(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2)))


def test_a_residual_network_without_padding_says_why_it_cannot_run():
    network = set_padding(torchvision.models.resnet18(), "valid")
    assert find_stages(network)[0] == "relu"
    with pytest.raises(ValueError, match="ResNet cannot run on a 224 x 224 image"):
        stage_shapes(network, ["layer1"])


def test_a_tap_sees_a_stage_as_it_was_before_a_later_in_place_layer():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
    tap = StageTap(encoder, ["0", "1"], 10)
    image = torch.rand(2, 3, 10, 10)
    encoder(image)
    before, after = tap.take().split(4, dim=1)
    assert torch.allclose(before, encoder[0](image), atol=1e-6)
    assert torch.allclose(after, before.relu())
    assert before.min() < 0


def test_a_tap_says_which_stage_did_not_arrive_and_leaves_no_hook():
    encoder = nn.ModuleDict({"used": nn.Conv2d(3, 4, 3), "unused": nn.Conv2d(3, 4, 3)})
    tap = StageTap(encoder, ["used", "unused"], 4)
    encoder["used"](torch.rand(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="unused"):
        tap.take()
    tap.remove()
    assert not any(m._forward_hooks for m in encoder.modules())


def test_alignment_keeps_the_corners():
    features = torch.arange(49.0).view(1, 1, 7, 7)
    aligned = align(features, 28)
    assert aligned.shape == (1, 1, 28, 28)
    assert aligned[0, 0, 0, 0] == 0
    assert aligned[0, 0, -1, -1] == pytest.approx(48)
    assert not align(features.half().requires_grad_(), 7).requires_grad


def test_the_context_that_vgg16_needs_is_the_protocols():
    assert context_size(torchvision.models.vgg16().features[:30], 224) == (404, [14])


def test_context_is_not_to_be_had_for_a_network_that_cannot_be_unpadded():
    with pytest.raises(ValueError, match="no image size up to 512 px"):
        context_size(torchvision.models.resnet18(), 64)


def test_the_papers_stages_of_a_resnet_are_its_four_blocks():
    assert choose_layers(torchvision.models.resnet152(), "paper") == ["layer1", "layer2", "layer3", "layer4"]
    vgg = torchvision.models.vgg16()
    assert choose_layers(vgg, "paper") == find_stages(vgg)


@pytest.mark.parametrize(("weights", "size"), [(None, 96), ("real", 224)])
def test_with_real_context_an_unpadded_vgg16_agrees_wherever_padding_does_not_reach(weights, size, request):
    """Same resolution, same geometry: the crops fall on whole cells."""
    torch.manual_seed(0)
    encoder = torchvision.models.vgg16().eval()
    if weights:
        data = request.getfixturevalue("data")
        state = torch.load(data / "weights" / "vgg16_imagenet_features.pth", weights_only=True)
        encoder.load_state_dict(state, strict=False)
    stages = find_stages(encoder)
    shown, sides = context_size(encoder, size, stages)
    if size == 224:
        assert (shown, sides) == (404, [224, 112, 56, 28, 14])
        full = [height for _, height, _ in stage_shapes(set_padding(encoder, "valid"), stages, shown)]
        assert [(a - b) // 2 for a, b in zip(full, sides, strict=True)] == [88, 42, 18, 6, 0]
        set_padding(encoder, "zeros")
    image = torch.rand(1, 3, shown, shown)
    padded = features(encoder, stages, center_crop(image, size))
    reach = padding_reach(encoder, stages, size)
    with as_built(encoder, "valid"):
        unpadded = features(encoder, stages, image)
    for stage, side in zip(stages, sides, strict=True):
        a, b = padded[stage], center_crop(unpadded[stage], side)
        assert a.shape == b.shape
        scale = a.abs().max()
        inside = ~reach[stage]
        assert inside.any() or stage in stages[3 if size < 224 else 4 :]
        assert ((a - b)[..., inside].abs() <= 1e-4 * scale).all()
        assert ((a - b)[..., reach[stage]].abs() > 1e-4 * scale).any()


def features(encoder, stages, image):
    found = {}
    hooks = [
        encoder.get_submodule(s).register_forward_hook(lambda m, args, out, s=s: found.update({s: out.clone()}))
        for s in stages
    ]
    with torch.no_grad():
        encoder(image)
    for hook in hooks:
        hook.remove()
    return found
