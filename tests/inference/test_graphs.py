"""`warm_up` and `graphed`: what can be seen without a GPU, and captured networks on one."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import slimkernels as sk
from slimkernels import tuning
from slimkernels.dispatch.select import choose
from slimkernels.inference import GraphedModel, cuda_graph, problem_of
from slimkernels.inference.inputs import served_sets
from slimkernels.kernels import KERNELS
from slimkernels.nn.stored_blocks import StoredBlocks


def pruned_net(device: str = "cpu", dtype: torch.dtype = torch.float32, block: tuple[int, int] = (16, 1)) -> nn.Module:
    """Two convolutions with ReLU and pool, and a classifier, all of them block-sparse after conversion."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 64),
    ).to(device, dtype)  # fmt: skip
    sk.finalize_(sk.prune_(model, 0.75, block, layers=["0", "3", "6"]))
    policy = sk.Policy(measure=False, min_speedup=0.0, block_shapes=(block,), check_model=False)
    return sk.convert(model.eval(), example_inputs=(images(1, device, dtype),), policy=policy)


def images(n: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 16, 8, 8, generator=generator).to(device, dtype)


def test_warm_up_names_the_kernel_of_every_layer_and_size() -> None:
    model = pruned_net()
    assert len(model.slimkernels_plan.swapped) == 3
    found = sk.warm_up(model, [(images(1),), (images(4),)])
    assert {(k.layer, getattr(k.problem, "n", None) or k.problem.m) for k in found.kernels} == {
        (name, n) for name in ("0", "3", "6") for n in (1, 4)
    }
    for k in found.kernels:
        asked = model.get_submodule(k.layer).kernel
        assert k.kernel == (choose(k.problem).name if asked == "auto" else asked) and k.kernel in KERNELS
        assert k.reason
    assert len(found.first_s) == len(found.steady_s) == 2 and min(found.first_s + found.steady_s) > 0
    assert not any(m._forward_pre_hooks for m in model.modules()), "the hooks are gone"


def test_warm_up_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = sk.warm_up(model, images(2))
    assert found.kernels == () and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled() and not model.training


def test_a_pack_that_lies_partly_elsewhere_is_no_second_device() -> None:
    """The tensor-core kernel's keeps on the CPU what a launch reads, for a model on a GPU too."""
    model = pruned_net()
    packs = [(m, name) for m in model.modules() if isinstance(m, StoredBlocks) for name in m._held()]
    assert packs
    for module, name in packs:
        module._buffers[name] = module._buffers[name].to("meta")
    assert served_sets("graphed", model, images(1))[1] == torch.device("cpu")


@pytest.mark.parametrize("helper", [sk.warm_up, sk.graphed], ids=lambda f: f.__name__)
def test_what_the_helpers_refuse(helper) -> None:
    name, model = helper.__name__, nn.Conv2d(16, 8, 3).eval()
    with pytest.raises(ValueError, match=f"^{name}: expected a model in eval mode"):
        helper(nn.Conv2d(16, 8, 3), images(1))
    with pytest.raises(ValueError, match=f"^{name}: expected example inputs, got none"):
        helper(model, None)
    with pytest.raises(TypeError, match="expected example_inputs to be a tensor"):
        helper(model, 3)
    with pytest.raises(ValueError, match=rf"^{name}: expected model and inputs on one device, got \['cpu', 'meta'\]"):
        helper(model, images(1).to("meta"))


def test_warm_up_needs_a_second_call() -> None:
    with pytest.raises(ValueError, match=r"^warm_up: expected calls >= 2, got 1"):
        sk.warm_up(nn.Conv2d(16, 8, 3).eval(), images(1), calls=1)


def test_problems_of_layers_and_of_others() -> None:
    with pytest.raises(TypeError, match="expected a block-sparse, low-rank or fused layer, got Conv2d"):
        problem_of(nn.Conv2d(1, 1, 1), images(1))
    layer = pruned_net()[0]
    assert problem_of(layer, images(3)[0]) == problem_of(layer, images(1)), "an image without a batch is a batch of one"


@pytest.fixture(scope="module")
def gpu_net() -> nn.Module:
    return pruned_net("cuda", torch.bfloat16, (32, 16))


def cuda_images(n: int) -> torch.Tensor:
    return images(n, "cuda", torch.bfloat16)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Records a CPU model, with a call of the model in the place of a CUDA graph's replay."""

    def captured(call: Any, **_: Any) -> tuple[Any, Any]:
        outputs = call()
        return SimpleNamespace(replay=lambda: outputs.copy_(call()), pool=lambda: None), outputs

    monkeypatch.setattr(cuda_graph, "capture", captured)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    stream = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    return lambda model, x: cuda_graph.CudaGraphs(model, torch.device("cuda", 0), 1, True).record((x,), {})


def test_a_graph_keeps_the_memory_of_its_model(graphs) -> None:
    """What it reads at fixed addresses: weights that are moved, packs that are dropped."""
    model = pruned_net()
    replay = graphs(model, images(1))
    tensors = (*model.parameters(), *model.buffers())
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in tensors if tensor.is_floating_point()]
    packs = sum(name.rpartition(".")[2].startswith("packed_") for name, _ in model.named_buffers())
    assert packs == 9
    del tensors
    model.double()
    gc.collect()
    assert all(storage() is not None for storage in memory)
    del replay, model  # whose chains know the packs that it had until they run again
    gc.collect()
    assert all(storage() is None for storage in memory)


def test_a_graph_runs_in_any_mode(graphs) -> None:
    """Outputs are inference tensors in inference mode, as a model's are, and never have a gradient."""
    model = pruned_net()
    replay, x = graphs(model, images(1)), images(1)
    expected = model(x).detach()
    with torch.inference_mode():
        inside = replay(x)
    outside = replay(x.clone().requires_grad_())
    assert inside.is_inference() and not outside.is_inference() and not outside.requires_grad
    for got in (inside, outside):
        torch.testing.assert_close(got, expected)


def test_a_graph_with_a_packed_layer_refuses_once_its_weight_was_written(graphs) -> None:
    model = pruned_net()
    replay = graphs(model, images(1))
    with torch.no_grad():
        model[0].bias.add_(1)  # read where it lies
    torch.testing.assert_close(replay(images(1)), model(images(1)))
    for tensor in (model[3].values, model[6].col_indices):
        replay = graphs(model, images(1))
        with torch.no_grad():
            tensor.mul_(1)
        with pytest.raises(RuntimeError, match="GraphedModel: expected the weights that were recorded, and a layer of"):
            replay(images(1))
        model.eval()  # packed anew


@pytest.mark.gpu
def test_a_captured_network_replays_its_own_outputs(gpu_net) -> None:
    with torch.no_grad():
        expected = {n: gpu_net(cuda_images(n)) for n in (1, 4)}
    captured = sk.graphed(gpu_net, [(cuda_images(1),), (cuda_images(4),), (cuda_images(4),)], one_launch=False)
    assert isinstance(captured, GraphedModel) and len(captured.signatures) == 2
    for n in (4, 1, 4):
        x = cuda_images(n)
        assert torch.equal(captured(x), expected[n])
        assert torch.equal(captured(2 * x), captured(2 * x)) and not torch.equal(captured(2 * x), expected[n])
    with torch.inference_mode():
        assert torch.equal(captured(cuda_images(1)), expected[1])


@pytest.mark.gpu
def test_outputs_are_copies_unless_asked_otherwise(gpu_net) -> None:
    x = cuda_images(1)
    copies = sk.graphed(gpu_net, x, one_launch=False)
    first = copies(x)
    kept = first.clone()
    copies(-x)
    assert torch.equal(first, kept)
    shared = sk.graphed(gpu_net, x, copy_outputs=False, one_launch=False)
    first = shared(x)
    assert shared(-x).data_ptr() == first.data_ptr()


@pytest.mark.gpu
def test_a_captured_network_sees_new_weights_and_refuses_new_shapes(gpu_net) -> None:
    captured = sk.graphed(gpu_net, cuda_images(2), other_shapes="raise", one_launch=False)
    before = captured(cuda_images(2))
    state = {k: v.clone() for k, v in gpu_net.state_dict().items()}
    gpu_net.load_state_dict({k: 2 * v if v.is_floating_point() else v for k, v in state.items()})
    try:
        with torch.no_grad():
            expected = gpu_net(cuda_images(2))
        assert torch.equal(captured(cuda_images(2)), expected) and not torch.equal(expected, before)
    finally:
        gpu_net.load_state_dict(state)
    for wrong in (cuda_images(3), cuda_images(2).float(), cuda_images(2).cpu()):
        with pytest.raises(ValueError, match=r"^GraphedModel: expected inputs \(bfloat16\[2, 16, 8, 8\] on cuda:0\)"):
            captured(wrong)


@pytest.mark.gpu
def test_streams_and_threads_share_a_recording_in_turn(gpu_net) -> None:
    captured = sk.graphed(gpu_net, cuda_images(2), one_launch=False)
    inputs = [cuda_images(2) * (i + 1) for i in range(8)]
    with torch.no_grad():
        expected = [gpu_net(x) for x in inputs]
    outputs: list[torch.Tensor | None] = [None] * len(inputs)
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                outputs[i] = captured(inputs[i])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, ref) for out, ref in zip(outputs, expected, strict=True))


@pytest.mark.gpu
def test_what_cannot_be_captured_is_said() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if float(x.sum()) > 0 else x - 1

    with pytest.raises(ValueError, match=r"^graphed: the model cannot be captured in a CUDA graph: "):
        sk.graphed(Branches().eval(), cuda_images(1))
    torch.randn(3, device="cuda")
    with pytest.raises(RuntimeError):
        tuning.captured(lambda: cuda_images(1).sum().item(), "cuda")
    torch.randn(3, device="cuda")  # random numbers do not wait for the end of the capture that failed
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_after_a_warm_up_nothing_is_compiled(gpu_net) -> None:
    """Triton's compiler is not entered again for sizes that were warmed up."""
    import triton

    sk.warm_up(gpu_net, [(cuda_images(2),), (cuda_images(16),)])
    compiled: list[object] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs.get("fn"))
    try:
        with torch.no_grad():
            gpu_net(cuda_images(2)), gpu_net(cuda_images(16))
        torch.cuda.synchronize()
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert compiled == []
