"""The base install: what works where none of the extras is there, and what a missing one says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import padprobe
from padprobe.errors import require

ROOT = Path(__file__).parents[1]
EXTRAS = {  # what the extras of setup.py install: module -> distribution
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "timm": "timm",
    "albumentations": "albumentations",
    "cv2": "opencv-python-headless",
    "pycocotools": "pycocotools",
    "py_sod_metrics": "pysodmetrics",
    "matplotlib": "matplotlib",
    "jsonargparse": "jsonargparse",
    "rich": "rich",
    "scipy": "scipy",
    "transformers": "transformers",
    "peft": "peft",
    "torchgeo": "torchgeo",
    "lightly": "lightly",
}
BROUGHT = ("jinja2", "yaml", "filelock")  # torch and lightning bring these, but padprobe's base does not count on it
WITHOUT_EXTRAS = f"""
import builtins, importlib.metadata, sys
EXTRAS, BROUGHT = {EXTRAS!r}, {BROUGHT!r}

class Missing:  # no module of an extra is found
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Missing())

installed = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):  # nor do libraries that ask what is installed find it
    if name.lower().replace("_", "-") in EXTRAS.values():
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)

load = builtins.__import__
def guarded(name, globals=None, *args, **options):
    if name.partition(".")[0] in BROUGHT and (globals or {{}}).get("__name__", "").startswith("padprobe"):
        raise ModuleNotFoundError(f"padprobe imports {{name!r}}", name=name)
    return load(name, globals, *args, **options)
builtins.__import__ = guarded
"""


def run_without_extras(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs Python code in a process that finds none of the extras' packages, in ``folder``."""
    text = f"{WITHOUT_EXTRAS}\nsys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_missing_package_is_named_with_the_install_that_brings_it():
    with pytest.raises(ModuleNotFoundError) as caught, require("report"):
        import no_such_package.part  # noqa: F401
    assert str(caught.value).count("\n") == 0
    assert "'no_such_package'" in str(caught.value)
    assert 'pip install "padprobe[report]"' in str(caught.value)


def test_other_trouble_in_the_block_is_left_alone():
    with pytest.raises(ImportError, match="cannot import name"), require("report"):
        from json import no_such_name  # noqa: F401
    with require("report"):
        import json  # noqa: F401


def test_the_extras_named_in_messages_exist():
    extras = set(re.findall(r'^    "(\w+)": |^EXTRAS\["(\w+)"\]', (ROOT / "setup.py").read_text(), re.MULTILINE))
    known = {name for pair in extras for name in pair if name}
    assert known == {"cli", "report", "tasks", "all", "dev", "hosts"}
    for path in ROOT.glob("padprobe/**/*.py"):
        for extra in re.findall(r'\brequire\("(\w+)"\)', path.read_text(encoding="utf-8")):
            assert extra in known, f"{path}: no extra is called {extra!r}"


def test_the_version_stands_in_one_place():
    shown = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip().splitlines()[-1] == padprobe.__version__
    assert padprobe.__version__ not in (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_callback_of_the_readme_works_without_the_extras(tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    code = f"""
sys.path.insert(0, {str(ROOT / "examples")!r})
import torch
from watch_training import DATA as train_loader, Classifier
val_loader, model = train_loader, Classifier()
{example}
assert "position/H/spc" in trainer.callback_metrics
"""
    done = run_without_extras(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_encoder_is_probed_without_the_extras(tmp_path):
    code = """
import padprobe
from padprobe.results import Results
for name in padprobe.__all__:
    getattr(padprobe, name)
encoder = padprobe.load_encoder("torchvision:squeezenet1_1")
results = padprobe.probe_encoder(encoder, image_size=64, limit_train=8, limit_test=4, epochs=1, untrained=1)
results.save("out")
assert len(Results.load("out").rows) == len(results.rows) > 0
"""
    done = run_without_extras(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks(tmp_path):
    done = run_without_extras("import matplotlib", tmp_path)
    assert done.returncode == 1
    assert "No module named 'matplotlib'" in done.stderr
