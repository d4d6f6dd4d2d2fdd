"""Counts machine instructions of compiled kernels, from the disassembler in Triton's wheel.

A kernel's main loop is the innermost loop that multiplies matrices; everything else in the kernel, but for the padding
behind its end, is its straight-line code, which a warp runs once.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)\s*(?:\s([^;]*?)\s*)?;", re.MULTILINE)
_MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "QGMMA")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address, its name with suffixes (``LDGSTS.E.BYPASS.128``), and its operands."""

    address: int
    name: str
    operands: str
    predicate: str | None = None

    @property
    def kind(self) -> str:
        """The name without suffixes."""
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes, None for other instructions and for branches to a register's address."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


def _kinds(instructions: Sequence[Instruction]) -> Counter[str]:
    return Counter(instruction.kind for instruction in instructions)


@dataclass(frozen=True)
class Kernel:
    """The instructions of one kernel in the order of their addresses."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def loops(self) -> tuple[tuple[Instruction, ...], ...]:
        """The loops that multiply matrices and hold no other one that does, in the order of their addresses."""
        found = []
        for instruction in self.instructions:
            begin = instruction.target
            if begin is not None and begin < instruction.address:
                found.append(tuple(i for i in self.instructions if begin <= i.address <= instruction.address))
        found = [body for body in found if any(i.kind in _MATRIX for i in body)]
        return tuple(
            body for body in found
            if not any(other is not body and body[0].address <= other[0].address and
                       other[-1].address <= body[-1].address for other in found)
        )  # fmt: skip

    @cached_property
    def loop(self) -> tuple[Instruction, ...]:
        """The main loop: of the loops that multiply matrices, the one of fewest instructions. Empty where none does."""
        return min(self.loops, key=len, default=())

    @cached_property
    def straight(self) -> tuple[Instruction, ...]:
        """Everything outside the main loop, without the NOPs and the branch to itself that pad a kernel's end."""
        inside = {instruction.address for instruction in self.loop}
        return tuple(
            i for i in self.instructions
            if i.address not in inside and i.kind != "NOP" and i.target != i.address
        )  # fmt: skip

    def in_loop(self, kind: str, *suffixes: str) -> int:
        """Instructions of a kind in the main loop whose names carry all of the suffixes."""
        return _count(self.loop, kind, suffixes)

    def outside(self, kind: str, *suffixes: str) -> int:
        """Instructions of a kind in the straight-line code whose names carry all of the suffixes."""
        return _count(self.straight, kind, suffixes)

    def kinds(self) -> tuple[Counter[str], Counter[str]]:
        """Number of instructions by kind: of the main loop, of the straight-line code."""
        return _kinds(self.loop), _kinds(self.straight)


def _count(instructions: Sequence[Instruction], kind: str, suffixes: Sequence[str]) -> int:
    return sum(i.kind == kind and set(suffixes) <= set(i.name.split(".")) for i in instructions)


def parse(text: str) -> Kernel:
    """The kernel in the text that ``cuobjdump -sass`` prints of a cubin that holds one."""
    return Kernel(
        tuple(Instruction(int(m[1], 16), m[3], m[4] or "", m[2]) for m in _INSTRUCTION.finditer(text))
    )  # fmt: skip


def tool(name: str) -> Path:
    """A program of the CUDA toolkit that Triton's wheel carries."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def disassemble(cubin: bytes) -> Kernel:
    """The kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("cuobjdump")), "-sass", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
