"""`graphed`: a model's inference recorded at fixed shapes: CUDA graphs on a GPU, lists of kernel calls on the CPU."""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from slimkernels.inference.batches import cut, filled_up, fitting, like_the_model
from slimkernels.inference.cpu_recording import Copies
from slimkernels.inference.cpu_replay import Replay
from slimkernels.inference.cuda_graph import CudaGraphs, GraphRecording
from slimkernels.inference.inputs import describe, served_sets, signature, tensors
from slimkernels.inference.one_launch import OneLaunch, OneLaunchRecording, kinds_of
from slimkernels.inference.one_launch_runs import AUTO, MAX_IMAGES
from slimkernels.kernels import cuda
from slimkernels.kernels.cuda_chain import has_clusters
from slimkernels.ops.library import ops_are_captured
from slimkernels.tensors import Snapshots

OTHER_SHAPES = ("pad", "run", "raise")


class GraphedModel(nn.Module):
    """A model's inference as recordings, one for each input signature (`graphed` makes it). Gradients are off.

    It has the parameters and the state dict of ``model``, which it holds. What would make the recordings untrue is
    refused: another device or dtype, training mode, loading a state dict; record the changed model again instead.

    Attributes:
        model: what was recorded; it runs inputs that no recording takes.
        device: of the model.
        recordings: what runs, by signature; each a `slimkernels.inference.Replay` on the CPU.
        other_shapes: what happens to inputs of other shapes, as `graphed` says.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        recordings: Mapping[Any, Callable[..., Any]],
        other_shapes: str = "pad",
        copied: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        if other_shapes not in OTHER_SHAPES:
            raise ValueError(f"graphed: expected other_shapes in {', '.join(OTHER_SHAPES)}, got {other_shapes!r}")
        self.model, self.device, self.recordings, self.other_shapes = model, device, dict(recordings), other_shapes
        # A short cut for calls with tensors alone, by their shapes, of recordings that have been found once: making a
        # signature takes 20 us, and a recorded VGG-19 at batch 1 runs in 340 us.
        self._by_shape: dict[Any, Callable[..., Any]] = {}
        # The way that inputs of a signature took which has no recording of its own.
        self._others: dict[Any, Callable[..., Any]] = {}
        self._said: set[str] = set()
        self._lock = threading.Lock()
        # A CPU recording holds the weights as they were, and so the model may answer for it only while they are. So do
        # launches of many layers, for those weights: ``copied``.
        tensors_then = [*model.parameters(), *model.buffers()] if device.type == "cpu" else copied
        self._weights = Snapshots(tensors_then)
        self._own = list(_state(model)) if device.type == "cpu" else None
        nn.Module.train(self, False)

    @property
    def signatures(self) -> list[str]:
        """One line per recording: the shapes and dtypes of its inputs."""
        return [describe(key) for key in self.recordings]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for some inputs, copied in and (unless asked otherwise) out.

        Where the call is exported, traced or transformed the model itself runs: of a recording nothing would be seen.

        Raises:
            ValueError: inputs that no recording takes, where ``other_shapes`` is ``raise`` or they are on another
                device; the message lists those that were recorded.
            RuntimeError: inputs that the model itself would have to run, after its weights or its mode changed.
        """
        if ops_are_captured():
            with torch.no_grad():
                return self.model(*args, **kwargs)
        shape: Any = None
        if not kwargs:
            # One tensor, what most models take, is looked up without a loop, which would take a microsecond of fifteen.
            if len(args) == 1 and isinstance(args[0], Tensor):
                x = args[0]
                shape = (x.shape, x.dtype, x.device)
            elif all(isinstance(x, Tensor) for x in args):
                shape = tuple([(x.shape, x.dtype, x.device) for x in args])
            known = None if shape is None else self._by_shape.get(shape)
            if known is not None:
                return known(*args)
        key = signature(args, kwargs)
        recording = self.recordings.get(key)
        if recording is not None:
            if shape is not None:
                self._by_shape[shape] = recording
            return recording(*args, **kwargs)
        if self.other_shapes == "raise" or any(t.device != self.device for t in tensors((args, kwargs))):
            raise ValueError(
                f"GraphedModel: expected inputs {' or '.join(self.signatures)} on {self.device}, got {describe(key)}"
            )
        way = self._others.get(key)
        if way is not None:
            return way(*args, **kwargs)
        return self._first_of_its_shape(key, args, kwargs)

    def _first_of_its_shape(self, key: Any, args: Any, kwargs: Any) -> Any:
        """Runs the model, and finds out whether a recording of a larger batch computes the same; later calls take it.

        Not every model does: one that mixes the images of a batch sees the padding.
        """
        expected = self._run(*args, **kwargs)
        larger = fitting(self.recordings, key) if self.other_shapes == "pad" else None
        if larger is None:
            hint = "; record this shape, or a larger batch of it, to serve it faster"
            hint = "" if self.other_shapes == "run" else hint
            self._say("run", f"{describe(key)} was not recorded, so the model itself runs it{hint}")
            self._others[key] = self._run
            return expected
        recorded, batch, given = larger
        recording = self.recordings[recorded]

        def run_padded(args: Any, kwargs: Any, noise: bool = False) -> Any:
            args, kwargs = filled_up(args, kwargs, recorded, noise=noise)
            return cut(recording(*args, **kwargs), given, batch)

        def padded(*args: Any, **kwargs: Any) -> Any:
            return run_padded(args, kwargs)

        # Inputs of zeros, such as those of a warm-up, do not show that a model mixes them with zeros behind them.
        in_bf16 = isinstance(recording, Replay) and recording.in_bf16
        if all(like_the_model(expected, run_padded(args, kwargs, noise), in_bf16) for noise in (False, True)):
            self._say("pad", f"{describe(key)} was not recorded, so a batch of {batch} runs, filled up with zeros")
            self._others[key] = padded
        else:
            self._say(
                "mixed", f"{describe(key)} was not recorded, and padding changes its outputs, so the model runs it"
            )
            self._others[key] = self._run
        return expected

    @torch.no_grad()
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if any(module.training for module in self.model.modules()):
            raise RuntimeError("GraphedModel: expected the model in eval mode, got training mode; call model.eval()")
        if self._is_replaced() or not self._weights.hold():
            raise RuntimeError(
                "GraphedModel: expected the weights that were recorded, and the model has others since, so that it and "
                "its recordings would disagree; record it again with graphed(model, example_inputs)"
            )
        return self.model(*args, **kwargs)

    def _is_replaced(self) -> bool:
        """Whether the model has other tensors than those that a CPU recording was made from."""
        if self._own is None:
            return False
        now = list(_state(self.model))
        return len(now) != len(self._own) or not all(map(operator.is_, now, self._own))

    def _say(self, what: str, text: str) -> None:
        with self._lock:
            if what in self._said:
                return
            self._said.add(what)
        warnings.warn(f"graphed: {text} (said once)", stacklevel=5)

    def train(self, mode: bool = True) -> GraphedModel:
        """Eval mode is the only one: ``eval()`` changes nothing. Raises ValueError for training mode."""
        if mode:
            raise ValueError("GraphedModel: expected eval mode, since inference was recorded; train the model itself")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> GraphedModel:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            with torch.no_grad():
                moved = fn(tensor)
            if (moved.device, moved.dtype) != (tensor.device, tensor.dtype):
                self._refuse(
                    f"a recording on {self.device} to stay there in its dtype", f"{moved.dtype} on {moved.device}"
                )
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused with ValueError: the recordings would not see it."""
        self._refuse("a recording to keep its weights", "a state dict to load")

    def _refuse(self, expected: str, got: str) -> NoReturn:
        raise ValueError(
            f"GraphedModel: expected {expected}, got {got}; change the model and record it again with "
            "graphed(model, example_inputs)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "GraphedModel: a recording holds memory of this process and cannot be copied or pickled; copy or save its "
            "model and record that again with graphed(model, example_inputs)"
        )

    def __repr__(self) -> str:
        lines = [f"  {describe(key)}: {_one_line(recording)}" for key, recording in self.recordings.items()]
        head = f"GraphedModel({type(self.model).__name__} on {self.device}, other shapes: {self.other_shapes}"
        return "\n".join([head, *lines, ")"])


def _state(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of a model's state dict; what is kept beside them, packs for one, may be made anew at any time."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield tensor


def _one_line(recording: Any) -> str:
    return repr(recording) if isinstance(recording, Replay | OneLaunchRecording | GraphRecording) else "a CUDA graph"


def graphed(
    model: nn.Module,
    example_inputs: Any,
    *,
    warm_up_calls: int = 3,
    copy_outputs: bool = True,
    other_shapes: str = "pad",
    measure: bool = True,
    one_launch: bool | str | Collection[str] = AUTO,
) -> GraphedModel:
    """Records a model's inference on static shapes and returns a callable that replays it.

    At small batches a network is bound by what happens between its kernels: launches on a GPU; on the CPU Python,
    fresh output tensors and cold weights. A CUDA graph replays all launches with one call; on the CPU a list of kernel
    calls runs on fixed memory. The example inputs say which shapes are recorded. Calls from several threads or
    streams wait for each other, since they share memory.

    A CUDA graph sees weights that change in place, but none that is replaced or moved, whose memory it keeps; a CPU
    recording holds copies of the weights as they were. With ``one_launch``, or where a layer on the tensor-core kernel
    keeps a pack, a CUDA graph does both, and so it raises RuntimeError once a weight of such a layer was written.

    Args:
        model: an eval-mode model; branches on tensor values cannot be recorded.
        example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of these,
            on the model's device. On the CPU, positional tensors only.
        warm_up_calls: calls before each capture on CUDA: kernels are compiled and loaded there, which a capture cannot
            do.
        copy_outputs: return copies. Without, a call returns the recording's own memory, which the next call overwrites.
        other_shapes: what happens to inputs that were not recorded. ``pad``: a smaller batch is filled up with zeros to
            the next recorded one, where the first such call shows that the model then computes the same; all else runs
            on the model itself. ``run``: everything else runs on the model itself. ``raise``: ValueError. The first
            time, a warning says what happens.
        measure: on the CPU, time each chain of native layers in its possible forms, the way of the modules among them,
            and take the fastest, as `slimkernels.inference.Replay` says; its ``repr`` lists the forms.
        one_launch: on CUDA, layers that follow each other in an ``nn.Sequential`` and are to be one launch; one or
            several names. ``chain``, which True stands for: block-sparse convolutions, for 1 to 16 images, as
            `slimkernels.inference.cuda_chain.chain_of` makes it. ``linear``: ``nn.Linear`` and ReLUs, for 1 to 16 rows,
            as `slimkernels.inference.cuda_linear_chain.linear_chain_of` makes it. ``stem``: a dense 3x3 convolution of
            images to 64 channels, its ReLU and the block-sparse convolution behind it, as
            `slimkernels.inference.cuda_stem.stem_of` makes it. What a kernel does not take stays as it is; the
            ``repr`` says what was taken, and why not the rest. ``auto``: chains and linear layers, where the graph is
            faster with them than without (they are captured and timed, and once more so that each launch begins while
            the kernel in front of it ends). False: none, so that the graph sees weights
            that are written in place.

    Raises:
        ValueError: a model in training mode or that cannot be recorded; no example inputs; another ``other_shapes`` or
            ``one_launch``, or ``one_launch`` where its kernels cannot run.
        TypeError: example inputs of another form.
    """
    sets, device = served_sets("graphed", model, example_inputs)
    if warm_up_calls < 1:
        raise ValueError(f"graphed: expected warm_up_calls >= 1, got {warm_up_calls}")
    if other_shapes not in OTHER_SHAPES:
        raise ValueError(f"graphed: expected other_shapes in {', '.join(OTHER_SHAPES)}, got {other_shapes!r}")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"graphed: expected model and inputs on the CPU or a CUDA device, got {device}")
    launches = _one_launch(model, device, one_launch) if kinds_of(one_launch) else None

    def graphs_of(model: nn.Module) -> CudaGraphs:
        return CudaGraphs(model, device, warm_up_calls, copy_outputs)

    plain = graphs_of(model) if device.type == "cuda" else None
    in_one = None if launches is None else graphs_of(launches.model)
    recordings: dict[Any, Callable[..., Any]] = {}
    copies = Copies()
    for args, kwargs in sets:
        key = signature(args, kwargs)
        if key in recordings:
            continue
        if plain is not None:
            if launches is None or in_one is None:
                recordings[key] = plain.record(args, kwargs)
            elif one_launch == AUTO:
                recordings[key] = _faster(plain, in_one, launches, args, kwargs)
            else:
                recordings[key] = launches.record(partial(in_one.record, args, kwargs))
        elif kwargs:
            raise TypeError(f"graphed: expected positional example inputs on the CPU, got keywords {sorted(kwargs)}")
        else:
            recordings[key] = Replay(
                model, args, copy_outputs=copy_outputs, measure=measure, copies=copies, op="graphed"
            )
    if launches is None:
        return GraphedModel(model, device, recordings, other_shapes)
    copied = [t for one in recordings.values() if isinstance(one, OneLaunchRecording) for t in one.tensors]
    if not copied and one_launch != AUTO:
        warnings.warn("graphed: one_launch took no layers; the repr says why", stacklevel=2)
    return GraphedModel(model, device, recordings, other_shapes, copied)


def _faster(
    plain: CudaGraphs, in_one: CudaGraphs, launches: OneLaunch, args: Any, kwargs: Any
) -> GraphRecording | OneLaunchRecording:
    """The fastest recording of a call: plain, or with runs in one launch each, which overlap where that is faster.

    Kernels that ran on few kinds of devices choose themselves here, so their outputs have to be those of the others.
    """
    recorded, given = plain.record(args, kwargs), tensors((args, kwargs))
    if not any(t.dim() and t.shape[0] <= MAX_IMAGES for t in given):
        return recorded
    found: list[OneLaunchRecording] = []
    for overlap in (False, True) if has_clusters(given[0]) else (False,):
        launches.overlap(overlap)
        found.append(launches.record(partial(in_one.record, args, kwargs)))
        if not found[-1].in_one_launch:
            return recorded
    expected = recorded(*args, **kwargs)
    if not all(like_the_model(expected, one(*args, **kwargs)) for one in found):
        runs = ", ".join(found[0].in_one_launch)
        recorded.note = f"; {runs} in one launch gave other outputs"
        warnings.warn(
            f"graphed: {runs} in one launch gave other outputs than layer by layer, and is left out", stacklevel=3
        )
        return recorded
    seconds, times = recorded.seconds(), [one.replay.seconds() for one in found]
    best = times.index(min(times))
    text = f"({1e6 * times[best]:.1f} us so{', overlapping,' if best else ''} and {1e6 * seconds:.1f} without)"
    if times[best] < seconds:
        found[best].note = f" {text}"
        return found[best]
    recorded.note = f"; {', '.join(found[best].in_one_launch)} in one launch would be slower {text}"
    return recorded


def _one_launch(model: nn.Module, device: torch.device, asked: bool | str | Collection[str]) -> OneLaunch | None:
    """None where ``auto`` finds nothing to try.

    Raises:
        ValueError: the kernels cannot run.
    """
    reason: str | None = f"expected one_launch with a model on a CUDA device, got {device}"
    if device.type == "cuda":
        with torch.cuda.device(device):
            missing = cuda.available()
        reason = None if missing is None else f"one_launch cannot run here: {missing}"
    if reason is not None and asked != AUTO:
        raise ValueError(f"graphed: {reason}")
    found = None if reason is not None else OneLaunch(model, asked)
    return None if found is not None and asked == AUTO and not found.runs else found
