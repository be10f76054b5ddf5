import copy
import pickle
import re

import pytest
import segmentation_models_pytorch
import torch
from segmentation_models_pytorch.encoders import encoders, get_encoder
from segmentation_models_pytorch.encoders.vgg import VGGEncoder
from torch import nn

from padprobe.network.padding import PADDING_MODES, list_padding
from tasks.networks import DECODERS, build_network

CHANNELS = {"config": [8, "M", 16, "M", 32, "M", 32], "out_channels": [8, 16, 32, 32], "depth": 3, "batch_norm": True}
OPTIONS = {
    "linear": {"width": 8},
    "unet": {"decoder_channels": (16, 8, 8)},
    "fpn": {"decoder_pyramid_channels": 8, "decoder_segmentation_channels": 64},
    "deeplabv3plus": {"decoder_channels": 8, "decoder_atrous_rates": (1, 2, 1)},
    "pspnet": {"psp_out_channels": 8},
    "linknet": {},
    "upernet": {"decoder_channels": 8},
}


class Shallow(VGGEncoder):
    """A VGG for DeepLabV3+: of no more than three or four stages, none has to be dilated."""

    def make_dilated(self, output_stride):
        assert 2**self._depth <= output_stride


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setitem(encoders, "vgg_shallow", {"encoder": Shallow, "params": CHANNELS})


def small(decoder, image_size=48, **options):
    """A network with few channels and three stages."""
    encoder = "smp:vgg_shallow" if decoder == "deeplabv3plus" else "smp:vgg11"
    torch.manual_seed(0)
    options = {"encoder_options": CHANNELS, "decoder_options": OPTIONS[decoder], **options}
    return build_network(3, encoder, image_size, decoder=decoder, **options)


def logits_of_a_constant(network):
    image = torch.full((1, 3, network.seen, network.seen), 0.7, dtype=torch.float64)
    with torch.no_grad():
        return network.double().eval()(image)


def spread(logits):
    """How far logits are from constant, relative to their size."""
    return ((logits.amax((2, 3)) - logits.amin((2, 3))) / logits.abs().amax((2, 3))).max().item()


MODES = [
    (decoder, mode)
    for decoder in DECODERS
    for mode in PADDING_MODES
    if mode == "zeros" or decoder == "linear" or (mode != "valid" and decoder != "linknet")
]


@pytest.mark.parametrize(("decoder", "decoder_padding"), MODES)
def test_every_pixel_gets_a_score_and_every_part_a_gradient(decoder, decoder_padding):
    network = small(decoder, decoder_padding=decoder_padding)
    logits = network(torch.rand(2, 3, 48, 48))
    assert logits.shape == (2, 3, 48, 48)
    logits.square().mean().backward()
    first = next(layer for layer in network.encoder.modules() if isinstance(layer, nn.Conv2d))
    for part in (first, network.decoder, network.head):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert any(g.any() for g in gradients)
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("alignment", ["stretch", "context"])
def test_a_network_without_any_padding_is_blind_on_a_constant_image(alignment):
    network = small("linear", encoder_padding="valid", alignment=alignment)
    assert not list_padding(network)
    assert (network.seen > network.image_size) == (alignment == "context")
    assert spread(logits_of_a_constant(network)) < 1e-9
    assert spread(logits_of_a_constant(small("linear", alignment=alignment))) > 1e-3


@pytest.mark.parametrize(("decoder", "mode"), [pair for pair in MODES if pair[1] not in ("zeros", "valid", "partial")])
def test_padding_with_pixels_of_the_image_shows_no_border_on_a_constant_image(decoder, mode):
    assert spread(logits_of_a_constant(small(decoder, encoder_padding=mode, decoder_padding=mode))) < 1e-9


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d not in ("linear", "pspnet")])
def test_a_decoders_own_zeros_tell_where_the_border_is(decoder):
    logits = logits_of_a_constant(small(decoder, encoder_padding="valid"))
    assert spread(logits) > 1e-3
    assert spread(logits[..., ::8, ::8]) > 1e-3


@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_on_a_torus_a_shifted_image_has_shifted_logits(mode):
    network = small("unet", encoder_padding=mode, decoder_padding=mode).double().eval()
    image = torch.rand(1, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        shifted, moved = network(image.roll((8, 16), (2, 3))), network(image).roll((8, 16), (2, 3))
    assert torch.allclose(shifted, moved, rtol=1e-9, atol=1e-12) == (mode == "circular")


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_gets_maps_of_the_same_sizes_however_the_encoder_pads(decoder):
    sizes = []
    for padding, alignment in (("zeros", "stretch"), ("valid", "stretch"), ("valid", "context")):
        network = small(decoder, encoder_padding=padding, alignment=alignment)
        network.decoder.register_forward_pre_hook(lambda module, args: sizes.append([m.shape[-1] for m in args[0]]))
        network(torch.rand(2, 3, network.seen, network.seen))
    assert sizes == [[48, 24, 12, 6]] * 3


def test_with_context_a_decoder_gets_what_a_padded_encoder_gives_wherever_no_padding_reaches():
    image, seen = torch.rand(1, 3, 200, 200), []
    for padding in ("zeros", "valid"):
        network = small("unet", 96, encoder_padding=padding, alignment="context").eval()
        network.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        network(image)
    for padded, unpadded in zip(*seen, strict=True):
        inner = (..., slice(3, -3), slice(3, -3))
        assert torch.allclose(padded[inner], unpadded[inner], atol=1e-5)
        assert not torch.allclose(padded, unpadded, atol=1e-5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_leaves_weights_and_their_names_alone_and_networks_can_be_copied(decoder):
    built = small(decoder).state_dict()
    image = torch.rand(1, 3, 48, 48)
    mode = "zeros" if decoder == "linknet" else "circular"
    network = small(decoder, encoder_padding="circular", decoder_padding=mode).eval()
    state = network.state_dict()
    assert list(state) == list(built)
    assert all(torch.equal(value, built[name]) for name, value in state.items())
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        for p in twin.parameters():
            p.data *= 1.5
        assert not torch.equal(twin(image), network(image))
        twin.load_state_dict(network.state_dict())
        assert torch.equal(twin(image), network(image))


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_deeplab_dilates_a_resnet_and_pads_by_as_much(padding):
    options = {"encoder_options": {"layers": [1, 1, 1, 1]}, "decoder_options": OPTIONS["deeplabv3plus"]}
    network = build_network(3, "smp:resnet18", 48, decoder="deeplabv3plus", encoder_padding=padding, **options)
    assert network(torch.rand(2, 3, 48, 48)).shape == (2, 3, 48, 48)  # no multiple of 32, which is the stride undilated
    dilated = {row.layer: row for row in list_padding(network.encoder)}["layer4.0.conv2"]
    assert dilated[1:] == ((2, 2), padding)


@pytest.mark.parametrize(
    ("decoder", "options", "named"),
    [
        ("linear", {"encoder_padding": "valid"}, "encoder_padding 'valid'"),
        ("upernet", {"encoder_padding": "reflect"}, "encoder_padding 'reflect'"),
        ("unet", {"decoder_padding": "reflect"}, "decoder_padding 'reflect'"),
        ("deeplabv3plus", {"decoder_padding": "reflect"}, "decoder_padding 'reflect'"),
        ("pspnet", {"encoder_padding": "valid"}, "encoder_padding 'valid'"),
    ],
)
def test_an_image_too_small_for_a_padding_mode_is_refused_with_the_smallest_that_works(decoder, options, named):
    if decoder == "deeplabv3plus":
        options = options | {"decoder_options": {"decoder_channels": 8, "decoder_atrous_rates": (1, 2, 3)}}
    with pytest.raises(ValueError, match=f"too small for .*{named}: the smallest that works") as refusal:
        small(decoder, 8, **options)
    smallest = int(re.search(r"that works is (\d+)", str(refusal.value))[1])
    step = 1 if decoder in ("linear", "unet") else 8
    with pytest.raises(ValueError, match="too small"):
        small(decoder, smallest - step, **options)
    network = small(decoder, smallest, **options)
    logits = network(torch.rand(2, 3, network.seen, network.seen))
    assert logits.shape[-2:] == (smallest, smallest)


def test_networks_that_cannot_work_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"unknown decoder 'unett'; did you mean 'unet'\? Valid: linear, unet, fpn"):
        build_network(1, "smp:vgg11", 48, decoder="unett")
    with pytest.raises(ValueError, match=r"unknown option of decoder 'fpn' 'width'. Valid: .*decoder_pyramid_channels"):
        small("fpn", decoder_options={"width": 8})
    with pytest.raises(ValueError, match=r"'deeplabv3plus' does not work with .*'smp:vgg11': .*such as 'smp:resnet18'"):
        build_network(3, "smp:vgg11", 48, decoder="deeplabv3plus", encoder_options=CHANNELS)
    with pytest.raises(ValueError, match=r"depth .*cannot be less than 3, got 2"):
        small("fpn", encoder_options=CHANNELS | {"depth": 2})
    with pytest.raises(ValueError, match=r"no multiple of 8, .*: the nearest that work are 40 and 48"):
        small("pspnet", 44)
    assert small("unet", 44)(torch.rand(2, 3, 44, 44)).shape[-1] == 44
    rates = {"decoder_channels": 8, "decoder_atrous_rates": (1, 2, 300)}
    with pytest.raises(ValueError, match="decoder_padding 'reflect' works at no image size up to 2048 px"):
        small("deeplabv3plus", decoder_padding="reflect", decoder_options=rates)
    for decoder in set(DECODERS) - {"linear"}:
        with pytest.raises(ValueError, match=f"decoder_padding 'valid' with decoder '{decoder}': .* decoder 'linear'"):
            small(decoder, decoder_padding="valid")
    with pytest.raises(ValueError, match="decoder_padding 'reflect' with decoder 'linknet': its transposed convolu"):
        small("linknet", decoder_padding="reflect")
    assert segmentation_models_pytorch.decoders.fpn.model.get_encoder is get_encoder  # smp is as it was


def test_a_timm_encoder_stands_under_a_decoder():
    network = build_network(2, "smp:tu-resnet10t", 64, decoder="fpn", encoder_padding="reflect")
    assert type(network.encoder).__name__ == "TimmUniversalEncoder"
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 2, 64, 64)


def test_an_encoder_whose_padding_cannot_be_changed_is_taken_as_it_was_built():
    options = {"decoder": "pspnet", "encoder_options": {"depth": 3}, "decoder_options": {"psp_out_channels": 8}}
    network = build_network(1, "smp:efficientnet-b0", 32, decoder_padding="reflect", **options)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)
    with pytest.raises(ValueError, match="ZeroPad2d, which pads for another layer"):
        build_network(1, "smp:efficientnet-b0", 32, encoder_padding="partial", **options)


def test_an_encoder_with_shortcuts_works_without_padding_where_its_maps_keep_a_cell():
    options = {"encoder_options": {"layers": [1, 1, 1, 1], "depth": 2}, "encoder_padding": "valid"}
    with pytest.raises(ValueError, match="28 x 28 image is too small for encoder 'smp:resnet18'"):
        build_network(1, "smp:resnet18", 28, **options)
    assert spread(logits_of_a_constant(build_network(1, "smp:resnet18", 64, **options))) < 1e-9
