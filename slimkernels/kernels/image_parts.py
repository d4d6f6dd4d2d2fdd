"""How few images fill a vector: each is cut into parts of equal size, which lie innermost as images do.

The lanes of a vector then hold the same pixel of all parts. A convolution reads across the borders between them, which
the kernels for strips of one channel do (csrc/cpu/slab_plan.h).
"""

from __future__ import annotations

from slimkernels.kernels.problems import Pair

WHOLE: Pair = (1, 1)
# Rows and columns of taps at most (SLIM_PARTS_MAX_TAPS).
_MAX_TAPS = 32


def image_parts(n: int, lanes: int, taps: Pair, stride: Pair, size: Pair, output: Pair, pool: bool) -> Pair:
    """How many rows and columns of parts each of n images is cut into, so that one vector holds all of them.

    As many as fill the vector, or half, a quarter, ... of them where the sizes do not divide; `WHOLE` where no cut fits
    or the images fill more than half a vector themselves.

    Args:
        n: the number of images, at least 1.
        lanes: of a vector; a power of two.
        taps: rows and columns of taps.
        stride: of rows and columns.
        size: height and width of the input.
        output: the same of the output, in front of the pooling.
        pool: whether 2x2 outputs are pooled; none of those may lie in two parts.
    """
    fits = all(p * step == x for p, step, x in zip(output, stride, size)) and max(taps) <= _MAX_TAPS
    parts = lanes // (1 << (n - 1).bit_length()) if fits else 1
    while parts > 1:
        rows = 1 << (parts.bit_length() - 1) // 2
        cut = rows, parts // rows
        if all(p > 0 and p % (k * (1 + pool)) == 0 for p, k in zip(output, cut)):
            return cut
        parts //= 2
    return WHOLE
