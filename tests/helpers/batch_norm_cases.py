"""Checks of the batch norm kernels, shared by the interpreter and the GPU tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels import testing
from slimkernels.kernels import reference
from slimkernels.kernels.triton import batch_norm

EPS = 1e-5
# Rows of one tile and of several, odd images whose last row and column no window has, one pixel a window.
SHAPES = ((2, 3, 6, 4), (3, 5, 7, 9), (5, 130, 3, 2), (1, 16, 2, 2), (2, 64, 33, 31))


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, epilogue: str, eps: float = EPS) -> Tensor:
    """torch's ops one after the other."""
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    if epilogue != "none":
        y = F.relu(y)
    return F.max_pool2d(y, 2) if epilogue == "relu_maxpool2" else y


def check_batch_norm(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    epilogue: str,
    *,
    affine: bool = True,
    device: str = "cpu",
    kernels: Any = batch_norm,
) -> None:
    """Forward against float64; gradients against the reference, which rounds z as the kernels do.

    ``kernels`` has the ``launch_forward`` and ``launch_backward`` that are checked.

    Where rounding makes two pixels of a window equal, or z zero, another last bit of a mean sends a gradient elsewhere:
    one in a thousand elements may differ in 16-bit dtypes.
    """
    c = shape[1]
    x = (testing.random_tensor(*shape, seed=1, dtype=torch.float32) * 2 + 30).to(dtype)  # a mean that cancels digits
    weight = testing.random_tensor(c, seed=2, dtype=torch.float32) if affine else None
    bias = testing.random_tensor(c, seed=3, dtype=torch.float32) if affine else None
    wide = [None if t is None else t.double() for t in (weight, bias)]
    expected = plain(x.double(), *wide, epilogue)
    grad = testing.random_tensor(*expected.shape, seed=4, dtype=dtype)

    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device)

    args = [moved(t) for t in (x, weight, bias)]
    y, statistics = kernels.launch_forward(*args, EPS, epilogue)
    again = kernels.launch_forward(*args, EPS, epilogue)
    assert torch.equal(y, again[0]) and torch.equal(statistics, again[1])
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    close = {"rtol": 2**-10, "atol": 2**-10} if dtype == torch.float16 else {"rtol": 2**-7, "atol": 2**-7}
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else close
    torch.testing.assert_close(y.cpu().double(), expected, **close)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    found = statistics.cpu().double()
    torch.testing.assert_close(found[0], mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], (var + EPS).rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2], torch.var(x.double(), (0, 2, 3)), rtol=1e-5, atol=0)

    grad_x, sums = kernels.launch_backward(moved(grad), *args, statistics, EPS, epilogue)
    right = reference.batch_norm_backward(grad, x, weight, bias, statistics.cpu(), EPS, epilogue)
    off = (grad_x.cpu().double() - right[0].double()).abs() > close["rtol"] * (1 + right[0].double().abs())
    few = 0 if dtype == torch.float32 else 1e-3
    assert off.double().mean() <= few, f"{off.sum()} of {off.numel()} elements of the gradient of x are wrong"
    bound = (1e-4 if dtype == torch.float32 else 1e-2) * grad.double().square().sum((0, 2, 3)).sqrt()
    for name, own, other in zip(("bias", "weight"), sums.cpu().double(), right[1].double(), strict=True):
        assert ((own - other).abs() <= bound + 1e-6).all(), f"gradient of {name}: {(own - other).abs().max()}"
    dropped = grad.clone()
    dropped[-1] = 0
    other = reference.batch_norm_backward(dropped, x, weight, bias, statistics.cpu(), EPS, epilogue)
    wrong = (other[0].double() - right[0].double()).abs() > close["rtol"] * (1 + right[0].double().abs())
    assert wrong.double().mean() > few, "gradients of an image that were dropped would not be seen"
