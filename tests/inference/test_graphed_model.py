"""A recorded model under real traffic: batches that were not recorded, and what a module is expected to answer."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import slimkernels as sk
from slimkernels.inference.inputs import signature


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5))
    sk.finalize_(sk.prune_(net.eval(), 0.5, (16, 1), layers=["0", "4"], skip_first=False))
    return sk.convert(net, policy=sk.Policy(min_speedup=0)).requires_grad_(False)


def images(n: int, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class CountCalls:
    """A recording that counts its calls, put in the place of one."""

    def __init__(self, recording: object) -> None:
        self.recording, self.calls = recording, 0

    def __call__(self, *args: object) -> object:
        self.calls += 1
        return self.recording(*args)  # type: ignore[operator]


def counted(served: sk.inference.GraphedModel) -> list[CountCalls]:
    served.recordings = {key: CountCalls(recording) for key, recording in served.recordings.items()}
    return list(served.recordings.values())


def test_smaller_batches_run_on_the_next_larger_recording_and_larger_ones_on_the_model() -> None:
    net = model()
    served = sk.graphed(net, [images(2), images(4), images(8)])
    two, four, eight = counted(served)
    with pytest.warns(
        UserWarning, match=r"graphed: \(float32\[3, 3, 8, 8\] on cpu\) was not recorded, so a batch of 4"
    ):
        close(served(images(3)), net(images(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        for n in (3, 3, 5, 1, 7):
            y = served(images(n))
            assert y.shape == (n, 5)
            close(y, net(images(n)))
    assert (two.calls, four.calls, eight.calls) == (2, 4, 4)  # two trials for each new size
    with pytest.warns(UserWarning, match="the model itself runs it; record this shape, or a larger batch of it"):
        close(served(images(9)), net(images(9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(served(images(2, size=10)), net(images(2, size=10)))
        assert served(images(0)).shape == (0, 5)
    assert (two.calls, four.calls, eight.calls) == (2, 4, 4)
    close(served(images(8)), net(images(8)))
    assert eight.calls == 5


class Mixing(nn.Module):
    """A model whose images see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Several(nn.Module):
    """Two batched inputs and one that is not; outputs of either kind, and one that is no tensor."""

    def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> dict[str, object]:
        return {"sum": x.flatten(1).sum(1) + y, "scale": scale * 2, "rows": [x * 2], "name": "several"}


def test_padding_that_would_change_results_is_not_used() -> None:
    net = Mixing().eval()
    served = sk.graphed(net, images(4))
    (four,) = counted(served)
    with pytest.warns(UserWarning, match="padding changes its outputs, so the model runs it"):
        close(served(images(3)), net(images(3)))
    close(served(images(3)), net(images(3)))
    assert four.calls == 1  # the trial alone


def test_a_first_call_with_zeros_shows_that_a_model_mixes_its_images() -> None:
    net = Mixing().eval()
    served = sk.graphed(net, images(4))
    with pytest.warns(UserWarning, match="padding changes its outputs, so the model runs it"):
        served(torch.zeros_like(images(3)))
    close(served(images(3)), net(images(3)))


def test_signatures_tell_values_of_other_types_apart() -> None:
    keys = [signature((images(1), value), {}) for value in (1, True, 1.0)]
    assert len(set(keys)) == 3 and all(key[0][1] == 1 for key in keys)
    served = sk.graphed(model(), images(4))
    with pytest.raises(TypeError, match="got a ndarray"):
        served(images(4).numpy())


def test_several_inputs_are_padded_together() -> None:
    net = Several().eval()
    scale = torch.randn(2)  # as many numbers as the smaller batch has images
    served = sk.graphed(net, (images(4), torch.randn(4), scale))
    (four,) = counted(served)
    with pytest.warns(UserWarning, match="was not recorded, so a batch of 4 runs"):
        served(images(2), torch.randn(2), scale)
    y = torch.randn(2)
    for got in (served(images(2), y, scale), served(images(2).contiguous(memory_format=torch.channels_last), y, scale)):
        expected = net(images(2), y, scale)
        assert got.keys() == expected.keys() and got["name"] == "several"
        for name in ("sum", "scale"):
            close(got[name], expected[name])
        close(got["rows"][0], expected["rows"][0])
    assert four.calls == 4
    with pytest.raises(RuntimeError, match="must match the size"):
        served(images(2), torch.randn(3), scale)  # batches that differ: the model's own error
    with pytest.warns(UserWarning, match="the model itself runs it"):
        assert torch.equal(served(images(2), y, torch.ones(1))["scale"], 2 * torch.ones(1))
    assert four.calls == 4


def test_other_shapes_may_always_run_the_model_or_be_refused() -> None:
    net = model()
    served = sk.graphed(net, images(4), other_shapes="run")
    (four,) = counted(served)
    with pytest.warns(UserWarning, match=r"so the model itself runs it \(said once\)"):
        close(served(images(3)), net(images(3)))
    assert four.calls == 0
    refusing = sk.graphed(net, images(4), other_shapes="raise")
    with pytest.raises(ValueError, match=r"GraphedModel: expected inputs \(float32\[4, 3, 8, 8\] on cpu\) on cpu, got"):
        refusing(images(3))
    with pytest.raises(ValueError, match="graphed: expected other_shapes in pad, run, raise, got 'grow'"):
        sk.graphed(net, images(4), other_shapes="grow")


def test_the_model_answers_only_while_it_is_the_one_that_was_recorded() -> None:
    net = model()
    served = sk.graphed(net, images(2))
    with torch.no_grad():
        net[4].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"the model has others since.*record it again with graphed"):
        served(images(3))
    served = sk.graphed(net, images(2))
    net[0].prepack()  # the same weights, packed anew
    served(images(3))
    net[4].bias = nn.Parameter(net[4].bias + 1, requires_grad=False)  # a tensor in the place of another
    with pytest.raises(RuntimeError, match=r"the model has others since.*record it again with graphed"):
        served(images(3))
    served = sk.graphed(net, images(2))
    nn.Module.train(net)
    with pytest.raises(RuntimeError, match="expected the model in eval mode, got training mode"):
        served(images(3))


@pytest.mark.parametrize("how", ["export", "make_fx", "trace", "vmap", "jvp", "flops"])
def test_whoever_captures_it_gets_the_model(how: str) -> None:
    """Native kernels fill a recording's memory unseen: captured it would return what the last call left there."""
    net = model()
    served = sk.graphed(net, images(2))
    x, y = images(2), 2 * images(2)
    if how == "flops":
        with FlopCounterMode(display=False) as recorded:
            served(x)
        with FlopCounterMode(display=False) as modules:
            net(x)
        assert recorded.get_total_flops() == modules.get_total_flops() > 0
        return
    captured: Any = {
        "export": lambda: torch.export.export(served, (x,)).module(),
        "make_fx": lambda: make_fx(served)(x),
        "trace": lambda: torch.jit.trace(served, x),
        "vmap": lambda: lambda z: torch.func.vmap(served)(z[None])[0],
        "jvp": lambda: lambda z: torch.func.jvp(served, (z,), (z,))[0],
    }[how]()
    served(x)
    close(captured(y), net(y))
    with pytest.raises(RuntimeError, match="Replay: expected a plain call, got one that torch exports"):
        make_fx(next(iter(served.recordings.values())))(x)


def test_it_is_a_module() -> None:
    net = model()
    served = sk.graphed(net, [images(1), images(2)])
    assert isinstance(served, nn.Module) and not served.training
    assert served.eval() is served and served.to("cpu") is served and served.float() is served
    assert {k.removeprefix("model.") for k in served.state_dict()} == set(net.state_dict())
    text = repr(served)
    assert text.startswith("GraphedModel(Sequential on cpu, other shapes: pad\n")
    assert "float32[2, 3, 8, 8] on cpu): Replay(" in text
    both = nn.Sequential(served, nn.Softmax(1)).eval()
    close(both(images(2)), net(images(2)).softmax(1))


def test_what_would_make_recordings_untrue_is_refused() -> None:
    served = sk.graphed(model(), images(1))
    again = r"record it again with graphed\(model, example_inputs\)"
    with pytest.raises(ValueError, match=r"GraphedModel: expected eval mode.*train the model itself"):
        served.train()
    for move in (lambda: served.half(), lambda: served.to("meta"), lambda: served.double()):
        with pytest.raises(ValueError, match=f"GraphedModel: expected a recording on cpu to stay there.*{again}"):
            move()
    with pytest.raises(ValueError, match=f"GraphedModel: expected a recording to keep its weights.*{again}"):
        served.load_state_dict(served.state_dict())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"GraphedModel: a recording holds memory.*record that again with graphed"):
            copied(served)
    assert served.model[0].values.dtype is torch.float32


def test_threads_meet_new_batches_together() -> None:
    net = model()
    served = sk.graphed(net, images(4))
    wrong: list[int] = []

    def work() -> None:
        for n in (1, 2, 3, 4, 5):
            if not torch.allclose(served(images(n)), net(images(n)), rtol=1e-4, atol=1e-5):
                wrong.append(n)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and len(caught) == 2  # one about padding, one about the model


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda x: ({"images": x},), TypeError, "graphed: expected example inputs to be tensors, got dict"),
        (lambda x: ([x],), TypeError, "graphed: expected example inputs to be tensors, got list"),
        (
            lambda x: {"x": x},
            TypeError,
            r"graphed: expected positional example inputs on the CPU, got keywords \['x'\]",
        ),
    ],
)
def test_errors_of_example_inputs_name_the_function_that_was_called(given, error, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        sk.graphed(nn.Identity().eval(), given(torch.zeros(2, 3)))


def test_errors_of_a_model_name_the_function_that_was_called() -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    with pytest.raises(ValueError, match=r"^graphed: expected a model that changes nothing"):
        sk.graphed(Counting().eval(), torch.zeros(2, 3))
