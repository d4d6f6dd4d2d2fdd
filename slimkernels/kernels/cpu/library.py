"""The C++ extension, loaded once, and whether its kernels run here."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from slimkernels import _extension
from slimkernels.kernels.cpu import abi


@lru_cache(maxsize=1)
def library() -> tuple[ModuleType | None, str | None, tuple[str, ...]]:
    """``(the extension or None, why it is not there, instruction sets that run here, best first)``."""
    module, reason = _extension.load()
    if module is not None and (different := abi.mismatch(module)) is not None:
        module, reason = None, different
    return module, reason, tuple(module.isas()) if module is not None else ()


def unavailable_reason(isa: str) -> str | None:
    """None when the native kernel of this instruction set can run here, else why not."""
    module, reason, isas = library()
    if module is None:
        return f"slimkernels._C is not loaded: {reason}"
    if isa in isas:
        return None
    return f"{isa} is not built or not supported by this CPU (available: {', '.join(isas)})"
