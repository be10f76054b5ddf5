"""The zoo: which architectures are tried, at which image sizes, and what is expected of each.

No weights are downloaded. Wide networks are built narrow or shallow where their library lets us, because the layers and
their order are what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class Network:
    """One architecture.

    Attributes:
        library: the package that it comes from, or ``load_encoder`` where padprobe builds it.
        name: its name there.
        make: builds it, untrained, for images of (height, width) pixels.
        sizes: the non-square and the square image that it is tried with.
        refused: where it is refused, the sentence that says so, by image size.
        quick: whether `make test` tries it too.
    """

    library: str
    name: str
    make: Callable[[Pair], nn.Module]
    sizes: tuple[Pair, Pair] = ((64, 96), (64, 64))
    refused: Mapping[Pair, str] = field(default_factory=dict)
    quick: bool = False

    @property
    def verdict(self) -> str:
        """What the documentation says about it."""
        sentences = dict.fromkeys(self.refused.values())
        if not sentences:
            return "probes"
        (sentence,) = sentences
        sizes = [f"{height} x {width}" for height, width in self.refused]
        where = "" if len(sizes) == len(self.sizes) else f" at {sizes[0]}"
        return f"refused{where}: {sentence}"


def torchvision(name: str, *, sized: bool = False, **options: Any) -> Callable[[Pair], nn.Module]:
    """Builds a torchvision model without weights; ``sized`` ones are made for one square image size."""

    def make(size: Pair) -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, **options, **({"image_size": size[0]} if sized else {}))

    return make


def detector(name: str) -> Callable[[Pair], nn.Module]:
    """Builds a torchvision segmentation model, whose output is a dictionary."""

    def make(size: Pair) -> nn.Module:
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None)

    return make


def narrow_maxvit(size: Pair) -> nn.Module:
    from torchvision.models import MaxVit

    blocks = {"block_channels": [32, 32, 64, 64], "block_layers": [1, 1, 1, 1], "head_dim": 16}
    return MaxVit(input_size=size, stem_channels=32, partition_size=2, stochastic_depth_prob=0.0, **blocks)


def timm(name: str, *, sized: bool = False, **options: Any) -> Callable[[Pair], nn.Module]:
    """Builds a timm model without weights; ``sized`` ones are made for one image size."""

    def make(size: Pair) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options, **({"img_size": size} if sized else {}))

    return make


def smp(name: str, **options: Any) -> Callable[[Pair], nn.Module]:
    """Builds an encoder of segmentation-models-pytorch without weights."""

    def make(size: Pair) -> nn.Module:
        from segmentation_models_pytorch.encoders import get_encoder

        return get_encoder(name, weights=None, **options)

    return make


def loaded(name: str) -> Callable[[Pair], nn.Module]:
    """Builds an encoder as `padprobe probe` does."""

    def make(size: Pair) -> nn.Module:
        from padprobe import load_encoder

        return load_encoder(name, image_size=size)

    return make


def transformers(name: str, *, part: str = "", sized: bool = False, **options: Any) -> Callable[[Pair], nn.Module]:
    """Builds ``name`` + "Model" of transformers with ``name`` + "Config"; ``part`` is what the classes have between."""

    def make(size: Pair) -> nn.Module:
        import transformers

        given = {**options, **({"image_size": size} if sized else {})}
        config = getattr(transformers, f"{name}Config")(**given)
        return getattr(transformers, f"{name}{part}Model")(config)

    return make


def not_at(size: Pair) -> dict[Pair, str]:
    """The refusal of a network that its library builds for one other size only."""
    return {size: f"cannot run on a {size[0]} x {size[1]} image (see image_size)"}


NO_GRID = "Say what it is (layout='NCHW', 'NHWC' or 'tokens'), or name other layers (stages=[...])"
TINY = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 96}
REGISTERS = {"num_register_tokens": 4, **TINY}
FOUR = {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
WIDE = ((64, 128), (64, 64))
TALL = ((96, 64), (64, 64))
LARGE = ((160, 224), (160, 160))  # deep in a network, every cell sees all of a smaller image
MIDDLE = ((128, 192), (128, 128))
PATCH14 = ((56, 84), (56, 56))

TORCHVISION = partial(Network, "torchvision")
TIMM = partial(Network, "timm")
SMP = partial(Network, "smp")
TRANSFORMERS = partial(Network, "transformers")
LOADED = partial(Network, "load_encoder")

NETWORKS = [
    TORCHVISION("alexnet", torchvision("alexnet"), MIDDLE),
    TORCHVISION("vgg11_bn", torchvision("vgg11_bn"), MIDDLE),
    TORCHVISION("resnet18", torchvision("resnet18"), MIDDLE, quick=True),
    TORCHVISION("resnext50_32x4d", torchvision("resnext50_32x4d"), MIDDLE),
    TORCHVISION("densenet121", torchvision("densenet121"), MIDDLE),
    TORCHVISION("googlenet", torchvision("googlenet", init_weights=False), MIDDLE),
    TORCHVISION("inception_v3", torchvision("inception_v3", init_weights=False), ((224, 288), (224, 224))),
    TORCHVISION("squeezenet1_1", torchvision("squeezenet1_1"), MIDDLE),
    TORCHVISION("mobilenet_v2", torchvision("mobilenet_v2"), LARGE),
    TORCHVISION("mobilenet_v3_small", torchvision("mobilenet_v3_small"), LARGE, quick=True),
    TORCHVISION("shufflenet_v2_x0_5", torchvision("shufflenet_v2_x0_5"), MIDDLE),
    TORCHVISION("mnasnet0_5", torchvision("mnasnet0_5"), LARGE),
    TORCHVISION("efficientnet_b0", torchvision("efficientnet_b0"), LARGE),
    TORCHVISION("efficientnet_v2_s", torchvision("efficientnet_v2_s"), MIDDLE),
    TORCHVISION("regnet_y_400mf", torchvision("regnet_y_400mf"), MIDDLE),
    TORCHVISION("regnet_x_400mf", torchvision("regnet_x_400mf"), MIDDLE),
    TORCHVISION("convnext_tiny", torchvision("convnext_tiny")),
    TORCHVISION("swin_t", torchvision("swin_t")),
    TORCHVISION("swin_v2_t", torchvision("swin_v2_t"), TALL),
    TORCHVISION("vit_b_16", torchvision("vit_b_16", sized=True), refused=not_at((64, 96))),
    TORCHVISION("MaxVit", narrow_maxvit, WIDE, not_at((64, 128))),
    TORCHVISION("lraspp_mobilenet_v3_large", detector("lraspp_mobilenet_v3_large"), MIDDLE),
    TIMM("resnet10t", timm("resnet10t"), MIDDLE),
    TIMM("seresnext26d_32x4d", timm("seresnext26d_32x4d"), MIDDLE),
    TIMM("resnetv2_50", timm("resnetv2_50"), MIDDLE),
    TIMM("res2net50_26w_4s", timm("res2net50_26w_4s"), LARGE),
    TIMM("convnext_atto", timm("convnext_atto")),
    TIMM("convnextv2_atto", timm("convnextv2_atto")),
    TIMM("efficientnet_b0", timm("efficientnet_b0"), LARGE),
    TIMM("tf_efficientnet_b0", timm("tf_efficientnet_b0"), LARGE),
    TIMM("mobilenetv2_050", timm("mobilenetv2_050"), LARGE),
    TIMM("mobilenetv3_small_050", timm("mobilenetv3_small_050"), LARGE),
    TIMM("mobilenetv4_conv_small", timm("mobilenetv4_conv_small"), LARGE),
    TIMM("mobilevit_xxs", timm("mobilevit_xxs"), MIDDLE),
    TIMM("mobileone_s0", timm("mobileone_s0"), LARGE),
    TIMM("fastvit_t8", timm("fastvit_t8"), MIDDLE),
    TIMM("repvit_m0_9", timm("repvit_m0_9"), MIDDLE),
    TIMM("repvgg_a0", timm("repvgg_a0"), LARGE),
    TIMM("efficientformer_l1", timm("efficientformer_l1"), ((160, 224), (224, 224)), not_at((160, 224))),
    TIMM("efficientformerv2_s0", timm("efficientformerv2_s0", sized=True)),
    TIMM("edgenext_xx_small", timm("edgenext_xx_small")),
    TIMM("levit_128s", timm("levit_128s", sized=True), refused={(64, 96): NO_GRID, (64, 64): NO_GRID}),
    TIMM("pvt_v2_b0", timm("pvt_v2_b0"), quick=True),
    TIMM("swin_tiny_patch4_window7_224", timm("swin_tiny_patch4_window7_224", sized=True), quick=True),
    TIMM("swinv2_tiny_window8_256", timm("swinv2_tiny_window8_256", sized=True), TALL),
    TIMM("maxvit_rmlp_pico_rw_256", timm("maxvit_rmlp_pico_rw_256", sized=True)),
    TIMM("coatnet_pico_rw_224", timm("coatnet_pico_rw_224", sized=True)),
    TIMM("vit_tiny_patch16_224", timm("vit_tiny_patch16_224", sized=True), quick=True),
    TIMM("deit_tiny_distilled_patch16_224", timm("deit_tiny_distilled_patch16_224", sized=True)),
    TIMM("vit_small_patch14_dinov2", timm("vit_small_patch14_dinov2", sized=True, depth=6), PATCH14),
    TIMM("vit_small_patch14_reg4_dinov2", timm("vit_small_patch14_reg4_dinov2", sized=True, depth=6), PATCH14),
    TIMM("eva02_tiny_patch14_224", timm("eva02_tiny_patch14_224", sized=True), PATCH14),
    TIMM("poolformer_s12", timm("poolformer_s12")),
    TIMM("mixer_s32_224", timm("mixer_s32_224", sized=True)),
    TIMM("beit_base_patch16_224", timm("beit_base_patch16_224", sized=True, depth=4, embed_dim=96, num_heads=3)),
    TIMM("dla46_c", timm("dla46_c"), MIDDLE),
    TIMM("regnetx_002", timm("regnetx_002"), LARGE),
    TIMM("ghostnet_050", timm("ghostnet_050"), LARGE),
    TIMM("nf_regnet_b0", timm("nf_regnet_b0"), MIDDLE),
    TIMM("pit_ti_224", timm("pit_ti_224", sized=True), WIDE),
    TIMM("twins_svt_small", timm("twins_svt_small")),
    TIMM("davit_tiny", timm("davit_tiny", depths=(1, 1, 1, 1))),
    TIMM("hiera_tiny_224", timm("hiera_tiny_224", sized=True), refused={(64, 96): NO_GRID, (64, 64): NO_GRID}),
    TIMM("focalnet_tiny_srf", timm("focalnet_tiny_srf")),
    TIMM("mambaout_femto", timm("mambaout_femto")),
    TIMM("tiny_vit_5m_224", timm("tiny_vit_5m_224"), LARGE),
    LOADED("timm:resnet18", loaded("timm:resnet18"), MIDDLE),
    LOADED("timm:vit_tiny_patch16_224", loaded("timm:vit_tiny_patch16_224")),
    LOADED("timm:swin_tiny_patch4_window7_224", loaded("timm:swin_tiny_patch4_window7_224")),
    LOADED("timm:convnext_atto", loaded("timm:convnext_atto"), quick=True),
    LOADED("timm:mobilenetv3_small_050", loaded("timm:mobilenetv3_small_050"), LARGE),
    LOADED("timm:pvt_v2_b0", loaded("timm:pvt_v2_b0")),
    SMP("resnet18", smp("resnet18"), MIDDLE, quick=True),
    SMP("vgg11", smp("vgg11"), MIDDLE),
    SMP("mobilenet_v2", smp("mobilenet_v2"), LARGE),
    SMP("efficientnet-b0", smp("efficientnet-b0"), LARGE),
    SMP("densenet121", smp("densenet121"), MIDDLE),
    SMP("mit_b0", smp("mit_b0"), quick=True),
    SMP("mobileone_s0", smp("mobileone_s0"), MIDDLE),
    SMP("dpn68", smp("dpn68"), MIDDLE),
    SMP("xception", smp("xception"), LARGE),
    SMP("tu-convnext_atto", smp("tu-convnext_atto")),
    SMP("tu-mobilevit_xxs", smp("tu-mobilevit_xxs"), MIDDLE),
    TRANSFORMERS("ViTModel", transformers("ViT", sized=True, **TINY)),
    TRANSFORMERS("DeiTModel", transformers("DeiT", sized=True, **TINY)),
    TRANSFORMERS("Dinov2Model", transformers("Dinov2", image_size=64, **TINY)),
    TRANSFORMERS("Dinov2WithRegistersModel", transformers("Dinov2WithRegisters", image_size=64, **REGISTERS)),
    TRANSFORMERS("DINOv3ViTModel", transformers("DINOv3ViT", sized=True, **REGISTERS)),
    TRANSFORMERS(
        "CLIPVisionModel", transformers("CLIPVision", image_size=64, patch_size=16, **TINY), refused=not_at((64, 96))
    ),
    TRANSFORMERS("SiglipVisionModel", transformers("SiglipVision", image_size=64, **TINY), refused=not_at((64, 96))),
    TRANSFORMERS(
        "ViTMAEModel", transformers("ViTMAE", sized=True, **TINY), refused={(64, 96): NO_GRID, (64, 64): NO_GRID}
    ),
    TRANSFORMERS("SwinModel", transformers("Swin", sized=True, embed_dim=24, window_size=2, **FOUR)),
    TRANSFORMERS("Swinv2Model", transformers("Swinv2", sized=True, embed_dim=24, window_size=2, **FOUR)),
    TRANSFORMERS("SegformerModel", transformers("Segformer", num_encoder_blocks=4)),
    TRANSFORMERS("PvtV2Model", transformers("PvtV2", depths=[1, 1, 1, 1])),
    TRANSFORMERS("ConvNextModel", transformers("ConvNext", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])),
    TRANSFORMERS("ResNetModel", transformers("ResNet", hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 1, 1]), MIDDLE),
    TRANSFORMERS(
        "RegNetModel", transformers("RegNet", hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1], groups_width=16)
    ),
    TRANSFORMERS("MobileNetV2Model", transformers("MobileNetV2"), LARGE),
]
