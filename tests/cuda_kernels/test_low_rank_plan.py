"""Host planning of the low-rank tensor-core kernels: tiles, stages, who shares what, predicted times."""

from __future__ import annotations

from itertools import product

import pytest

from slimkernels.kernels import low_rank_plan
from slimkernels.kernels.low_rank_plan import VARIANTS, Work, machine, plan, seconds, stages_for

H200 = machine(132, 227 * 1024)
# What one block may use on the RTX of compute capability 8.6 and 8.9, on an A100 and on an H200.
SHARED = (99 * 1024, 163 * 1024, 227 * 1024)


def work(m: int, k: int, n: int, rank: int) -> Work:
    return Work(m, k, rank, n, 2 * (m * (k + n) + rank * (k + n)))


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("rank", [1, 24, 64, 65, 128, 200, 256])
@pytest.mark.parametrize("m", [1, 16, 100, 1024, 70000])
def test_every_layer_has_a_plan_that_fits(m: int, rank: int, shared: int) -> None:
    for k, n in product((8, 512, 4096), repeat=2):
        found = plan(work(m, k, n, rank), machine(132, shared))
        assert found is not None
        shape = VARIANTS[found.variant]
        assert shape.rank >= rank and found.shared_bytes == shape.shared_bytes(found.stages) <= shared
        assert 2 <= found.stages <= 8
        tiles = -(-m // shape.rows)
        assert 1 <= found.splits <= -(-n // shape.columns) and 1 <= found.depth_splits <= -(-k // 64)
        expected = found.depth_splits * tiles * shape.rows * shape.rank if found.depth_splits > 1 else 0
        assert found.partial == expected
        assert found.seconds == seconds(work(m, k, n, rank), found.variant, found.stages, found.splits,
                                        found.depth_splits, machine(132, shared))  # fmt: skip


def test_few_rows_are_shared_by_many_blocks() -> None:
    """16 rows are one tile: the outputs are shared, and a large V, which every block would read whole, is too."""
    small, large = plan(work(16, 512, 512, 64), H200), plan(work(16, 4096, 4096, 128), H200)
    assert small is not None and (small.depth_splits, small.splits) == (1, 8)
    assert large is not None and large.depth_splits >= 4 and large.splits == 32
    whole = plan(work(16, 4096, 4096, 128), H200, {"depth_splits": 1})
    assert whole is not None and whole.seconds > 1.4 * large.seconds


def test_many_rows_share_nothing() -> None:
    for sizes in ((65536, 1024, 1024, 128), (65536, 4096, 4096, 256), (65536, 512, 512, 64)):
        found = plan(work(*sizes), H200)
        assert found is not None and (found.splits, found.depth_splits) == (1, 1)
        assert VARIANTS[found.variant].rows >= 64


def test_time_rises_with_the_layer_and_never_falls_below_its_limits() -> None:
    for m, k, n, rank in product((16, 1024, 65536), (512, 4096), (512, 4096), (32, 256)):
        small, large = plan(work(m, k, n, rank), H200), plan(work(2 * m, 2 * k, n, rank), H200)
        assert small is not None and large is not None and small.seconds < large.seconds
        one = work(m, k, n, rank)
        floor = max(one.nbytes / H200.memory_bytes_s, m * rank * (k + n) / H200.macs_s)
        assert small.seconds > floor + H200.launch_s


def test_a_configuration_is_kept() -> None:
    config = {"variant": 4, "stages": 2, "splits": 3, "depth_splits": 5}
    found = plan(work(100, 1024, 512, 70), H200, config)
    assert found is not None
    assert {name: getattr(found, name) for name in config} == config
    assert plan(work(100, 1024, 512, 70), H200, {"variant": 0}) is None  # 64 numbers of rank
    assert plan(work(100, 1024, 512, 70), machine(132, 99 * 1024), {"variant": 5}) is None


def test_stages_hide_a_load_and_end_where_the_work_does() -> None:
    for shape in VARIANTS:
        alone, shared = stages_for(shape, 100, 1, SHARED[-1]), stages_for(shape, 100, 2, SHARED[-1])
        assert 3 <= shared <= alone <= low_rank_plan.MAX_STAGES
        assert (alone - 1) * shape.stage_bytes >= 64 * 1024 or alone == low_rank_plan.MAX_STAGES
        assert stages_for(shape, 1, 1, SHARED[-1]) == 2
        assert stages_for(shape, 100, 1, shape.shared_bytes(2) - 1) == 0
