"""Concurrent callers and thread counts: no state is shared between calls."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slimkernels.cases import ConvCase, launch
from slimkernels.kernels import KERNELS
from slimkernels.kernels.cpu import conv2d as native
from slimkernels.nn import BlockSparseConv2d, BlockSparseLinear
from slimkernels.testing import random_tensor

NATIVE_CONV = [
    name for name, s in KERNELS.items() if s.op == "bsr_conv2d" and s.backend == "cpu" and s.available() is None
]


def sparse_conv() -> BlockSparseConv2d:
    dense = torch.nn.Conv2d(12, 48, 3, padding=1)
    keep = random_tensor(*dense.weight.shape, seed=0) > 1.0
    with torch.no_grad():
        dense.weight.mul_(keep)
    return BlockSparseConv2d.from_dense(dense, (8, 1), epilogue="relu").eval()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("prepacked", [True, False])
def test_eight_threads_call_one_module_with_different_shapes(prepacked: bool, threads: int) -> None:
    module = sparse_conv()
    if not prepacked:
        module.drop_packed()
    shapes = [(1, 5, 7), (3, 2, 2), (2, 16, 16), (1, 1, 1), (5, 4, 4), (1, 33, 3), (0, 6, 6), (4, 9, 8)]
    inputs = [random_tensor(n, 12, h, w, seed=i) for i, (n, h, w) in enumerate(shapes)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]
    start = threading.Barrier(len(shapes))

    def work(i: int) -> list[bool]:
        torch.set_num_threads(threads)
        start.wait()
        with torch.no_grad():
            return [torch.equal(module(inputs[i]), expected[i]) for _ in range(30)]

    with ThreadPoolExecutor(len(shapes)) as pool:
        for i, same in enumerate(pool.map(work, range(len(shapes)))):
            assert all(same), f"shape {shapes[i]}: {same.count(False)} of {len(same)} calls differ"


def test_threads_that_train_separate_modules_do_not_meet() -> None:
    def steps(seed: int) -> torch.Tensor:
        dense = torch.nn.Linear(24, 40)
        with torch.no_grad():
            dense.weight.copy_(random_tensor(40, 24, seed=seed))
            dense.bias.zero_()
        module = BlockSparseLinear.from_dense(dense, (8, 1))
        optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
        for step in range(5):
            optimiser.zero_grad()
            module(random_tensor(6, 24, seed=step)).square().mean().backward()
            optimiser.step()
        return module.to_dense().weight.detach()

    alone = [steps(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(steps, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", NATIVE_CONV)
def test_the_kernel_follows_torch_set_num_threads(name: str, monkeypatch) -> None:
    """The thread count that reaches the native entry is torch's at the time of the call."""
    module = native.library()[0]
    seen = []

    class Recorder:
        entry_offsets = staticmethod(module.entry_offsets)
        entry_offsets_count = staticmethod(module.entry_offsets_count)

        @staticmethod
        def conv2d_f32(isa, *args):
            seen.append(args[-1])
            return module.conv2d_f32(isa, *args)

    monkeypatch.setattr(native, "library", lambda: (Recorder, None, ()))
    case = ConvCase()
    for threads in (1, 2, 3, 1):
        launch(name, case, case.inputs(), threads=threads)
    assert seen == [1, 2, 3, 1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to count threads")
@pytest.mark.parametrize(("threads", "workers"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("name", NATIVE_CONV)
def test_a_call_starts_one_worker_less_than_its_threads(name: str, threads: int, workers: int) -> None:
    """A fresh Python thread has no OpenMP team yet: what its first calls start is what they use."""

    def count() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Threads:"))

    def settled() -> int:
        """The count once the teams of threads that ended before have ended, too."""
        last, same = count(), 0
        for _ in range(500):
            if same == 10:
                break
            time.sleep(0.01)
            now = count()
            last, same = now, same + 1 if now == last else 0
        return last

    case = ConvCase(n=8, h=16, w=16)
    inputs = case.inputs()
    grown = []

    def work() -> None:
        torch.set_num_threads(threads)
        before = settled()
        for _ in range(3):
            KERNELS[name].launch(*case.launch_args(*inputs))
        grown.append(count() - before)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert grown == [workers]
