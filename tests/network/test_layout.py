import pytest
import torch
from torch import nn

from padprobe.network.layout import Layout, find_layouts
from padprobe.network.reach import padding_reach
from padprobe.network.stages import find_stages
from padprobe.network.tap import StageTap, align
from padprobe.network.trace import stage_shapes
from padprobe.probe.options import ProbeOptions
from padprobe.probe.plan import make_plan


def small_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**{**shape, **options}).eval()


def small_swin(window=4):
    from torchvision.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    return SwinTransformer([4, 4], 16, [2, 2], [1, 2], [window, window], num_classes=2).eval()


def taken(encoder, stages, images, grid=5):
    """What a tap catches of the stages."""
    size = (images.shape[-2], images.shape[-1])
    tap = StageTap(encoder, stages, grid, layouts=find_layouts(encoder, stages, size))
    with torch.no_grad():
        result = encoder(images)
    return result, tap.take()


def test_a_swins_tap_agrees_with_a_permutation_by_hand():
    encoder, images = small_swin(), torch.rand(2, 3, 32, 64)
    stages = find_stages(encoder, (32, 64))
    assert stage_shapes(encoder, stages, (32, 64)) == [(16, 8, 16), (32, 4, 8)]
    _, features = taken(encoder, stages, images)
    with torch.no_grad():
        first = encoder.features[1](encoder.features[0](images))  # (B, H, W, C)
        second = encoder.features[3](encoder.features[2](first))
    by_hand = [align(maps.permute(0, 3, 1, 2), 5) for maps in (first, second)]
    assert torch.allclose(features, torch.cat(by_hand, 1), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
def test_a_vits_stages_are_timms_intermediates(options):
    encoder, images = small_vit(**options), torch.rand(2, 3, 32, 48)
    stages = find_stages(encoder, (32, 48))
    assert stages == ["blocks.1", "blocks.3"]
    with pytest.raises(ValueError, match=r"VisionTransformer cannot run on a 48 x 32 image.*img_size"):
        find_stages(encoder, (48, 32))
    _, features = taken(encoder, stages, images)
    with torch.no_grad():
        maps = encoder.forward_intermediates(images, indices=[1, 3], output_fmt="NCHW", intermediates_only=True)
    assert torch.allclose(features, torch.cat([align(m, 5) for m in maps], 1), atol=1e-6)


@pytest.mark.parametrize(("name", "prefix"), [("ViT", 1), ("Dinov2", 1), ("Dinov2WithRegisters", 5), ("DeiT", 2)])
def test_the_tokens_of_transformers_models_are_maps_without_those_that_have_no_place(name, prefix):
    transformers = pytest.importorskip("transformers", reason="comes with padprobe[hosts]; see make test-zoo")

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"image_size": 32} if "Dino" in name else {"image_size": (32, 48), "return_dict": False}
    config = getattr(transformers, f"{name}Config")(patch_size=8, **shape)
    encoder = getattr(transformers, f"{name}Model")(config).eval()
    assert len(find_stages(encoder, (32, 48))) == 2
    result, features = taken(encoder, ["layernorm"], torch.rand(2, 3, 32, 48))
    by_hand = result[0][:, prefix:].reshape(2, 4, 6, 16).permute(0, 3, 1, 2)
    assert torch.allclose(features, align(by_hand, 5), atol=1e-6)


def test_the_stages_of_transformers_swin_are_maps_that_halve():
    transformers = pytest.importorskip("transformers", reason="comes with padprobe[hosts]; see make test-zoo")

    torch.manual_seed(0)
    shape = {"embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    encoder = transformers.SwinModel(transformers.SwinConfig(image_size=64, **shape)).eval()
    stages = find_stages(encoder, (32, 64))
    assert stage_shapes(encoder, stages, (32, 64)) == [(12, 8, 16), (24, 4, 8)]


class Permuted(nn.Module):
    """Moves the dimensions of what it gets."""

    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_channels_that_equal_the_size_of_the_map_are_told_apart(order):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), Permuted(*order), nn.Softmax(-1))
    layouts = find_layouts(encoder, ["0", "1", "2"], 32)
    assert [layout.kind for layout in layouts.values()] == ["NCHW", *(["NCHW" if order[1] == 1 else "NHWC"] * 2)]


class Shuffled(nn.Module):
    """Tokens of an image in an order of their own."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.order = nn.Identity()

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        return self.order(tokens[:, torch.arange(63, -1, -1)])


def test_tokens_that_are_not_where_they_belong_are_refused_with_the_way_out():
    torch.manual_seed(0)
    encoder = Shuffled()
    refusal = r"stage 'order' gives an output of shape \(2, 64, 8\).*tokens of 8 x 8.*does not change.*layout="
    with pytest.raises(ValueError, match=refusal):
        find_layouts(encoder, ["order"], 32)
    with pytest.raises(ValueError, match=refusal):
        make_plan(encoder, ProbeOptions(stages=["order"], image_size=32, grid=4))
    plan = make_plan(encoder, ProbeOptions(stages=["order"], image_size=32, grid=4, layout="tokens"))
    assert plan.layouts == {"order": Layout("tokens", 8, 8, 8)}
    with pytest.raises(ValueError, match="unknown layout 'NCWH'"):
        ProbeOptions(layout="NCWH")


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return x + 0 * torch.rand(1)


def test_the_check_leaves_the_network_and_the_random_states_as_they_were():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), Counting(), Permuted(0, 2, 3, 1))
    encoder[1].eval()
    before, random = {k: v.clone() for k, v in encoder.state_dict().items()}, torch.get_rng_state()
    assert find_layouts(encoder, ["3"], 32)["3"].kind == "NHWC"
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in encoder] == [True, False, True, True]
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert not any(module._forward_hooks for module in encoder.modules())


def test_tokens_of_another_image_size_keep_the_proportions():
    layout = Layout("tokens", 2, height=4, width=8, prefix=1)
    tokens = torch.arange(9.0).view(1, 9, 1).expand(1, 9, 2)
    assert layout.to_maps(tokens)[0, 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(ValueError, match="8 tokens, which are not 1 and a grid with the proportions of 4 x 8"):
        layout.to_maps(tokens[:, 1:])


def test_without_padding_a_transformer_has_none_in_reach():
    encoder = small_vit()
    masks = padding_reach(encoder, ["blocks.3"], (32, 48), find_layouts(encoder, ["blocks.3"], (32, 48)))
    assert masks["blocks.3"].shape == (4, 6)
    assert not masks["blocks.3"].any()


def test_the_padding_of_swins_windows_reaches_the_cells_that_change_with_it(monkeypatch):
    encoder, stages = small_swin(window=7), ["features.1", "features.3"]
    layouts = find_layouts(encoder, stages, (64, 96))
    masks = padding_reach(encoder, stages, (64, 96), layouts)
    outputs = []
    pad = nn.functional.pad
    for value in (0.0, 3.0):
        monkeypatch.setattr(nn.functional, "pad", lambda x, amount, value=value: pad(x, amount, value=value))
        handle = encoder.features[1].register_forward_hook(lambda m, args, out: outputs.append(out))
        with torch.no_grad():
            encoder(torch.rand(1, 3, 64, 96, generator=torch.manual_seed(0)))
        handle.remove()
    changed = (outputs[0] != outputs[1]).any(-1)[0]
    assert 0.2 < changed.float().mean() < 0.8
    assert torch.equal(masks["features.1"], changed)
    assert masks["features.3"].all()


def test_no_reach_is_given_where_an_embedding_hides_it():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.position = nn.Parameter(torch.rand(1, 4, 8, 8))

        def forward(self, images):
            return self.second(self.first(images) + self.position)

    assert list(padding_reach(Embedded(), ["first", "second"], 8)) == ["first"]
