"""The machine code of VGG-19's pruned layers for sm_90, and the plan of their default tiles held against it.

Compiling happens in a process of its own (vgg_compile_check.py): a process with TRITON_INTERPRET=1 cannot compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sass

pytest.importorskip("triton")
CHECK = Path(__file__).with_name("vgg_compile_check.py")
# (pixels, channels, warps) of a tile: the most instructions outside the main loop of a pipeline of two stages, what a
# further stage may add, and the most in the loop. Triton 3.6 and 3.8 differ by up to ten.
LIMITS = {
    (128, 64, 4): (480, 110, 170),
    (128, 128, 8): (420, 75, 120),
    (128, 128, 4): (590, 110, 165),
    (256, 128, 8): (640, 80, 160),
}
# Programs that share a processor, by block height and layer; the others' are those of their family's line.
HELD = {
    (128, "conv1_2, pool"): 4,
    (128, "conv4_2"): 1,
    (128, "conv4_4, pool"): 1,
    (128, "conv5_1"): 1,
    (128, "conv5_4, pool"): 1,
    (64, "conv1_2, pool"): 4,
    (64, "conv2_1"): 4,
}
USUALLY_HELD = {128: 2, 64: 3}

LISTING = """
	code for sm_90
		Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                         /* 0x00000a00ff017b82 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64] ;   /* 0x0000000002047fae */
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64], P1 ; /* 0x0000000002047fae */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x01e0000008187df0 */
        /*0040*/             @!UP1 UIADD3 UR4, UR4, 0x40, URZ ;                   /* 0x0000004004047890 */
        /*0050*/               @P2 BRA 0x20 ;                                     /* 0xffffffe800c02947 */
        /*0060*/                   WARPSYNC.ALL ;                                 /* 0x0000000000007948 */
        /*0070*/               @P3 BRA 0x10 ;                                     /* 0xffffffe800c02947 */
        /*0080*/                   EXIT ;                                         /* 0x000000000000794d */
        /*0090*/                   BRA 0x90;                                      /* 0xfffffffc00fc7947 */
        /*00a0*/                   NOP;                                           /* 0x0000000000007918 */
"""


def test_the_loop_is_told_from_the_code_around_it() -> None:
    kernel = sass.parse(LISTING)
    assert [i.address for i in kernel.loop] == [0x20, 0x30, 0x40, 0x50]
    assert [i.kind for i in kernel.straight] == ["LDC", "LDGSTS", "WARPSYNC", "BRA", "EXIT"]
    assert (
        kernel.in_loop("LDGSTS", "128") == kernel.outside("LDGSTS", "128") == 1 and kernel.in_loop("LDGSTS", "64") == 0
    )
    assert kernel.loop[0].predicate == "!P0" and kernel.loop[0].operands == "[R4], desc[UR6][R2.64], P1"
    assert kernel.kinds()[0]["HGMMA"] == 1 and sass.parse("").loop == ()


def rows(cache: Path, *flags: str) -> list[dict[str, Any]]:
    """Rows of vgg_compile_check.py, compiled afresh."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(CHECK.parent.parent)}
    command = [sys.executable, "-W", "ignore", str(CHECK), "--json", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)["rows"]


def check(row: dict[str, Any]) -> None:
    """The main loop is the one that was planned, little else is executed, and as many programs fit as were planned."""
    name, config = f"{row['layer']} {row['block_shape']}", row["config"]
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    warps, stages = config["num_warps"], config["num_stages"]
    # A warp takes part in the products of its warpgroup, 64 rows and 16 columns of K each.
    products = block_m // (16 * warps) * (block_k // 16)
    assert row["products"] == [f"HGMMA.64x{block_n}x16.F32.BF16"] * products, f"{name}: {row['products']}"
    copies = (block_m + block_n) * block_k * 2 // (16 * 32 * warps)
    assert row["copies"] == ["LDGSTS.E.BYPASS.128"] * copies, f"{name}: {row['copies']}"
    assert row["spills"] == 0 and row["shuffles"] == 0, f"{name}: {row['spills']} spills, {row['shuffles']} shuffles"
    straight, a_stage, loop = LIMITS[block_m, block_n, warps]
    straight += (stages - 2) * a_stage
    assert row["straight"] <= straight, f"{name}: {row['straight']} instructions outside the loop, not {straight}"
    assert row["loop"] <= loop, f"{name}: {row['loop']} instructions in the loop, not {loop}"
    assert row["registers"] <= row["planned_registers"], f"{name}: {row['registers']}, not {row['planned_registers']}"
    height = row["block_shape"][0]
    assert row["held"] == row["planned"] == HELD.get((height, row["layer"]), USUALLY_HELD[height]), name


def test_code_of_an_early_a_deep_and_a_pooled_layer(tmp_path: Path) -> None:
    """One of each kind of tile: 64 channels, 128, 128 pooled; 256 pixels is left to the slow run."""
    found = rows(tmp_path, "--layers", "conv1_2, pool", "conv3_2", "conv3_4, pool", "--blocks", "128x16")
    assert len(found) == 3 and {row["pool"] for row in found} == {True, False}
    for row in found:
        check(row)


@pytest.mark.slow
def test_code_of_every_layer(tmp_path: Path) -> None:
    found = rows(tmp_path)
    assert len(found) == 22
    for row in found:
        check(row)
