"""README and docs: links, commands and Python names exist, the diagram of imports is right, and the site builds."""

from __future__ import annotations

import argparse
import ast
import functools
import graphlib
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgmim_fast import backends, cli, ops

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "docs/reference", "benchmarks", "benchmarks/evidence", "examples", ".github")
    for path in (ROOT / folder).glob("*.md")
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def text(page: str) -> str:
    return (ROOT / page).read_text()


def prose(page: str) -> str:
    return INLINE.sub("", BLOCK.sub("", text(page)))


def slug(heading: str) -> str:
    """Returns the anchor that GitHub and the site generate for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page} links to {target}#{anchor}"


def commands(page: str) -> Iterator[str]:
    """Yields the commands in code blocks without a language, and those in sentences."""
    for language, block in BLOCK.findall(text(page)):
        if not language:
            yield from re.sub(r"\\\n\s*", "", block).splitlines()
    yield from (" ".join(code.split()) for code in INLINE.findall(BLOCK.sub("", text(page))))


PROGRAM = r"(?:[A-Z_]+=\S+ )*(sgmim-fast|python|make|torchrun|accelerate launch)(?: |$)"
ALL = sorted(
    {
        (page, part)
        for page in PAGES
        for line in commands(page)
        for part in re.split(r" && | \|\| ", line)
        if re.match(PROGRAM, part)
    }
)


def test_commands_are_found():
    assert len(ALL) > 60 and len({page for page, _ in ALL}) > 6


@pytest.mark.parametrize(("page", "command"), ALL)
def test_commands_exist(page, command):
    check_command(command)


def check_command(command: str) -> None:
    """Asserts that program, module or script, subcommand, options, presets, settings and variables exist."""
    words = [word for word in shlex.split(command, comments=True) if word not in ("...", "…")]
    while "=" in words[0]:
        name = words.pop(0).partition("=")[0]
        assert name == "TRITON_INTERPRET" or is_read(name), f"nothing reads {name}"
    if words[0] == "make":
        assert set(words[1:]) <= set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    elif words[0] == "sgmim-fast":
        sgmim_fast_command(words[1:])
    elif "-m" in words:
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        if module == "sgmim_fast.cli":
            sgmim_fast_command(arguments)
        else:
            path = importlib.util.find_spec(module)
            assert path is not None, f"there is no module {module}"
            if module.startswith("sgmim_fast"):
                options_of(Path(path.origin), arguments)
    elif len(words) > 1 and words[0] == "python" and not words[1].startswith("-"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
        options_of(ROOT / words[1], words[2:])


def is_read(variable: str) -> bool:
    """Returns whether any source contains the name of the variable."""
    folders = (ROOT / "sgmim_fast", ROOT / "kernels", ROOT / "tests")
    files = [ROOT / "setup.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    return any(variable in path.read_text() for path in files)


@functools.cache
def literals(script: Path) -> set[str]:
    """Returns the string literals of a script, and for a benchmark those of all files in its folder."""
    files = [script, *script.parent.rglob("*.py")] if script.parent.name == "benchmarks" else [script]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def options_of(script: Path, arguments: list[str]) -> None:
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in literals(script), f"{script.name} has no {argument}"


def parser_of(name: str) -> argparse.ArgumentParser:
    path, _, extra = cli.COMMANDS[name]
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as missing:
        pytest.skip(f"needs {missing.name}, of the extra [{extra}]")
    parser = argparse.ArgumentParser(name)
    module.add_arguments(parser)
    return parser


def sgmim_fast_command(words: list[str]) -> None:
    """Asserts that the subcommand, its options, presets and settings exist."""
    if not words or words[0].startswith("-"):
        assert set(words) <= {"--help", "--version"}
        return
    name, *words = words
    assert name in cli.COMMANDS
    parser = parser_of(name)
    options = {option for action in parser._actions for option in action.option_strings}
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in subparsers:
        for word in words:
            if word in action.choices:
                options |= {option for a in action.choices[word]._actions for option in a.option_strings}
    for position, word in enumerate(words):
        if not word.startswith("-"):
            continue
        option, _, value = word.partition("=")
        assert option in options, f"sgmim-fast {name} has no {option}"
        value = value or " ".join(words[position + 1 : position + 2])
        if option == "--preset" and value and value.isidentifier() and not value.isupper():
            assert value in importlib.import_module(cli.COMMANDS[name][0]).PRESETS
        if option == "--set" and value:
            key = value.partition("=")[0]
            if not key.isupper():
                from sgmim_fast.engine.settings import flat
                from sgmim_fast.finetune import config as finetune
                from sgmim_fast.pretrain import config as pretrain

                known = flat(pretrain.Config()) if name == "pretrain" else flat(finetune.Config())
                assert key in known or key.startswith("model.arguments."), f"there is no setting {key}"


PYTHON = [(page, block) for page in PAGES for language, block in BLOCK.findall(text(page)) if language == "python"]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[page for page, _ in PYTHON])
def test_python_names_exist(page, block):
    """Checks every `sgmim_fast.NAME` and every import of the package."""
    if "finetune" in block or "import data" in block:
        pytest.importorskip("segmentation_models_pytorch", reason="needs the extra [downstream]")
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sgmim_fast"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"sgmim_fast(\.\w+)+", name):
                found = importlib.import_module("sgmim_fast")
                for part in name.split(".")[1:]:
                    found = getattr(found, part)


# ---- the drawing of docs/ARCHITECTURE.md


def drawn() -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Returns the node of each module in the diagram, and the arrows."""
    block = next(block for language, block in BLOCK.findall(text("docs/ARCHITECTURE.md")) if language == "mermaid")
    nodes = re.findall(r'^ +(\w+)\["(.*)"\]$', block, re.MULTILINE)
    arrows = {
        (a, b)
        for a, targets in re.findall(r"^ +(\w+) -\.?->? (.*)$", block, re.MULTILINE)
        for b in targets.split(" & ")
    }
    return {module: node for node, modules in nodes for module in modules.split(" · ")}, arrows


def top_level(module: str) -> str:
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:2] in (["ops", "cpu"], ["ops", "cuda"]) else (parts or [""])[0]


def sources() -> dict[str, Path]:
    """Returns the file of each module."""
    found = {}
    for folder, package in ((ROOT / "sgmim_fast", "sgmim_fast"), (ROOT / "kernels", "sgmim_fast.kernels")):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported() -> Iterator[tuple[str, str]]:
    """Yields (importing, imported) modules of the package for all import statements, at run time or for types only."""
    modules = sources()
    for module, path in modules.items():
        inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names if alias.name in modules)
            elif isinstance(node, ast.ImportFrom):
                above = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *filter(None, [node.module])])
                names = (f"{source}.{alias.name}" for alias in node.names)  # modules, or names in a module
                yield from ((module, name if name in modules else source) for name in names if source in modules)


def test_the_drawing_has_every_module_and_every_import():
    nodes, arrows = drawn()
    package = ROOT / "sgmim_fast"
    files = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    aside = {"", "_moved", "errors", "memory"}  # the package itself, old names, and what every module imports
    assert set(nodes) == files - {"__init__", "_moved", "errors", "memory"} | {"kernels", "ops.cpu", "ops.cuda"}
    real = {
        (nodes[top_level(a)], nodes[top_level(b)])
        for a, b in imported()
        if not {top_level(a), top_level(b)} & aside
        and top_level(b) in nodes
        and nodes[top_level(a)] != nodes[top_level(b)]
    }
    dynamic = {("cli", node) for node in ("backends", "data", "finetune", "fourier", "pretrain")} | {
        ("backends", "kernels")
    }
    assert arrows == real | dynamic, (
        f"to draw: {sorted(real | dynamic - arrows)}; to remove: {sorted(arrows - real - dynamic)}"
    )


def test_no_files_import_each_other_in_a_circle():
    below: dict[str, set[str]] = {}
    for a, b in imported():
        if "sgmim_fast" not in (a, b):  # the package has names of all modules
            below.setdefault(a, set()).add(b)
    graphlib.TopologicalSorter(below).prepare()


def test_fine_tuning_imports_nothing_of_pre_training():
    found = {(top_level(a), top_level(b)) for a, b in imported()}
    assert {("pretrain", "engine"), ("finetune", "engine")} <= found
    assert not {(a, b) for a in ("engine", "data", "finetune") for b in ("pretrain", "finetune") if a != b} & found


# ---- the two commands of the README, and the site


NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]


def test_every_op_is_public_and_documented():
    pages = text("docs/reference/ops.md")
    for op in backends.MODULES:
        assert op in ops.__all__ and callable(getattr(ops, op)), f"ops/__init__.py does not import the function {op}"
        assert f"`{op}(" in pages and f"::: sgmim_fast.ops.{op}.{op}\n" in pages, f"docs/reference/ops.md lacks {op}"
    assert f"has {NUMBERS[len(backends.MODULES)]} registered operators" in text("README.md")


def test_ci_runs_what_the_readme_says():
    readme, ci = text("README.md"), text(".ci/run")
    assert "pip install -e . && python benchmarks/bench_guidance.py" in readme
    tests = 'pip install -e ".[test]" && python -m pytest -q -n auto'
    assert tests in readme
    for command in tests.split(" && "):
        assert re.search(rf"^{re.escape(command)}( \|\| .*)?$", ci, re.MULTILINE), command


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """The strict build fails for broken links, missing headings and names that cannot be documented."""
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    pytest.importorskip("mkdocstrings", reason="needs the extra [docs]")
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra [downstream]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "ARCHITECTURE.html", "reference/ops.html", "benchmarks/evidence/EVIDENCE.html"} <= pages
    assert "--accept-changes" in (tmp_path / "site" / "reference" / "command.html").read_text()
    reference = (tmp_path / "site" / "reference" / "ops.html").read_text()
    assert 'id="sgmim_fast.ops.window_attention.window_attention"' in reference
