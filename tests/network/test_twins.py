import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from padprobe.network.twins import untrained_twin

NORMS = [nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]


def train(encoder: nn.Module) -> nn.Module:
    """Gives every parameter and statistic values that no initialization gives."""
    with torch.no_grad():
        for value in encoder.state_dict().values():
            if value.is_floating_point():
                value.copy_(3 + torch.rand(value.shape))
    return encoder


def assert_untrained(encoder: nn.Module, twin: nn.Module) -> None:
    state = twin.state_dict()
    assert state.keys() == encoder.state_dict().keys()
    for name, trained in encoder.state_dict().items():
        if trained.is_floating_point() and name.split(".")[-1] not in ("original0", "weight_g"):
            assert state[name].abs().max() < 3, name  # drawn, or a constant


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_nothing_trained_stays_under_a_norm_and_the_norm_stays(norm):
    encoder = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.ConvTranspose2d(8, 4, 3)))
    train(encoder)
    image = torch.rand(2, 3, 16, 16)
    encoder(image)  # the old style now has a computed weight
    twin = untrained_twin(encoder, 0)
    assert_untrained(encoder, twin)
    plain = untrained_twin(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)), 0)
    twin(image), encoder(image)
    expected = plain[0].weight
    if "spectral" in norm.__name__:
        expected = expected / torch.linalg.matrix_norm(expected.flatten(1), 2)
    assert torch.allclose(twin.eval()[0].weight, expected, rtol=0.1, atol=1e-3)
    assert torch.equal(untrained_twin(encoder, 0)[2].bias, twin[2].bias)


def small_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0, init_values=0.1)


@pytest.mark.parametrize(
    "build",
    [
        small_vit,
        lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32),
        lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(2, 2), embed_dim=16),
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Embedding(5, 4, padding_idx=0), nn.PReLU()),
        lambda: nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4), nn.BatchNorm2d(4), nn.LSTM(3, 4)),
    ],
)
def test_no_parameter_of_a_twin_is_trained(build):
    encoder = train(build())
    assert_untrained(encoder, untrained_twin(encoder, 0))


def test_transformers_are_drawn_as_their_libraries_do():
    twin = untrained_twin(train(small_vit()), 0)
    for value in (twin.pos_embed, twin.blocks[1].mlp.fc1.weight):
        assert value.std().item() == pytest.approx(0.0176, rel=0.05)  # 0.02, cut at two standard deviations
    assert twin.blocks[0].ls1.gamma.unique().tolist() == pytest.approx([0.1])


def test_what_would_stay_trained_is_named():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("ema", torch.rand(4))

    with pytest.raises(ValueError, match=r"keep the trained values of ema \(1 in all\): pass probe_encoder a `twin`"):
        untrained_twin(Average(), 0)
    with pytest.raises(ValueError, match="parametrization _Orthogonal"):
        untrained_twin(parametrizations.orthogonal(nn.Linear(3, 3)), 0)
    with pytest.raises(ValueError, match="'weight' is lazy"):
        untrained_twin(nn.LazyConv2d(4, 3), 0)


def test_tied_and_frozen_weights_stay_tied_and_frozen():
    encoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    encoder[1].weight = encoder[0].weight
    twin = untrained_twin(train(encoder), 0)
    assert twin[1].weight is twin[0].weight
    assert not twin[0].weight.requires_grad
    assert_untrained(encoder, twin)


def test_a_twin_of_an_untrained_network_that_was_drawn_alike_is_no_mistake():
    encoder = untrained_twin(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), 0)
    assert torch.equal(untrained_twin(encoder, 0)[0].weight, encoder[0].weight)
