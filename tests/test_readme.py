"""The README's promises, as they are printed."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_callback_example_runs_as_it_is_printed_and_has_five_lines(host, batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the Trainer leaves its logs
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line.strip()]) <= 5
    names = {"model": host, "train_loader": batches, "val_loader": batches}
    exec(example, names)
    assert "position/H/spc" in names["trainer"].callback_metrics


def test_the_commands_in_the_readme_name_files_that_exist():
    for config in re.findall(r"configs/[\w/]+\.yaml", README):
        assert (Path(__file__).parents[1] / config).is_file(), config


def test_the_readme_starts_with_the_two_commands():
    first = re.search(r"```\n(.*?)```", README, re.DOTALL).group(1)
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make quick", "make test"]


def test_no_figure_is_left_to_be_filled_in():
    for page in (README, (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text(encoding="utf-8")):
        assert not re.findall(r"\b[A-Z]+_(?:TABLE|HEAD|COST)\b", page)
