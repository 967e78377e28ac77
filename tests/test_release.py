"""Files that must agree with the code: matrix and commands of the workflows, the changelog, the citation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_docs import PROGRAM, check_command

yaml = pytest.importorskip("yaml", reason="needs the extra [train]")

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
STEPS = [
    (name, line.strip())
    for name, workflow in WORKFLOWS.items()
    for job in workflow["jobs"].values()
    for step in job["steps"]
    for line in step.get("run", "").splitlines()
]


@pytest.mark.parametrize(("workflow", "command"), STEPS)
def test_a_step_runs_what_exists(workflow, command):
    for part in (part.removeprefix(".venv/bin/") for part in command.split(" && ")):
        if part.startswith("."):
            assert (ROOT / part).is_file()
        elif re.match(PROGRAM, part) and not re.search(r" -m (pip|build|twine|cibuildwheel)\b", part):
            check_command(part)


def test_every_python_and_the_oldest_torch_are_tested():
    matrix = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)\"", PYPROJECT)
    oldest = re.search(r"^dependencies = \[\"torch>=([\d.]+)\"", PYPROJECT, re.MULTILINE)[1]
    assert f"{oldest}.*" in matrix["torch"] and "newest" in matrix["torch"]
    assert re.search(rf'requires-python = ">={matrix["python"][0]}"', PYPROJECT)


def test_the_tests_of_the_readme_are_the_workflows():
    steps = [command for _, command in STEPS]
    assert 'python -m pip install -e ".[test]"' in steps and "python -m pytest -q -n auto" in steps
    assert ".ci/run" in steps and "make docs" in steps


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_templates_can_be_read(path):
    form = yaml.safe_load(path.read_text())
    if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config":
        assert {"name", "description", "body"} <= set(form)
        assert all(part["attributes"]["label"] for part in form["body"])


def test_the_changelog_has_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


def test_the_citation_is_the_readmes():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    readme = re.sub(r"[{}]", "", (ROOT / "README.md").read_text())
    paper = citation["preferred-citation"]
    assert paper["title"] in readme and paper["url"] in readme
    assert all(f"{author['family-names']}, {author['given-names']}" in readme for author in paper["authors"])
    assert citation["license"] == "MIT" and "version" not in citation  # defined in sgmim_fast.__version__ alone
