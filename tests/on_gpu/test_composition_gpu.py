"""What the ops and modules go through on a GPU: compile, export, autocast, graphs, layouts, DDP, streams, devices.

DDP is also tested between two CPU processes.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from precision import fp32_precision
from torch import Tensor, nn

import slimkernels as sk
from slimkernels.cases import ConvCase, LinearCase, LowRankConvCase, LowRankLinearCase, to_device
from slimkernels.models import vgg19_cifar

gpu = pytest.mark.gpu
BF16 = torch.bfloat16
# RMS of a difference over RMS of the result: sums of some hundred products rounded to bfloat16, several layers deep.
CLOSE = 3e-2


def off(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.fixture(autouse=True)
def full_float32_precision() -> Iterator[None]:
    """Convolutions and products of float32 as such: by default torch's dense convolutions multiply in TF32."""
    with fp32_precision("ieee"):
        yield


def trainable(device: str = "cuda", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """``(block-sparse network in training mode, dense twin with the same zeros)``."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 32),
    ).to(device, dtype)  # fmt: skip
    sk.finalize_(sk.prune_(dense, 0.75, (32, 16), layers=["0", "2", "5"]))
    policy = sk.Policy(measure=False, min_speedup=0.0, block_shapes=((32, 16),))
    sparse = sk.convert(copy.deepcopy(dense), policy=policy, training=True)
    assert len(sparse.slimkernels_plan.swapped) == 3
    return sparse.train(), dense.train()


def images(n: int = 4, device: str = "cuda", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 16, 8, 8, generator=torch.Generator().manual_seed(n)).to(device, dtype)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_(True)
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_compile_fullgraph_forward_and_backward(dtype: torch.dtype) -> None:
    sparse, _ = trainable(dtype=dtype)
    x = images(dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True)
    limit = 1e-4 if dtype == torch.float32 else CLOSE
    assert off(compiled(x).detach(), sparse(x).detach()) < limit
    for got, expected in zip(gradients(compiled, x), gradients(sparse, x), strict=True):
        assert got.shape == expected.shape and off(got, expected) < limit


@gpu
def test_compile_with_dynamic_batches() -> None:
    sparse, _ = trainable()
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True)
    for n in (4, 7, 1):
        assert off(compiled(images(n)).detach(), sparse(images(n)).detach()) < 1e-4


def assert_gradients_of_the_stored_blocks(device: str) -> None:
    """Of input, bias and values, in a network and in its dense twin with the same zeros."""
    sparse, dense = trainable(device)
    x = images(device=device).requires_grad_(True)
    found = []
    for model, weight in ((sparse, "values"), (dense, "weight")):
        y = model(x)
        wanted = [x, model[0].bias, getattr(model[0], weight)]
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    stored = sk.BSRWeight.from_dense(found[1][3], (32, 16), sparse[0].weight_bsr().mask()).values
    found[1][3] = stored
    assert found[0][3].shape == sparse[0].values.shape and stored.numel() < dense[0].weight.numel()
    for name, ours, theirs in zip(("output", "input", "bias", "values"), *found, strict=True):
        assert off(ours, theirs) < 1e-4, name


@gpu
def test_training_matches_the_masked_dense_network() -> None:
    assert_gradients_of_the_stored_blocks("cuda")


@gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype_and_leaves_float32_gradients(dtype: torch.dtype) -> None:
    sparse, dense = trainable()
    with torch.autocast("cuda", dtype):
        y, expected = sparse(images()), dense(images())
    assert y.dtype == expected.dtype == dtype and off(y.detach(), expected.detach()) < CLOSE
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sparse.parameters())


@gpu
def test_export_and_reload(tmp_path: Path) -> None:
    sparse, _ = trainable()
    model, x = sparse.eval().requires_grad_(False), images()
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert off(again(x), model(x)) < 1e-5


OPCHECK = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@gpu
@pytest.mark.parametrize(
    "case",
    [ConvCase(block_shape=(16, 16)), LinearCase(block_shape=(16, 16)), LowRankLinearCase(rank=16), LowRankConvCase()],
    ids=lambda c: c.op,
)
def test_opcheck(case: ConvCase) -> None:
    tensors = to_device(case.launch_args(*case.inputs()), "cuda")
    op = getattr(torch.ops.slimkernels, case.op).default
    differentiable = tuple(
        t.requires_grad_(True) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
    )
    torch.library.opcheck(op, (*differentiable, "auto"), test_utils=OPCHECK)


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    """VGG-19/CIFAR-10 in bf16, every convolution but the first at 87.5% zero (64, 16) blocks."""
    torch.manual_seed(0)
    model = vgg19_cifar().cuda().eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    sk.finalize_(sk.prune_(model, 0.875, (64, 16), layers=names))
    model = model.to(BF16)
    x = torch.randn(2, 3, 32, 32, device="cuda", dtype=BF16)
    policy = sk.Policy(measure=False, min_speedup=0.0, dense_layers=False, block_shapes=((64, 16),), check_model=False)
    fast = sk.convert(model, example_inputs=(x,), policy=policy)
    # The first convolution stays dense and takes its ReLU into its kernel.
    assert len(fast.slimkernels_plan.swapped) == len(names) + 1
    return fast


def vgg_images(n: int) -> Tensor:
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)).to("cuda", BF16)
    return x.contiguous(memory_format=torch.channels_last)


@gpu
def test_a_converted_vgg_is_captured_and_replayed(vgg: nn.Module) -> None:
    captured = sk.graphed(vgg, [(vgg_images(1),), (vgg_images(8),)], one_launch=False)
    for n in (8, 1):
        with torch.no_grad():
            expected = vgg(vgg_images(n))
        assert torch.equal(captured(vgg_images(n)), expected)


def kernel_names(call) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return [e.name for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@gpu
def test_channels_last_goes_through_without_copies(vgg: nn.Module) -> None:
    """Between the kernels of a converted network nothing is copied, transposed or converted."""
    x = vgg_images(8)
    with torch.no_grad():
        names = kernel_names(lambda: vgg(x))
        swapped = len(vgg.slimkernels_plan.swapped)
        assert len(names) >= swapped
        moved = [n for n in names if any(w in n.lower() for w in ("copy", "transpose", "nchwtonhwc", "nhwctonchw"))]
        assert moved == [], names
        assert kernel_names(lambda: x.contiguous()) != [], "a copy shows in the profile"


@gpu
def test_a_converted_network_needs_no_more_kernels_than_layers_and_pools(vgg: nn.Module) -> None:
    x = vgg_images(8)
    with torch.no_grad():
        # The tests fill what torch.empty hands out with NaN; a network alone does not.
        names = [name for name in kernel_names(lambda: vgg(x)) if "FillFunctor" not in name]
    # 16 convolutions, some split over their depth (two kernels), the first one's bias and ReLU, pools, the classifier.
    assert len(names) <= 2 * 16 + 12, names


@gpu
def test_two_streams_at_once(vgg: nn.Module) -> None:
    inputs = [vgg_images(4), vgg_images(5)]
    with torch.no_grad():
        expected = [vgg(x) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        outputs: list[list[Tensor]] = [[], []]
        for _ in range(20):
            for i, (stream, x) in enumerate(zip(streams, inputs, strict=True)):
                with torch.cuda.stream(stream):
                    outputs[i].append(vgg(x))
        torch.cuda.synchronize()
    assert all(torch.equal(y, ref) for ys, ref in zip(outputs, expected, strict=True) for y in ys)


@gpu
def test_a_second_device_is_not_mixed_up_with_the_current_one(vgg: nn.Module) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.no_grad():
        expected = vgg(vgg_images(4))
        other = copy.deepcopy(vgg).to("cuda:1")
        assert torch.cuda.current_device() == 0
        y = other(vgg_images(4).to("cuda:1"))
        captured = sk.graphed(other, vgg_images(4).to("cuda:1"), one_launch=False)
        replayed = captured(vgg_images(4).to("cuda:1"))
    assert y.device == replayed.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert off(y, expected) < CLOSE and torch.equal(y, replayed)


@gpu
def test_deepcopy_and_state_dict_on_the_gpu() -> None:
    sparse, _ = trainable()
    twin = copy.deepcopy(sparse)
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.load_state_dict(sparse.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(images()), sparse(images()))


DDP = """
import json, os, sys, torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
import slimkernels as sk
rank, world, device, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
device = f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else "cpu"
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
sk.finalize_(sk.prune_(net, 0.75, (16, 16), layers=["0", "2"]))
policy = sk.Policy(measure=False, min_speedup=0.0, block_shapes=((16, 16),))
net = sk.convert(net.to(device), policy=policy, training=True).train()
assert len(net.slimkernels_plan.swapped) == 2
x = torch.randn(8, 16, 6, 6, generator=torch.Generator().manual_seed(1)).to(device)
target = torch.randn(8, 32, 6, 6, generator=torch.Generator().manual_seed(2)).to(device)
model = net
if world:
    torch.distributed.init_process_group("nccl" if x.is_cuda else "gloo", init_method=f"file://{store}", rank=rank,
                                         world_size=world)
    model = DistributedDataParallel(net, device_ids=[x.device.index] if x.is_cuda else None)
    x, target = x.chunk(world)[rank], target.chunk(world)[rank]
optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(3):
    optimiser.zero_grad()
    mse_loss(model(x), target).backward()
    optimiser.step()
if rank == 0:
    torch.save({"values": net[0].values.detach().cpu(), "last": net[2].values.detach().cpu(),
                "grad": net[0].values.grad.cpu()}, out)
if world:
    torch.distributed.destroy_process_group()
    # All is done and saved: torch 2.14 alone, with a gloo group and DDP, aborts in 1 of 8 interpreters on the way out.
    os._exit(0)
"""


def run_ddp(tmp_path: Path, world: int, device: str) -> dict[str, Tensor]:
    """Weights and gradient after three steps in ``world`` processes; 0 trains without DDP."""
    out = tmp_path / f"{device}-{world}.pt"
    arguments = [str(world), device, str(tmp_path / f"store-{world}"), str(out)]
    running = [
        subprocess.Popen([sys.executable, "-c", DDP, str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(max(world, 1))
    ]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert all(process.returncode == 0 for process in running), json.dumps(errors)
    return torch.load(out)


def assert_same_training(one: dict[str, Tensor], many: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        assert tensor.abs().max() > 0
        torch.testing.assert_close(many[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Gradients of ``values`` are averaged over the ranks, so two half batches make the step of the whole batch."""
    assert_same_training(run_ddp(tmp_path, 0, "cpu"), run_ddp(tmp_path, 2, "cpu"))


@gpu
def test_ddp_on_gpus(tmp_path: Path) -> None:
    """Two ranks where there are two GPUs, else one."""
    world = 2 if torch.cuda.device_count() >= 2 else 1
    assert_same_training(run_ddp(tmp_path, 0, "cuda"), run_ddp(tmp_path, world, "cuda"))


def test_training_matches_the_masked_dense_network_on_the_cpu() -> None:
    assert_gradients_of_the_stored_blocks("cpu")
