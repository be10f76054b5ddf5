"""The networks of the study's tasks: an encoder and a decoder, each with its own padding mode."""

from __future__ import annotations

import inspect
from typing import Any, Literal
from unittest.mock import patch

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import ClassificationHead
from torch import Tensor, nn

from padprobe.errors import check_name
from padprobe.maps import Size, size_pair
from padprobe.network.encoders import load_encoder
from padprobe.network.forward import smallest_image, takes
from padprobe.network.padding import PADDING_MODES, as_built, list_padding, set_padding
from padprobe.network.tap import center_crop
from padprobe.network.trace import context_size, output_sides, stage_shapes

DECODERS = ("linear", "unet", "fpn", "deeplabv3plus", "pspnet", "linknet", "upernet")
LARGEST = 2048  # px: the search for an image size that works ends here


def _resize(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps, size_pair(size), mode="bilinear", align_corners=False)


class DenseNetwork(nn.Module):
    """Scores every class at every pixel: images (B, 3, H, W) -> logits (B, classes, S, S).

    Args:
        encoder: an smp encoder, which returns a list of feature maps.
        decoder: takes the maps, in the sizes that the padded encoder gives them; returns one map.
        head: turns that map into logits of any size, which are then resized to S.
        image_size: S in pixels.
        alignment: how the maps of an unpadded encoder are brought to the sizes of the padded encoder's maps.
            ``"stretch"`` resizes them, as in the paper. This moves deep maps outwards relative to shallow ones, and the
            decoder can tell position from the difference. ``"context"`` takes an image larger than S and scores its
            centre. An unpadded encoder also sees the surroundings that it needs, and its maps are centre-cropped to the
            geometry of the padded encoder's maps, so that padding is the only difference.

    Attributes:
        seen: side in pixels of the image that the network needs.

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
        check_name(alignment, ("stretch", "context"), "alignment")
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.image_size, self.seen = image_size, image_size
        self.fit = center_crop if alignment == "context" else _resize
        self.sides: list[tuple[int, int]] | None = None  # of the aligned maps; None if the encoder pads
        if not list_padding(encoder):
            if alignment == "context":
                (self.seen, _), self.sides = context_size(encoder, image_size)
            else:
                with as_built(encoder):
                    self.sides = output_sides(encoder, image_size)

    def forward(self, image: Tensor) -> Tensor:
        if min(image.shape[-2:]) < self.seen:
            raise ValueError(
                f"the image is {image.shape[-2]} x {image.shape[-1]} px; this network needs {self.seen} px to score "
                f"the central {self.image_size}: give the data more context, or use alignment 'stretch'"
            )
        maps = self.encoder(center_crop(image, (self.seen, self.seen)))
        if self.sides:
            maps = [self.fit(features, side) for features, side in zip(maps, self.sides, strict=True)]
        return _resize(self.head(self.decoder(maps)), self.image_size)


class LinearDecoder(nn.Module):
    """A decoder without any padding: a list of maps (B, C, h, w) -> one map (B, width, grid, grid).

    A 1x1 convolution takes each map, with C in ``channels``, to ``width`` channels, and the map is resized to the grid.
    A 1x1 convolution follows the sum of all maps.

    Example:
        >>> import torch
        >>> decoder = LinearDecoder([8, 16], grid=12, width=4)
        >>> decoder([torch.rand(1, 8, 24, 24), torch.rand(1, 16, 6, 6)]).shape
        torch.Size([1, 4, 12, 12])
    """

    def __init__(self, channels: list[int], grid: int, width: int = 32) -> None:
        super().__init__()
        self.grid = grid
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=maps[0].device)
        for lateral, m in zip(self.laterals, maps, strict=True):
            # a 1x1 convolution and a resize commute: convolve whichever map is smaller
            big = m.shape[-1] > self.grid
            total = total + (lateral(_resize(m, self.grid)) if big else _resize(lateral(m), self.grid))
        return F.relu(self.mix(F.relu(total)))


class ClassificationNetwork(nn.Module):
    """Scores every class for an image's central S x S px, by global average pooling: (B, 3, H, W) -> (B, classes).

    Args:
        classes: number of classes.
        encoder: an smp encoder, such as ``smp:vgg16``.
        image_size: S in pixels.
        encoder_options: more arguments of the encoder's constructor, see :func:`padprobe.load_encoder`.
        encoder_weights: ``untrained``, a name that smp, torchvision or timm knows, or a file.
        encoder_padding: ``zeros``, ``valid``, ``reflect``, ``replicate`` or ``circular``.
        seed: for the weights of an untrained encoder.

    Raises:
        ValueError: for an unknown name, or an image that is too small for the encoder.
    """

    def __init__(
        self,
        classes: int,
        encoder: str = "smp:vgg16",
        image_size: int = 224,
        encoder_options: dict[str, Any] | None = None,
        encoder_weights: str = "untrained",
        encoder_padding: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.encoder = _load(encoder, encoder_options, encoder_weights, encoder_padding, seed)
        stage_shapes(self.encoder, [], image_size)
        channels = self.encoder.out_channels[-1]  # type: ignore[index]
        self.head = ClassificationHead(channels, classes, dropout=0.0)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(center_crop(image, (self.image_size, self.image_size)))[-1])


def build_network(
    classes: int,
    encoder: str = "smp:vgg16",
    image_size: int = 224,
    encoder_options: dict[str, Any] | None = None,
    encoder_weights: str = "untrained",
    encoder_padding: str = "zeros",
    decoder: str = "linear",
    decoder_options: dict[str, Any] | None = None,
    decoder_padding: str = "zeros",
    alignment: Literal["stretch", "context"] = "stretch",
    seed: int = 0,
) -> DenseNetwork:
    """An encoder with a decoder, ready to train.

    Args:
        classes: number of output channels.
        encoder: an smp encoder, such as ``smp:vgg16``; ``smp:tu-NAME`` is an encoder of timm.
        image_size: S, the side of the output in pixels.
        encoder_options: more arguments of the encoder's constructor, see :func:`padprobe.load_encoder`.
        encoder_weights: ``untrained``, a name that smp, torchvision or timm knows, or a file.
        encoder_padding: ``zeros``, ``valid``, ``reflect``, ``replicate`` or ``circular``.
        decoder: ``linear`` (has no padding, see :class:`LinearDecoder`), or smp's ``unet``, ``fpn``,
            ``deeplabv3plus``, ``pspnet``, ``linknet`` or ``upernet``.
        decoder_options: arguments of :class:`LinearDecoder` (``width``) or of smp's model (``decoder_channels``, ...).
        decoder_padding: how an smp decoder and its head pad: ``zeros``, ``reflect``, ``replicate`` or ``circular``
            (``linknet``: only ``zeros``).
        alignment: how the maps of an unpadded encoder are aligned, ``stretch`` or ``context``, see
            :class:`DenseNetwork`. ``context`` needs images larger than S; labels stay S x S.
        seed: for the weights of an untrained encoder. The decoder's weights come from the global random state.

    Raises:
        ValueError: for what cannot work (a name, a decoder with the encoder or the padding mode, an encoder without
            padding, an image size), with what does.

    Example:
        >>> import torch
        >>> tiny = {"config": [8, "M", 8], "out_channels": [8, 8], "depth": 1}
        >>> network = build_network(2, "smp:vgg11", 32, encoder_options=tiny, encoder_padding="reflect")
        >>> network(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 2, 32, 32])
    """
    check_name(decoder, DECODERS, "decoder")
    for mode in (encoder_padding, decoder_padding):
        check_name(mode, PADDING_MODES, "padding mode")
    backbone = _load(encoder, encoder_options, encoder_weights, "zeros", seed)
    body, head, step = _decoder(decoder, encoder, backbone, classes, image_size, decoder_options or {})
    if decoder != "linear" and decoder_padding != "zeros":
        _pad_decoder(decoder, nn.Sequential(body, head), decoder_padding)
    if encoder_padding != "zeros":  # zeros is how it was built, even where padding cannot be changed
        set_padding(backbone, encoder_padding)

    # tried at a large size: where maps shrink to one cell, broadcasting would hide that they do not fit
    if encoder_padding == "valid" and not takes(backbone, LARGEST):
        raise ValueError(
            f"encoder {encoder!r} cannot work without padding (encoder_padding 'valid'): its maps no longer fit each "
            "other, as where a shortcut skips a convolution. Use encoder_padding zeros, reflect, replicate or "
            "circular, or an encoder without shortcuts, such as 'smp:vgg16'"
        )
    smallest: dict[str, int | None] = {}
    if encoder_padding != "valid" or alignment == "stretch":
        part = f"encoder {encoder!r} with encoder_padding {encoder_padding!r}"
        smallest[part] = _smallest(backbone, image_size, step)
    with as_built(backbone):
        part = f"decoder {decoder!r} on {encoder!r} with decoder_padding {decoder_padding!r}"
        smallest[part] = _smallest(nn.Sequential(backbone, body, head), image_size, step)
    _check_size(image_size, step, smallest)
    return DenseNetwork(backbone, body, head, image_size, alignment)


def _load(encoder: str, options: dict[str, Any] | None, weights: str, padding: str, seed: int) -> nn.Module:
    if not encoder.startswith("smp:"):
        raise ValueError(f"encoder {encoder!r}: the tasks need an encoder of smp, such as 'smp:vgg16'")
    return load_encoder(encoder, weights, padding, seed, options).train()


def _decoder(
    name: str, encoder_name: str, encoder: Any, classes: int, image_size: int, options: dict[str, Any]
) -> tuple[nn.Module, nn.Module, int]:
    """A decoder and its head for this encoder, and the number that the image size must be a multiple of.

    A decoder that needs a dilated encoder (DeepLabV3+) dilates it in place.
    """
    model_class = smp.MODEL_ARCHITECTURES_MAPPING.get(name, LinearDecoder)
    given = {"self", "channels", "grid"} | {
        "encoder_name",
        "encoder_depth",
        "encoder_weights",
        "in_channels",
        "classes",
    }
    known = inspect.signature(model_class.__init__).parameters.keys() - given - {"activation", "aux_params", "kwargs"}
    for option in options:
        check_name(option, sorted(known), f"option of decoder {name!r}")
    if name == "linear":
        linear = LinearDecoder(encoder.out_channels, image_size // 2, **options)
        return linear, nn.Conv2d(linear.mix.out_channels, classes, 1), 1
    depth = len(encoder.out_channels) - 1
    # smp's defaults fit its default depth alone; these are the same for any depth
    defaults: dict[str, dict[str, Any]] = {
        "unet": {"decoder_channels": (256, 128, 64, 32, 16)[-depth:]},
        "fpn": {"upsampling": 2 ** (depth - 3)},
        "pspnet": {"upsampling": 2**depth},
    }

    def give_encoder(name: str, *, output_stride: int = 32, **_: Any) -> nn.Module:
        if output_stride != 32:
            if not hasattr(encoder, "make_dilated"):
                raise ValueError(f"{type(encoder).__name__} cannot be dilated once it is built.")
            encoder._output_stride = output_stride
            encoder.make_dilated(output_stride)
        return encoder

    arguments = {
        "encoder_depth": depth,
        "encoder_weights": None,
        "classes": classes,
        **defaults.get(name, {}),
        **options,
    }
    try:  # by itself, smp's model would build an encoder without encoder_options
        with patch(f"{model_class.__module__}.get_encoder", give_encoder):
            model = model_class(encoder_name.removeprefix("smp:"), **arguments)
    except (ValueError, NotImplementedError) as error:  # smp's encoders that cannot be dilated raise the latter
        way_out = ", or an encoder that can be dilated, such as 'smp:resnet18'" if name == "deeplabv3plus" else ""
        raise ValueError(
            f"decoder {name!r} does not work with encoder {encoder_name!r}: {error or 'smp does not support it.'} Use "
            f"another decoder ({', '.join(d for d in DECODERS if d != name)}){way_out}"
        ) from error
    return model.decoder, model.segmentation_head, encoder.output_stride if model.requires_divisible_input_shape else 1


def _pad_decoder(name: str, layers: nn.Module, mode: str) -> None:
    """Changes how an smp decoder pads, in place; raises ValueError for a mode that it cannot have."""
    if mode == "valid":
        raise ValueError(
            f"decoder_padding 'valid' with decoder {name!r}: smp's decoders need maps that keep their size. Use "
            "decoder 'linear', which has no padding, or decoder_padding zeros, reflect, replicate or circular"
        )
    if any(isinstance(layer, nn.ConvTranspose2d) for layer in layers.modules()):
        raise ValueError(
            f"decoder_padding {mode!r} with decoder {name!r}: its transposed convolutions always see zeros outside the "
            "map. Use decoder_padding zeros, or another decoder, such as 'unet'"
        )
    set_padding(layers, mode)


def _smallest(network: nn.Module, image_size: int, step: int) -> int | None:
    """The smallest multiple of ``step`` that a network takes, None if over 2048 px; 0 if it takes the image size."""
    return 0 if takes(network, image_size // step * step) else smallest_image(network, LARGEST, step)


def _check_size(image_size: int, step: int, smallest: dict[str, int | None]) -> None:
    """Raises ValueError if a part needs a larger image, or the image size is no multiple of ``step``."""
    for part, size in smallest.items():
        if size is None:
            raise ValueError(
                f"{part} works at no image size up to {LARGEST} px: use another padding mode, or other options"
            )
    size, part = max((size or 0, part) for part, size in smallest.items())
    if size:
        raise ValueError(
            f"a {image_size} x {image_size} image is too small for {part}: the smallest that works is {size} x {size}. "
            "Use larger images, or padding that keeps the maps' size (zeros)"
        )
    if rest := image_size % step:
        below = image_size - rest
        raise ValueError(
            f"image_size {image_size} is no multiple of {step}, the stride of this encoder, as the decoder needs: the "
            f"nearest that work are {below} and {below + step}"
        )
