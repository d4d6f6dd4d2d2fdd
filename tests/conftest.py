"""Fixtures of every test: seeds, poisoned memory, sentinel borders, threads, forms of chains, native steps, GPUs."""

from __future__ import annotations

import logging
import math
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import native_memory
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from slimkernels.kernels.cpu import chain as chains
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.kernels.cpu.steps import MovableSteps

settings.register_profile(
    "slimkernels",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("slimkernels")

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
# ``with torch.device("meta")`` knows these functions by identity, from its first use on. First used while they are
# patched it would never act, and every VGG would initialise 124 million weights of a classifier that it throws away.
with torch.device("meta"):
    torch.empty(0)
# 256 floats: beyond any vector store of a tile's tail, and a multiple of a cache line, so alignment stays as it was.
BORDER = 256
SENTINEL = -7.0123456e11
ORIGINAL_EMPTY = torch.empty


def pytest_configure(config: pytest.Config) -> None:
    """What `slimkernels tune` has measured on this machine decides nothing here, nor is anything left for it."""
    folder = tempfile.TemporaryDirectory(prefix="slimkernels-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["SLIMKERNELS_CACHE_DIR"] = folder.name
    if not os.path.isdir(os.environ.get("SLIMKERNELS_TEST_BUILDS", "")):
        # What one process of a run has compiled the others find here: workers, and tests that run tests.
        builds = tempfile.TemporaryDirectory(prefix="slimkernels-builds-")
        config.add_cleanup(builds.cleanup)
        os.environ["SLIMKERNELS_TEST_BUILDS"] = builds.name


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own, which reads these options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spreads the whole suite over the processors; what is named on the command line runs as pytest runs it."""
    whole = config.args_source == config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = "auto"
        # A file's tests stay in one process: what they share, such as a run of Triton's interpreter, is then made once.
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # files with the most tests are not those that take longest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command of the command line shows the package's log for the rest of its process, which here is not its own."""
    yield
    log = logging.getLogger("slimkernels")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Skips, counted by reason: a suite that skipped its subject must not look green."""
    reasons = Counter(
        report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count}: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run and in every order (torch.manual_seed costs 5 ms without a GPU)."""
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run with one torch thread, which is faster at their sizes; they name the launches that take more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def poison(tensor: Tensor) -> Tensor:
    """Fills an uninitialised tensor with NaN, or with an index that no tensor has."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(math.nan)
        if tensor.dtype in (torch.int16, torch.int32, torch.int64):
            return tensor.fill_(torch.iinfo(tensor.dtype).min)
    return tensor


class SentinelBorders:
    """Outputs of native launches lie inside a larger buffer of sentinels; `check` finds writes outside them."""

    def __init__(self) -> None:
        self.active = False
        self.buffers: list[tuple[Tensor, int]] = []
        self.checked = 0

    def allocate(self, like: Tensor) -> Tensor:
        """A NaN tensor of the size and strides of ``like`` (a meta tensor) in the middle of a sentinel buffer."""
        extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        buffer = ORIGINAL_EMPTY(extent + 2 * BORDER, dtype=like.dtype).fill_(SENTINEL)
        buffer[BORDER : BORDER + extent] = math.nan
        self.buffers.append((buffer, extent))
        return ORIGINAL_EMPTY(0, dtype=like.dtype).set_(buffer.untyped_storage(), BORDER, like.shape, like.stride())

    def check(self) -> None:
        """Asserts that no border changed, and forgets the buffers."""
        for buffer, extent in self.buffers:
            expected = torch.full((BORDER,), SENTINEL, dtype=buffer.dtype)
            for side, border in (("before", buffer[:BORDER]), ("after", buffer[BORDER + extent :])):
                touched = (border != expected).nonzero().flatten()
                assert len(touched) == 0, f"{len(touched)} elements written {side} an output of {extent} elements"
        self.checked += len(self.buffers)
        self.buffers.clear()


_BORDERS = SentinelBorders()


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes uninitialised memory that ``slimkernels`` allocates hold NaN, so that an output left unwritten shows."""

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("slimkernels."):
                return original(*args, **kwargs)
            if _BORDERS.active and caller == "slimkernels.kernels.cpu.conv2d":
                like = original(*args, **{**kwargs, "device": "meta"})
                if like.is_floating_point():
                    return _BORDERS.allocate(like)
            return poison(original(*args, **kwargs))

        return allocate

    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.fixture
def sentinel_borders(poisoned_allocations: None) -> Iterator[SentinelBorders]:
    """Surrounds what ``kernels.cpu`` allocates with sentinels, which ``check()`` and the end of the test inspect."""
    _BORDERS.active, _BORDERS.checked = True, 0
    try:
        yield _BORDERS
        _BORDERS.check()
        assert _BORDERS.checked, "no output was allocated by kernels.cpu: the fixture guards nothing here"
    finally:
        _BORDERS.active = False
        _BORDERS.buffers.clear()


@pytest.fixture(autouse=True)
def steps_keep_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native call of any test has steps that may run at the same time in each other's memory."""

    def watch(kind: Any) -> None:
        init = kind.__init__

        def checked(self: Any, isa: str, steps: Sequence[native.Step], *memory: Any) -> None:
            native_memory.check(steps)
            init(self, isa, steps, *memory)

        monkeypatch.setattr(kind, "__init__", checked)

    watch(native.Steps)
    watch(MovableSteps)


@pytest.fixture
def innermost_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains take vectors of images innermost first, however few multiply-adds they have or however dense they are."""
    monkeypatch.setattr(chains, "_MACS_PER_COPY", 0)
    monkeypatch.setattr(chains, "_STORED_SHARE_WHOLE", 1.1)


@pytest.fixture
def nan_surrounded() -> Callable[[Tensor], Tensor]:
    """Copies a dense float tensor, strides kept, into the middle of a NaN buffer: reading outside it shows."""

    def surround(tensor: Tensor) -> Tensor:
        extent = tensor.numel()
        buffer = torch.full((extent + 2 * BORDER,), math.nan, dtype=tensor.dtype)
        inside = ORIGINAL_EMPTY(0, dtype=tensor.dtype).set_(
            buffer.untyped_storage(), BORDER, tensor.shape, tensor.stride()
        )
        return inside.copy_(tensor)

    return surround
