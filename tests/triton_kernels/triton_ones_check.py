"""Translates the Triton kernels with integer arguments that are 1, which Triton turns into constants.

A launch whose integer argument is 1 compiles a kernel of its own, in which the argument is a Python integer: it has no
``.to``, and arithmetic with another such argument stays Python's. Every kernel is translated to Triton's first
intermediate form with each integer alone as 1, where all such errors show, and compiled for sm_90 with all of them 1.

Prints JSON; run by test_triton_compile.py in a process of its own, because a process with TRITON_INTERPRET=1
cannot compile.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from typing import Any
from unittest import mock

import triton
import triton_backward_compile_check as backward
import triton_compile_check as forward
import triton_fused_compile_check as fused
import triton_low_rank_compile_check as low_rank
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import slimkernels.kernels.triton as package
from slimkernels.kernels.triton import bsr_conv2d_split, sums

# Together they take both sides of every compile-time branch that changes which integer arguments are read.
TARGETS = [
    (forward, forward.Target(90, "bf16", (128, 16))),
    (forward, forward.Target(90, "bf16", (128, 16), epilogue="relu_maxpool2", index_64=True, c_in=200)),
    (forward, forward.Target(90, "bf16", (64, 16), variant="weights_on_m", m_total=16, border=False)),
    (forward, forward.Target(90, "bf16", (16, 16), taps=7)),
    (forward, forward.Target(90, "bf16", (24, 24))),
    (forward, forward.Target(90, "bf16", (32, 32), variant="shared_input")),
    (forward, forward.Target(90, "bf16", (128, 16), variant="images_on_m")),
    (forward, forward.Target(90, "bf16", (32, 32), variant="images_on_m", index_64=True, c_in=240)),
    (forward, forward.Target(90, "bf16", (64,))),
    (forward, forward.Target(90, "bf16", (512,), index_64=True)),
    (backward, backward.Target("dgrad", 90, "bf16")),
    (backward, backward.Target("dgrad", 90, "bf16", (16, 16), stride=2, kernel=7, index_64=True)),
    (backward, backward.Target("wgrad", 90, "bf16")),
    (backward, backward.Target("wgrad", 90, "bf16", border=False, index_64=True, channels=200)),
    (backward, backward.Target("pool", 90, "bf16")),
    (backward, backward.Target("pool", 90, "bf16", index_64=True)),
    *((backward, backward.Target(kind, 90, "bf16")) for kind in backward.BATCH_NORM),
    (low_rank, low_rank.Target(90, "bf16", "fused", 64)),
    (low_rank, low_rank.Target(90, "bf16", "fused", 48, c_in=201, index_64=True)),
    (low_rank, low_rank.Target(90, "bf16", "alone", 64)),
    (fused, fused.Target(90, layer="grey", index_64=True)),
    (fused, fused.Target(90, layer="grey", epilogue="relu_maxpool2", contiguous=True)),
]


class Translated(Exception):
    """A kernel's first intermediate form was made without an error."""


class Translation(ASTSource):
    """A kernel of which `triton.compile` makes the first intermediate form and nothing else."""

    def make_ir(self, *args: Any, **kwargs: Any) -> Any:
        super().make_ir(*args, **kwargs)
        raise Translated


_SMALL = {"num_warps": 4, "num_stages": 2}


def reduction(pool: bool) -> None:
    """Compiles the kernel that adds the parts of a split convolution."""
    constants = {"HAS_BIAS": True, "RELU": True, "POOL": pool, "OVERLAP": False, "BLOCK_M": 16, "BLOCK_N": 128}
    pointers = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    forward.compile_kernel(bsr_conv2d_split.bsr_conv2d_reduce_kernel, constants, pointers, pointers, _SMALL, 90)


def partials(has_spare: bool) -> None:
    """Compiles the kernel that adds partial gradients."""
    constants = {"HAS_SPARE": has_spare, "OVERLAP": 2, "BLOCK_M": 16, "BLOCK_N": 128}
    pointers = {"partial_ptr": "*fp32", "crow_ptr": "*i32", "out_ptr": "*bf16"}
    forward.compile_kernel(sums.add_partials_kernel, constants, pointers, pointers, _SMALL, 90)


def channel_sums(index_64: bool) -> None:
    """Compiles the kernel that sums a gradient over its pixels."""
    constants = {"INDEX_64": index_64, "BLOCK_M": 16, "BLOCK_N": 128, "STAGES": sums.STAGES}
    pointers = {"grad_ptr": "*bf16", "partial_ptr": "*fp32"}
    forward.compile_kernel(sums.channel_sums_kernel, constants, pointers, pointers, _SMALL, 90)


# Kernels that no compile check has a target for.
OTHERS = [partial(make, flag) for make in (reduction, partials, channel_sums) for flag in (False, True)]


def sources(number: int) -> list[tuple[ASTSource, dict[str, Any]]]:
    """What a target hands to `triton.compile`: sources and options."""
    found: list[tuple[ASTSource, dict[str, Any]]] = []

    def record(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> None:
        found.append((source, options))

    with mock.patch.object(triton, "compile", record):
        if number < len(TARGETS):
            module, target = TARGETS[number]
            module.compile_target(target)
        else:
            OTHERS[number - len(TARGETS)]()
    return found


def with_ones(source: ASTSource, names: list[str], kind: type[ASTSource]) -> ASTSource:
    """The same kernel where the arguments of these names are 1."""
    signature = source.signature | dict.fromkeys(names, "constexpr")
    places = {(source.fn.arg_names.index(name),) for name in names}
    constants = source.constants | dict.fromkeys(places, 1)
    hints = {place: hint for place, hint in source.attrs.items() if place not in places}
    return kind(fn=source.fn, signature=signature, constexprs=constants, attrs=hints)


def errors(number: int) -> Iterator[tuple[str, list[str], str | None]]:
    """(kernel, the arguments that were 1, the error or None) of one target."""
    device = GPUTarget("cuda", 90, 32)
    for source, options in sources(number):
        # A kernel may ask that an argument never becomes a constant.
        kept = {parameter.name for parameter in source.fn.params if parameter.do_not_specialize}
        integers = [name for name, kind in source.signature.items() if kind in ("i32", "i64") and name not in kept]
        for ones in [*([name] for name in integers), integers]:
            error = None
            try:
                made = with_ones(source, ones, Translation if len(ones) == 1 else ASTSource)
                triton.compile(made, target=device, options=options)
            except Translated:
                pass
            except Exception as raised:  # compilers raise whatever they like
                while raised.__cause__ is not None:
                    raised = raised.__cause__
                error = f"{type(raised).__name__}: {str(raised)[-400:]}"
            yield source.fn.__name__, ones, error


def kernels() -> list[str]:
    """The names of all kernels of the package: they are named so and take pointers."""
    names = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        found = vars(importlib.import_module(module.name)).values()
        functions = [value for value in found if isinstance(value, JITFunction) and "_kernel" in value.__name__]
        names |= {function.__name__ for function in functions if any(n.endswith("_ptr") for n in function.arg_names)}
    return sorted(names)


def rows_of(number: int) -> list[tuple[str, list[str], str | None]]:
    return list(errors(number))


if __name__ == "__main__":
    with ProcessPoolExecutor(cpu_count(), get_context("spawn")) as pool:
        rows = [row for found in pool.map(rows_of, range(len(TARGETS) + len(OTHERS))) for row in found]
    print(json.dumps({"kernels": kernels(), "rows": rows}))
