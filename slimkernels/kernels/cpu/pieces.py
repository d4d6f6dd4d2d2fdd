"""How a chain cuts a batch: vectors of images, single images, or the whole of it."""

from __future__ import annotations

from typing import NamedTuple

# Share of a vector's images that must be there: below it, half-empty vectors cost more than the other layout.
FULL_ENOUGH = 0.75


class Piece(NamedTuple):
    """The images from ``start`` to ``start + count`` of a batch, and how they run.

    Attributes:
        lanes: the number of images that lie innermost; 1 means channels last.
        slot: pieces with different slots from 0 on run at the same time, each on one thread. A piece with slot -1 runs
            on all threads.
    """

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a piece for
    lanes: int
    slot: int

    @property
    def padded_count(self) -> int:
        """Images that memory is needed for: the last vector of images may not be full."""
        return -(-self.count // self.lanes) * self.lanes


def pieces(n: int, lanes: int, threads: int, full_enough: float = FULL_ENOUGH) -> list[Piece]:
    """A batch in pieces: a vector of images for every thread as long as there are enough, then the rest.

    A piece that runs on one thread waits for no other, and its data stays on one core. If the last images do not nearly
    fill a vector, they run channels last.

    Args:
        n: the number of images.
        lanes: the number of images in a vector; 1 keeps the batch whole and channels last.
        threads: the number of threads.
        full_enough: the share of a vector that the last images must fill to become one; 0 if they always have to.
    """
    if lanes == 1:
        return [Piece(0, n, 1, -1)]
    rest = n % lanes
    vectors = n // lanes + (rest > 0 and rest >= full_enough * lanes)
    covered = min(vectors * lanes, n)  # images in vectors; the others run channels last
    one_thread_each = vectors // threads * threads if threads > 1 else 0
    cut = [Piece(i * lanes, min(lanes, n - i * lanes), lanes, i % threads) for i in range(one_thread_each)]
    # Several vectors a piece give many threads enough to do in the smallest layers.
    together = -(-threads // 2)
    for i in range(one_thread_each, vectors, together):
        cut.append(Piece(i * lanes, min(together * lanes, covered - i * lanes), lanes, -1))
    return cut if covered == n else [*cut, Piece(covered, n - covered, 1, -1)]


def image_by_image(n: int, threads: int) -> list[Piece]:
    """A batch in single images, channels last: one for every thread as long as there are enough, then the rest.

    Args:
        n: the number of images.
        threads: the number of threads.
    """
    one_thread_each = n // threads * threads if threads > 1 else 0
    return [Piece(i, 1, 1, i % threads if i < one_thread_each else -1) for i in range(n)]
