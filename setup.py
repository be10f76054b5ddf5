"""The package; the build system and the tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version in padprobe/__init__.py, read as text: importing it would need the dependencies."""
    text = (ROOT / "padprobe" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE).group(1)


REPORT = ["jinja2>=3.1", "matplotlib>=3.9"]
EXTRAS = {
    "report": REPORT,
    "cli": [*REPORT, "jsonargparse[signatures]>=4.37,<5", "pyyaml>=6.0", "rich>=13.7", "filelock>=3.13"],
    "tasks": [
        "segmentation-models-pytorch>=0.5",
        "timm>=1.0",
        "albumentations>=2.0",
        "pycocotools>=2.0.8",
        "pysodmetrics>=1.4",
    ],
}
EXTRAS["all"] = [requirement for extra in ("cli", "tasks") for requirement in EXTRAS[extra]]
EXTRAS["dev"] = [
    *EXTRAS["all"],
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "scipy>=1.15",
    "ruff>=0.9",
    "mypy>=1.14",
    "pandas-stubs",
    "scipy-stubs",
    "types-PyYAML",
    "tensorboard>=2.17",
    "wandb>=0.18",
    "pre-commit>=3.7",
]
EXTRAS["hosts"] = ["transformers>=4.56", "peft>=0.17", "torchgeo>=0.7", "lightly>=1.5"]  # for `make test-zoo` alone

setup(
    name="padprobe",
    version=version(),
    description="How much absolute position a CNN encodes, where it comes from, and what it does to the task",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["padprobe", "padprobe.*"]),
    package_data={"padprobe": ["py.typed"], "padprobe.report": ["*.jinja"]},
    install_requires=[  # what the callback and probe_encoder import; the rest are extras
        "torch>=2.6",
        "torchvision>=0.21",
        "lightning>=2.5",
        "torchmetrics>=1.6",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "pandas>=2.2",
        "pillow>=10.3",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["padprobe = padprobe.cli:main"]},
)
