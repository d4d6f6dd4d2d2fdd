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
from places import PYTHONPATH

pytest.importorskip("triton")
CHECK = Path(__file__).with_name("vgg_compile_check.py")
# By pixels and channels of a tile on four warps, with six stages of one slice: the most instructions outside the main
# loop, without and with a max-pool, the most in the loop, and the programs that share a processor. Triton 3.6 and 3.8
# differ by up to twelve.
LIMITS = {
    (128, 128): (655, 630, 101, 3),
    (128, 64): (530, 515, 102, 5),
    (64, 128): (475, 605, 88, 5),
    (64, 64): (395, 445, 77, 8),
}

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
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "ignore", str(CHECK), "--json", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)["rows"]


def check(row: dict[str, Any]) -> None:
    """The main loop is the one that was planned, little else is executed, and as many programs fit as were planned."""
    name, config = f"{row['layer']} {row['block_shape']}", row["config"]
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    warps, stages = config["num_warps"], config["num_stages"]
    # A stage is the sixteen channels of one block.
    assert (block_k, warps, stages) == (row["block_shape"][1], 4, 6), f"{name}: {config}"
    # A warp takes part in the products of its warpgroup, 64 rows and 16 columns of K each.
    products = block_m // (16 * warps) * (block_k // 16)
    assert row["products"] == [f"HGMMA.64x{block_n}x16.F32.BF16"] * products, f"{name}: {row['products']}"
    copies = (block_m + block_n) * block_k * 2 // (16 * 32 * warps)
    assert row["copies"] == ["LDGSTS.E.BYPASS.128"] * copies, f"{name}: {row['copies']}"
    # A pool window's pixels lie in one thread's registers where a warp has 32 rows of the tile; else threads exchange
    # every accumulator once.
    shuffles = block_m * block_n // (32 * warps) if row["pool"] and block_m < 32 * warps else 0
    assert row["spills"] == 0 and row["shuffles"] == shuffles, f"{name}: {row['spills']} spills, {row['shuffles']}"
    # Before it waits for the kernel in front, a program reads three numbers of its row and its first column.
    assert (row["reads_before_waiting"], row["copies_before_waiting"]) == (4, 0), f"{name}: reads or writes too early"
    assert row["products_after_next_begins"] == 0, f"{name}: the next kernel begins inside the main loop"
    straight, pooled, loop, programs = LIMITS[block_m, block_n]
    straight = pooled if row["pool"] else straight
    assert row["straight"] <= straight, f"{name}: {row['straight']} instructions outside the loop, not {straight}"
    assert row["loop"] <= loop, f"{name}: {row['loop']} instructions in the loop, not {loop}"
    assert row["planned_registers"] - 12 <= row["registers"] <= row["planned_registers"], f"{name}: {row['registers']}"
    assert row["held"] == row["planned"] == programs, f"{name}: {row['held']} programs, planned {row['planned']}"


def test_code_of_an_early_a_deep_and_a_pooled_layer(tmp_path: Path) -> None:
    """One of each kind of tile: 64 channels pooled, 128, and 64 pixels pooled."""
    found = rows(tmp_path, "--layers", "conv1_2, pool", "conv3_2", "conv4_4, pool", "--blocks", "128x16")
    tiles = {(row["config"]["BLOCK_M"], row["config"]["BLOCK_N"]) for row in found}
    assert tiles == {(128, 64), (128, 128), (64, 128)}
    # The two products and four copies of 16 bytes a thread of the largest tile.
    (large,) = (row for row in found if row["layer"] == "conv3_2")
    assert (len(large["products"]), len(large["copies"])) == (2, 4)
    for row in found:
        check(row)


@pytest.mark.slow
def test_code_of_every_layer(tmp_path: Path) -> None:
    found = rows(tmp_path)
    assert len(found) == 22 and {(r["config"]["BLOCK_M"], r["config"]["BLOCK_N"]) for r in found} == set(LIMITS)
    for row in found:
        check(row)
