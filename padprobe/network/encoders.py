"""Loads an encoder by name or from a checkpoint."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padprobe.errors import check_name, require
from padprobe.maps import Size, size_pair
from padprobe.network.embedding import EMBEDDING_MODES, set_position_embedding
from padprobe.network.padding import PADDING_MODES, set_padding


def load_encoder(
    name: str,
    weights: str | Path = "untrained",
    padding: str = "zeros",
    seed: int = 0,
    options: dict[str, Any] | None = None,
    image_size: Size | None = None,
    position_embedding: str = "learned",
) -> nn.Module:
    """Loads an encoder by name, in evaluation mode.

    Args:
        name: ``"torchvision:vgg16"``, ``"smp:resnet34"`` (``"smp:tu-NAME"`` for a timm model with smp's interface),
            ``"timm:convnext_tiny"``, or the path of a Lightning checkpoint (``.ckpt``). From a checkpoint, the
            ``encoder`` submodule is taken, with the weights and the padding that it was trained with.
        weights: ``"untrained"``; a name that the library knows (``"IMAGENET1K_V1"``, ``"imagenet"``, a timm tag; for
            smp's encoders also torchvision's names); or the path of a state dict, whose head may be missing.
        padding: see :func:`~padprobe.set_padding`. ``"zeros"`` leaves the network as it was built or trained.
        seed: seed of untrained weights. The global random state is left alone.
        options: further arguments of the library's constructor, such as ``config`` and ``out_channels`` of smp's VGG.
        image_size: the size in pixels to build the network for, where timm's constructor takes one (``img_size``). A
            ViT runs on images of this size alone.
        position_embedding: see :func:`~padprobe.network.embedding.set_position_embedding`. ``"learned"`` leaves the
            network as it was built or trained.

    Raises:
        ValueError: for an unknown library, architecture, weight name, padding mode or position embedding (with the
            nearest valid names), for a weights file that does not fit the architecture, and for a network whose
            position embedding cannot be set.

    Example:
        >>> encoder = load_encoder("torchvision:squeezenet1_1", padding="valid", seed=3)
        >>> encoder.features[3].squeeze.weight.shape, encoder.training
        (torch.Size([16, 64, 1, 1]), False)
    """
    check_name(padding, PADDING_MODES, "padding mode")
    check_name(position_embedding, EMBEDDING_MODES, "position embedding")
    if str(name).endswith(".ckpt"):
        _check_weights(weights, [])
        encoder = _from_checkpoint(Path(name))
    else:
        library, _, architecture = str(name).partition(":")
        if not architecture:
            raise ValueError(
                f"unknown encoder {name!r}; expected 'torchvision:NAME', 'smp:NAME', 'timm:NAME' or a .ckpt file"
            )
        check_name(library, _BUILD, "encoder library")
        with torch.random.fork_rng(devices=[]), require("tasks"):
            torch.manual_seed(seed)
            build = functools.partial(_BUILD[library], architecture, weights)
            try:
                sized = {"img_size": size_pair(image_size)} if image_size and library == "timm" else {}
                encoder = build({**sized, **(options or {})})
            except TypeError as error:  # timm's convolutional networks take images of any size
                if "img_size" not in str(error) or "img_size" in (options or {}):
                    raise
                encoder = build(options or {})
    if Path(weights).is_file():
        _load_state(encoder, Path(weights))
    if padding != "zeros":
        set_padding(encoder, padding)
    if position_embedding != "learned":
        set_position_embedding(encoder, position_embedding)
    return encoder.eval()


def _check_weights(weights: str | Path, known: list[str]) -> str | None:
    """The name of the library's weights to use, which must be ``known``; None for untrained weights and files."""
    if weights == "untrained" or Path(weights).is_file():
        return None
    check_name(str(weights), ["untrained", *known, "the path of a file"], "weights")
    return str(weights)


def _torchvision(architecture: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    check_name(architecture, models.list_models(models), "torchvision encoder")
    name = _check_weights(weights, list(_torchvision_weights(architecture)))
    return models.get_model(architecture, weights=name, **options)


def _torchvision_weights(architecture: str) -> dict[str, Any]:
    """torchvision's weights of an architecture by name; empty for an architecture that torchvision does not have."""
    from torchvision import models

    known = architecture in models.list_models(models)
    return dict(models.get_model_weights(architecture).__members__) if known else {}


def _smp(architecture: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    from segmentation_models_pytorch.encoders import encoders, get_encoder
    from segmentation_models_pytorch.encoders.vgg import VGGEncoder

    if architecture.startswith("tu-"):  # a timm model with smp's interface
        name, pretrained = _timm_name(architecture[3:], weights)
        return get_encoder(f"tu-{name}", weights=pretrained or None, **options)
    check_name(architecture, encoders, "smp encoder")
    shared = _torchvision_weights(architecture)  # smp's VGG, ResNet and DenseNet take torchvision's weights
    chosen = _check_weights(weights, [*encoders[architecture].get("pretrained_settings", {}), *shared])
    if chosen and options:
        raise ValueError(
            f"the weights {chosen!r} do not fit an encoder that options {options} change: leave one of them out"
        )
    if chosen in shared:
        encoder = _smp(architecture, "untrained", {})
        encoder.load_state_dict(shared[chosen].get_state_dict(progress=False, check_hash=True))
        return encoder
    if chosen:
        return get_encoder(architecture, weights=chosen)
    # the arguments of get_encoder(), which would drop the options
    entry = encoders[architecture]
    arguments = {**entry["params"], "depth": 5, "output_stride": 32, **options}
    build = entry["encoder"]
    return _vgg(build, arguments) if build is VGGEncoder else build(**arguments)


def _vgg(encoder_class: Any, arguments: dict[str, Any]) -> nn.Module:
    """An smp VGG with torchvision's initialization, without the 120 million weights of the head.

    smp builds torchvision's whole network and then deletes the head, which costs two seconds and half a gigabyte.
    """
    with torch.device("meta"):
        encoder = encoder_class(**arguments, init_weights=False)
    encoder.to_empty(device="cpu")
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # VGG's convolutions have a bias
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    return encoder


def _timm(architecture: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    import timm

    name, pretrained = _timm_name(architecture, weights)
    return timm.create_model(name, pretrained=pretrained, features_only=True, **options)


def _timm_name(architecture: str, weights: str | Path) -> tuple[str, bool]:
    """A timm model's name, with the tag of its weights if it has any, and whether it has."""
    import timm

    check_name(architecture, timm.list_models(), "timm encoder")
    tag = _check_weights(weights, [name.partition(".")[2] for name in timm.list_pretrained(architecture)])
    return (f"{architecture}.{tag}", True) if tag else (architecture, False)


_BUILD = {"torchvision": _torchvision, "smp": _smp, "timm": _timm}


def _read(path: Path) -> Any:
    """Reads a file of tensors and plain values. Nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read {str(path)!r} as weights: {error}") from error


def _load_state(encoder: nn.Module, path: Path) -> None:
    """Loads a state dict that must have every parameter and buffer of the encoder, without its head.

    The keys may share a prefix, such as ``module.`` or ``net.encoder.``; keys without it belong to other parts. Step
    counts of BatchNorms may be missing. A head (see ``_HEADS``) may be missing, too much, or of other shapes: nothing
    that is probed depends on it, and then it stays as it is.
    """
    state, kind = _state_dict(_read(path), path), type(encoder).__name__
    expected = encoder.state_dict()
    # a head of convolutions, as SqueezeNet's, may be a stage
    body = [key for key in expected if not _is_optional(key) or expected[key].ndim == 4]
    prefixes = {key.removesuffix(body[0]) for key in state if key == body[0] or key.endswith("." + body[0])}
    fits = {prefix: [key for key in body if prefix + key not in state] for prefix in prefixes or {""}}
    complete = [prefix for prefix, missing in fits.items() if not missing]
    if len(complete) > 1 and "" not in complete:
        raise ValueError(
            f"weights {str(path)!r} hold {len(complete)} networks that fit {kind}, under "
            f"{', '.join(sorted(complete))}: save the one to probe alone"
        )
    prefix = "" if "" in complete else (complete or sorted(fits, key=lambda prefix: len(fits[prefix])))[0]
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    wrong = [key for key in body if key in own and own[key].shape != expected[key].shape]
    extra = [key for key in own if key not in expected and not _is_optional(key)]
    for keys, what in ((wrong, "has other shapes for"), (fits[prefix], "lacks"), (extra, "has keys that it lacks:")):
        if keys:
            raise ValueError(
                f"weights {str(path)!r} do not fit {kind}: the file {what} {', '.join(keys[:3])} ({len(keys)} of "
                f"{len(body)} keys); its keys look like {', '.join(list(state)[:3])}"
            )
    for key in body:
        if expected[key].is_floating_point() and not own[key].is_floating_point():
            raise ValueError(
                f"weights {str(path)!r}: {key} is {own[key].dtype}; expected floating-point numbers: save the weights "
                "before they are quantized"
            )
        if not own[key].float().isfinite().all():
            raise ValueError(f"weights {str(path)!r}: {key} has NaN or infinite values: the training has diverged")
    fitting = {key: own[key] for key in expected if key in own and own[key].shape == expected[key].shape}
    nn.Module.load_state_dict(encoder, fitting, strict=False)


_HEADS = ("classifier", "fc", "head", "heads", "head_dist", "last_linear", "AuxLogits", "aux1", "aux2")
"""What torchvision, timm and smp call the layers behind the last stage."""


def _is_optional(key: str) -> bool:
    return key.split(".")[0] in _HEADS or key.endswith("num_batches_tracked")


def _state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, alone or as part of a checkpoint."""
    for part in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(part), dict):
            content = content[part]
            break
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
        for key, value in content.items()
    ):
        raise ValueError(f"{str(path)!r} holds no state dict; expected tensors by name, or a 'state_dict' of them")
    return content


def _from_checkpoint(path: Path) -> nn.Module:
    """The ``encoder`` of the LightningModule that wrote a checkpoint."""
    if not path.is_file():
        raise ValueError(f"no checkpoint {str(path)!r}: expected the path of a file")
    checkpoint = _read(path)
    hparams = dict(checkpoint.get("hyper_parameters", {}))
    class_path = hparams.pop("_class_path", None)
    if class_path is None:
        raise ValueError(
            f"checkpoint {str(path)!r} does not say which LightningModule wrote it: train with `padprobe fit`, or "
            "build the module yourself and pass its encoder to probe_encoder"
        )
    from lightning.pytorch import LightningModule

    module_name, _, class_name = class_path.rpartition(".")
    try:
        task = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} was written by {class_path}, which cannot be imported: {error}"
        ) from error
    if not (isinstance(task, type) and issubclass(task, LightningModule)):
        raise ValueError(f"checkpoint {str(path)!r} names {class_path}, which is not a LightningModule")
    hparams.pop("_instantiator", None)
    if "encoder_weights" in hparams:  # the file that the training started from may be gone
        hparams["encoder_weights"] = "untrained"
    module = task(**hparams)
    module.load_state_dict(checkpoint["state_dict"])
    return module.get_submodule(find_encoder(module))


def weights_label(weights: str | Path) -> str:
    """What results call an encoder's weights: a file's name without its ending, any other weights as they are.

    Example:
        >>> weights_label("data/vgg16.pth"), weights_label("IMAGENET1K_V1"), weights_label("data/untrained.pth")
        ('vgg16', 'IMAGENET1K_V1', 'untrained.pth')
    """
    path = Path(weights)
    return path.name if path.stem in ("untrained", "trained") else path.stem


def find_encoder(module: nn.Module) -> str:
    """The dotted name of a network's outermost submodule called ``encoder`` or ``backbone``; "" if there is none."""
    names = [name for name, _ in module.named_modules() if name.split(".")[-1] in ("encoder", "backbone")]
    return min(names, key=lambda name: name.count("."), default="")
