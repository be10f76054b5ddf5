"""The house rules: imports run one way, names are public where they are shared, files and functions stay short.

Each rule is a function of a folder that lists every offence, so that it can be tested on small made-up trees.
"""

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import padprobe

ROOT = Path(__file__).parents[1]
PACKAGES = ("padprobe", "tasks")
LEVELS = {  # a room may import rooms of a lower level, and its own files
    "cli": 5,
    "study": 4,
    **dict.fromkeys(("probe", "callbacks", "dependence", "report"), 3),
    "readout": 2,
    "network": 1,
    **dict.fromkeys(
        ("maps", "scores", "stimuli", "images", "results", "processes", "precision", "progress", "errors"), 0
    ),
}
MOST_LINES = 13250  # lower it when code goes
MOST_FILE_LINES, MOST_FUNCTION_LINES = 500, 60


def modules(root: Path) -> dict[str, Path]:
    """Every module of the packages under ``root``, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted(root.glob(f"{package}/**/*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below ``node``, also in functions, but not those for the type checker alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:
                yield from running_nodes(other)
        else:
            yield from running_nodes(child)


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str, str, str]]:
    """(line, module, name in it or "", local name) of every import that can run."""
    for node in running_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, "", alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:  # a relative import
                parts = module.split(".")
                base = parts[: len(parts) - node.level + is_package]
                source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, source, alias.name, alias.asname or alias.name


def imports(root: Path) -> Iterator[tuple[str, int, str, str, str]]:
    """(importing module, line, imported module, name in it, local name) of the packages' own modules."""
    known = modules(root)
    for module, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, source, name, local in imported_names(tree, module, path.name == "__init__.py"):
            if f"{source}.{name}" in known:  # `from padprobe.report import tables` imports a module
                yield module, line, f"{source}.{name}", "", local
            elif source.split(".")[0] in PACKAGES:
                yield module, line, source, name, local


def room(module: str) -> str:
    """The room of a module: "probe" of "padprobe.probe.plan"; "padprobe" of the package itself."""
    return ".".join(module.split(".")[1:2]) or module


def wrong_ways(root: Path) -> list[str]:
    """Imports that run up the house, between rooms on one level, or from padprobe to tasks."""
    offences = []
    for module, line, target, name, _ in imports(root):
        if module.split(".")[0] != "padprobe":
            continue
        here, there = room(module), room(target)
        if (target, name) == ("padprobe", "__version__"):
            continue
        if target.split(".")[0] == "tasks":
            offences.append(f"{module}:{line} imports {target}: padprobe does not know tasks")
        elif here == there:
            continue
        elif there not in LEVELS or here not in LEVELS:
            unknown = there if there not in LEVELS else here
            offences.append(f"{module}:{line} imports {target}: {unknown!r} has no level in tests/test_house.py")
        elif LEVELS[there] >= LEVELS[here] > 0 or LEVELS[there] > LEVELS[here]:  # the ground floor is one room
            offences.append(f"{module}:{line} imports {target}: {here} may not import {there}")
    return offences


def circles(root: Path) -> list[str]:
    """Modules that import each other, directly or through others: "a -> b -> a"."""
    graph: dict[str, set[str]] = {module: set() for module in modules(root)}
    for module, _, target, _, _ in imports(root):
        if target in graph and target != module:
            graph[module].add(target)
    offences, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            offences.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return offences


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def shared_private_names(root: Path) -> list[str]:
    """Private names of one file that another file imports or reaches into."""
    offences = []
    aliases: dict[str, dict[str, str]] = {}
    for module, line, target, name, local in imports(root):
        if is_private(name) or any(is_private(part) for part in target.split(".")):
            offences.append(f"{module}:{line} imports {name or target} from {target}")
        if not name:
            aliases.setdefault(module, {})[local] = target
    for module, local_names in aliases.items():
        for node in ast.walk(ast.parse(modules(root)[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in local_names:
                offences.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
    return offences


def long_files(root: Path) -> list[str]:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules(root).items()}
    return [f"{module}: {length} lines" for module, length in lengths.items() if length > MOST_FILE_LINES]


def long_functions(root: Path) -> list[str]:
    """Functions that do not fit a screen; their docstring is not counted."""
    offences = []
    for module, path in modules(root).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > MOST_FUNCTION_LINES:
                offences.append(f"{module}:{node.lineno} {node.name}: {length} lines")
    return offences


def product_lines(root: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules(root).values())


RULES = {
    "imports run one way": wrong_ways,
    "no circle": circles,
    "private names stay in their file": shared_private_names,
    f"no file over {MOST_FILE_LINES} lines": long_files,
    f"no function over {MOST_FUNCTION_LINES} lines": long_functions,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rules(rule):
    offences = RULES[rule](ROOT)
    assert not offences, f"{rule}:\n  " + "\n  ".join(offences)


def test_the_product_stays_small():
    lines = product_lines(ROOT)
    assert lines <= MOST_LINES, f"padprobe/ and tasks/ have {lines} lines of Python, {lines - MOST_LINES} too many"


@pytest.mark.parametrize("name", padprobe.__all__)
def test_every_public_name_shows_an_example_that_runs(name):
    docstring = getattr(padprobe, name).__doc__ or ""
    assert "Example:" in docstring, f"padprobe.{name} has no `Example:` in its docstring"
    assert doctest.DocTestParser().get_examples(docstring), f"the Example of padprobe.{name} has no >>> line"


def test_every_module_imports():
    for module in modules(ROOT):
        importlib.import_module(module)


# The rules on made-up trees: each is seen to fail and to pass.

GOOD = {
    "padprobe/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from padprobe.cli import main\n",
    "padprobe/errors.py": "class Bad(ValueError): ...",
    "padprobe/maps.py": "from padprobe.errors import Bad\nfrom torch._private import _anything",
    "padprobe/network/__init__.py": "",
    "padprobe/network/stages.py": "from padprobe.maps import H\nfrom padprobe.network import trace\ntrace.shapes()",
    "padprobe/network/trace.py": "def _shapes(): ...\ndef shapes(): return _shapes()",
    "padprobe/probe/__init__.py": "from .encoder import probe",
    "padprobe/probe/encoder.py": "def probe():\n    from padprobe.network.stages import find",
    "padprobe/cli.py": "def main():\n    from padprobe.probe import probe",
    "tasks/__init__.py": "from padprobe.network.stages import find",
}


def tree(folder: Path, **changes: str) -> Path:
    """The good tree with some files replaced or added: keys are paths with "__" for "/"."""
    files = GOOD | {f"{key.replace('__', '/')}.py": text for key, text in changes.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("rule", RULES)
def test_a_good_tree_keeps_every_rule(rule, tmp_path):
    assert RULES[rule](tree(tmp_path)) == []


@pytest.mark.parametrize(
    ("file", "text", "offence"),
    [
        ("padprobe__maps", "def f():\n    import padprobe.network.stages", "maps may not import network"),
        ("padprobe__network__trace", "from padprobe.probe.encoder import probe", "network may not import probe"),
        ("padprobe__network__trace", "from ..probe.encoder import probe", "network may not import probe"),
        ("padprobe__network__trace", "from ..probe import encoder", "network may not import probe"),
        ("padprobe__report", "from padprobe.probe.encoder import probe", "report may not import probe"),
        ("padprobe__errors", "import tasks", "padprobe does not know tasks"),
        ("padprobe__errors", "from tasks.data import scenes", "padprobe does not know tasks"),
        ("padprobe__attic", "from padprobe.maps import H", "'attic' has no level"),
        ("padprobe__network__trace", "from padprobe import find_stages", "'padprobe' has no level"),
    ],
)
def test_an_import_the_wrong_way_is_listed(file, text, offence, tmp_path):
    (listed,) = wrong_ways(tree(tmp_path, **{file: text}))
    assert listed.endswith(offence) or offence in listed


def test_circles_are_listed_with_their_path(tmp_path):
    root = tree(tmp_path, padprobe__network__trace="def f():\n    from padprobe.network.stages import find")
    assert circles(root) == ["padprobe.network.stages -> padprobe.network.trace -> padprobe.network.stages"]
    root = tree(
        tmp_path,
        padprobe__network__trace="from padprobe.network import tap",
        padprobe__network__tap="from . import stages",
    )
    (circle,) = circles(root)
    assert circle.count(" -> ") == 3


@pytest.mark.parametrize(
    "text",
    [
        "from padprobe.network.trace import _shapes",
        "from padprobe.network.trace import _shapes as shapes",
        "from padprobe.network import trace\ntrace._shapes()",
        "import padprobe.network.trace\npadprobe.network.trace._shapes()",
        "from padprobe.network._hidden import shapes",
    ],
)
def test_a_private_name_of_another_file_is_listed(text, tmp_path):
    assert len(shared_private_names(tree(tmp_path, padprobe__network__stages=text))) == 1


def test_lengths_are_counted_without_docstrings(tmp_path):
    body = "    x = 0\n" * (MOST_FUNCTION_LINES - 1)
    docstring = '    """' + "Text.\n" * 30 + '    """\n'
    root = tree(
        tmp_path, padprobe__maps=f"def fits():\n{docstring}{body}\n\ndef grows():\n{docstring}{body}    x = 1\n"
    )
    assert [offence.split(" ", 1)[1] for offence in long_functions(root)] == [f"grows: {MOST_FUNCTION_LINES + 1} lines"]
    before = product_lines(tree(tmp_path))
    root = tree(
        tmp_path, padprobe__scores="x = 0\n" * (MOST_FILE_LINES + 1), padprobe__results="x = 0\n" * MOST_FILE_LINES
    )
    assert long_files(root) == [f"padprobe.scores: {MOST_FILE_LINES + 1} lines"]
    assert product_lines(root) == before + 2 * MOST_FILE_LINES + 1
