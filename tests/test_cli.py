"""The console command and its subcommands. Errors that the user can correct give one line and exit code 2."""

from __future__ import annotations

import sys

import pytest

import sgmim_fast
from sgmim_fast import cli
from sgmim_fast.errors import UserError


def output(capsys, code, *words):
    """Runs the command. Returns its standard output and the single line on standard error."""
    try:
        found = cli.main([str(word) for word in words])
    except SystemExit as end:
        found = end.code
    out, err = capsys.readouterr()
    assert found == code, err
    assert err.count("\n") == (0 if code == 0 else 1), err
    return out, err


def test_env_needs_no_extra(capsys, monkeypatch):
    for name in ("accelerate", "yaml", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)  # simulates that it is not installed
    out, _ = output(capsys, 0, "env")
    assert out.startswith("versions\n") and "torch" in out


def test_help_lists_the_commands(capsys):
    out, _ = output(capsys, 0, "--help")
    assert all(name in out for name in cli.COMMANDS)
    assert output(capsys, 0) == (out, "")


def test_version(capsys):
    assert output(capsys, 0, "--version")[0] == f"sgmim_fast {sgmim_fast.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fast",), "COMMAND"),
        (("pretain",), "did you mean pretrain?"),
        (("env", "--fast"), "unrecognized arguments: --fast"),
        (("export", "run"), "OUT.safetensors"),
    ],
)
def test_wrong_words_are_one_line(capsys, words, message):
    assert message in output(capsys, 2, *words)[1]


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for name in [name for name in sys.modules if name.startswith(("sgmim_fast.engine", "sgmim_fast.pretrain"))]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'sgmim_fast[train]'" in output(capsys, 2, "pretrain", "--preset", "tiny_demo")[1]


def test_only_errors_of_the_user_are_one_line(capsys, monkeypatch):
    class Module:
        add_arguments = staticmethod(lambda parser: None)
        error: Exception = UserError("line\nbroken")

        @classmethod
        def run(cls, args):
            raise cls.error

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Module)
    assert output(capsys, 2, "env")[1] == "sgmim-fast env: line broken\n"
    monkeypatch.setenv("RANK", "3")
    assert output(capsys, 2, "env")[1] == "sgmim-fast env: process 3: line broken\n"
    Module.error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["env"])
