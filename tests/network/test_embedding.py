"""Position embeddings of networks of three libraries: what is listed, and that "none" really removes them."""

import copy
import pickle
from collections import Counter

import pytest
import timm
import torch
import torchvision
from timm.layers import RelPosBias, RelPosMlp
from timm.models import beit, convit, efficientformer, eva, levit, swin_transformer, swin_transformer_v2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import Attention as SamAttention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from padprobe.network.embedding import (
    EMBEDDING_MODES,
    as_learned,
    list_position_embedding,
    position_embedding_of,
    set_position_embedding,
)
from padprobe.network.encoders import load_encoder

SMALL = {"image_size": 32, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def timm_vit(**options):
    return VisionTransformer(32, 4, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool="token", **options)


def torchvision_vit():
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    vit = torchvision.models.VisionTransformer(32, 4, **sizes, dropout=0.1)
    return nn.Sequential(_FirstOf(vit))


class _FirstOf(nn.Module):
    """A torchvision ViT that returns its tokens."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, image):
        tokens = self.vit._process_input(image)
        return self.vit.encoder(torch.cat([self.vit.class_token.expand(len(image), -1, -1), tokens], 1))


def transformers_vit(name):
    transformers = pytest.importorskip("transformers", reason="comes with padprobe[hosts]; see make test-zoo")
    config = getattr(transformers, name.replace("Model", "Config"))(**SMALL, intermediate_size=64)
    return getattr(transformers, name)(config)


VITS = {
    "timm": (timm_vit, 1),
    "timm with registers": (lambda: timm_vit(reg_tokens=2, no_embed_class=True), 3),
    "torchvision": (torchvision_vit, 1),
    "ViTModel": (lambda: transformers_vit("ViTModel"), 1),
    "DeiTModel": (lambda: transformers_vit("DeiTModel"), 2),
    "Dinov2Model": (lambda: transformers_vit("Dinov2Model"), 1),
    "CLIPVisionModel": (lambda: transformers_vit("CLIPVisionModel"), 1),
}


def tokens(vit, image, prefix):
    """The last block's tokens without the prefix, in row-major order of the patches: (B, 64, C)."""
    with torch.no_grad():
        output = vit.forward_features(image) if isinstance(vit, VisionTransformer) else vit(image)
    return getattr(output, "last_hidden_state", output)[:, prefix:]


def exchanged(image, order, patch=4):
    """An image whose patches are in another order."""
    cells = torch.nn.functional.unfold(image, patch, stride=patch)[..., order]
    return torch.nn.functional.fold(cells, image.shape[-2:], patch, stride=patch)


def drawn(network):
    """A network in double precision and evaluation mode whose position embeddings are not near 0."""
    network.double().eval()
    torch.manual_seed(0)
    for row in list_position_embedding(network):
        tensors = [network.get_parameter(row.name)] if row.shape else network.get_submodule(row.name).parameters()
        for tensor in tensors:
            nn.init.normal_(tensor)
    return network


@pytest.mark.parametrize("name", VITS)
def test_without_embedding_exchanged_patches_give_exchanged_tokens_and_with_it_they_do_not(name):
    build, prefix = VITS[name]
    vit = drawn(build())
    image, order = torch.rand(2, 3, 32, 32, dtype=torch.double), torch.randperm(64)
    seen = {}
    for mode in EMBEDDING_MODES:
        set_position_embedding(vit, mode)
        assert position_embedding_of(vit) == mode
        seen[mode] = tokens(vit, image, prefix)
        difference = (tokens(vit, exchanged(image, order), prefix) - seen[mode][:, order]).abs().max().item()
        assert difference < 1e-10 if mode == "none" else difference > 0.1
    assert (seen["learned"] - seen["shuffled"]).abs().max() > 0.1
    assert torch.equal(tokens(set_position_embedding(vit, "learned"), image, prefix), seen["learned"])


@pytest.mark.parametrize("name", VITS)
def test_shuffling_is_a_fixed_exchange_of_the_patches_embeddings_that_leaves_the_prefix_in_place(name):
    build, prefix = VITS[name]
    vit = drawn(build())
    (row,) = list_position_embedding(vit)
    before = vit.get_parameter(row.name).detach().clone().view(-1, 32)
    set_position_embedding(vit, "shuffled")
    owner, _, attribute = row.name.rpartition(".")
    after = getattr(vit.get_submodule(owner), attribute).detach().view(-1, 32)
    prefix = len(before) - 64  # with no_embed_class the prefix has no embedding
    assert torch.equal(before[:prefix], after[:prefix])
    assert not torch.equal(before, after)
    assert torch.equal(before[prefix:].sort(0).values, after[prefix:].sort(0).values)
    assert (before[prefix:] == after[prefix:]).all(1).float().mean() < 0.1
    other = set_position_embedding(drawn(build()), "shuffled")
    assert torch.equal(after, getattr(other.get_submodule(owner), attribute).view(-1, 32))


def beit_attention():
    attention = beit.Attention(16, 2, qkv_bias=True, window_size=(4, 4))
    return lambda x: attention(torch.cat([x.mean(1, keepdim=True), x], 1))[:, 1:], attention


def with_bias(bias):
    """Attention of one head whose scores have a timm bias added, as in MaxViT."""

    def attend(x):
        return bias((x @ x.transpose(1, 2))[:, None]).softmax(-1)[:, 0] @ x

    return attend, bias


def on_grid(attention):
    return lambda x: attention(x.view(-1, 4, 4, 16)).reshape(-1, 16, 16), attention


def alone(attention):
    return attention, attention


WINDOWS = {
    "timm swin": lambda: alone(swin_transformer.WindowAttention(16, 2, window_size=(4, 4))),
    "timm swin v2": lambda: alone(swin_transformer_v2.WindowAttention(16, (4, 4), 2)),
    "torchvision swin": lambda: on_grid(ShiftedWindowAttention(16, [4, 4], [0, 0], 2)),
    "torchvision swin v2": lambda: on_grid(ShiftedWindowAttentionV2(16, [4, 4], [0, 0], 2)),
    "torchvision maxvit": lambda: on_grid_of_windows(RelativePositionalMultiHeadAttention(16, 8, 16)),
    "beit": beit_attention,
    "table": lambda: with_bias(RelPosBias((4, 4), 1)),
    "mlp": lambda: with_bias(RelPosMlp((4, 4), 1, mode="cr")),
    "efficientformer": lambda: alone(efficientformer.Attention(16, 8, 2, resolution=4)),
    "levit": lambda: alone(levit.Attention(16, 8, 2, resolution=(4, 4))),
    "convit": lambda: alone(convit.GPSA(16, 4)),
    "sam": lambda: on_grid(SamAttention(16, 2, use_rel_pos=True, input_size=(4, 4))),
}


def on_grid_of_windows(attention):
    return lambda x: attention(x[:, None])[:, 0], attention


@pytest.mark.parametrize("name", WINDOWS)
def test_without_relative_biases_the_attention_in_a_window_does_not_know_the_order_of_its_tokens(name):
    torch.manual_seed(0)
    attend, attention = WINDOWS[name]()
    drawn(attention)
    for layer in attention.modules():
        if isinstance(layer, nn.BatchNorm1d):  # LeViT's last one starts at 0
            nn.init.ones_(layer.weight)
    x, order = torch.randn(2, 16, 16, dtype=torch.double), torch.randperm(16)
    for mode in ("learned", "shuffled", "none", "learned"):  # LeViT's and EfficientFormer's keep a cache in between
        set_position_embedding(attention, mode)
        with torch.no_grad():
            difference = (attend(x[:, order]) - attend(x)[:, order]).abs().max().item()
        assert difference < 1e-10 if mode == "none" else difference > 1e-3, mode
    assert {row.kind for row in list_position_embedding(attention)} == {"relative"}


def test_the_rows_of_the_class_token_stay_in_a_shuffled_table():
    _attend, attention = beit_attention()
    nn.init.normal_(attention.relative_position_bias_table)
    before = attention.relative_position_bias_table
    after = set_position_embedding(attention, "shuffled").relative_position_bias_table
    assert torch.equal(before[49:], after[49:])
    assert (before[:49] == after[:49]).all(1).float().mean() < 0.2


@pytest.mark.parametrize("mode", ["none", "shuffled"])
def test_nothing_that_is_saved_or_trained_changes_and_learned_undoes_it(mode):
    vit = timm_vit()
    vit.pos_embed.requires_grad_(False)
    kind, parameters, state = type(vit), dict(vit.named_parameters()), copy.deepcopy(vit.state_dict())
    set_position_embedding(vit, mode)
    assert isinstance(vit, VisionTransformer)
    assert type(vit).__name__ == "VisionTransformer"
    assert all(parameters[name] is parameter for name, parameter in vit.named_parameters())
    assert list(vit.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in vit.state_dict().items())
    assert not vit._parameters["pos_embed"].requires_grad
    set_position_embedding(vit, "learned")
    assert type(vit) is kind
    assert vit.pos_embed is parameters["pos_embed"]
    assert vars(vit).keys() == vars(timm_vit()).keys()


def test_weights_are_loaded_and_copies_made_in_any_mode():
    image, torch_vit = torch.rand(1, 3, 32, 32), timm_vit().eval()
    expected = tokens(set_position_embedding(copy.deepcopy(torch_vit), "none"), image, 1)
    other = set_position_embedding(timm_vit().eval(), "none")
    other.load_state_dict(torch_vit.state_dict())
    for made in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert position_embedding_of(made) == "none"
        assert torch.equal(tokens(made, image, 1), expected)
        assert torch.equal(made.state_dict()["pos_embed"], torch_vit.pos_embed)
        set_position_embedding(made, "learned")
        assert torch.equal(tokens(made, image, 1), tokens(torch_vit, image, 1))


def test_what_is_drawn_anew_reaches_the_embedding_itself():
    """A twin of a network with shuffled embedding has new weights, shuffled."""
    table = set_position_embedding(RelPosBias((4, 4), 1), "shuffled")
    before = table.relative_position_bias_table.detach().clone()
    with as_learned(table):
        table.reset_parameters()
    after = table.relative_position_bias_table
    assert position_embedding_of(table) == "shuffled"
    assert not (before == after).any()
    assert torch.equal(after.sort(0).values, table.state_dict()["relative_position_bias_table"].sort(0).values)


def test_zero_stays_zero_where_the_embedding_is_resized_to_the_image():
    vit = timm_vit(dynamic_img_size=True).eval()
    zero = copy.deepcopy(vit)
    nn.init.zeros_(zero.pos_embed)
    image = torch.rand(1, 3, 48, 40)
    assert torch.equal(tokens(set_position_embedding(vit, "none"), image, 1), tokens(zero, image, 1))


@pytest.mark.parametrize("mode", EMBEDDING_MODES)
def test_a_changed_network_is_traced_moved_and_trained_as_any_other(mode):
    vit = set_position_embedding(timm_vit(), mode)
    image = torch.rand(2, 3, 32, 32)
    state = {name: tensor.to("meta") for name, tensor in vit.state_dict().items()}
    with torch.device("meta"):
        assert torch.func.functional_call(vit, state, torch.empty(2, 3, 32, 32)).is_meta
    with FakeTensorMode(allow_non_fake_inputs=True):
        vit(torch.empty(2, 3, 32, 32))
    vit(image)[:, 0].sum().backward()
    gradient = vit._parameters["pos_embed"].grad
    assert gradient is None if mode == "none" else gradient.abs().sum() > 0
    assert vit.double()(image.double()).dtype == torch.double


def test_a_network_without_any_and_a_rotary_one_are_refused_by_name():
    with pytest.raises(ValueError, match=r"ResNet has no position embedding that could be set to 'none'.*padding"):
        set_position_embedding(torchvision.models.resnet18(), "none")
    rotary = eva.Eva(32, 8, embed_dim=32, depth=1, num_heads=2, use_rot_pos_emb=True)
    assert [row.kind for row in list_position_embedding(rotary)] == ["absolute", "rotary"]
    for mode in ("none", "shuffled"):
        with pytest.raises(ValueError, match=r"rotary position embedding, 'rope' \(RotaryEmbeddingCat\)"):
            set_position_embedding(rotary, mode)
    assert position_embedding_of(set_position_embedding(rotary, "learned")) == "learned"
    odd = nn.Module()
    odd.pos_embed = nn.Parameter(torch.ones(1, 3, 5, 7))
    with pytest.raises(ValueError, match=r"'pos_embed' has shape \(1, 3, 5, 7\).*set it to 'none'"):
        set_position_embedding(odd, "shuffled")
    with pytest.raises(ValueError, match="unknown position embedding 'nothing'"):
        load_encoder("torchvision:resnet18", position_embedding="nothing")
    with pytest.raises(ValueError, match="ResNet has no position embedding"):
        load_encoder("torchvision:resnet18", position_embedding="none")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("timm:deit_tiny_distilled_patch16_224", {"absolute": 1}),
        ("timm:maxvit_tiny_tf_224", {"relative": 22}),
        ("timm:samvit_base_patch16", {"absolute": 1, "relative": 24}),
        ("timm:vit_small_patch16_dinov3", {"rotary": 1}),
        ("timm:xcit_nano_12_p16_224", {"sincos": 1}),
        ("timm:pvt_v2_b0", {}),
        ("torchvision:vit_b_16", {"absolute": 1}),
        ("torchvision:swin_v2_t", {"relative": 12}),
        ("transformers:Dinov2Model", {"absolute": 1}),
        ("transformers:BeitModel", {"absolute": 1, "relative": 2}),
        ("transformers:SwinModel", {"relative": 12}),
        ("transformers:Swinv2Model", {"relative": 12}),
        ("transformers:DINOv3ViTModel", {"rotary": 1}),
    ],
)
def test_the_embeddings_of_three_libraries_are_listed_by_kind(name, kinds):
    library, _, architecture = name.partition(":")
    with torch.device("meta"):
        if library == "timm":
            network = timm.create_model(architecture)
        elif library == "torchvision":
            network = torchvision.models.get_model(architecture)
        else:
            transformers = pytest.importorskip("transformers", reason="comes with padprobe[hosts]; see make test-zoo")
            small = {} if "Swin" in architecture else SMALL
            more = {"use_absolute_position_embeddings": True, "use_relative_position_bias": True}
            more = more if architecture == "BeitModel" else {}
            config = getattr(transformers, architecture.replace("Model", "Config"))(**small, **more)
            network = getattr(transformers, architecture)(config)
    assert Counter(row.kind for row in list_position_embedding(network)) == kinds
    for mode in () if not kinds or "rotary" in kinds else ("none", "shuffled"):
        assert position_embedding_of(set_position_embedding(network, mode)) == mode
