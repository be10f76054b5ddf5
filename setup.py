"""The package; the build system and the tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="padprobe",
    version="0.1.0",
    description="How much absolute position a CNN encodes, where it comes from, and what it does to the task",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["padprobe", "padprobe.*"]),
    package_data={"padprobe": ["py.typed"], "padprobe.report": ["*.json", "*.jinja"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "lightning>=2.5",
        "torchmetrics>=1.6",
        "segmentation-models-pytorch>=0.5",
        "timm>=1.0",
        "albumentations>=2.0",
        "pycocotools>=2.0.8",
        "pysodmetrics>=1.4",
        "safetensors>=0.4.3",
        "filelock>=3.13",
        "numpy>=1.26",
        "scipy>=1.15",
        "pandas>=2.2",
        "pillow>=10.3",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "jsonargparse[signatures]>=4.37,<5",
        "pyyaml>=6.0",
        "rich>=13.7",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "pandas-stubs",
            "scipy-stubs",
            "types-PyYAML",
            "tensorboard>=2.17",
            "wandb>=0.18",
        ],
    },
    entry_points={"console_scripts": ["padprobe = padprobe.cli:main"]},
)
