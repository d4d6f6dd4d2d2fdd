"""Tile configurations of the forward convolution: a default by rules, and the list a tuner tries.

Nothing here imports Triton or needs a GPU. A configuration holds

    BLOCK_M        pixels of a tile            BLOCK_N   output channels of a tile (at most one block row's)
    BLOCK_K        input channels of a stage   num_warps, num_stages
    GROUP_M        pixel tiles whose block rows are walked together; absent: as many as L2_BYTES of input hold
    SPLITS         programs that share one tile's stored blocks; absent: 1
    INDEX_64       1 forces 64-bit addresses, which are otherwise used from 2^31 elements on

Measured on an H200 (bf16, VGG-19 on 32x32 images, batch 1024, 87.5% zeros; benchmarks/results/nvidia-h200):

* A stage is one slice: the consecutive channels of one tap that a block holds, 16 to 64. Stages of several slices, four
  of 16 say, take 1.2 to 2.1 times as long at the same tile, whatever their number.
* 128 pixels on four warps beat 256 pixels on eight by 1.1 to 1.3, and 64 pixels on four by 1.1 to 1.2, except where
  that leaves a processor fewer than four programs: there 64 pixels win by up to 1.2.
* About 96 channels in flight are best: six stages of 16, three of 32. Eight stages of 16 lose a tenth of the time,
  three lose up to a quarter.
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
# Input channels in flight, 16-bit (see above), and programs a processor below which tiles are halved.
CHANNELS_IN_FLIGHT = 96
FEW_PROGRAMS = 4

Config = dict[str, int]


def shared_bytes(config: Mapping[str, int], itemsize: int, rows: int = 1) -> int:
    """Shared memory of the pipeline's buffers, bytes; `rows` block rows of BLOCK_N channels read one input tile."""
    tiles = config["BLOCK_M"] + rows * config["BLOCK_N"]
    return config["num_stages"] * tiles * config["BLOCK_K"] * itemsize


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

    Args: programs of the unsplit grid; stages of 128 bytes of channels of an average block row; processors.
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
    tensor_cores: bool = True,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = 108,
) -> Config:
    """Tile constants for one convolution, by the rules of this module.

    Args: m_total output pixels; block_rows rows of the BSR; c_in input channels; blocks stored blocks (None: those of a
    deep layer, never split); weights_on_m the kernel whose MMA has output channels on M; tensor_cores False for IEEE
    float32; shared_memory bytes one block may use; processors the number of SMs to keep busy.
    """
    block_out, block_in = block_shape
    block_n = min(max(next_power_of_2(block_out), 16), 128)
    wide = 128 // dtype.itemsize
    one_slice = min(power_of_2_divisor(c_in, wide), power_of_2_divisor(block_in, wide))
    copied = tensor_cores and one_slice * dtype.itemsize >= 16
    warps = 4
    if not tensor_cores:
        # FMA units take both operands from registers: on 4 warps a 64 x 64 tile at K = 16 spills 8 bytes on sm_80.
        block_m, block_n, block_k, stages = 64, min(block_n, 64), 16, 3
    elif not copied:
        # Slices below 16 bytes are gathered element by element into registers, 16 a thread at 64 x 32.
        block_m, block_n, block_k, stages = 64, min(block_n, 64), 32, 3
    elif one_slice < 16:
        # Products are 16 channels deep at least, so that a stage is several slices, and then better many.
        block_m, block_k, warps, stages = 128, wide, 8 if block_n == 128 else 4, 3
    else:
        block_m, block_k = 128, one_slice
        stages = max(2, CHANNELS_IN_FLIGHT * 2 // dtype.itemsize // one_slice)
    # Pixels on N may be as few as 16 without leaving wgmma, whose M is 64.
    least = 16 if weights_on_m else 64
    floor = min(least, max(16, next_power_of_2(m_total)))
    tiles_n = block_rows * cdiv(block_out, block_n)
    # A smaller tile loads more for each product: it pays where every half still finds an idle processor.
    while block_m > floor and (
        block_m >= 2 * m_total
        or 2 * cdiv(m_total, block_m) * tiles_n <= processors
        or (copied and block_m == 128 and cdiv(m_total, block_m) * tiles_n < FEW_PROGRAMS * processors)
    ):
        block_m //= 2
    if not tensor_cores:
        warps = 8 if block_m * block_n >= 4096 else 4
    elif block_m < 128:
        warps = 4
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    while config["num_stages"] > 2 and shared_bytes(config, dtype.itemsize) > shared_memory:
        config["num_stages"] -= 1
    if blocks is not None:
        depth = cdiv(blocks * block_in, block_rows * wide)
        config["SPLITS"] = splits_for(cdiv(m_total, block_m) * tiles_n, depth, processors)
    return config


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
        m_total,
        cdiv(block_rows, rows),
        block_shape,
        c_in,
        dtype,
        tensor_cores=tensor_cores,
        shared_memory=shared_memory,
        processors=processors,
    )
    wide = min(max(next_power_of_2(block_shape[0]), 16), 64)
    config["BLOCK_N"] = wide
    if tensor_cores and config["BLOCK_K"] < 128 // dtype.itemsize and config["BLOCK_M"] == 128:
        # Its columns and slots are vectors in any case.
        config["BLOCK_K"], config["num_stages"] = 128 // dtype.itemsize, 4
    if not tensor_cores:
        config["BLOCK_M"], config["num_warps"] = 32, 4 if rows * wide <= 64 else 8
    elif rows * wide == 128:
        config["num_warps"] = 8 if config["BLOCK_M"] >= 128 else 4
    while config["num_stages"] > 2 and shared_bytes(config, dtype.itemsize, rows) > shared_memory:
        config["num_stages"] -= 1
    return config


def images_config(
    images: int,
    block_shape: Sequence[int],
    c_in: int,
    dtype: torch.dtype,
    *,
    tensor_cores: bool = True,
    shared_memory: int = SHARED_MEMORY_SM80,
) -> Config:
    """The default of the kernel with one output position a tile: a stage is one slice, a tile at most 64 images.

    Args: images of the batch; the rest as `default_config`.
    """
    block_n = min(max(next_power_of_2(block_shape[0]), 16), 128 if tensor_cores else 64)
    block_m = max(16, min(64, next_power_of_2(images)))
    wide = 128 // dtype.itemsize if tensor_cores else 16
    block_k = min(power_of_2_divisor(c_in, wide), power_of_2_divisor(block_shape[1], wide))
    stages = max(2, 64 * 2 // dtype.itemsize // block_k) if tensor_cores else 3
    warps = 8 if not tensor_cores and block_m * block_n >= 4096 else 4
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    while config["num_stages"] > 2 and shared_bytes(config, dtype.itemsize) > shared_memory:
        config["num_stages"] -= 1
    return config


def images_reason(problem: Problem) -> str | None:
    """None where a tile of one output position leaves out taps, else why not; CPU tensors need the interpreter."""
    if not isinstance(problem, ConvProblem):
        return "a linear layer has one tap"
    if problem.epilogue == "relu_maxpool2":
        return "a max-pool wants the four pixels of a window in one tile"
    if problem.r > 3:
        return f"walks at most 3 rows of taps, not {problem.r}"
    if max(problem.padding) == 0:
        return "without padding every tap is inside the image"
    width = min(power_of_2_divisor(problem.c_in, 16), power_of_2_divisor(problem.block_shape[1], 16))
    if width < 16:
        return f"a stage of the product is 16 channels of one tap, and only {width} follow each other"
    return shape_reason(problem)


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
        shared_memory: bytes a block may use on the device, `runtime.device_limits`.
        processors: of the device.

    Raises: TypeError for another problem.
    """
    if not isinstance(problem, ConvProblem | LinearProblem):
        raise TypeError(f"configs: expected a ConvProblem or LinearProblem, got {type(problem).__name__}")
    m_total, c_in, c_out = _shape(problem)
    block_out, block_in = problem.block_shape
    if variant == "images_on_m" and isinstance(problem, ConvProblem):
        return _images_configs(problem, tensor_cores, shared_memory)
    block_rows, itemsize = cdiv(c_out, block_out), problem.dtype.itemsize
    if tensor_cores is None:
        tensor_cores = problem.dtype != torch.float32 or _tf32(problem)
    limits = {"tensor_cores": tensor_cores, "shared_memory": shared_memory, "processors": processors}
    rows = rows_sharing_input(block_out) if variant == "shared_input" else 1
    if variant == "shared_input":
        first = shared_input_config(m_total, block_rows, problem.block_shape, c_in, problem.dtype, **limits)
    else:
        first = default_config(
            m_total,
            block_rows,
            problem.block_shape,
            c_in,
            problem.dtype,
            blocks=problem.nnz_blocks,
            weights_on_m=variant == "weights_on_m",
            **limits,
        )
    narrow = min(power_of_2_divisor(c_in, 16), power_of_2_divisor(block_in, 16)) * itemsize < 16
    found = [first]
    steps = cdiv(problem.nnz_blocks * block_in, block_rows * (128 // itemsize))
    for tile in _tiles(first, tensor_cores and not narrow, variant, itemsize):
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


def _images_configs(problem: ConvProblem, tensor_cores: bool | None, shared_memory: int) -> list[Config]:
    if tensor_cores is None:
        tensor_cores = problem.dtype != torch.float32 or _tf32(problem)
    first = images_config(
        problem.n,
        problem.block_shape,
        problem.c_in,
        problem.dtype,
        tensor_cores=tensor_cores,
        shared_memory=shared_memory,
    )
    found = [first]
    itemsize = problem.dtype.itemsize
    deep = CHANNELS_IN_FLIGHT * 2 // itemsize // first["BLOCK_K"]
    for block_m in (128, 64) if tensor_cores else ():
        for stages in (first["num_stages"], deep):
            config = {**first, "BLOCK_M": block_m, "num_stages": max(2, stages)}
            fits = block_m < 2 * problem.n and shared_bytes(config, itemsize) <= shared_memory
            if fits and config not in found:
                found.append(config)
    return found


def _tf32(problem: ConvProblem | LinearProblem) -> bool:
    switches = torch.backends.cudnn.conv if isinstance(problem, ConvProblem) else torch.backends.cuda.matmul
    # For mypy: torch 2.9 has it, torch's annotations do not.
    return switches.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _tiles(first: Config, wide: bool, variant: str, itemsize: int) -> list[Config]:
    """Tiles to try beside the default's; `wide` where slices are copied in 16-byte pieces to tensor cores."""
    if not wide:
        return [{"BLOCK_M": m} for m in (32, 64) if m != first["BLOCK_M"]]
    depth = first["num_stages"]
    tiles = []
    for block_m, warps in ((128, 4), (64, 4), (256, 8), (128, 8), (32, 4), (16, 4)):
        # 256 pixels a warpgroup, or 128 x 128 on one, leave less than 64 registers beside the accumulator; pixels
        # on N below 64 only where weights are on M. TF32 at 256 pixels spills on sm_100: 8 bytes at 256 x 32.
        accumulators = block_m * first["BLOCK_N"] * (4 if variant == "shared_input" else 1)
        if accumulators > 16384 * warps // 4 or (itemsize == 4 and (block_m == 256 or accumulators > 16384)):
            continue
        if block_m < 64 and variant != "weights_on_m":
            continue
        tile = {"BLOCK_M": block_m, "num_warps": warps}
        tiles += [{**tile, "num_stages": n} for n in dict.fromkeys((depth, max(2, depth * 2 // 3), max(2, depth // 2)))]
    return tiles
