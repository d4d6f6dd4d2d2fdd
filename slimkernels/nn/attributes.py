"""Which attributes of torch's layers the drop-in modules take over, and which they refuse."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.utils import _pair

from slimkernels.kernels import EPILOGUES


def unsupported_conv_reason(conv: nn.Conv2d) -> str | None:
    """Why a ``nn.Conv2d`` has no block-sparse or low-rank twin, naming attribute and value; None when it has one."""
    if conv.groups != 1:
        return f"groups={conv.groups} is not supported, expected 1"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} is not supported, expected 'zeros'"
    if not conv.weight.is_floating_point():
        return f"weight dtype {conv.weight.dtype} is not supported, expected floating point"
    try:
        resolved_padding(conv)
    except ValueError as error:
        return str(error)
    return None


def resolved_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """A convolution's padding as two ints; ``'same'`` where it is symmetric. Raises ValueError where it is not."""
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
    if any(t % 2 for t in total):
        raise ValueError(f"padding='same' with kernel_size={conv.kernel_size} is asymmetric and not supported")
    return total[0] // 2, total[1] // 2


def check_epilogue(name: str, op: str, epilogue: str) -> None:
    """Raises ValueError, beginning with the module's name, unless the op has this epilogue."""
    if epilogue not in EPILOGUES[op]:
        raise ValueError(f"{name}: expected epilogue in {sorted(EPILOGUES[op])}, got {epilogue!r}")
