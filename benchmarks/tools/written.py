"""Writes results to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, tree: Any) -> None:
    """Writes JSON atomically, so that a killed run leaves the previous results intact."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(tree, indent=1) + "\n")
    part.replace(path)
