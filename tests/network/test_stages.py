import itertools

import pytest
import torch
import torchvision
from torch import nn

from padprobe import find_stages, set_padding
from padprobe.network.forward import smallest_image
from padprobe.network.layout import find_layouts
from padprobe.network.padding import as_built
from padprobe.network.reach import padding_reach
from padprobe.network.stages import choose_layers
from padprobe.network.tap import StageTap, align, center_crop
from padprobe.network.trace import context_size, stage_shapes


def network_of_shapes(name, **options):
    """A network of torchvision without weights: nothing but its shapes is asked for."""
    with torch.device("meta"):
        return getattr(torchvision.models, name)(weights=None, **options)


def test_vgg16_stages_are_the_papers():
    network = network_of_shapes("vgg16")
    stages = find_stages(network)
    assert stages == [f"features.{i}" for i in (3, 8, 15, 22, 29)]
    sizes = [(64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14)]
    assert stage_shapes(network, stages) == sizes


def test_unpadded_vgg16_has_the_same_stages_with_smaller_maps():
    network = set_padding(network_of_shapes("vgg16").features, "valid")
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
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # a RegNet computes its widths with tensors
        network = getattr(torchvision.models, name)(weights=None, **options)
    assert find_stages(network) == expected


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("mobilenet_v2", 224, [(16, 112, 112), (24, 56, 56), (32, 28, 28), (96, 14, 14), (1280, 7, 7)]),
        ("mobilenet_v3_small", (160, 224), [(16, 80, 112), (16, 40, 56), (24, 20, 28), (48, 10, 14), (576, 5, 7)]),
        ("efficientnet_b0", 64, [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (1280, 2, 2)]),
        ("mnasnet0_5", 64, [(8, 32, 32), (16, 16, 16), (24, 8, 8), (48, 4, 4), (1280, 2, 2)]),
        ("densenet121", 64, [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (1024, 2, 2)]),
        ("convnext_tiny", (64, 96), [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]),
        ("maxvit_t", 224, [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]),
        ("inception_v3", 299, [(64, 147, 147), (192, 71, 71), (288, 35, 35), (768, 17, 17), (2048, 8, 8)]),
    ],
)
def test_a_stage_is_the_output_of_a_whole_block(name, size, expected):
    options = {"init_weights": False} if name == "inception_v3" else {}  # its auxiliary head is no stage
    network = network_of_shapes(name, **options).train()
    assert stage_shapes(network, find_stages(network, size), size) == expected
    assert network.training


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "pvt_v2_b0"])
def test_the_stages_of_timms_networks_are_those_that_timm_states(name):
    import timm

    torch.manual_seed(0)
    wrapper = timm.create_model(name, features_only=True)
    with torch.no_grad():
        expected = [tuple(maps.shape[1:]) for maps in wrapper.eval()(torch.rand(1, 3, 64, 96))]
    for network in (wrapper, timm.create_model(name)):
        assert stage_shapes(network, find_stages(network, (64, 96)), (64, 96)) == expected


def test_smps_encoders_have_stages_that_halve():
    import segmentation_models_pytorch as smp

    for name in ("vgg11", "resnet18", "mobilenet_v2", "timm-efficientnet-b0", "tu-test_convnext"):
        with torch.device("meta"):
            network = smp.encoders.get_encoder(name, weights=None)
        sizes = [height for _, height, _ in stage_shapes(network, find_stages(network, 64), 64)]
        assert all(a == 2 * b for a, b in itertools.pairwise(sizes)), (name, sizes)
        assert len(sizes) >= 4


def test_the_stages_of_a_plain_transformer_are_every_other_block_or_each():
    import timm

    torch.manual_seed(0)
    network = timm.create_model("test_vit", img_size=(64, 96), depth=5)
    assert choose_layers(network, "each_block", (64, 96)) == [f"blocks.{i}" for i in range(5)]
    assert choose_layers(network, "auto", (64, 96)) == [f"blocks.{i}" for i in (1, 3, 4)]
    resnet, vgg = network_of_shapes("resnet18"), network_of_shapes("vgg11")
    assert choose_layers(resnet, "each_block", 64) == [f"layer{i}.{k}" for i in (1, 2, 3, 4) for k in (0, 1)]
    with pytest.raises(ValueError, match=r"VGG has no blocks.*stages='auto'"):
        choose_layers(vgg, "each_block", 64)


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
    with pytest.raises(ValueError, match=f"100 x 150 image is too small.*{smallest} x {round(1.5 * smallest)}"):
        stage_shapes(network, ["3"], (100, 150))


def test_wrong_layers_are_named_with_their_neighbours():
    network = network_of_shapes("vgg16")
    with pytest.raises(ValueError, match=r"'features.31'; did you mean 'features.3"):
        stage_shapes(network, ["features.31"])
    with pytest.raises(ValueError, match=r"'classifier' gives an output of shape \(2, 1000\)"):
        stage_shapes(network, ["classifier"])
    with pytest.raises(ValueError, match="no stages found in Sequential"):
        find_stages(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2)))


def test_a_residual_network_without_padding_needs_a_large_image():
    network = set_padding(network_of_shapes("resnet18"), "valid")
    assert find_stages(network)[0] == "relu"
    with pytest.raises(ValueError, match="224 x 224 image is too small for ResNet"):
        stage_shapes(network, ["layer1"])


def test_with_real_context_an_unpadded_residual_network_agrees_wherever_padding_does_not_reach():
    """Its grid is not symmetric in the image: strided windows start at the upper left. The crops know it."""
    torch.manual_seed(0)
    encoder = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    stages, size = ["relu", "layer1", "layer2"], (96, 128)
    shown, sides = context_size(encoder, size, stages)
    assert sides == [(48, 64), (24, 32), (12, 16)]
    image = torch.rand(1, 3, *shown)
    padded, reach = features(encoder, stages, center_crop(image, size)), padding_reach(encoder, stages, size)
    with as_built(encoder, "valid"):
        unpadded = features(encoder, stages, image)
    for stage, side in zip(stages, sides, strict=True):
        difference = (padded[stage] - center_crop(unpadded[stage], side)).abs() / padded[stage].abs().max()
        assert (~reach[stage]).any()
        assert (difference[..., ~reach[stage]] <= 1e-5).all()
        assert (difference[..., reach[stage]] > 1e-3).any()


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
    small = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1))
    assert context_size(small, (16, 24), ["0", "2"]) == ((22, 30), [(16, 24), (8, 12)])
    assert context_size(network_of_shapes("vgg16").features[:30], 224) == ((404, 404), [(14, 14)])


def test_context_is_not_to_be_had_where_a_window_is_larger_than_the_largest_image():
    with pytest.raises(ValueError, match="no image size up to 128 x 128 px"):
        context_size(nn.Sequential(nn.Conv2d(3, 2, 127, padding=63), nn.ReLU()), 16)


def test_the_papers_stages_of_a_resnet_are_its_four_blocks():
    assert choose_layers(network_of_shapes("resnet152"), "paper") == ["layer1", "layer2", "layer3", "layer4"]
    vgg = network_of_shapes("vgg16")
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
        assert (shown, sides) == ((404, 404), [(n, n) for n in (224, 112, 56, 28, 14)])
        full = [height for _, height, _ in stage_shapes(set_padding(encoder, "valid"), stages, shown)]
        assert [(a - b) // 2 for a, (b, _) in zip(full, sides, strict=True)] == [88, 42, 18, 6, 0]
        set_padding(encoder, "zeros")
    image = torch.rand(1, 3, *shown)
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


class Branching(nn.Module):
    """Needs data: a value of the image decides what is computed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, images):
        maps = self.first(images)
        return self.second(maps if images.mean().item() > 0 else -maps)


def test_a_network_that_needs_data_is_traced_on_random_images():
    encoder, random = Branching(), torch.get_rng_state()
    stages = find_stages(encoder, (16, 24))
    assert stage_shapes(encoder, stages, (16, 24)) == [(4, 16, 24), (4, 8, 12)]
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("share", ["module", "weight"])
def test_tracing_gives_shared_layers_their_weights_back(share):
    encoder = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    if share == "module":
        encoder[2] = encoder[0]
    else:
        encoder[2].weight = encoder[0].weight
    image = torch.rand(1, 3, 8, 8)
    before = encoder(image)
    stage_shapes(encoder, ["1"], 8)
    set_padding(set_padding(encoder, "valid"), "zeros")
    assert encoder[2].weight is encoder[0].weight
    assert torch.equal(encoder(image), before)


class Remembering(nn.Module):
    """Keeps a grid by the size of its maps, and a list of its maps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.grids, self.seen = {}, []

    def forward(self, images):
        maps = self.first(images)
        grid = self.grids.setdefault(maps.shape[-1], torch.linspace(0, 1, maps.shape[-1], device=maps.device))
        self.seen.append(maps)
        return self.second(maps + grid)


def test_nothing_that_a_network_keeps_comes_from_a_pass_of_ours():
    encoder, caught = Remembering(), []
    encoder.first.register_forward_hook(lambda module, args, output: caught.append(output))
    encoder.second.register_forward_pre_hook(lambda module, args: caught.append(args))
    stages = find_stages(encoder, 16)
    stage_shapes(encoder, stages, 16)
    find_layouts(encoder, stages, 16, "auto")
    padding_reach(encoder, stages, 16)
    set_padding(set_padding(encoder, "valid"), "zeros")
    assert (encoder.grids, encoder.seen, caught) == ({}, [], [])
    encoder(torch.rand(1, 3, 16, 16))
    assert len(caught) == 2


class BatchSecond(nn.Module):
    """A transformer whose blocks take (tokens, images, channels), torch's own default."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)

    def forward(self, images):
        return self.blocks(self.patches(images).flatten(2).permute(2, 0, 1))


class Skipping(nn.Module):
    """All that its deep maps know goes around them too, and its last addition is no layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, images):
        maps = self.stem(images)
        return maps + nn.functional.interpolate(self.deep(maps), scale_factor=2)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (BatchSecond(), r"gives \(tokens, images, channels\).*batch_first=True"),
        (Skipping(), "only one stage of Skipping .* smaller maps, such as 'deep'"),
        (nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3))), "is a DataParallel, .*its `module`"),
    ],
)
def test_a_network_of_which_only_the_first_layers_would_be_read_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        find_stages(network, 32)


def test_a_scripted_network_is_refused_and_keeps_its_mode():
    scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).train(), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="before it is scripted"):
        find_stages(scripted, 8)
    with pytest.raises(ValueError, match="before it is scripted"):
        set_padding(scripted, "reflect")
    assert scripted.training


def test_a_part_that_returns_several_maps_is_no_stage():
    network = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    assert find_stages(network, 64)[:4] == ["body.relu", "body.layer1", "body.layer2", "body.layer3"]


def test_patches_that_are_unfolded_are_no_map():
    """(B, C, pixels of a patch, patches) has four dimensions, and comes from a convolution."""

    class Unfolding(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 1)

        def forward(self, images):
            return self.mix(nn.functional.unfold(self.stem(images), 2, stride=2).unflatten(1, (4, 4)))

    with pytest.raises(ValueError, match=r"could be NCHW of 4 x 96 cells.* does not change this corner"):
        stage_shapes(Unfolding(), ["mix"], (32, 48))
