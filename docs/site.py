"""Hooks of the documentation site (mkdocs.yml).

Pages that live outside docs/, where GitHub shows them, become pages of the site; links between files of the repository
become links between pages. The command's page gets what `sgmim-fast --help` says.
"""

from __future__ import annotations

import argparse
import importlib
import os
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# file of the repository -> page
PAGES = {
    "README.md": "index.md",
    **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md")},
    "benchmarks/evidence/EVIDENCE.md": "benchmarks/evidence/EVIDENCE.md",
}
HELP = "<!-- sgmim-fast --help -->"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages, and the pictures that they show."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for picture in (ROOT / "benchmarks").glob("*/*.png"):
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = next((source for source, name in PAGES.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")

    def link(match):
        picture, text, target, anchor = match.groups()
        if re.match(r"\w+:", target) or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: the link to {target} leads nowhere")
        path = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(path) is None:  # a source file, say: its name has to do
            return text
        return (
            f"{picture}[{text}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"
        )

    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)  # code is every other one
    markdown = "".join(part if code % 2 else _LINK.sub(link, part) for code, part in enumerate(parts))
    return markdown.replace(HELP, _help()) if HELP in markdown else markdown


def _help() -> str:
    """What each command says of itself, from its parser."""
    from sgmim_fast.cli import COMMANDS

    os.environ["COLUMNS"] = "100"
    sections = []
    for name, (module, what, extra) in COMMANDS.items():
        parser = argparse.ArgumentParser(f"sgmim-fast {name}", description=what[0].upper() + what[1:] + ".")
        importlib.import_module(module).add_arguments(parser)
        needs = f"Needs `pip install 'sgmim_fast[{extra}]'`.\n\n" if extra else ""
        sections.append(f"## {name}\n\n{needs}```text\n{parser.format_help()}```\n")
    return "\n".join(sections)
