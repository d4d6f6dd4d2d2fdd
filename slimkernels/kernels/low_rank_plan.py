"""Host planning of csrc/cuda/low_rank.cuh: which tile, how deep a ring, who shares what, and how long that takes.

Two factors run as one kernel, or, where there are too few rows for one, as two: the first product's depth is shared by
`depth_splits` thread blocks and the second kernel adds up what they wrote. Plain arithmetic: nothing here needs a GPU,
and none of it has been measured on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from typing import NamedTuple

DEPTH = 64  # numbers of a row in a stage: kDepth of csrc/cuda/low_rank.cuh
MAX_RANK = 256
MAX_STAGES, MAX_DEPTH_SPLITS = 8, 32
_ITEM = 2  # bytes of bfloat16 and float16
# Bytes of stages on their way at once that hide the time a load takes: 0.7 us at 100 GB/s a processor.
_IN_FLIGHT = 64 * 1024
_REGISTERS = 65536  # of a processor


class Shape(NamedTuple):
    """A compiled shape of csrc/cuda/low_rank.cu.

    Attributes:
        rows: of x in a tile, a thread block's.
        rank: at most.
        columns: output channels that a thread block computes at a time.
        threads: of a thread block.
        registers: of a thread, as compiled, at most.
    """

    rows: int
    rank: int
    columns: int
    threads: int
    registers: int

    @property
    def stage_bytes(self) -> int:
        """Of x or nothing, and of V or U."""
        return (self.rows + max(self.rank, self.columns)) * DEPTH * _ITEM

    def shared_bytes(self, stages: int) -> int:
        """Shared memory of a thread block: `low_rank_shared_bytes` of csrc/cuda/low_rank.cuh."""
        return self.rows * self.rank * _ITEM + stages * self.stage_bytes


# By the `variant` of csrc/kernels.h.
VARIANTS = (
    Shape(16, 64, 64, 64, 120),
    Shape(16, 128, 128, 128, 120),
    Shape(16, 256, 128, 128, 128),
    Shape(64, 64, 64, 128, 128),
    Shape(64, 128, 128, 128, 184),
    Shape(64, 256, 256, 256, 176),
    Shape(128, 128, 128, 256, 176),
)


class Machine(NamedTuple):
    """What a plan needs to know of a GPU; times in seconds, rates of all processors together.

    Attributes:
        processors: streaming multiprocessors.
        shared_memory: bytes that one block may use.
        clock_hz: of the processors.
        macs_s: multiply-adds in 16 bits by ``mma.sync``.
        l2_bytes_s: from L2.
        memory_bytes_s: from and to device memory.
        latency_s: from a load's address to its data.
        launch_s: of a kernel in a CUDA graph.
    """

    processors: int
    shared_memory: int
    clock_hz: float = 1.92e9
    macs_s: float = 0.0
    l2_bytes_s: float = 0.0
    memory_bytes_s: float = 4.24e12
    latency_s: float = 0.4e-6
    launch_s: float = 1.03e-6


# What `mma.sync` reaches of the rate of dense products on Hopper (GPU.md's lead, to be measured).
MMA_SYNC_SHARE = 0.62
# Of an H200, measured but for the share: dense products 757 TFLOP/s and gathers from L2 9.8 TB/s on 132 processors.
_MACS_S, _L2_BYTES_S = MMA_SYNC_SHARE * 757e12 / 2 / 132, 9.8e12 / 132
_PORT_BYTES = 64  # a clock, that one processor can take from L2 when few of them ask
# A step of one thread block at least, in clocks: barrier, ldmatrix and four dependent products of 16 numbers, measured
# on no GPU.
_STEP_CLOCKS = 250.0


def machine(processors: int, shared_memory: int) -> Machine:
    """A GPU of so many processors like those of an H200."""
    return Machine(processors, shared_memory, macs_s=_MACS_S * processors, l2_bytes_s=_L2_BYTES_S * processors)


class Work(NamedTuple):
    """A layer of two factors.

    Attributes:
        rows: of x, or output pixels.
        depth: numbers of a row of V: input features, or taps times input channels.
        rank: rows of V.
        columns: rows of U.
        nbytes: of x, the factors and y, each once.
    """

    rows: int
    depth: int
    rank: int
    columns: int
    nbytes: int


class Plan(NamedTuple):
    """How a layer runs: the members of the same names in csrc/kernels.h, and what follows.

    Attributes:
        partial: fp32 numbers of partial sums, 0 where one kernel does it.
        seconds: predicted, launches included.
    """

    variant: int
    stages: int
    splits: int
    depth_splits: int
    shared_bytes: int
    partial: int
    seconds: float


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def stages_for(shape: Shape, steps: int, resident: int, shared_memory: int) -> int:
    """Stages of the ring: enough on their way for `resident` blocks of a processor, if so many fit; 0 if two do not."""
    wanted = min(max(3, 1 + _ceil(_IN_FLIGHT, resident * shape.stage_bytes)), max(2, steps + 1), MAX_STAGES)
    while wanted >= 2 and shape.shared_bytes(wanted) > shared_memory:
        wanted -= 1
    return wanted if wanted >= 2 else 0


def _resident(shape: Shape, stages: int, gpu: Machine) -> int:
    by_memory = (gpu.shared_memory + 1024) // (shape.shared_bytes(stages) + 1024)
    return max(1, min(by_memory, _REGISTERS // (shape.threads * shape.registers)))


def _kernel_s(
    shape: Shape, rank: int, blocks: int, steps: int, outer: int, more_bytes: float, stages: int, gpu: Machine
) -> float:
    """One kernel without its launch.

    Args: of each block `steps` of the first product, `outer` of the second, and the bytes it moves beside; rows of V
    beyond `rank` are multiplied and not read.
    """
    port = min(_PORT_BYTES * gpu.clock_hz, gpu.l2_bytes_s / min(blocks, gpu.processors))
    rounds = _ceil(blocks, gpu.processors)
    least = _STEP_CLOCKS / gpu.clock_hz / min(rounds, _resident(shape, stages, gpu))
    row, macs = DEPTH * _ITEM, gpu.macs_s / gpu.processors
    first = max(shape.rows * shape.rank * DEPTH / macs, (shape.rows + rank) * row / port, least)
    second = max(shape.rows * shape.columns * DEPTH / macs, shape.columns * min(row, rank * _ITEM) / port, least)
    # The first load, twice as long from device memory, and the last store.
    return rounds * (steps * first + outer * second + more_bytes / port) + 3 * gpu.latency_s


def seconds(work: Work, variant: int, stages: int, splits: int, depth_splits: int, gpu: Machine) -> float:
    """Predicted time of a plan, launches included."""
    shape = VARIANTS[variant]
    tiles, steps = _ceil(work.rows, shape.rows), _ceil(work.depth, DEPTH)
    own = _ceil(_ceil(work.columns, shape.columns), splits)
    outer, stored = own * _ceil(work.rank, DEPTH), own * shape.rows * shape.columns * _ITEM
    memory = work.nbytes / gpu.memory_bytes_s
    if depth_splits == 1:
        once = _kernel_s(shape, work.rank, tiles * splits, steps, outer, stored, stages, gpu)
        return gpu.launch_s + max(once, memory + 3 * gpu.latency_s)
    partial = shape.rows * shape.rank * 4
    first = _kernel_s(shape, work.rank, tiles * depth_splits, _ceil(steps, depth_splits), 0, partial, stages, gpu)
    # A thread adds up the sums of as many blocks at once as 16 vectors of four hold.
    vectors = partial // (16 * shape.threads)
    waits = _ceil(depth_splits, max(1, 16 // vectors)) * gpu.latency_s
    second = _kernel_s(shape, work.rank, tiles * splits, 0, outer, depth_splits * partial + stored, stages, gpu) + waits
    return 2 * gpu.launch_s + max(first + second, memory + 6 * gpu.latency_s)


def _powers(limit: int) -> list[int]:
    """Powers of two below a limit, and the limit."""
    return [1 << i for i in range((max(limit, 1) - 1).bit_length())] + [max(limit, 1)]


def _plans(work: Work, gpu: Machine, config: Mapping[str, int]) -> Iterator[Plan]:
    rank = next(r for r in (64, 128, MAX_RANK) if work.rank <= r)
    for variant, shape in enumerate(VARIANTS):
        if variant != config.get("variant", variant) or shape.rank < work.rank:
            continue
        if "variant" not in config and shape.rank != rank:
            continue
        tiles, steps = _ceil(work.rows, shape.rows), _ceil(work.depth, DEPTH)
        columns = _ceil(work.columns, shape.columns)
        # Neither the outputs nor the depth are shared by more blocks than keep the processors busy.
        splits = [s for s in _powers(columns) if s == 1 or tiles * s <= 4 * gpu.processors]
        depth_splits = [d for d in _powers(min(steps, MAX_DEPTH_SPLITS)) if d == 1 or tiles * d <= 2 * gpu.processors]
        shares = product(
            [config["splits"]] if "splits" in config else splits,
            [config["depth_splits"]] if "depth_splits" in config else depth_splits,
            (1, 2),
        )
        for split, depth_split, resident in shares:
            longest = max(steps if depth_split == 1 else 0, _ceil(columns, split) * _ceil(work.rank, DEPTH))
            stages = config.get("stages", stages_for(shape, longest, resident, gpu.shared_memory))
            size = shape.shared_bytes(stages)
            if stages < 2 or size > gpu.shared_memory:
                continue
            partial = depth_split * tiles * shape.rows * shape.rank if depth_split > 1 else 0
            time = seconds(work, variant, stages, split, depth_split, gpu)
            yield Plan(variant, stages, split, depth_split, size, partial, time)


def plan(work: Work, gpu: Machine, config: Mapping[str, int] | None = None) -> Plan | None:
    """The fastest plan by `seconds`, or None where shared memory holds none.

    Args: config: ``variant``, ``stages``, ``splits`` and ``depth_splits`` to take instead of the fastest.
    """
    return _best(work, gpu, tuple(sorted((config or {}).items())))


@lru_cache(maxsize=4096)
def _best(work: Work, gpu: Machine, config: tuple[tuple[str, int], ...]) -> Plan | None:
    return min(_plans(work, gpu, dict(config)), key=lambda p: (p.seconds, p.depth_splits, p.splits), default=None)
