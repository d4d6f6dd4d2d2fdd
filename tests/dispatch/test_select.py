"""Kernel choice: candidates with reasons, explicit requests that never fall back, environment caps."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slimkernels import kernels, ops
from slimkernels.cases import ConvCase, LinearCase, LowRankConvCase, LowRankLinearCase
from slimkernels.dispatch.select import candidates, choose, configurations, predicted_dense_seconds, predicted_seconds
from slimkernels.kernels import KERNELS

CASES = [ConvCase(), LinearCase(), LowRankLinearCase(), LowRankConvCase()]
IDS = [c.op for c in CASES]
ISAS = ("scalar", "avx2", "avx512")
NATIVE = [isa for isa in ISAS if KERNELS[f"bsr_conv2d_f32__{isa}"].available() is None]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch) -> None:
    for name in ("SLIMKERNELS_ISA", "SLIMKERNELS_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def test_every_kernel_has_a_row_that_its_name_finds() -> None:
    """A name made of parts would not be found by who looks for it."""
    source = Path(kernels.__file__).read_text()
    assert len(kernels.KERNELS) > 40
    for name in kernels.KERNELS:
        assert source.count(f'"{name}"') == 1, name


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_kernel_of_the_op_is_kept_or_rejected_with_a_reason(case) -> None:
    for device in ("cpu", "cuda"):
        listed = candidates(case.problem(device))
        assert {c.name for c in listed} == {n for n, s in KERNELS.items() if s.op == case.op}
        for candidate in listed:
            spec = KERNELS[candidate.name]
            assert candidate.predicted_s > 0
            if candidate.reason is None:
                assert device in spec.devices and case.dtype in spec.dtypes and spec.available() is None
            else:
                assert candidate.reason.strip()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_choose_takes_a_kept_candidate_and_says_why(case) -> None:
    choice = choose(case.problem())
    kept = {c.name for c in candidates(case.problem()) if c.reason is None}
    assert choice.name in kept and choice.reason and choice.config == {}
    assert choose(case.problem()) == choice
    for name in kept - {choice.name}:
        spec, best = KERNELS[name], KERNELS[choice.name]
        assert spec.backend == "reference" or ISAS.index(spec.isa) < ISAS.index(best.isa)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_backends_can_be_forced(case) -> None:
    assert choose(case.problem(), "reference").name == f"{case.op}__reference"
    for candidate in candidates(case.problem(), "reference"):
        if KERNELS[candidate.name].backend != "reference":
            assert candidate.reason == "backend 'reference' was asked for"


@pytest.mark.parametrize("call", [candidates, choose])
def test_unknown_backend(call) -> None:
    with pytest.raises(ValueError, match="expected backend in auto, reference, cpu, triton, cuda, got 'opencl'"):
        call(ConvCase().problem(), "opencl")


def test_a_backend_without_a_kernel_raises_with_every_reason() -> None:
    with pytest.raises(
        ValueError, match=r"^low_rank_linear: no kernel takes this problem .*__reference: backend 'cpu'"
    ):
        choose(LowRankLinearCase(dtype=torch.float64).problem(), "cpu")
    with pytest.raises(ValueError, match=r"^bsr_conv2d: no kernel .*bsr_conv2d_f32__scalar: .*not torch\.float64"):
        choose(ConvCase(dtype=torch.float64).problem(), "cpu")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"dtype": torch.bfloat16}, "not torch.bfloat16"),
    ],
)
def test_auto_falls_back_to_the_reference_and_says_so(change, why) -> None:
    choice = choose(replace(ConvCase(), **change).problem())
    assert choice.name == "bsr_conv2d__reference" and why in choice.reason and "bsr_conv2d_f32__scalar" in choice.reason


def test_the_reference_is_no_contender_on_a_gpu(monkeypatch) -> None:
    """It multiplies the zeros: where a block-sparse kernel runs, neither ``auto`` nor `tune` considers it."""
    monkeypatch.setattr("slimkernels.kernels.triton.runtime.available", lambda: None)
    for case in (ConvCase(dtype=torch.bfloat16), LinearCase(dtype=torch.bfloat16)):
        names = {spec.name for spec, _ in configurations(case.problem("cuda"))}
        assert names and all("__triton" in name for name in names), names
    low_rank = {spec.name for spec, _ in configurations(LowRankConvCase(dtype=torch.bfloat16).problem("cuda"))}
    assert "low_rank_conv2d__reference" in low_rank, "the factors one by one multiply nothing in vain"


@pytest.mark.skipif(not NATIVE, reason="native library not built")
def test_auto_takes_the_highest_instruction_set(monkeypatch) -> None:
    assert choose(ConvCase().problem()).name == f"bsr_conv2d_f32__{NATIVE[-1]}"
    for cap in NATIVE:
        monkeypatch.setenv("SLIMKERNELS_ISA", cap)
        choice = choose(ConvCase().problem())
        assert choice.name == f"bsr_conv2d_f32__{cap}", "the cap applies at once, no cache in the way"
        capped = [c for c in candidates(ConvCase().problem()) if "SLIMKERNELS_ISA caps" in (c.reason or "")]
        assert {KERNELS[c.name].isa for c in capped} == set(ISAS[ISAS.index(cap) + 1 :])
    monkeypatch.setenv("SLIMKERNELS_BACKEND", "reference")
    assert choose(ConvCase().problem()).name == "bsr_conv2d__reference"
    assert choose(ConvCase().problem(), "cpu").name == f"bsr_conv2d_f32__{NATIVE[-1]}", "an argument beats the variable"


RUN = """
import torch
from slimkernels import kernels, ops
from slimkernels.cases import ConvCase
from slimkernels.kernels import KERNELS
case = ConvCase()
x, w, b = case.inputs()
ran = []
for name, spec in list(KERNELS.items()):
    def launch(*args, spec=spec):
        ran.append(spec.name)
        return spec.launch(*args)
    KERNELS[name] = type(spec)(**{**spec.__dict__, "launch": launch})
ops.bsr_conv2d(x, w.values, w.crow_indices, w.col_indices, b, weight_shape=w.weight_shape, block_shape=(16, 1))
print(*ran)
"""


def run_op(**variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLIMKERNELS_")}
    return subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, env={**environment, **variables}, timeout=120
    )


@pytest.mark.parametrize(
    ("variables", "kernel"),
    [
        ({"SLIMKERNELS_ISA": "scalar"}, "bsr_conv2d_f32__scalar" if NATIVE else "bsr_conv2d__reference"),
        ({"SLIMKERNELS_BACKEND": "reference"}, "bsr_conv2d__reference"),
    ],
)
def test_the_environment_decides_what_runs_in_a_fresh_process(variables, kernel) -> None:
    result = run_op(**variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [kernel]


def test_a_wrong_environment_stops_the_op_with_the_valid_values() -> None:
    result = run_op(SLIMKERNELS_BACKEND="opencl")
    assert result.returncode != 0
    assert "SLIMKERNELS_BACKEND: expected one of auto, reference, cpu, triton, cuda, got 'opencl'" in result.stderr


def call(kernel: str, case: ConvCase) -> torch.Tensor:
    x, w, b = case.inputs()
    tensors = (x, w.values, w.crow_indices, w.col_indices, b)
    return ops.bsr_conv2d(*tensors, weight_shape=w.weight_shape, block_shape=w.block_shape, kernel=kernel)


def test_an_explicit_kernel_that_cannot_run_raises_with_its_reason() -> None:
    for name, spec in KERNELS.items():
        if spec.op != "bsr_conv2d":
            continue
        case = ConvCase()
        reason = spec.supports(case.problem()) or spec.available()
        if reason is None:
            assert torch.isfinite(call(name, case)).all()
            continue
        with pytest.raises(ValueError, match=f"^bsr_conv2d: kernel '{name}' cannot run here: "):
            call(name, case)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (ConvCase(dtype=torch.float64), "not torch.float64"),
    ],
)
def test_an_explicit_kernel_never_falls_back(case, why) -> None:
    with pytest.raises(ValueError, match=f"^bsr_conv2d: kernel 'bsr_conv2d_f32__scalar' cannot run here: .*{why}"):
        call("bsr_conv2d_f32__scalar", case)


def test_an_explicit_kernel_beats_the_cap(monkeypatch) -> None:
    if "avx2" not in NATIVE:
        pytest.skip("this CPU or build has no AVX2 kernel")
    monkeypatch.setenv("SLIMKERNELS_ISA", "scalar")
    assert torch.equal(call("bsr_conv2d_f32__avx2", ConvCase()), call("bsr_conv2d_f32__avx2", ConvCase()))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_predictions_are_positive_and_grow_with_the_work(case) -> None:
    more = {"n": 2**14, "h": 64, "w": 64} if hasattr(case, "n") else {"m": 2**24}
    for device in ("cpu", "cuda"):
        small = case.problem(device)
        large = replace(small, **more)
        assert 0 < predicted_dense_seconds(small) < predicted_dense_seconds(large)
        for spec in KERNELS.values():
            if spec.op == case.op:
                assert 0 < predicted_seconds(spec, small) < predicted_seconds(spec, large), spec.name


def test_macs_count_what_lies_inside_the_image() -> None:
    """The multiply-adds of a problem are those of the index-by-index convolution."""
    for case in (ConvCase(h=4, w=5), ConvCase(stride=(2, 1), padding=(2, 0), dilation=(1, 2), h=7, w=9)):
        problem = case.problem()
        taps = 0
        for i in range(problem.p):
            for j in range(problem.q):
                for r in range(3):
                    for s in range(3):
                        row = i * case.stride[0] - case.padding[0] + r * case.dilation[0]
                        column = j * case.stride[1] - case.padding[1] + s * case.dilation[1]
                        taps += 0 <= row < case.h and 0 <= column < case.w
        assert problem.macs_dense == case.n * case.c_in * case.c_out * taps
        assert problem.macs == round(problem.macs_dense * problem.stored_share)
