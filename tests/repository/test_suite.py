"""How the suite itself runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from places import TESTS


def config(source: pytest.Config.ArgsSource, *, xdist: bool = True, **more: Any) -> Any:
    option = SimpleNamespace(numprocesses=None, dist="no", loadscopereorder=True)
    plugins = SimpleNamespace(hasplugin=lambda name: xdist and name == "xdist")
    return SimpleNamespace(
        args_source=source, ArgsSource=pytest.Config.ArgsSource, option=option, pluginmanager=plugins, **more
    )


@pytest.mark.parametrize(
    ("made", "spread"),
    [
        (config(pytest.Config.ArgsSource.TESTPATHS), True),
        (config(pytest.Config.ArgsSource.ARGS), False),
        (config(pytest.Config.ArgsSource.TESTPATHS, xdist=False), False),
        (config(pytest.Config.ArgsSource.TESTPATHS, workerinput={}), False),
    ],
    ids=["the whole suite", "named files", "without pytest-xdist", "a worker"],
)
def test_the_whole_suite_alone_is_spread_over_processes(
    made: Any, spread: bool, request: pytest.FixtureRequest
) -> None:
    """A worker, which has the same arguments, must start no workers of its own."""
    plugins = request.config.pluginmanager.get_plugins()
    own = next(p for p in plugins if getattr(p, "__file__", None) == str(TESTS / "conftest.py"))
    own.pytest_cmdline_main(made)
    assert (made.option.numprocesses, made.option.dist) == (("auto", "loadfile") if spread else (None, "no"))
