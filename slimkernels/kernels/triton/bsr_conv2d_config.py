"""Tile configurations of the forward convolution: a default by arithmetic, and the list a tuner tries.

Nothing here imports Triton or needs a GPU; nothing here was measured on one. A configuration holds

    BLOCK_M        pixels of a tile            BLOCK_N   output channels of a tile (at most one block row's)
    BLOCK_K        input channels of a stage   num_warps, num_stages
    GROUP_M        pixel tiles whose block rows are walked together; absent: as many as L2_BYTES of input hold
    SPLITS         programs that share one tile's stored blocks; absent: 1
    INDEX_64       1 forces 64-bit addresses, which are otherwise used from 2^31 elements on

The plan of a default tile. A program's prologue and epilogue cost as much as one to three K stages, and a pruned layer
has 2 to 9 of those. Programs that share a processor hide them behind each other's loads (`programs_a_processor`), but
their tiles are smaller and load more for each product: 128 pixels x 128 channels moves 1.33 times the bytes of
256 x 128 and leaves room for a second program, so the large tile is for rows of DEEP_STAGES and more. A pipeline deeper
than a row has steps holds memory that another program could use; beyond three stages it gives way to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from slimkernels.kernels.problems import ConvProblem, LinearProblem, Problem, SizedProblem
from slimkernels.kernels.triton.bsr_conv2d_index import rows_sharing_input
from slimkernels.kernels.triton.runtime import (
    SHARED_MEMORY_SM80,
    cdiv,
    device_limits,
    division,
    next_power_of_2,
    power_of_2_divisor,
    shape_reason,
)

# Input that one group of pixel tiles may read: below each half of A100's (20 MB) and H100's (25 MB) L2.
L2_BYTES = 16 * 2**20
# Leads: a second launch costs about 2 us in a CUDA graph, a K stage of 64 x 128 tiles 0.2 to 0.6 us (5.5 TB/s of L2
# over 132 processors at best, one processor's own port at worst).
MIN_STAGES_SAVED = 8
MIN_STAGES_A_SPLIT = 4
# Where a tile of 256 pixels moves fewer bytes than two of 128 pixels by more than the prologue and epilogue it cannot
# hide: those take about 3500 cycles and a stage of 256 x 128 x 64 about 2070 from L2 (arithmetic, not measured).
DEEP_STAGES = 6
# Four stages of 256 x 128 x 64, 16-bit, which sm_90 and sm_100 hold. Their products read tiles from shared memory;
# mma.sync, on every other GPU, reads them through registers, which take the place of one stage.
ROOMY_SHARED_MEMORY = 4 * (256 + 128) * 64 * 2
# Registers of a processor, threads it holds, and shared memory that a program takes beside its buffers: the system's
# kilobyte and at most one of the kernel's own.
REGISTER_FILE, MAX_THREADS, SHARED_OVERHEAD = 65536, 2048, 2048

Config = dict[str, int]


def shared_bytes(config: Mapping[str, int], itemsize: int, rows: int = 1) -> int:
    """Shared memory of the pipeline's buffers, bytes; `rows` block rows of BLOCK_N channels read one input tile."""
    tiles = config["BLOCK_M"] + rows * config["BLOCK_N"]
    return config["num_stages"] * tiles * config["BLOCK_K"] * itemsize


def planned_registers(config: Mapping[str, int], rows: int = 1) -> int:
    """At most so many registers a thread takes for 16-bit tiles on sm_90: its accumulators and its addresses.

    tests/test_triton_sass.py holds the compiled kernels to it.
    """
    accumulators = config["BLOCK_M"] * config["BLOCK_N"] * rows // (32 * config["num_warps"])
    return -(-(accumulators * 5 // 4 + 48) // 8) * 8


def programs_a_processor(config: Mapping[str, int], itemsize: int, shared_memory: int, rows: int = 1) -> int:
    """Programs that a processor holds at a time, by registers, shared memory and threads.

    shared_memory: bytes one program may use; a processor has a kilobyte more.
    """
    threads = 32 * config["num_warps"]
    return min(
        REGISTER_FILE // (planned_registers(config, rows) * threads),
        (shared_memory + 1024) // (shared_bytes(config, itemsize, rows) + SHARED_OVERHEAD),
        MAX_THREADS // threads,
    )


def group_m(config: Mapping[str, int], c_in: int, stride: Sequence[int], itemsize: int) -> int:
    """Pixel tiles of a group: those whose input fills L2_BYTES, at least one."""
    tile_bytes = config["BLOCK_M"] * stride[0] * stride[1] * c_in * itemsize
    return config.get("GROUP_M") or max(1, L2_BYTES // tile_bytes)


def grid_integers(tiles_m: int, n_tiles: int, group: int) -> tuple[int, ...]:
    """The integer arguments tiles_m ... last_shift of the kernels (`tiles.grouped_tile`); group: tiles of a group."""
    group = min(group, tiles_m)
    last = (tiles_m - 1) % group + 1
    return (tiles_m, n_tiles, group, *division(group * n_tiles), *division(group), *division(last))


def splits_for(programs: int, stages: int, processors: int) -> int:
    """Programs that share one tile's stored blocks: 1 unless the grid leaves processors idle and stages are saved.

    Args: programs of the unsplit grid; stages K stages of an average block row; processors of the device.
    """
    splits = min(processors // max(programs, 1), stages // MIN_STAGES_A_SPLIT, 32)
    return splits if splits > 1 and stages - cdiv(stages, splits) >= MIN_STAGES_SAVED else 1


def default_config(
    m_total: int,
    block_rows: int,
    block_shape: Sequence[int],
    c_in: int,
    dtype: torch.dtype,
    *,
    blocks: int | None = None,
    weights_on_m: bool = False,
    pool: bool = False,
    tensor_cores: bool = True,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> Config:
    """Tile constants for one convolution, by arithmetic (nothing here is measured on a GPU).

    Args: m_total output pixels; block_rows rows of the BSR; c_in input channels; blocks stored blocks (None: those of a
    deep layer, never split); weights_on_m the kernel whose MMA has output channels on M; pool whether 2x2 windows are
    pooled; tensor_cores False for IEEE float32; shared_memory bytes one block may use; processors the number of SMs to
    keep busy.
    """
    block_out, block_in = block_shape
    block_n = min(max(next_power_of_2(block_out), 16), 128)
    block_k = 64 if dtype.itemsize == 2 else 32
    slice_bytes = power_of_2_divisor(c_in, 16), power_of_2_divisor(block_in, 16)
    steps = DEEP_STAGES if blocks is None else cdiv(blocks * block_in, block_rows * block_k)
    copied = tensor_cores and min(slice_bytes) * dtype.itemsize >= 16
    # 16-bit tiles from shared memory to wgmma or tcgen05, with room for several programs or for a large one.
    roomy = copied and dtype.itemsize == 2 and shared_memory >= ROOMY_SHARED_MEMORY
    if not tensor_cores:
        # FMA units take both operands from registers: on 4 warps a 64 x 64 tile at K = 16 spills 8 bytes on sm_80.
        block_m, block_n, block_k, warps, stages = 64, min(block_n, 64), 16, 4, 3
    elif not copied:
        # Slices below 16 bytes are gathered element by element into registers, 16 a thread at 64 x 32.
        block_m, block_n, block_k, warps, stages = 64, min(block_n, 64), 32, 4, 3
    elif block_n == 128 and roomy and steps >= DEEP_STAGES:
        block_m, warps, stages = 256, 8, 4
    else:
        block_m, warps, stages = 128, 8 if block_n == 128 else 4, 4
    # Pixels on N may be as few as 16 without leaving wgmma, whose M is 64.
    least = 16 if weights_on_m else 64
    floor = min(least, max(16, next_power_of_2(m_total)))
    tiles_n = block_rows * cdiv(block_out, block_n)
    # A smaller tile loads more for each product: it pays where every half still finds an idle processor.
    while block_m > floor and (block_m >= 2 * m_total or 2 * cdiv(m_total, block_m) * tiles_n <= processors):
        block_m //= 2
    if not tensor_cores:
        warps = 8 if block_m * block_n >= 4096 else 4
    elif block_m < 128 or (pool and roomy and block_m == 128 and not weights_on_m):
        # A window's pixels lie in one thread's registers where a warp has 32 rows of the tile.
        warps = 4
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    if roomy:
        shared = cdiv(m_total, block_m) * tiles_n > processors
        config["num_stages"] = _stages(config, steps, dtype.itemsize, shared_memory if shared else 0)
    while config["num_stages"] > 2 and shared_bytes(config, dtype.itemsize) > shared_memory:
        config["num_stages"] -= 1
    if blocks is not None:
        config["SPLITS"] = splits_for(cdiv(m_total, block_m) * tiles_n, steps, processors)
    return config


def _stages(config: Mapping[str, int], steps: int, itemsize: int, shared_memory: int) -> int:
    """Stages of a pipeline over so many steps: two to four, three where that lets a processor hold more programs.

    shared_memory: 0 where no processor gets a second program.
    """
    if steps < 4:
        return max(steps, 2)
    held = [programs_a_processor({**config, "num_stages": n}, itemsize, shared_memory) for n in (3, 4)]
    return 3 if held[0] > held[1] else 4


def shared_input_config(
    m_total: int,
    block_rows: int,
    block_shape: Sequence[int],
    c_in: int,
    dtype: torch.dtype,
    *,
    tensor_cores: bool = True,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> Config:
    """`default_config` of the input-sharing kernel: one accumulator of BLOCK_N channels per block row of the group."""
    rows = rows_sharing_input(block_shape[0])
    config = default_config(
        m_total, cdiv(block_rows, rows), block_shape, c_in, dtype, tensor_cores=tensor_cores,
        shared_memory=shared_memory, processors=processors,
    )  # fmt: skip
    wide = min(max(next_power_of_2(block_shape[0]), 16), 64)
    config["BLOCK_N"] = wide
    if not tensor_cores:
        config["BLOCK_M"], config["num_warps"] = 32, 4 if rows * wide <= 64 else 8
    elif rows * wide == 128:
        config["num_warps"] = 8 if config["BLOCK_M"] >= 128 else 4
    while config["num_stages"] > 2 and shared_bytes(config, dtype.itemsize, rows) > shared_memory:
        config["num_stages"] -= 1
    return config


def device_configs(variant: str, problem: SizedProblem) -> list[Config]:
    """`configs` within the limits of the current GPU; of an A100 where there is none, the default alone on the CPU."""
    if problem.device == "cpu":
        return [{}]
    limits = device_limits(torch.empty(0, device="cuda")) if torch.cuda.is_available() else {}
    return configs(problem, variant, **limits)


def taps_together_reason(problem: Problem) -> str | None:
    """None when there are taps to visit together, else why not; CPU tensors need the interpreter."""
    if isinstance(problem, ConvProblem) and problem.r * problem.s == 1:
        return "a 1x1 convolution has one tap"
    return shape_reason(problem)


def shared_input_reason(problem: Problem) -> str | None:
    """None when block rows are short enough to share an input tile, else why not; CPU tensors need the interpreter."""
    if problem.block_shape[0] > 64:
        return f"a block row of {problem.block_shape[0]} outputs fills a tile by itself"
    return shape_reason(problem)


def _shape(problem: ConvProblem | LinearProblem) -> tuple[int, int, int]:
    """(output pixels, input channels, output channels)."""
    if isinstance(problem, LinearProblem):
        return problem.m, problem.in_features, problem.out_features
    p, q = problem.p, problem.q
    if problem.epilogue == "relu_maxpool2":
        p, q = p // 2 * 2, q // 2 * 2
    return problem.n * p * q, problem.c_in, problem.c_out


def configs(
    problem: SizedProblem,
    variant: str = "pixels_on_m",
    *,
    tensor_cores: bool | None = None,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> list[Config]:
    """Configurations worth timing on a problem, the default first, none twice; every one compiles without spills.

    Args:
        problem: a ConvProblem or LinearProblem.
        variant: "pixels_on_m", "weights_on_m", "taps_together" or "shared_input", the kernels of this op.
        tensor_cores: False for IEEE float32, None asks torch's switch (False unless "tf32").
        shared_memory, processors: limits of the device, `runtime.device_limits`.

    Raises: TypeError for another problem.
    """
    if not isinstance(problem, ConvProblem | LinearProblem):
        raise TypeError(f"configs: expected a ConvProblem or LinearProblem, got {type(problem).__name__}")
    m_total, c_in, c_out = _shape(problem)
    block_out, block_in = problem.block_shape
    block_rows, itemsize = cdiv(c_out, block_out), problem.dtype.itemsize
    if tensor_cores is None:
        tensor_cores = problem.dtype != torch.float32 or _tf32(problem)
    limits = {"tensor_cores": tensor_cores, "shared_memory": shared_memory, "processors": processors}
    rows = rows_sharing_input(block_out) if variant == "shared_input" else 1
    if variant == "shared_input":
        first = shared_input_config(m_total, block_rows, problem.block_shape, c_in, problem.dtype, **limits)
    else:
        first = default_config(
            m_total, block_rows, problem.block_shape, c_in, problem.dtype, blocks=problem.nnz_blocks,
            weights_on_m=variant == "weights_on_m", pool=problem.epilogue == "relu_maxpool2", **limits,
        )  # fmt: skip
    narrow = min(power_of_2_divisor(c_in, 16), power_of_2_divisor(block_in, 16)) * itemsize < 16
    found = [first]
    steps = cdiv(problem.nnz_blocks * block_in, block_rows * first["BLOCK_K"])
    fewest = 2 if shared_memory >= ROOMY_SHARED_MEMORY else 3
    for tile in _tiles(first, tensor_cores and not narrow, variant, itemsize, range(fewest, max(steps, fewest) + 1)):
        config = {**first, **tile}
        if config["BLOCK_M"] < 2 * m_total and shared_bytes(config, itemsize, rows) <= shared_memory:
            found.append(config)
    if variant != "shared_input":
        tiles_n = block_rows * cdiv(block_out, first["BLOCK_N"])
        idle = cdiv(m_total, first["BLOCK_M"]) * tiles_n < 2 * processors
        found += [{**first, "SPLITS": s} for s in (1, 2, 4, 8, 16) if idle and (s == 1 or steps >= 2 * s)]
    if cdiv(m_total, first["BLOCK_M"]) > 1:
        found.append({**first, "GROUP_M": 1})
    unique: list[Config] = []
    for config in found:
        if config not in unique:
            unique.append(config)
    return unique


def _tf32(problem: ConvProblem | LinearProblem) -> bool:
    switches = torch.backends.cudnn.conv if isinstance(problem, ConvProblem) else torch.backends.cuda.matmul
    return switches.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _tiles(first: Config, wide: bool, variant: str, itemsize: int, depths: range) -> list[Config]:
    """Tiles to try beside the default's; `wide` where slices are copied in 16-byte pieces to tensor cores.

    depths: numbers of stages, of which four at most are tried. The fewest leave room for the most programs a
    processor, four bear the longest latency; a pipeline deeper than a row's steps does neither.
    """
    if not wide:
        return [{"BLOCK_M": m} for m in (32, 64) if m != first["BLOCK_M"]]
    stage = 128 // itemsize
    depths = depths[: 5 - depths.start]
    tiles = []
    for block_m, warps in ((256, 8), (128, 8), (128, 4), (64, 4), (32, 4), (16, 4)):
        # 256 pixels a warpgroup, or 128 x 128 on one, leave less than 64 registers beside the accumulator; pixels
        # on N below 64 only where weights are on M. TF32 at 256 pixels spills on sm_100: 8 bytes at 256 x 32.
        accumulators = block_m * first["BLOCK_N"] * (4 if variant == "shared_input" else 1)
        if accumulators > 16384 * warps // 4 or (itemsize == 4 and (block_m == 256 or accumulators > 16384)):
            continue
        if block_m < 64 and variant != "weights_on_m":
            continue
        tile = {"BLOCK_M": block_m, "BLOCK_K": stage, "num_warps": warps}
        tiles += [{**tile, "num_stages": n} for n in depths]
        if block_m == first["BLOCK_M"] and warps == first["num_warps"]:
            tiles.append({**tile, "BLOCK_K": stage // 2, "num_stages": min(5, 2 * depths[-1])})
    return tiles
