import dataclasses
import inspect
import re

import pytest

from padprobe import probe_encoder
from padprobe.cli import main
from padprobe.probe.command import make_parser, read_options
from padprobe.probe.options import ProbeOptions, change_options, default_of
from padprobe.readout.spec import Readout

FIELDS = {field.name: field for field in dataclasses.fields(ProbeOptions)}


def parse(*arguments):
    return read_options(make_parser().parse_args(["--encoder", "a:b", "--weights", "w", "--out", "o", *arguments]))


def test_the_command_line_has_every_option_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit):
        main(["probe", "--help"])
    printed = capsys.readouterr().out
    options = printed.partition("options of the probe:")[2]
    names = re.findall(r"^  --([a-z-]+)", options, flags=re.M)
    assert [name.replace("-", "_") for name in names] == list(FIELDS)
    words = " ".join(options.split())
    for name, field in FIELDS.items():
        assert " ".join(field.metadata["help"].split()) in words, name
    assert parse() == ProbeOptions()


def test_the_function_has_every_option_with_its_help_and_default():
    parameters = inspect.signature(probe_encoder).parameters
    assert list(parameters)[-len(FIELDS) :] == list(FIELDS)
    words = " ".join(probe_encoder.__doc__.split())
    for name, field in FIELDS.items():
        assert parameters[name].default == default_of(field)
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"{name}: {field.metadata['help']}" in words


def test_spellings_of_the_command_line():
    options = parse("--limit-train", "8", "--image-size", "96", "--no-selectivity", "--seeds", "0", "1", "2")
    assert (options.limit_train, options.image_size, options.selectivity, options.seeds) == (8, 96, False, [0, 1, 2])
    options = parse("--targets", "H", "V", "--stages", "layer1", "layer2", "--context", "--cache-gb", "0.5")
    assert (options.targets, options.stages, options.cache_gb) == (["H", "V"], ["layer1", "layer2"], 0.5)
    assert options.context
    assert parse("--stages", "paper").stages == "paper"
    readouts = parse("--readouts", "posenet", "kernel_size=7", "ridge,kernel_size=1").readouts
    assert readouts == [Readout(), Readout(kernel_size=7), Readout("ridge", kernel_size=1)]
    assert parse("--readouts", "vgg16.safetensors").readouts == "vgg16.safetensors"
    sizes = ("240x320", "96x96", "96"), ((240, 320), 96, 96)
    assert [parse("--image-size", text).image_size for text in sizes[0]] == list(sizes[1])
    with pytest.raises(ValueError, match="give the file alone"):
        parse("--readouts", "vgg16.safetensors", "ridge")


def test_untrained_weights_are_settled_and_trained_ones_are_not():
    arguments = ["--encoder", "torchvision:vgg16", "--out", "o"]
    assert read_options(make_parser().parse_args(arguments)).settle
    assert not read_options(make_parser().parse_args([*arguments, "--weights", "IMAGENET1K_V1"])).settle
    assert not read_options(make_parser().parse_args(["--encoder", "best.ckpt", "--out", "o"])).settle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({"untrained": -1}, "untrained is -1; expected 0 or more"),
        ({"limit_train": 0}, "limit_train is 0; expected 1 or more"),
        ({"limit_test": -2}, "limit_test is -2; expected 1 or more"),
        ({"cache_gb": -1.0}, r"cache_gb is -1\.0; expected 0 or more"),
        ({"epochs": True}, "epochs is True; expected an integer"),
        ({"batch_size": 8.0}, "batch_size is 8.0; expected an integer"),
        ({"untrained": "3"}, "untrained is '3'; expected an integer"),
        ({"grid": float("nan")}, "grid is nan; expected an integer"),
        ({"cache_gb": float("nan")}, "cache_gb is nan; expected a finite number"),
        ({"cache_gb": float("inf")}, "cache_gb is inf; expected a finite number"),
        ({"normalize": "yes"}, "normalize is 'yes'; expected bool"),
        ({"targets": "HV"}, "targets is 'HV'; expected list"),
        ({"seeds": [0.5]}, r"seeds is \[0.5\]; expected list"),
        ({"seeds": [-1]}, "a seed is -1; expected 0 or more"),
        ({"readouts": []}, "readouts is empty; expected at least one"),
        ({"targets": []}, "targets is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"stages": []}, "stages is empty"),
        ({"image_size": (1, 5)}, r"image_size is \(1, 5\); expected 2 or more"),
        ({"image_size": 1}, "image_size is 1; expected 2 or more"),
        ({"image_size": (3, 4, 5)}, r"image_size is \(3, 4, 5\); expected pixels: 224 for a square, or height"),
        ({"image_size": 32.0}, r"image_size is 32\.0; expected pixels"),
        ({"image_size": True}, "image_size is True; expected pixels"),
    ],
)
def test_a_value_that_is_not_possible_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ProbeOptions(**options)


@pytest.mark.parametrize("size", ["0x3", "224x", "1x2x3", "2.5", "large"])
def test_an_image_size_that_is_none_is_named_by_the_command_line(size, tmp_path, capsys):
    assert main(["probe", "--encoder", "torchvision:vgg11", "--out", str(tmp_path), "--image-size", size]) == 2
    assert f"image_size is {size!r}; expected pixels: 224 for a square, or height and width" in capsys.readouterr().err


def test_an_unknown_option_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="unknown option of a probe 'epoch'; did you mean 'epochs'"):
        probe_encoder("torchvision:vgg16", epoch=2)


def test_changes_leave_the_options_as_they_were_and_lists_are_not_shared():
    options = ProbeOptions(epochs=2)
    assert change_options(options, {"grid": 14}) == ProbeOptions(epochs=2, grid=14)
    assert options == ProbeOptions(epochs=2)
    options.seeds.append(1)
    assert ProbeOptions().seeds == [0]
