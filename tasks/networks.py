"""The study's networks: an encoder and a decoder, each padded in its own way."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Literal

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import ClassificationHead
from torch import Tensor, nn

from padprobe.errors import check_name
from padprobe.network.encoders import load_encoder
from padprobe.network.padding import PADDING_MODES, as_built, list_padding, set_padding
from padprobe.network.tap import center_crop
from padprobe.network.trace import context_size, output_sides, smallest_image, stage_shapes, takes

DECODERS = ("linear", "unet", "fpn", "deeplabv3plus", "pspnet", "linknet", "upernet")
ALIGNMENTS = ("stretch", "context")
LARGEST = 2048  # px, of the images that are tried


def _resize(maps: Tensor, side: int) -> Tensor:
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)


class DenseNetwork(nn.Module):
    """One score a class for every pixel: images (B, 3, H, W) -> logits (B, classes, S, S).

    Args:
        encoder: an smp encoder: returns a list of feature maps.
        decoder: list of maps, with the sizes that the padded encoder gives them -> one map.
        head: that map -> logits, of any size; they are resized to S.
        image_size: S in pixels.
        alignment: of an unpadded encoder's maps, which cover less of the image. ``"stretch"``: over all of it, as in
            the paper; that moves deep maps outwards over shallow ones, so comparing the two tells the decoder where it
            is. ``"context"``: the image is larger than S and only its centre is scored. A padded encoder is shown that
            centre; an unpadded one as much around it as it needs, and its maps are centre-cropped to the resolution
            and geometry of the padded one's. Padding is then all that differs.

    Attributes:
        seen: the side of the image that it needs, in pixels.

    Raises:
        ValueError: for an unknown alignment; in ``forward``, for an image that is too small.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        head: nn.Module,
        image_size: int,
        alignment: Literal["stretch", "context"] = "stretch",
    ) -> None:
        super().__init__()
        check_name(alignment, ALIGNMENTS, "alignment")
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.image_size, self.seen = image_size, image_size
        self.fit = center_crop if alignment == "context" else _resize
        self.sides: list[int] | None = None  # of an unpadded encoder's maps, once aligned
        if not list_padding(encoder):
            if alignment == "context":
                self.seen, self.sides = context_size(encoder, image_size)
            else:
                with as_built(encoder):
                    self.sides = output_sides(encoder, image_size)

    def forward(self, image: Tensor) -> Tensor:
        if min(image.shape[-2:]) < self.seen:
            raise ValueError(
                f"the image is {image.shape[-2]} x {image.shape[-1]} px; this network needs {self.seen} px to score "
                f"the central {self.image_size}: give the data more context, or use alignment 'stretch'"
            )
        maps = self.encoder(center_crop(image, self.seen))
        if self.sides:
            maps = [self.fit(features, side) for features, side in zip(maps, self.sides, strict=True)]
        return _resize(self.head(self.decoder(maps)), self.image_size)


class LinearDecoder(nn.Module):
    """A decoder without any padding: a list of maps (B, C, h, w) -> one map (B, width, grid, grid).

    Each map goes through a 1x1 convolution and is resized to the grid; they are added, and one more 1x1 convolution
    follows.

    Args:
        channels: of the maps.
        grid: side of the output in cells.
        width: channels of the output.
    """

    def __init__(self, channels: list[int], grid: int, width: int = 32) -> None:
        super().__init__()
        self.grid = grid
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=maps[0].device)
        for lateral, m in zip(self.laterals, maps, strict=True):
            # a 1x1 convolution and a resize commute: the smaller map is convolved
            big = m.shape[-1] > self.grid
            total = total + (lateral(_resize(m, self.grid)) if big else _resize(lateral(m), self.grid))
        return F.relu(self.mix(F.relu(total)))


class ClassificationNetwork(nn.Module):
    """One score a class for the centre of an image: (B, 3, H, W) -> logits (B, classes), by global average pooling.

    Args:
        encoder: an smp encoder: returns a list of feature maps, and knows their ``out_channels``.
        classes: number of outputs.
        image_size: side of the centre in pixels.
    """

    def __init__(self, encoder: nn.Module, classes: int, image_size: int) -> None:
        super().__init__()
        self.encoder, self.image_size = encoder, image_size
        self.head = ClassificationHead(encoder.out_channels[-1], classes, dropout=0.0)  # type: ignore[index]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(center_crop(image, self.image_size))[-1])


def build_encoder(
    encoder: str, options: dict[str, Any] | None, weights: str, padding: str, image_size: int, seed: int
) -> nn.Module:
    """An smp encoder, ready to train; raises ValueError if it cannot take an image of ``image_size``."""
    network = _load(encoder, options, weights, padding, seed)
    stage_shapes(network, [], image_size)
    return network


def build_network(
    encoder: str,
    classes: int,
    image_size: int,
    *,
    decoder: str = "linear",
    encoder_options: dict[str, Any] | None = None,
    encoder_weights: str = "untrained",
    encoder_padding: str = "zeros",
    decoder_padding: str = "zeros",
    decoder_options: dict[str, Any] | None = None,
    alignment: Literal["stretch", "context"] = "stretch",
    seed: int = 0,
) -> DenseNetwork:
    """An encoder under a decoder, ready to train.

    Args:
        encoder: an smp encoder, such as ``"smp:vgg16"``.
        classes: number of output channels.
        image_size: side of the output in pixels.
        decoder: ``"linear"`` (see :class:`LinearDecoder`) or one of smp's.
        encoder_options: see :func:`~padprobe.load_encoder`.
        encoder_weights: see :func:`~padprobe.load_encoder`.
        encoder_padding: see :func:`~padprobe.set_padding`.
        decoder_padding: likewise, of the decoder and its head; transposed convolutions too. ``"valid"``: what a layer
            gives without padding is stretched to the size that it has with padding, so that the decoder's maps fit
            each other; a transposed convolution leaves out what only padding completes, and its checkerboard.
        decoder_options: arguments of :class:`LinearDecoder` (``width``) or of smp's model (``decoder_channels``, ...).
        alignment: see :class:`DenseNetwork`.
        seed: of an untrained encoder's weights. The decoder's are drawn from the global random state.

    Raises:
        ValueError: for an unknown name; a decoder that cannot stand on the encoder; an encoder that cannot do without
            its padding; an image size that is too small for a padding mode, or that the decoder cannot divide (with
            the nearest sizes that work).
    """
    check_name(decoder, DECODERS, "decoder")
    for mode in (encoder_padding, decoder_padding):
        check_name(mode, PADDING_MODES, "padding mode")
    backbone = _load(encoder, encoder_options, encoder_weights, "zeros", seed)
    if decoder == "linear":
        body, head, step = _linear(backbone, classes, image_size, decoder_options or {})
    else:
        body, head, step = _from_smp(decoder, encoder, backbone, classes, decoder_options or {})
    if encoder_padding != "zeros":  # as built, even where that cannot be changed
        set_padding(backbone, encoder_padding)
    for layers in (body, head):
        _pad_decoder(layers, decoder_padding)

    # at a size that leaves one cell, which is broadcast over a shortcut, maps that do not fit each other pass
    if encoder_padding == "valid" and not takes(backbone, LARGEST):
        raise ValueError(
            f"encoder {encoder!r} cannot do without its padding (encoder_padding 'valid'): its maps no longer fit each "
            "other, as where a shortcut goes around a convolution. Use encoder_padding zeros, reflect, replicate or "
            "circular, or an encoder without shortcuts, such as 'smp:vgg16'"
        )
    needs = {}
    if encoder_padding != "valid" or alignment == "stretch":
        part = f"encoder {encoder!r} with encoder_padding {encoder_padding!r}"
        needs[part] = _smallest(part, backbone, image_size, step)
    with as_built(backbone):
        part = f"decoder {decoder!r} on {encoder!r} with decoder_padding {decoder_padding!r}"
        needs[part] = _smallest(part, nn.Sequential(backbone, body, head), image_size, step)
    _check_size(image_size, step, needs)
    return DenseNetwork(backbone, body, head, image_size, alignment)


def _load(encoder: str, options: dict[str, Any] | None, weights: str, padding: str, seed: int) -> nn.Module:
    if not encoder.startswith("smp:"):
        raise ValueError(f"encoder {encoder!r}: the tasks' networks are built on smp encoders, such as 'smp:vgg16'")
    return load_encoder(encoder, weights, padding, seed, options).train()


def _linear(encoder: Any, classes: int, image_size: int, options: dict[str, Any]) -> tuple[nn.Module, nn.Module, int]:
    """The padding-free decoder, its head, and what the image size must be a multiple of."""
    for option in options:
        check_name(option, ["width"], "option of decoder 'linear'")
    decoder = LinearDecoder(encoder.out_channels, image_size // 2, **options)
    return decoder, nn.Conv2d(decoder.mix.out_channels, classes, 1), 1


def _from_smp(
    arch: str, name: str, encoder: Any, classes: int, options: dict[str, Any]
) -> tuple[nn.Module, nn.Module, int]:
    """smp's decoder and head for this very encoder, and what the image size must be a multiple of.

    A decoder that wants a dilated encoder (DeepLabV3+) dilates it.
    """
    model_class = smp.MODEL_ARCHITECTURES_MAPPING[arch]
    ours = {"self", "encoder_name", "encoder_depth", "encoder_weights", "in_channels", "classes", "kwargs"}
    known = inspect.signature(model_class.__init__).parameters.keys() - ours - {"activation", "aux_params"}
    for option in options:
        check_name(option, sorted(known), f"option of decoder {arch!r}")
    depth = len(encoder.out_channels) - 1
    # as smp has them, for an encoder of another depth than smp's default
    defaults: dict[str, dict[str, Any]] = {
        "unet": {"decoder_channels": (256, 128, 64, 32, 16)[-depth:]},
        "fpn": {"upsampling": 2 ** (depth - 3)},
        "pspnet": {"upsampling": 2**depth},
    }

    def hand_over(name: str, *, output_stride: int = 32, **_: Any) -> nn.Module:
        if output_stride != 32:
            if not hasattr(encoder, "make_dilated"):
                raise NotImplementedError(f"{type(encoder).__name__} cannot be dilated once it is built.")
            encoder._output_stride = output_stride
            encoder.make_dilated(output_stride)
        return encoder

    module = sys.modules[model_class.__module__]
    get_encoder, module.get_encoder = module.get_encoder, hand_over  # type: ignore[attr-defined]
    try:
        model = model_class(
            name.removeprefix("smp:"),
            encoder_depth=depth,
            encoder_weights=None,
            classes=classes,
            **{**defaults.get(arch, {}), **options},
        )
    except (ValueError, NotImplementedError) as error:
        way_out = ", or an encoder that can be dilated, such as 'smp:resnet18'" if arch == "deeplabv3plus" else ""
        raise ValueError(
            f"decoder {arch!r} cannot stand on encoder {name!r}: {error or 'not implemented'} Use another decoder "
            f"({', '.join(d for d in DECODERS if d != arch)}){way_out}"
        ) from error
    finally:
        module.get_encoder = get_encoder  # type: ignore[attr-defined]
    return model.decoder, model.segmentation_head, encoder.output_stride if model.requires_divisible_input_shape else 1


def _pad_decoder(decoder: nn.Module, mode: str) -> None:
    """Changes how a decoder pads, in place. Its padded convolutions must keep the size of their input."""
    if mode == "zeros":
        return
    padded = [decoder.get_submodule(row.layer) for row in list_padding(decoder)]
    set_padding(decoder, mode)
    if mode == "valid":
        for layer in padded:
            layer.register_forward_hook(_stretch_back)
    for layer in decoder.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            layer.__class__ = _BorderedTranspose
            layer.padding_mode = mode  # type: ignore[assignment]


def _stretch_back(conv: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return _resize(output, args[0].shape[-1])


class _BorderedTranspose(nn.ConvTranspose2d):
    """A transposed convolution whose border cells are as complete as the others: (B, C, n, n) -> (B, D, sn, sn).

    Zero padding is implicit in a transposed convolution: outside its input is nothing. Here the input goes on for a
    cell in ``padding_mode``; or (``"valid"``) the incomplete cells are left out, and the rest stretched. For kernels of
    stride + 2 padding, padding at most the stride, without dilation.
    """

    def forward(self, maps: Tensor, output_size: list[int] | None = None) -> Tensor:
        stride, crop = self.stride[0], int(self.padding[0])
        if self.padding_mode == "valid":
            weight = _without_checkerboard(self.weight, stride)
            return _resize(F.conv_transpose2d(maps, weight, self.bias, stride, 2 * crop), stride * maps.shape[-1])
        further = F.pad(maps, (1, 1, 1, 1), mode=self.padding_mode)
        return F.conv_transpose2d(further, self.weight, self.bias, stride, crop + stride)


def _without_checkerboard(kernel: Tensor, stride: int) -> Tensor:
    """The nearest kernel (C, D, k, k) by which a constant map gives a constant one.

    A transposed convolution's output cells take turns in the parts of the kernel that they see. A checkerboard of
    parts with different sums, once stretched, would beat against the borders and so tell where they are.
    """
    parts = kernel.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # (C, D, tap, part, tap, part)
    sums = parts.mean((2, 4), keepdim=True)
    return (parts - sums + sums.mean((3, 5), keepdim=True)).flatten(4, 5).flatten(2, 3)


def _smallest(part: str, network: nn.Module, image_size: int, step: int) -> int:
    """0 if the network takes the multiple of ``step`` up to the image size, else the smallest one that it takes."""
    if takes(network, image_size // step * step):
        return 0
    smallest = smallest_image(network, LARGEST, step)
    if smallest is None:
        raise ValueError(
            f"{part} works at no image size up to {LARGEST} px: use another padding mode, or other options"
        )
    return smallest


def _check_size(image_size: int, step: int, needs: dict[str, int]) -> None:
    """Raises ValueError if a part needs a larger image than this, or the decoder one that it can divide."""
    worst = max(needs, key=needs.__getitem__)
    below = image_size // step * step
    if below < needs[worst]:
        raise ValueError(
            f"a {image_size} x {image_size} image is too small for {worst}: the smallest that works is "
            f"{needs[worst]} x {needs[worst]}. Use larger images, or padding that keeps the maps' size (zeros)"
        )
    if below < image_size:
        raise ValueError(
            f"image_size {image_size} is no multiple of {step}, the stride that smp's decoder undoes: the nearest that "
            f"work are {below} and {below + step}"
        )
