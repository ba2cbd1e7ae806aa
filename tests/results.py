"""What the suites measured, a small JSON file a run, kept in the repository: fits take hours.

A result is used as long as the configuration and options that made it are the same; `make suite` measures
what is missing. Remove a file to measure it anew.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from trainmerge.run.config import read_settings
from trainmerge.run.manifest import versions
from trainmerge.system.atomic import write_whole

FOLDER = Path("tests/results")


def fingerprint(config: str | dict[str, Any], *options: str) -> str:
    """Of a configuration's content, or that of a file's, however it is written, and the options beside it."""
    content = read_settings(Path("configs", config)) if isinstance(config, str) else config
    return hashlib.sha256(json.dumps([content, *options]).encode()).hexdigest()[:16]


def recall(name: str, made_by: str) -> dict[str, Any] | None:
    """What was measured under this name by the same configuration."""
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found["measured"] if found.get("fingerprint") == made_by else None


def measured(name: str) -> dict[str, Any] | None:
    """What was measured under this name, whatever the configuration is by now; None if nothing was."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text())["measured"] if path.exists() else None


def keep(name: str, made_by: str, measured: dict[str, Any]) -> None:
    """Write what was measured, with the versions that it was measured with."""
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"fingerprint": made_by, "versions": versions(), "measured": measured}
    write_whole(path, json.dumps(content, indent=1) + "\n")
