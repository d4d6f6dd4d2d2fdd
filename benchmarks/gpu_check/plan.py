"""The stages of the GPU check: commands, seconds, the question that each answers, and the prediction for it.

One table, in the order in which the stages run, the most valuable first. What is expected is printed
beside the measurements: arithmetic, and what an H200 showed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Seconds that all stages of a call may take together.
CALL_SECONDS = {1: 540, 2: 230, 3: 540}
# Between the interrupt at a stage's limit, on which pytest prints its summary, and the kill.
GRACE_SECONDS = 10
# Always the same folder: its name is part of what a Triton cache made beforehand is looked up by.
TRITON_CACHE = "/tmp/slimkernels-triton-cache"


@dataclass(frozen=True)
class Stage:
    """One process, or process group, with its own time limit.

    Attributes:
        name: also of the file that keeps its rows.
        call: 1, 2 or 3. seconds: its limit.
        question: what it answers, and what is expected.
        command: arguments of Python; ``{rows}`` is the file for its rows, ``{state}`` the folder of all results.
        build_wait: seconds of its limit that it may wait for the build of the extension (CUDA C++ kernels).
        spare: it runs only in the time that the stages before it left over, and counts in no sum.
        variables: further environment variables; ``{state}`` as above.
    """

    name: str
    call: int
    seconds: int
    question: str
    command: tuple[str, ...]
    build_wait: int = 0
    spare: bool = False
    variables: dict[str, str] = field(default_factory=dict)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"gpu_check.{name}", "--rows", "{rows}", *arguments)


def _suite(*arguments: str) -> tuple[str, ...]:
    quiet = ("-q", "-p", "no:cacheprovider", "--benchmark-disable-gc", "--benchmark-columns=median")
    return ("-m", "pytest", *quiet, "--rows", "{rows}", *arguments)


def _networks(*names: str) -> tuple[str, ...]:
    return tuple(f"benchmarks/bench_vgg.py::test_vgg_gpu[{name}]" for name in names)


# The files with tests that need a GPU, the most telling first (`telling` orders the tests inside them).
GPU_TESTS = (
    "tests/on_gpu/test_triton_gpu.py",
    "tests/on_gpu/test_triton_backward_gpu.py",
    "tests/on_gpu/test_fused_gpu.py",
    "tests/inference/test_graphs.py",
    "tests/on_gpu/test_graphed_steps_gpu.py",
    "tests/on_gpu/test_composition_gpu.py",
    "tests/cuda_kernels/test_cuda_tensor_cores.py",
    "tests/cuda_kernels/test_cuda_streamed.py",
    "tests/cuda_kernels/test_cuda_chain.py",
    "tests/cuda_kernels/test_cuda_low_rank.py",
    "tests/cuda_kernels/test_cuda_narrow_blocks.py",
    "tests/cuda_kernels/test_cuda_tf32.py",
    "tests/cuda_kernels/test_gathered_packs.py",
    "tests/cuda_kernels/test_cuda_gradients.py",
    "tests/cuda_kernels/test_cuda_input_gradient.py",
    "tests/cuda_kernels/test_cuda_linear_launch.py",
    "tests/cuda_kernels/test_cuda_one_launch.py",
    "tests/cuda_kernels/test_cuda_stem_launch.py",
    "tests/cuda_kernels/test_cuda.py",
    "tests/compress/test_engine.py",
)
# Those of them that launch kernels of CUDA C++, or stand near them.
CUDA_TESTS = tuple(name for name in GPU_TESTS if not name.startswith("tests/on_gpu/test_triton"))
# One at a time, in the given order: 14 compilers of 16 cores, and the time box cuts off the least telling tests.
_WORKERS = ("-n", "14", "--dist", "load", "--maxschedchunk", "1")
_TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_check.telling", "--rows", "{rows}")
_TRAINING_STEP = "benchmarks/bench_backward.py::test_training_step"
_CHECKS = ("--checks", "{state}/rows/correctness.jsonl")
# Tables of this device: the first holds the measured ceilings alone, the second the sweep's configurations too.
_SWEPT = {"SLIMKERNELS_CACHE_DIR": "{state}/swept"}

STAGES = (
    Stage("versions", 1, 20, "What runs here: device, clocks, versions, a Triton cache made beforehand.",
          _module("versions")),
    Stage("ceilings", 1, 25,
          "Gather from L2 at 32, 64, 128 contiguous bytes (9.8 TB/s on an H200), matrix product (757 TFLOP/s), dense "
          "convolution (745), copy (3.0 TB/s on an H100, 4.24 on an H200), a launch in a graph (1.03 us).",
          _suite("benchmarks/bench_ceilings.py", "--state", "{state}")),
    Stage("compile", 1, 35, "Every kernel of the stages below, compiled 14 at once: 110, each 0.8 s of one core.",
          _module("precompile", "--processes", "14")),
    Stage("correctness", 1, 40,
          "Are the timed kernels right? Every layer at its full batch against float64, output memory poisoned, three "
          "runs bit-equal, once through a CUDA graph.",
          _module("correctness")),
    Stage("vgg", 1, 75,
          "VGG-19, batch 1024, 87.5%, (128, 16) blocks, against eager, CUDA graphs and torch.compile, and the kernels "
          "of both sides: 3.65x on an H200 (0.482 ms), 4x the goal.",
          _suite(*_networks("headline"), "--compile", "default", "--seconds", "1.5", *_CHECKS)),
    Stage("sweep", 1, 65,
          "Which configuration of each layer is fastest, and what binds it: microseconds beside the floors of L2, "
          "device memory, matrix units and issue slots.",
          _module("sweep", "--state", "{state}")),
    Stage("counters", 1, 30,
          "Why: L2 sectors, L1 tags, issue slots, DRAM bytes and what warps wait for, of three kernels (ncu). Sixteen "
          "tags a copy of 32-byte slices would equal the matrix time.",
          _module("counters", "--state", "{state}")),
    Stage("rows", 1, 50,
          "(64, 16) blocks (2.2x wanted), 95% (3.8x H100, 4.5x H200), 60% (1x), batch 1 and 16 (1.5x) with every "
          "pruned layer swapped, in the configurations that the sweep found fastest.",
          _suite(*_networks("batch_1", "batch_16", "blocks_64x16", "sparsity_95", "sparsity_60"), "--compile", "none",
                 "--seconds", "0.6", *_CHECKS, "--checks", "{state}/rows/sweep.jsonl"), variables=_SWEPT),
    Stage("tensor_cores", 1, 15,
          "CUDA C++ on tensor cores, no choice of auto: each layer beside auto's kernel, and the first two as one. An "
          "H200 took 555 us for all 15 where auto took 389, 108 for the two.",
          _module("tensor_cores"), build_wait=5),
    Stage("tests", 1, 140, "All GPU tests, the most telling first, as far as the time goes.",
          (*_TESTS, "-m", "gpu and not slow", *_WORKERS, "--junitxml", "{state}/tests.xml", *GPU_TESTS), build_wait=20),
    Stage("sanitizer", 1, 45,
          "compute-sanitizer on the headline's configurations and a training step's kernels, at 8 images: no error.",
          _module("sanitizer", "--tool", "memcheck")),
    Stage("autotune", 1, 150, "The headline once more, against torch.compile's max-autotune.",
          _suite(*_networks("headline"), "--compile", "max-autotune-no-cudagraphs", "--seconds", "1", *_CHECKS),
          spare=True),
    Stage("racecheck", 1, 60, "Shared-memory races in the same kernels: none.",
          _module("sanitizer", "--tool", "racecheck"), spare=True),
    Stage("tensor_cores_2", 1, 45,
          "CUDA C++ on tensor cores in (32, 32) blocks (724 us for all 15 layers on an H200, Triton 510), and the "
          "gradients of a training step (689 and 574 us, Triton 567 and 312).",
          _module("tensor_cores", "--gradients"), build_wait=5, spare=True),
    Stage("tests_cuda", 1, 120, "The GPU tests but for those of Triton's block-sparse kernels.",
          (*_TESTS, "-m", "gpu and not slow", *_WORKERS, *CUDA_TESTS), build_wait=20, spare=True),
    Stage("narrow", 1, 45,
          "VGG-19 in (32, 32) blocks by auto's kernels and by CUDA C++ on tensor cores, wanted 2x dense; (128, 16) by "
          "the latter.",
          _suite(*_networks("blocks_32x32", "tensor_cores_32x32", "tensor_cores_128x16"), "--compile", "none",
                 "--seconds", "0.4", *_CHECKS), build_wait=5, spare=True),
    Stage("tensor_cores_tf32", 1, 35,
          "The layers in float32, multiplied in TF32: CUDA C++ on tensor cores beside auto's kernel.",
          _module("tensor_cores", "--tf32"), build_wait=5, spare=True),
    Stage("sanitizer_cuda", 1, 150,
          "memcheck, racecheck and synccheck side by side on every kernel of CUDA C++: no error.",
          _module("sanitizer", "--kernels", "cuda", "--tool", "memcheck", "racecheck", "synccheck"),
          build_wait=5, spare=True),
    Stage("compile_2", 2, 20, "The kernels of VGG-16 and of the training step, 14 at once.",
          _module("precompile", "--processes", "14", "--names", "vgg16_224", "--no-sweep", "--training")),
    Stage("vgg16", 2, 40, "VGG-16 at 224x224, batch 32: 2.5x (H100) or 2.8x (H200) wanted; the floor is 3.3x/3.8x.",
          _suite(*_networks("vgg16_224"), "--compile", "default", "--seconds", "1", *_CHECKS)),
    Stage("swept", 2, 25, "The headline with the configurations that the sweep found fastest.",
          _suite(*_networks("headline"), "--compile", "none", "--seconds", "1", *_CHECKS,
                 "--checks", "{state}/rows/sweep.jsonl"), variables=_SWEPT),
    Stage("training", 2, 45, "A whole training step against the masked dense one, both in CUDA graphs too: 2x wanted.",
          _suite(f"{_TRAINING_STEP}[block_shape0-fused]", "--compile", "none", "--seconds", "1")),
    Stage("again", 2, 70, "What failed in call 1, and the tests that it did not reach.",
          (*_TESTS, "--again", "{state}/rows/tests.jsonl", "-m", "gpu and not slow", *_WORKERS,
           "--junitxml", "{state}/again.xml", *GPU_TESTS), build_wait=5),
    Stage("low_rank", 2, 30,
          "Low-rank layers against their factors and the merged layer: 1.3x where launch-bound, and CUDA C++ on tensor "
          "cores beside Triton: on an H200 9.1 us for 16 x 4096 -> 4096 of rank 128, 154 for 8192 of rank 256.",
          _suite("benchmarks/bench_low_rank.py", "--seconds", "0.1")),
    Stage("trainer", 2, 60,
          "A step of the training loop, VGG-19 at batch 512: from Python and as a CUDA graph, plain and with all that "
          "the recipe does. By the GPU's own time about 60 000 images/s.",
          _module("trainer"), spare=True),
    Stage("chain", 2, 110,
          "graphed(one_launch=...) of VGG-19 at batch 1, 16 and 4, beside a CUDA graph of auto's kernels: outputs, "
          "launches, time (40, 73 and 44 us on an H200 with chain and classifier, 98, 103 and 102 without). Then its "
          "15 block-sparse convolutions alone (31, 48 and 32 us).",
          _module("chain"), build_wait=20, spare=True),
    Stage("training_torch", 2, 45, "The training step with torch's batch norm on both sides.",
          _suite(f"{_TRAINING_STEP}[block_shape0-torch]", "--compile", "none", "--seconds", "1"), spare=True),
    Stage("training_compiled", 2, 100, "The training step once more, the masked one through torch.compile too.",
          _suite(f"{_TRAINING_STEP}[block_shape0-fused]", "--compile", "default", "--seconds", "1"), spare=True),
    Stage("sparse_compiled", 2, 90, "The sparse training step through torch.compile: does it run in a CUDA graph?",
          _suite("benchmarks/bench_backward.py::test_compiled_training_step", "--compile", "default", "--seconds", "1"),
          spare=True),
    Stage("networks", 2, 100,
          "ResNet-50 at 224x224, batch 32 and 1, 90%, NIN and ResNet-18, as convert decides here, against cuDNN with "
          "additions and ReLUs in its kernels, ResNet-50 at batch 32 against torch.compile too.",
          _suite("benchmarks/bench_networks.py::test_network_gpu", "--compile", "default", "--seconds", "0.3"),
          spare=True),
    Stage("checkpoints", 2, 90,
          "Compact files that the recipe trained in (128, 16) blocks, converted here for batches of 1 and 1024. Needs "
          "constriction.",
          _suite("benchmarks/bench_checkpoints.py", "--seconds", "0.3"), spare=True),
    Stage("recipe", 3, 530,
          "VGG-19 trained, pruned and distilled at 87.5, 92, 95 and 98%, low rank, NIN: 85x smaller at 98% of the "
          "accuracy and 3x faster wanted. An H200 took 18 s to read the images, 0.44 s an epoch and 0.84 of a taught "
          "one, 12 s for the files of a row.",
          _module("recipe", "--state", "{state}")),
    Stage("ranking", 3, 480,
          "VGG-19 at equal bytes: equal shares, one ranking over all layers, importance per predicted second, and "
          "latency budgets. By the same figures 395 s.",
          _module("recipe", "--recipe", "ranking", "--state", "{state}"), spare=True),
)  # fmt: skip


def stages_of(call: int) -> list[Stage]:
    """The stages of a call, those for spare time last."""
    return sorted((s for s in STAGES if s.call == call), key=lambda s: s.spare)


def plan_text() -> str:
    """Stages, seconds and sums of all calls."""
    lines = []
    for call, most in CALL_SECONDS.items():
        lines += [f"call {call}", "seconds  stage        question"]
        for stage in stages_of(call):
            seconds = f"({stage.seconds})" if stage.spare else str(stage.seconds)
            lines.append(f"{seconds:>7}  {stage.name:<12} {stage.question}")
        total = sum(s.seconds for s in stages_of(call) if not s.spare)
        lines += [f"{total:>7}  in all, of at most {most}; in brackets: only in time that is left", ""]
    return "\n".join(lines)
