"""Runs of integers, entropy coded one after another with the range coder of `constriction`, and how few bits they need.

Each run comes with a table of how often each symbol occurs in it. Coder and decoder take their probabilities from the
table, so a decoded run whose counts are not those of its table was damaged, or coded by other arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.int32]
EXTRA = "pip install 'slimkernels[compact]'"
# The coder's words.
_WORD = np.dtype("<u4")


class Table(NamedTuple):
    """How often symbols occur: the one of ``counts[i]`` is ``lowest + i``."""

    lowest: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, symbols: Symbols) -> Table:
        """The table of a run."""
        if symbols.size == 0:
            return cls(0, ())
        lowest = int(symbols.min())
        return cls(lowest, tuple(np.bincount(symbols - lowest).tolist()))

    @property
    def total(self) -> int:
        """Symbols in the run."""
        return sum(self.counts)

    def count_of(self, symbol: int) -> int:
        """How often a symbol occurs."""
        place = symbol - self.lowest
        return self.counts[place] if 0 <= place < len(self.counts) else 0

    @property
    def entropy(self) -> float:
        """Bits that the run needs at least where nothing but its table is known: its zeroth-order entropy."""
        total = self.total
        return sum(n * math.log2(total / n) for n in self.counts if n)


def choices(cells: int, chosen: int) -> float:
    """log2 of the number of ways to choose ``chosen`` of ``cells``, in bits."""
    return (math.lgamma(cells + 1) - math.lgamma(chosen + 1) - math.lgamma(cells - chosen + 1)) / math.log(2)


def coders(where: str) -> Any:
    """The package that codes and decodes. Raises ImportError, beginning with ``where``, where it is not installed."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError(f"{where}: expected the package constriction, got none; install it with: {EXTRA}") from error
    return constriction.stream


def _model(stream: Any, counts: Sequence[int]) -> Any:
    """The coder's model. Of double precision, as its fixed-point form must be the same on every machine."""
    numbers = np.asarray(counts, dtype=np.float64)
    return stream.model.Categorical(numbers / numbers.sum(), perfect=False)


class Encoder:
    """Codes runs into bytes.

    Raises:
        ImportError: `constriction` is not installed.
    """

    def __init__(self) -> None:
        self._stream = coders("save")
        self._coder = self._stream.queue.RangeEncoder()

    def add(self, symbols: Symbols, table: Table) -> None:
        """The next run. One symbol alone, however often it occurs, takes no bits."""
        if len(table.counts) > 1:
            self._coder.encode((symbols - table.lowest).astype(np.int32), _model(self._stream, table.counts))

    def finish(self) -> bytes:
        """Everything as bytes."""
        coded: bytes = self._coder.get_compressed().astype(_WORD).tobytes()
        return coded


class Decoder:
    """Takes runs out of bytes again, in the order in which they were added.

    Raises:
        ImportError: `constriction` is not installed. ValueError: not whole words.
    """

    def __init__(self, coded: bytes) -> None:
        self._stream = coders("load")
        if len(coded) % _WORD.itemsize:
            raise ValueError(f"expected coded symbols of 4 bytes a word, got {len(coded)} bytes")
        self._coder = self._stream.queue.RangeDecoder(np.frombuffer(coded, _WORD).astype(np.uint32))

    def take(self, table: Table) -> Symbols:
        """The next run, as long as its table says: the caller has checked that length.

        Raises:
            ValueError: the bytes do not decode to what the table says.
        """
        total, alphabet = table.total, len(table.counts)
        if alphabet < 2:
            return np.full(total, table.lowest, dtype=np.int32)
        try:
            symbols: Symbols = self._coder.decode(_model(self._stream, table.counts), total)
        except AssertionError as error:  # bytes that no encoder makes
            raise ValueError(f"expected symbols coded by their table, got {error}") from error
        if tuple(np.bincount(symbols, minlength=alphabet).tolist()) != table.counts:
            raise ValueError("expected the symbols that their table counts, got others")
        return symbols + np.int32(table.lowest)

    def finish(self) -> None:
        """Raises ValueError where coded words are left."""
        if not self._coder.maybe_exhausted():
            raise ValueError("expected no coded symbols beyond the last table, got some")
