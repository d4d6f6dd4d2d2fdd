"""A pytest plugin that leaves out what Triton's interpreter does in vain: its tests take a third of the time.

It is loaded by name (``pytest -p interpreter_speed``) into the processes of `triton_processes`, whose results are the
same without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from triton.runtime import interpreter


def pytest_configure(config: pytest.Config) -> None:
    """Called once, before the files of cases are imported."""
    builder, function = interpreter.interpreter_builder, interpreter.InterpretedFunction
    # Every sum, difference and product of integers is computed twice more, in int64, for an assertion that is not made
    # unless `debug` is on. `address_replay` checks them by itself.
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Triton patches its language anew whenever a kernel calls a function, which stays patched afterwards.
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    function.__call__ = call
