"""Launches without a GPU: Triton's driver is replaced by one that compiles for sm_90 and launches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from slimkernels import testing  # noqa: E402
from slimkernels.kernels.triton import bsr_conv2d, sums  # noqa: E402
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order  # noqa: E402
from slimkernels.kernels.triton.launcher import Launch  # noqa: E402
from slimkernels.kernels.triton.runtime import Limits  # noqa: E402

CONFIG = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


class NoDriver:
    """Everything Triton asks of a driver; `launched` holds (name, grid, arguments) of every launch."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *rest: (name, name, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def run(x: int, y: int, z: int, stream: int, function: str, packed: Any, *rest: Any) -> None:
            # rest: launch metadata, two hooks, the kernel's arguments.
            self.launched.append((metadata.name, (x, y, z), (metadata.hash, *rest[3:])))

        return run


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[NoDriver]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    fake = NoDriver()
    monkeypatch.setattr(driver, "_active", fake)
    bsr_conv2d._plan.cache_clear()
    yield fake
    bsr_conv2d._plan.cache_clear()
    bsr_conv2d.bsr_conv2d_fwd_kernel.device_caches.clear()
    sums._add_plan.cache_clear()
    sums.add_partials_kernel.device_caches.clear()


def conv(x: torch.Tensor, config: dict[str, int] = CONFIG, bias: torch.Tensor | None = None) -> torch.Tensor:
    weight = testing.random_bsr((32, 32, 3, 3), (16, 16), 0.5, dtype=x.dtype)
    order = forward_order(weight.crow_indices, weight.col_indices, weight.weight_shape, weight.block_shape)
    index = weight.crow_indices, weight.col_indices
    geometry = weight.weight_shape, weight.block_shape, (1, 1), (1, 1), (1, 1)
    return bsr_conv2d.launch(x, weight.values, *index, bias, [order], *geometry, "relu", config)


def aligned_input(shift: int) -> torch.Tensor:
    """x whose address is `shift` elements past a multiple of 64 bytes."""
    storage = torch.zeros(8192 + 32, dtype=torch.float16)
    start = (-storage.data_ptr() // 2) % 32 + shift
    x = torch.as_strided(storage, (4, 32, 8, 8), (2048, 1, 256, 32), start)
    assert x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 64 == 2 * shift % 64
    return x


def test_repeated_launches_pass_what_triton_passes(no_driver: NoDriver) -> None:
    """The second call skips Triton's binder; kernel, grid and arguments are those of the first, pointers apart."""
    x = aligned_input(0)
    for _ in range(2):
        conv(x)
    first, second = no_driver.launched
    assert first[:2] == second[:2] and len(first[2]) == len(second[2])
    plain = [[a for a in launched[2] if not isinstance(a, torch.Tensor)] for launched in (first, second)]
    assert plain[0] == plain[1]
    assert [i for i, a in enumerate(first[2]) if isinstance(a, torch.Tensor)] == [1, 2, 3, 4, 5, 6]


def test_an_unaligned_pointer_gets_a_kernel_of_its_own(no_driver: NoDriver) -> None:
    """Compiled for 16-byte aligned pointers, the kernel would copy 16 bytes from an odd address."""
    for shift in (0, 1, 0, 1, 8):
        conv(aligned_input(shift))
    hashes = [launched[2][0] for launched in no_driver.launched]
    assert hashes[0] == hashes[2] == hashes[4] and hashes[1] == hashes[3] and hashes[0] != hashes[1]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_another_dtype_gets_a_kernel_of_its_own(no_driver: NoDriver, narrow: torch.dtype) -> None:
    """Plans are kept by sizes; a kernel that stores float32 would write past the end of 16-bit results of that size."""
    partial = torch.zeros(8, 64)
    for dtype in (torch.float32, narrow, torch.float32, narrow):
        sums.add_partials(partial, torch.zeros(64, dtype=dtype))
    hashes = [launched[2][0] for launched in no_driver.launched]
    assert hashes[0] == hashes[2] and hashes[1] == hashes[3] and hashes[0] != hashes[1]


def test_split_launches_the_reduction_after_the_product(no_driver: NoDriver) -> None:
    y = conv(aligned_input(0), {**CONFIG, "SPLITS": 3})
    names = [(name, grid) for name, grid, _ in no_driver.launched]
    assert names == [("bsr_conv2d_fwd_kernel", (32, 3, 1)), ("bsr_conv2d_reduce_kernel", (16, 1, 1))]
    written, read = no_driver.launched[0][2][6], no_driver.launched[1][2][1]
    assert written is read and written.shape == (3, 256, 32) and written.dtype == torch.float32
    assert no_driver.launched[1][2][3] is y or no_driver.launched[1][2][3].data_ptr() == y.data_ptr()


@pytest.mark.parametrize("given", (True, False), ids=("given", "made here"))
@pytest.mark.parametrize("variant", ("images_on_m", "taps_together"))
def test_an_order_made_for_the_call_is_waited_for(monkeypatch: pytest.MonkeyPatch, variant: str, given: bool) -> None:
    """A kernel reads an order before it waits for the one in front, so none may overlap with what made the order."""
    launched: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        Launch,
        "__call__",
        lambda self, *tensors: launched.append((self.constants["OVERLAP"], self.options.get("launch_pdl", False))),
    )
    monkeypatch.setattr(bsr_conv2d, "limits", lambda device: Limits(227 * 1024, 132, True))
    weight = testing.random_bsr((32, 32, 3, 3), (16, 16), 0.5, dtype=torch.float16)
    index = weight.crow_indices, weight.col_indices
    packed = [forward_order(*index, weight.weight_shape, weight.block_shape)] if given else []
    geometry = weight.weight_shape, weight.block_shape, (1, 1), (1, 1), (1, 1)
    bsr_conv2d.launch(aligned_input(0), weight.values, *index, None, packed, *geometry, "relu", variant=variant)
    ((overlap, early),) = launched
    assert (overlap > 0) == early == given
