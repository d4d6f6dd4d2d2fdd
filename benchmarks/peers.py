"""Baselines of the whole-network suite beyond `slimkernels.timing.best_dense` and `slimkernels.cli.peers`.

CPU: DeepSparse at the same sparsity (``--deepsparse PYTHON``).
GPU: cuDNN channels_last eager, and replayed from CUDA graphs, because at small batches launches decide: the same, with
ReLU fused by cuDNN, in residual networks the addition in front of it too, and torch.compile.
"""

from __future__ import annotations

import copy
import operator
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

from slimkernels import timing
from slimkernels.cli.peers import first_line
from slimkernels.tuning import captured


class DeepSparse:
    """A network in DeepSparse, which skips zero weights too: a process in a Python environment of its own.

    Args:
        python: the interpreter of an environment with ``deepsparse==1.8.0``.
        model: eval mode; batch norm is folded before the export, zeros stay zeros.

    Raises:
        RuntimeError: the engine does not start, or computes something else.
    """

    def __init__(self, python: str, model: nn.Module, x: Tensor) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = str(Path(self._folder.name) / "model.onnx")
        folded = timing.fold_batch_norm(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(folded, (x.contiguous(),), path, dynamo=False, input_names=["x"], opset_version=13)
        np.save(path + ".x.npy", x.contiguous().numpy())
        server = Path(__file__).with_name("deepsparse_server.py")
        self._process = subprocess.Popen(
            [python, str(server), path, str(x.shape[0]), str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        while (line := self._answer()) != "ready":  # the engine greets on standard output
            if not line and self._process.poll() is not None:
                raise RuntimeError(f"DeepSparse did not start, exit status {self._process.returncode}")
        self._ask("check")
        with torch.no_grad():
            expected = folded(x)
        off = (torch.from_numpy(np.load(path + ".y.npy")) - expected).abs().max() / expected.abs().max()
        if not off < 1e-3:
            raise RuntimeError(f"DeepSparse's output is {off:.1e} off")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def seconds(self, calls: int) -> list[float]:
        """Latencies of so many calls in a row, by the engine's own process."""
        return [float(part) for part in self._ask(str(calls)).split()]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def deepsparse_seconds(python: str | None, model: nn.Module, x: Tensor, seconds: float) -> float | None:
    """Median latency of a pruned network in DeepSparse; None where ``python``, its interpreter, is."""
    if python is None:
        return None
    peer = DeepSparse(python, model, x)
    try:
        once = min(peer.seconds(3))
        return timing.percentiles(peer.seconds(max(5, int(seconds / 2 / once)))).p50
    finally:
        peer.close()


class _Fused(nn.Module):
    """A convolution with the ReLU behind it as one cuDNN call, or with an addition and the ReLU behind that."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        conv = self.conv
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        if added is None:
            return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, conv.weight, added, 1.0, conv.bias, *geometry)


_ADDITIONS = (operator.add, operator.iadd, torch.add)


def fused_by_cudnn(model: nn.Module, additions: bool = False) -> nn.Module:
    """A copy of a model in which every Conv2d with a ReLU behind it is one cuDNN call.

    With ``additions`` every Conv2d with an addition and then a ReLU behind it too, as the last one of a residual block.
    Raises torch.fx's errors where a model cannot be traced.
    """
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    graph, modules = traced.graph, dict(traced.named_modules())

    def conv_of(node: Any) -> nn.Conv2d | None:
        module = modules.get(node.target) if isinstance(node, torch.fx.Node) and node.op == "call_module" else None
        alone = isinstance(module, nn.Conv2d) and module.bias is not None and len(node.users) == 1
        return module if alone else None

    for i, relu in enumerate(list(graph.nodes)):
        if relu.op != "call_module" or type(modules[relu.target]) is not nn.ReLU:
            continue
        given, behind = relu.args[0], [relu]
        if additions and given.target in _ADDITIONS and len(given.users) == 1:
            behind.append(given)
            given = next((node for node in given.args if conv_of(node) is not None), None)
        conv = conv_of(given)
        if conv is None:
            continue
        added = [other for other in behind[-1].args if other is not given]  # none behind a convolution alone
        traced.add_submodule(f"fused_{i}", _Fused(conv))
        with graph.inserting_before(relu):
            relu.replace_all_uses_with(graph.call_module(f"fused_{i}", (given.args[0], *added)))
        for node in (*behind, given):
            graph.erase_node(node)
    graph.lint()
    traced.recompile()
    return traced


class Replay:
    """A module's inference on fixed memory, captured in a CUDA graph; a call replays it and returns its own output.

    Nothing is copied in or out: at small batches that would be most of the time, on both sides of a comparison.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self._module, self._x = module, x
        with torch.inference_mode(False), torch.no_grad():
            self._replay = captured(self._call, "cuda")

    def _call(self) -> None:
        self._y = self._module(self._x)

    def __call__(self) -> Tensor:
        self._replay()
        return self._y


def in_batches(model: Callable[[Tensor], Tensor], batch: int) -> Callable[[Tensor], Tensor]:
    """A model that is called with so many images at a time: those for which kernels were chosen and compiled."""
    return lambda x: torch.cat([model(part) for part in x.split(batch)])


def graph_ms(served: Any) -> float:
    """Milliseconds of what `slimkernels.graphed` recorded for one shape: the graph alone, by the device's clock."""
    (recording,) = served.recordings.values()
    return 1e3 * float(getattr(recording, "replay", recording).seconds())


def decisions(fast: Any, served: Any) -> dict[str, Any]:
    """For a row: what `convert` decided for each layer and the times that it found, and what was recorded.

    ``dense_ms`` and ``other_ms`` are those of the layer as it was and of the best other way to run it.
    """
    layers = [
        {"layer": p.name, "runs": p.format, "kernel": p.kernel, "block_shape": p.block_shape, "epilogue": p.epilogue,
         "block_sparsity": p.block_sparsity, "dense_ms": p.dense_ms, "other_ms": p.sparse_ms}
        for p in fast.slimkernels_plan.layers
        if p.weight_shape is not None
    ]  # fmt: skip
    return {"decisions": layers, "notes": list(fast.slimkernels_plan.notes), "recording": repr(served)[:2000]}


def gpu_dense(
    model: nn.Module, x: Tensor, note: Callable[[str], None], *, compile: str | None = "default"
) -> dict[str, Callable[[], Any]]:
    """Dense baselines on CUDA, batch norm folded, channels_last: eager, and replayed from CUDA graphs.

    Args:
        compile: mode of torch.compile, None to leave it out (``default`` takes some 20 s, autotuning a VGG minutes).
    """
    folded = timing.fold_batch_norm(model).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    found: dict[str, Callable[[], Any]] = {}

    with torch.no_grad():
        expected = folded(x).float()

    def add(name: str, make: Callable[[], Callable[[], Any]]) -> None:
        try:
            call = make()
            with torch.no_grad():
                off = float((call().float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
            if not off < 0.1:
                raise ValueError(f"its output is {off:.1%} off")
            found[name] = call
        except Exception as error:  # compilers and cuDNN raise whatever they like
            note(f"{name} left out: {first_line(error)}")

    def compiled() -> Callable[[], Any]:
        import torch._inductor.config as inductor

        with inductor.patch(freezing=True), torch.no_grad():
            run = torch.compile(folded, dynamic=False, mode=compile)
            run(x)
        return Replay(_Compiled(run), x)

    add("eager channels_last", lambda: lambda: folded(x))
    add("CUDA graph, channels_last", lambda: Replay(folded, x))
    add("CUDA graph, ReLU fused by cuDNN", lambda: Replay(fused_by_cudnn(folded), x))
    if isinstance(folded, torch.fx.GraphModule) and any(node.target in _ADDITIONS for node in folded.graph.nodes):
        add("CUDA graph, addition and ReLU fused by cuDNN", lambda: Replay(fused_by_cudnn(folded, additions=True), x))
    if compile is not None:
        add(f"CUDA graph, torch.compile {compile}", compiled)
    return found


class _Compiled(nn.Module):
    """A compiled function as a module without parameters of its own."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = [run]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run[0](x)


# A kernel's name says what it is in its first characters; those made from templates go on for a thousand.
_KERNEL_NAME = 160


def kernel_times(call: Callable[[], Any], calls: int = 5) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a call spends on the device, kernel by kernel (copies included), by torch's profiler.

    Returns: ``(kernels, launches)``. kernels: ``name``, ``us`` and ``calls`` of one call, those of one name together,
    the longest first. launches: ``name`` and ``us`` of every launch of one call in the order in which they ran; empty
    where the calls launched different numbers of kernels. Both are means over some calls.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    ran = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ran.sort(key=lambda event: event.time_range.start)
    found: dict[str, list[float]] = {}
    for event in ran:
        found.setdefault(event.name[:_KERNEL_NAME], []).append(event.time_range.elapsed_us())
    kernels = [{"name": name, "us": sum(us) / calls, "calls": len(us) / calls} for name, us in found.items()]
    each, rest = divmod(len(ran), calls)
    launches = [
        {"name": ran[i].name[:_KERNEL_NAME], "us": sum(e.time_range.elapsed_us() for e in ran[i::each]) / calls}
        for i in range(0 if rest else each)
    ]
    return sorted(kernels, key=lambda kernel: -kernel["us"]), launches
