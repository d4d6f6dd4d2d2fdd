"""Are the kernels that the rows time right? Each distinct layer at its full batch, by the kernel and configuration that
the rows run, against float64; those of the headline by the kernel of one position a tile, too.

The reference is the dense convolution in float64 on the device (no TF32 anywhere) under the bound of
`slimkernels.testing`; three images of it are computed on the CPU as well. Output memory holds NaN before every run;
three runs and one replay of a CUDA graph must agree bit for bit. One failing layer does not stop the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from gpu_check import layers, options, rows
from gpu_check.summary import config_text
from slimkernels.capture import capture
from slimkernels.dispatch.select import KernelChoice
from slimkernels.kernels.problems import ConvProblem, FusedConvProblem, problem_json
from slimkernels.testing import compare

RUNS = 3


def check(p: ConvProblem | FusedConvProblem, choice: KernelChoice | None = None) -> dict[str, Any]:
    """The row of one problem; ``match`` is True where everything agreed, ``errors`` says what did not."""
    bench = layers.Bench(p)
    choice = choice or layers.choice_of(p)
    row: dict[str, Any] = {
        "suite": "correctness", "name": layers.layer_name(p), "key": layers.choice_key(p, choice.name, choice.config),
        "problem": problem_json(p), "batch": p.n, "block_shape": list(p.block_shape),
        "stored_share": round(getattr(p, "stored_share", 1.0), 4), "kernel": choice.name,
        "config": dict(choice.config), "match": False,
    }  # fmt: skip
    errors: list[str] = []
    with layers.poisoned_memory():
        runs = [bench.call(choice) for _ in range(RUNS)]
        if not all(torch.equal(y, runs[0]) for y in runs[1:]):
            errors.append(f"{RUNS} runs differ")
        if p.device == "cuda" and not torch.equal(replayed(bench, choice), runs[0]):
            errors.append("the replay of a CUDA graph differs")
    result = bench.compare(runs[0])
    row |= {"worst_over_bound": result.worst_over_bound, "rms_ratio": result.rms_ratio}
    if not result.passed:
        errors.append(result.message)
    some = sorted({0, p.n // 2, p.n - 1})
    expected, bound = bench.reference(some, "cpu")
    exact = compare(runs[0][some].cpu(), expected, **bound, name="on the CPU")
    if not exact.passed:
        errors.append(exact.message)
    return row | {"match": not errors, "errors": errors}


def replayed(bench: layers.Bench, choice: KernelChoice) -> torch.Tensor:
    """The output of one replay of a CUDA graph."""
    graph, y = capture(lambda: bench.call(choice), warm_up_calls=1)
    graph.replay()
    return y


def checked(p: ConvProblem | FusedConvProblem, choice: KernelChoice | None = None) -> dict[str, Any]:
    """`check`, an exception being a row that does not match."""
    try:
        return check(p, choice)
    except Exception as error:  # one layer that cannot run must not hide the others
        return {"suite": "correctness", "name": layers.layer_name(p), "problem": problem_json(p), "batch": p.n,
                "block_shape": list(p.block_shape), "match": False,
                "errors": [f"{type(error).__name__}: {error}"[:1000]]}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--names", nargs="*", default=list(layers.FIRST_ROWS), help="of gpu_check.layers.ROWS")
    parser.add_argument("--batch", type=int, default=None, help="instead of the rows' own (for a rehearsal)")
    parsed = parser.parse_args(arguments)
    options.prepare(parsed.device)
    wrong = 0
    for name in parsed.names:
        for p in layers.ROWS[name].every(parsed.device):
            p = layers.at_batch(p, parsed.batch)
            for choice in layers.choices_of(p) if name == "headline" else [None]:
                begun = time.monotonic()
                row = checked(p, choice) | {"row": name, "seconds": time.monotonic() - begun}
                rows.append(parsed.rows, row)
                wrong += not row["match"]
                verdict = "ok" if row["match"] else "WRONG: " + "; ".join(row["errors"])
                print(f"{name} {row['name']} {row.get('kernel', '')} {config_text(row.get('config', {}))}: {verdict}")
    if wrong:
        raise SystemExit(f"{wrong} layers are wrong")


if __name__ == "__main__":
    main()
