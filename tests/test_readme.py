"""The README's and the documentation's promises, as they are printed."""

import re
from pathlib import Path

import pytest

from padprobe.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")})
COMMANDS = re.findall(r"`padprobe (.+?)`", README)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made by GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_callback_example_runs_as_it_is_printed_and_has_five_lines(host, batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the Trainer leaves its logs
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line.strip()]) <= 5
    names = {"model": host, "train_loader": batches, "val_loader": batches}
    exec(example, names)
    assert "position/H/spc" in names["trainer"].callback_metrics


def test_the_readme_is_a_first_page():
    assert len(README.splitlines()) <= 120
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    commands = [[line.split("#")[0].strip() for line in block.strip().splitlines()] for block in blocks]
    assert ["make quick", "make test", "make test-zoo"] in commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = []
    for path in re.findall(r"(?:configs|benchmarks|examples|padprobe|docs)/[\w./-]+\.(?:yaml|py|md|csv)\b", text):
        if not (ROOT / path).is_file():
            missing.append(path)
    for link, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)\s]*))?\)", text):
        target = (page.parent / link).resolve() if link else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(f"{link}#{anchor}" if anchor else link)
    assert not missing, f"{page.relative_to(ROOT)} names what does not exist: {', '.join(missing)}"


def test_every_command_has_an_example():
    assert {command.split()[0] for command in COMMANDS if command.split()[0].islower()} >= {
        *("fit", "probe", "study", "report", "data"),
    }


@pytest.mark.parametrize("command", ["probe", "study", "report", "data check"])
def test_the_options_in_the_pages_exist(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it names options of the past
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(rf"padprobe {command} [^`#\n]*", text):
            unknown = {option.split("=")[0] for option in re.findall(r"(?<!\S)--[\w-]+", line)} - known
            assert not unknown, f"{page.relative_to(ROOT)}: `padprobe {command}` has no {', '.join(sorted(unknown))}"
