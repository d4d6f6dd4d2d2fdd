"""Measured rows: one JSON object a line, on disk as soon as it is known, so that a killed stage leaves them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(path: Path | None, *rows: Mapping[str, Any]) -> None:
    """Adds rows to a file; folders are made. Without a path nothing is written."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file; a last line that was cut off is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def of_suite(rows: Iterable[Mapping[str, Any]], *suites: str) -> list[dict[str, Any]]:
    """The rows of these suites, in their order."""
    return [dict(row) for row in rows if row.get("suite") in suites]
