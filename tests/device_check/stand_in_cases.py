"""The stand-in for a GPU: run by tests/device_check/test_dry_run.py in a process of its own, which keeps it to its end.

``PYTHONPATH=benchmarks python -m pytest tests/device_check/stand_in_cases.py``
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in

if not hasattr(stand_in, "LAUNCHES"):
    import tempfile

    stand_in.LAUNCHES = Path(tempfile.mkdtemp()) / "launches.jsonl"
    stand_in.install(stand_in.LAUNCHES)

import torch

from slimkernels import testing
from slimkernels.kernels.triton import bsr_conv2d
from slimkernels.kernels.triton.bsr_conv2d_index import forward_order


@pytest.fixture(autouse=True)
def launches() -> Iterator[Path]:
    stand_in.LAUNCHES.unlink(missing_ok=True)
    yield stand_in.LAUNCHES


def conv(x: torch.Tensor, weight: object, index: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return bsr_conv2d.launch(
        x, weight.values.to(x.device), *index, None, [forward_order(*index, weight.weight_shape, weight.block_shape)],
        weight.weight_shape, weight.block_shape, (1, 1), (1, 1), (1, 1), "relu",
    )  # fmt: skip


def problem() -> tuple[torch.Tensor, object, tuple[torch.Tensor, torch.Tensor]]:
    weight = testing.random_bsr((64, 32, 3, 3), (64, 16), 0.5, dtype=torch.bfloat16)
    x = testing.random_tensor(2, 32, 6, 6, seed=1, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return x, weight, (weight.crow_indices, weight.col_indices)


def test_tensors_move_and_stay() -> None:
    x = torch.randn(4).cuda()
    assert x.is_cuda and x.device == torch.device("cuda", 0) and (x + 1).is_cuda and x.bfloat16().is_cuda
    assert not x.cpu().is_cuda and type(x.cpu()) is torch.Tensor and torch.equal(x.cpu(), x.to("cpu"))
    assert torch.tensor([1.0], device="cuda").is_cuda and torch.zeros(2, device="cuda").tolist() == [0.0, 0.0]
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()


def test_modules_move_train_and_are_copied() -> None:
    module = torch.nn.Linear(4, 3).cuda()
    assert all(p.is_cuda and isinstance(p, torch.nn.Parameter) for p in module.parameters())
    with torch.autocast("cuda", torch.bfloat16):
        y = module(torch.randn(2, 4, device="cuda"))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.weight.grad.is_cuda and module.weight.grad.dtype == torch.float32
    copied = copy.deepcopy(module).bfloat16()
    assert copied.weight.dtype == torch.bfloat16 and module.weight.dtype == torch.float32 and copied.weight.is_cuda


def test_what_a_gpu_refuses_is_refused() -> None:
    x = torch.randn(4, device="cuda")
    with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
        x + torch.ones(4)
    for read in (lambda: x.sum().item(), x.cpu, torch.cuda.synchronize, lambda: x.nonzero()):
        with (
            pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            read()


def test_a_graph_is_replayed_on_new_inputs() -> None:
    x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        y.add_(1)
        z = torch.zeros(4, device="cuda").add_(y)
    for value in (5.0, 7.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == z.tolist() == [2 * value + 1] * 4


def test_a_launch_is_recorded_and_its_result_is_right(launches: Path) -> None:
    x, weight, index = problem()
    y = conv(x.cuda(), weight, tuple(t.cuda() for t in index))
    expected = testing.reference_bsr_conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), "relu")
    assert y.is_cuda and (y.cpu().double() - expected).abs().max() < 0.05 * expected.abs().max()
    lines = [json.loads(line) for line in launches.read_text().splitlines()]
    assert lines and lines[0]["kernel"] == "bsr_conv2d_fwd_kernel" and lines[0]["grid"][0] > 0
    assert set(lines[0]["alignment"]) >= {"x_ptr", "values_ptr", "y_ptr"} and min(lines[0]["alignment"].values()) >= 16


def test_launches_that_could_not_run_are_refused() -> None:
    from stand_in.launches import check_launch

    given = {"x_ptr": torch.zeros(64, device="cuda"), "n": 17}
    with pytest.raises(RuntimeError, match="cannot be accessed from Triton"):
        check_launch("kernel", (1,), {"x_ptr": torch.zeros(64)}, {}, {})
    for grid in ((0,), (2**31,), (1, 65536)):
        with pytest.raises(RuntimeError, match="cannot be launched"):
            check_launch("kernel", grid, given, {}, {})
    with pytest.raises(RuntimeError, match="divisible by 16, launched with 17"):
        check_launch("kernel", (1,), given, {(1,): [["tt.divisibility", 16]]}, {})
    with pytest.raises(RuntimeError, match="compiled for n = 1, got 17"):
        check_launch("kernel", (1,), given, {}, {(1,): 1})
    shifted = {"x_ptr": torch.zeros(65, device="cuda")[1:]}
    with pytest.raises(RuntimeError, match="compiled for x_ptr divisible by 16"):
        check_launch("kernel", (1,), shifted, {(0,): [["tt.divisibility", 16]]}, {})


def test_what_conversion_launches_is_listed_and_timed_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem that `convert` launches for two images is one of those found with one image, and the reverse."""
    from gpu_check import conversions

    import slimkernels as sk
    from slimkernels.conversion import measure
    from slimkernels.ops import bsr, fused

    launched, graphs = set(), []
    for module in (bsr, fused):
        plain = module.launcher

        def spy(kernel: str, index: int, kind: type, *sizes: object, plain: object = plain) -> object:
            launched.add(kind(*sizes))
            return plain(kernel, index, kind, *sizes)

        monkeypatch.setattr(module, "launcher", spy)
    monkeypatch.setattr(
        measure, "capture", lambda call, calls: graphs.append(calls) or (SimpleNamespace(replay=call), 0)
    )
    torch.manual_seed(0)
    conv = [torch.nn.Conv2d(c, 64, 3, padding=1) for c in (3, 64, 64)]
    layers = [conv[0], torch.nn.ReLU(), conv[1], torch.nn.ReLU(), torch.nn.MaxPool2d(2), conv[2], torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(64 * 4, 64)).eval()
    model = sk.finalize_(sk.prune_(model, 0.5, (64, 16))).to("cuda", torch.bfloat16)
    x = torch.randn(2, 3, 4, 4).to("cuda", torch.bfloat16).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(conversions, "networks", lambda: [(model.float(), x[:1].float(), 2)])
    monkeypatch.setattr(conversions, "checkpoints", list)
    (converted,) = conversions.every()
    listed = set(converted.problems())
    assert {type(p).__name__ for p in listed} == {"ConvProblem", "LinearProblem", "FusedConvProblem"}
    policy = sk.Policy(serve=sk.graphed, check_model=False, repeats=3, budget_s=0.0)
    sk.convert(model.to(torch.bfloat16), (x,), policy=policy)
    assert launched == listed
    assert len(graphs) > 4 and set(graphs) == {measure.GraphRun.HELD}
    graphs.clear()
    sk.convert(model, (x,), policy=sk.Policy(check_model=False, repeats=3, budget_s=0.0))
    assert not graphs


def test_another_card_is_found_by_its_name() -> None:
    from stand_in import cuda

    from slimkernels.dispatch import select, tables

    found = {}
    for card in cuda.CARDS:
        cuda.become(card)
        select.forget()
        found[card] = torch.cuda.get_device_name(), tables.table_for("cuda")[1], tables.gpu_rates().l2_capacity
    cuda.become("h100")
    select.forget()
    assert found == {"h100": ("NVIDIA H100 80GB HBM3", False, 50 * 2**20), "h200": ("NVIDIA H200", True, 60 * 2**20)}


def test_linear_layers_are_launched_for_the_cache(launches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, which no reference could fill."""
    import warm_triton_cache

    from slimkernels.kernels import KERNELS, LinearProblem

    p = LinearProblem(3, 64, 128, (64, 16), 5, torch.bfloat16, "cuda", "relu")
    monkeypatch.setattr(bsr_conv2d, "launch_linear", bsr_conv2d.launch_linear.__wrapped__)
    for kernel in ("bsr_linear__triton", "bsr_linear__triton_weights_on_m"):
        warm_triton_cache.launch(warm_triton_cache.Job(kernel, p, dict(KERNELS[kernel].configs(p)[0])))
    lines = [json.loads(line) for line in launches.read_text().splitlines()]
    assert [line["arguments"]["values_ptr"] for line in lines] == ["bfloat16[5, 64, 16]"] * 2
