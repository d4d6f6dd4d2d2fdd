"""torch's switches of float32 arithmetic: read whichever way a user sets them, and left so that torch can read them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from precision import fp32_precision

from slimkernels.kernels.triton.runtime import gradient_precision

# How a user may set them, and what convolutions and matrix products then multiply in.
SETTINGS = {
    "pass": ("tf32", "ieee"),
    "b.cudnn.allow_tf32 = False": ("ieee", "ieee"),
    "b.cudnn.allow_tf32 = False; b.cudnn.allow_tf32 = True": ("tf32", "ieee"),
    "b.cuda.matmul.allow_tf32 = True": ("tf32", "tf32"),
    "b.cuda.matmul.allow_tf32 = True; b.cuda.matmul.allow_tf32 = False": ("tf32", "ieee"),
    "torch.set_float32_matmul_precision('high')": ("tf32", "tf32"),
    "b.cudnn.conv.fp32_precision = 'ieee'": ("ieee", "ieee"),
    "b.cuda.matmul.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "b.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "b.cudnn.allow_tf32 = False; b.cudnn.conv.fp32_precision = 'tf32'": ("tf32", "ieee"),
    "b.cuda.matmul.fp32_precision = 'tf32'; b.cuda.matmul.allow_tf32 = False": ("tf32", "ieee"),
}
READ = """
import os, torch
from slimkernels.kernels.triton.runtime import gradient_precision
b = torch.backends
for text, expected in {settings}.items():
    child = os.fork()
    if child == 0:
        exec(text)
        found = gradient_precision((3, 3, 8, 8)), gradient_precision((1, 1, 1, 1))
        print(f"{{text}}: expected {{expected}}, found {{found}}" if found != expected else "as expected", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_either_interface_of_torch_is_followed() -> None:
    script = READ.format(settings=SETTINGS)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["as expected"] * len(SETTINGS)


@pytest.mark.parametrize("value", ("ieee", "tf32"))
def test_the_switch_of_the_tests_leaves_a_state_that_torch_can_read(value: str) -> None:
    """`torch.export` asks for cuDNN's flags, which raise after a new and an old interface were mixed."""
    before = gradient_precision((3, 3, 8, 8)), gradient_precision((1, 1, 1, 1))
    x = torch.ones(1, 2, 4, 4)
    with fp32_precision(value):
        assert gradient_precision((3, 3, 8, 8)) == gradient_precision((1, 1, 1, 1)) == value
        torch.export.export(torch.nn.Conv2d(2, 3, 3), (x,))
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (value == "tf32")
    assert (gradient_precision((3, 3, 8, 8)), gradient_precision((1, 1, 1, 1))) == before
    torch.export.export(torch.nn.Conv2d(2, 3, 3), (x,))
