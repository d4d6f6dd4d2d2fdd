"""Addresses of the Triton kernels at a GPU's sizes, replayed by Triton's interpreter without memory.

TRITON_INTERPRET is read where @triton.jit decorates, so the tests live in address_cases.py and two more files and
run in processes of their own; to see them one by one: `TRITON_INTERPRET=1 pytest` of that file.
"""

from __future__ import annotations

import pytest
import triton_processes

pytest.importorskip("triton")


FILES = ("address_cases.py", "address_gradient_cases.py", "real_tile_cases.py")
# The least number of slow cases: layers times block shapes.
SLOW = {"address_cases.py": 120, "address_gradient_cases.py": 90}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file in FILES for name in triton_processes.names(file)])
def test_addresses(file: str, name: str) -> None:
    triton_processes.check(file, name)


@pytest.mark.slow
@pytest.mark.parametrize("file", SLOW)
def test_addresses_of_every_layer_and_block_shape(file: str) -> None:
    cases = triton_processes.outcomes(file, "slow")
    for name in cases:
        triton_processes.check(file, name, slow=True)
    assert sum(len(found) for found in cases.values()) >= SLOW[file]
