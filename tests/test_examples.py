"""The examples run, stay short, and show what their first lines say."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the `main` of an example as a script in an empty folder would."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def run(name: str, **sizes: int):
        result = importlib.import_module(name).main(**sizes)
        assert not list(tmp_path.iterdir()), "an example leaves no files behind"
        return result

    return run


def test_a_training_is_watched(run):
    scores = run("watch_training", epochs=2)
    assert set(scores) >= {f"position/{target}/spc" for target in ("H", "V", "G")}


@pytest.mark.slow
def test_an_untrained_resnet_knows_position_by_its_zero_padding_alone(run):
    spc = run("probe_resnet18", image_size=64, images=32, epochs=5)
    assert (spc.loc["zeros"] > 0.5).all(axis=None)
    assert (spc.loc["circular", "white"] == 0).all()  # a constant image without a border has no position
    assert (spc.loc["circular"].abs() < 0.3).all(axis=None)


def test_the_encoder_of_a_checkpoint_is_probed(run):
    spc = run("probe_checkpoint", images=32)
    assert {"H", "V", "G"} <= set(spc.columns)
    assert {"spc", "delta"} == set(spc.index.get_level_values("metric"))


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(script):
    text = script.read_text(encoding="utf-8")
    assert f"python examples/{script.name}" in text.splitlines()[0]
    assert len(text.splitlines()) < 40
