"""A progress bar on stderr for work that is counted in items."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counting_bar(enabled: bool, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A function ``advance(items, what)``; without a terminal it does nothing, and rich is not loaded."""
    if not enabled or not sys.stderr.isatty():
        yield lambda items, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda items, what: bar.update(task, advance=items, description=f"{title} {what}")
