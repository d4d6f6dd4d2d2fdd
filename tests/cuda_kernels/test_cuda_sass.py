"""The machine code of the tensor-core kernels in the built extension, where it has CUDA code."""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache

import pytest
import sass

from slimkernels import _extension
from slimkernels.kernels.low_rank_plan import VARIANTS

pytest.importorskip("triton")
COLUMNS_32 = ("Li1ELi4ELi8ELi4E", "Li2ELi2ELi8ELi4E")
COLUMNS_16 = ("Li1ELi4ELi8ELi2E", "Li2ELi2ELi8ELi2E")
PORTABLE, HOPPER, NARROW = "Li2ELi2ELi4ELi8E", "Li4ELi1ELi2ELi16E", "Li4ELi1ELi4ELi8E"
# Kernel, its shape's template arguments, architecture -> the most instructions of its loop for each step, and the
# matrix instructions of a step. With wgmma the loop takes two steps at a time, and four warps multiply together.
LOOPS = {
    ("resident_conv2d", PORTABLE + "Li2ELb0", "sm_80"): (52, 32),
    ("resident_conv2d", PORTABLE + "Li2ELb0", "sm_90a"): (52, 32),
    **{("resident_conv2d", tile + "Li2ELb0", arch): (58, 32) for tile in COLUMNS_32 for arch in ("sm_80", "sm_90a")},
    **{("resident_conv2d", tile + "Li2ELb0", arch): (38, 16) for tile in COLUMNS_16 for arch in ("sm_80", "sm_90a")},
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
        if matrix == "HMMA":  # rows of 16 pixels, 16-byte loads of weights and one of the step
            tiles, loads = (int(key[1].split("Li")[i][0]) for i in (3, 4))
            assert code.in_loop("LDSM") == tiles * steps and code.in_loop("LDS", "128") == loads // 2 * steps


# The shapes of float32 -> the most instructions of a step, and its products. A number of the input that is read takes
# two more than of 16 bits: a comparison that spares infinite ones, and an addition that rounds.
TF32 = {"Li2ELi2ELi4ELi8ELi2ELb0": (84, 32), "Li2ELi2ELi8ELi4ELi2ELb0": (126, 32), "Li2ELi2ELi8ELi2ELi2ELb0": (104, 16)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("shape", TF32)
def test_tf32(shape: str, arch: str):
    most, products = TF32[shape]
    code = kernel("resident_conv2d", shape, arch, "f")
    every = [i for i in code.instructions if i.kind == "HMMA"]
    assert every and all(i.name == "HMMA.1688.F32.TF32" for i in every)
    steps, rest = divmod(code.in_loop("HMMA"), products)
    tiles, loads = (int(shape.split("Li")[i][0]) for i in (3, 4))
    assert rest == 0 and steps >= 1 and len(code.loop) <= most * steps
    assert code.in_loop("LDSM") == tiles * steps and code.in_loop("LDS", "128") == loads // 2 * steps
    assert code.in_loop("FSETP") == 4 * tiles * steps, "each number is rounded once a load"
    stores = [i.name for i in code.instructions if i.kind == "STG"]
    assert stores and all("128" in name for name in stores)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_tf32_registers(arch: str):
    """256 threads have 255 registers each; these leave some."""
    module, _ = _extension.load()
    names = [name for name in functions(arch) if "resident_conv2d_kernelIf" in name]
    assert module is not None and len(names) == len(TF32)
    command = [str(sass.tool("cuobjdump")), "-res-usage", "-arch", arch, str(module.__file__)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", text))
    assert all(int(used[name]) <= 240 for name in names), [used[name] for name in names]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_copies_and_registers(arch: str):
    """Every copy to shared memory is of 16 bytes past L1, and nothing is spilled."""
    names = [name for name in functions(arch) if "TileShape" in name]
    assert len(names) == 21
    for name in names:
        code = sass.parse(functions(arch)[name])
        kinds = [i.name for i in code.instructions]
        assert not any(i.startswith(("LDL", "STL")) for i in kinds), name
        copies = [i for i in kinds if i.startswith("LDGSTS")]
        if "streamed" in name:
            assert arch == "sm_90a" or len(code.instructions) < 64
        elif arch == "sm_90a" or "Lb0" in name:
            assert copies and all("128" in i and "BYPASS" in i for i in copies), name
        else:  # a shape of another processor
            assert len(code.instructions) < 64


# Streamed shapes -> products of a step, steps of a chunk, and the most instructions of the loop, which has two chunks,
# each of them with all its steps or with one.
STREAMED = {HOPPER: (2, 2, 335), NARROW: (4, 1, 290)}


@pytest.mark.parametrize("shape", STREAMED)
def test_streamed(shape: str):
    """A chunk's products follow each other, and are waited for behind the next chunk's only; who multiplies copies
    nothing, and who copies has one instruction for pixels and one for weights."""
    of_step, chunk, most = STREAMED[shape]
    for dtype in ("13__nv_bfloat16", "6__half"):
        code = kernel("streamed_conv2d", shape + "Li2ELb1", "sm_90a", dtype)
        products = of_step * (chunk if chunk == 1 else chunk + 1)
        assert code.in_loop("HGMMA") == code.in_loop("LDSM") == 2 * products
        assert code.in_loop("WARPGROUP", "DEPBAR") == 2 and len(code.loop) <= most
        kinds = [i.kind for i in code.instructions]
        assert kinds.count("UTMALDG") == kinds.count("UBLKCP") == 1
        assert not any(i.name.startswith("LDGSTS") for i in code.instructions)


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


# The low-rank kernels: template arguments in the order of `low_rank_plan.VARIANTS` -> the matrix instructions of a warp
# in a stage of 64 numbers, of the first product and of the second, and the most instructions of either loop.
LOW_RANK = {
    "Li1ELi2ELi1ELi64ELi64E": ((16, 16), (300, 170)),
    "Li1ELi4ELi1ELi128ELi128E": ((16, 16), (280, 170)),
    "Li1ELi4ELi1ELi256ELi128E": ((32, 16), (470, 170)),
    "Li2ELi2ELi2ELi64ELi64E": ((32, 32), (365, 165)),
    "Li2ELi2ELi2ELi128ELi128E": ((64, 64), (435, 235)),
    "Li2ELi4ELi2ELi256ELi256E": ((64, 64), (375, 235)),
    "Li4ELi2ELi2ELi128ELi128E": ((64, 64), (370, 205)),
}


def low_rank_names(arch: str) -> dict[str, str]:
    """Template arguments and dtype -> mangled name."""
    found = {}
    for name in functions(arch):
        match = re.search(r"low_rank_kernelI(13__nv_bfloat16|6__half)NS_12LowRankShapeI((?:Li\d+E)+)", name)
        if match is not None:
            found[f"{match[2]} {match[1]}"] = name
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_low_rank(arch: str):
    """Both loops feed every matrix instruction from two loads at most; 16 bytes a copy and a store; nothing spilled."""
    names = low_rank_names(arch)
    assert set(names) == {f"{shape} {dtype}" for shape in LOW_RANK for dtype in ("13__nv_bfloat16", "6__half")}
    for key, name in names.items():
        code = sass.parse(functions(arch)[name])
        products, most = LOW_RANK[key.split()[0]]
        loops = [body for body in code.loops if any(i.kind == "LDSM" for i in body)]
        assert len(loops) == 2, key
        rows = int(re.findall(r"Li(\d+)E", key)[2])  # of 16, a warp's
        for body, product, limit in zip(loops, products, most, strict=True):
            kinds = [i.kind for i in body]
            assert kinds.count("HMMA") == product and kinds.count("BAR") == 1, key
            assert kinds.count("LDSM") == 4 * rows + product // rows // 2, key
            assert len(body) <= limit, (key, len(body))
        every = [i.name for i in code.instructions]
        assert not any(i.startswith(("LDL", "STL")) for i in every), key
        copies = [i for i in every if i.startswith("LDGSTS")]
        assert copies and all("128" in i and "BYPASS" in i for i in copies), key
        assert all("128" in i for i in every if i.startswith(("STG", "STS"))), key
        kinds = [i.kind for i in code.instructions]
        assert ("ACQBULK" in kinds and "PREEXIT" in kinds) == (arch == "sm_90a"), key


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_low_rank_registers(arch: str):
    """As many thread blocks fit a processor as the plan counts on."""
    module, _ = _extension.load()
    names = {name: key for key, name in low_rank_names(arch).items()}
    assert module is not None
    command = [str(sass.tool("cuobjdump")), "-res-usage", "-arch", arch, str(module.__file__)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", text))
    shapes = dict(zip(LOW_RANK, VARIANTS, strict=True))
    for name, key in names.items():
        registers = shapes[key.split()[0]].registers
        assert registers - 16 <= int(used[name]) <= registers, (key, used[name])


# Row tiles and pieces of a warp -> products of 16 pixels, and the most instructions of a stage of 32 pixels, its copies
# and the cases of its wait, of which one runs, among them.
GRADIENTS = {"Li8ELi2E": (32, 330), "Li4ELi4E": (32, 410), "Li2ELi4E": (16, 360), "Li1ELi4E": (8, 260)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("shape", GRADIENTS)
def test_weight_gradient(shape: str, arch: str):
    """Two steps of 16 pixels a stage, whose operands are transposed by their loads; nothing is spilled."""
    products, most = GRADIENTS[shape]
    found = [text for name, text in functions(arch).items() if f"GradientShapeI{shape}" in name]
    assert len(found) == 2  # both dtypes
    for text in found:
        code = sass.parse(text)
        assert code.in_loop("HMMA") == 2 * products and len(code.loop) <= most
        m_tiles, pieces = (int(shape.split("Li")[i][0]) for i in (1, 2))
        transposed = [i for i in code.loop if i.kind == "LDSM" and ".MT88" in i.name]
        assert len(transposed) == code.in_loop("LDSM") == 2 * (m_tiles + pieces)
        kinds = [i.name for i in code.instructions]
        assert not any(i.startswith(("LDL", "STL")) for i in kinds)
        copies = [i for i in kinds if i.startswith("LDGSTS")]
        assert copies and all("128" in i and "BYPASS" in i for i in copies)
