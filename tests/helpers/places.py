"""Where things are, for tests that read files or start processes."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
# What a process needs that runs a file of `tests` outside pytest, which reads the same list from pyproject.toml.
PYTHONPATH = os.pathsep.join(str(path) for path in (ROOT, TESTS / "helpers", TESTS / "fuzz"))
