"""The machine code of the tensor-core kernels in the built extension, where it has CUDA code."""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache

import pytest
import sass

from slimkernels import _extension

pytest.importorskip("triton")
PORTABLE, HOPPER, NARROW = "Li2ELi2ELi4ELi8E", "Li4ELi1ELi2ELi16E", "Li4ELi1ELi4ELi8E"
# Kernel, its shape's template arguments, architecture -> the most instructions of its loop for each step, and the
# matrix instructions of a step. With wgmma the loop takes two steps at a time, and four warps multiply together.
LOOPS = {
    ("resident_conv2d", PORTABLE + "Li2ELb0", "sm_80"): (52, 32),
    ("resident_conv2d", PORTABLE + "Li2ELb0", "sm_90a"): (52, 32),
    ("resident_conv2d", HOPPER + "Li2ELb1", "sm_90a"): (24, 2),
    ("resident_conv2d", NARROW + "Li2ELb1", "sm_90a"): (34, 4),
    ("stem_conv2d", NARROW + "Li2ELb0", "sm_80"): (52, 32),
    ("stem_conv2d", NARROW + "Li2ELb0", "sm_90a"): (52, 32),
    ("stem_conv2d", NARROW + "Li2ELb1", "sm_90a"): (34, 4),
}


@lru_cache(maxsize=4)
def functions(arch: str) -> dict[str, str]:
    """Disassembly of the extension's functions for one architecture, by mangled name."""
    module, reason = _extension.load()
    if module is None or not module.build_info()["cuda"]:
        pytest.skip(f"the extension has no CUDA code: {reason or 'built without'}")
    command = [str(sass.tool("cuobjdump")), "-sass", "-arch", arch, str(module.__file__)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def kernel(name: str, arguments: str, arch: str, dtype: str = "13__nv_bfloat16") -> sass.Kernel:
    begin = f"{name}_kernelI{dtype}NS_9TileShapeI{arguments}"
    found = [text for function, text in functions(arch).items() if begin in function]
    assert len(found) == 1, (name, arguments, arch, len(found))
    return sass.parse(found[0])


@pytest.mark.parametrize("key", LOOPS, ids=lambda key: "-".join(key))
def test_loop(key: tuple[str, str, str]):
    most, products = LOOPS[key]
    for dtype in ("13__nv_bfloat16", "6__half"):
        code = kernel(*key, dtype)
        matrix = "HGMMA" if key[1].endswith("Lb1") else "HMMA"
        steps, rest = divmod(code.in_loop(matrix), products)
        assert rest == 0 and steps >= 1
        assert len(code.loop) <= most * steps
        if matrix == "HMMA":  # four rows of 16 pixels, four 16-byte loads of weights and one of the step
            assert code.in_loop("LDSM") == 4 * steps and code.in_loop("LDS", "128") == 4 * steps


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_copies_and_registers(arch: str):
    """Every copy to shared memory is of 16 bytes past L1, and nothing is spilled."""
    names = [name for name in functions(arch) if "TileShape" in name]
    assert len(names) == 10
    for name in names:
        code = sass.parse(functions(arch)[name])
        kinds = [i.name for i in code.instructions]
        assert not any(i.startswith(("LDL", "STL")) for i in kinds), name
        copies = [i for i in kinds if i.startswith("LDGSTS")]
        if arch == "sm_90a" or "Lb0" in name:
            assert copies and all("128" in i and "BYPASS" in i for i in copies), name
        else:  # a shape of another processor
            assert len(code.instructions) < 64


def test_wgmma_is_not_serialized():
    """Of two steps' products, the second is issued before the first is waited for."""
    for name, arguments in (("resident_conv2d", HOPPER), ("resident_conv2d", NARROW)):
        code = kernel(name, arguments + "Li2ELb1", "sm_90a")
        assert code.in_loop("WARPGROUP", "DEPBAR") == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_chain(arch: str):
    """Six steps a round of the loop; a load is of what nothing writes, or goes past L1; nothing is spilled."""
    names = [name for name in functions(arch) if "chain_conv2d_kernelI" in name]
    assert len(names) == 4
    for name in names:
        code = sass.parse(functions(arch)[name])
        kinds = [i.name for i in code.instructions]
        assert not any(i.startswith(("LDL", "STL")) for i in kinds), name
        loads = [i.split(".") for i in kinds if i.startswith("LDG")]
        assert all("CONSTANT" in i or "STRONG" in i or "LTC128B" in i for i in loads), name
        assert code.in_loop("HMMA") == 24 and len(code.loop) <= 31 * 6, (name, len(code.loop))
        assert code.in_loop("LDG", "64", "STRONG") == 12 and code.in_loop("LDG", "128", "CONSTANT") == 18
        if arch == "sm_90a" and "ClusterBarrier" in name:
            at = {
                kind: [i for i, k in enumerate(kinds) if k.startswith(kind)] for kind in ("UCGABAR", "MEMBAR", "CCTL")
            }
            assert [kinds[i] for i in at["UCGABAR"]] == ["UCGABAR_WAIT", "UCGABAR_ARV"]
            assert len(at["MEMBAR"]) == 1 and len(at["CCTL"]) == 1  # what is stored goes out, what L1 holds goes away
            assert at["UCGABAR"][0] < at["CCTL"][0] < at["MEMBAR"][0] < at["UCGABAR"][1]
