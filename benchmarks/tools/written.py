"""How results get to the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, tree: Any) -> None:
    """As a whole: a run that is killed leaves what it had written before."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(tree, indent=1) + "\n")
    part.replace(path)
