"""Baselines of the whole-network suite beyond `slimkernels.timing.best_dense` and `slimkernels.cli.peers`.

CPU: DeepSparse at the same sparsity (``--deepsparse PYTHON``).
GPU: cuDNN channels_last eager, and replayed from CUDA graphs, because at small batches launches decide: the same, with
ReLU fused by cuDNN, and torch.compile.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


class _ReluFused(nn.Module):
    """A convolution with the ReLU behind it as one cuDNN call."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        return torch.cudnn_convolution_relu(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )


def with_fused_relu(model: nn.Module) -> nn.Module:
    """A copy of a model in which every Conv2d with a ReLU as its next sibling is one cuDNN call: right for VGGs."""
    import copy

    copied = copy.deepcopy(model)
    for container in list(copied.modules()):
        children = [(n, m) for n, m in container.named_children() if not isinstance(m, nn.Identity)]
        for (name, module), (after, relu) in itertools.pairwise(children):
            if isinstance(module, nn.Conv2d) and isinstance(relu, nn.ReLU) and module.bias is not None:
                setattr(container, name, _ReluFused(module))
                setattr(container, after, nn.Identity())
    return copied


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
    add("CUDA graph, ReLU fused by cuDNN", lambda: Replay(with_fused_relu(folded), x))
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
