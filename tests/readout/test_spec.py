import pytest

from padprobe.readout.spec import Readout, parse_readout, with_controls


def test_a_readout_is_written_in_one_line():
    assert parse_readout("kernel_size=7,stages=f1+f2") == Readout(kernel_size=7, stages="f1+f2")
    assert parse_readout("ridge,kernel_size=1") == Readout("ridge", kernel_size=1)
    assert parse_readout("depth=2, padding=1,scale=paper") == Readout(depth=2, padding=1, scale="paper")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel=7", "unknown readout option 'kernel'; did you mean 'kernel_size'"),
        ("kernel_size=4", "kernel_size is 4"),
        ("kernel_size=big", "kernel_size of readout 'kernel_size=big' is 'big'"),
        ("rigde", "unknown readout 'rigde'; did you mean 'ridge'"),
        ("ridge,depth=2", "a ridge readout has depth 1"),
        ("stages=first", "stages of a readout are 'first'"),
        ("scale=big", "unknown scale 'big'"),
    ],
)
def test_what_cannot_be_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_readout(text)


def test_every_readout_has_its_control_on_the_image_alone_once():
    found = with_controls([Readout(), Readout(stages="each"), Readout(kernel_size=7), Readout()], ["f1", "f2"])
    names = [(readout.stages, readout.kernel_size) for readout in found]
    assert names == [("all", 3), ("f1", 3), ("f2", 3), ("all", 7), ("rgb", 3), ("rgb", 7)]
    with pytest.raises(ValueError, match="unknown stage 'f6'"):
        with_controls([Readout(stages="f1+f6")], ["f1", "f2"])
