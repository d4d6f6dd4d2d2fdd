"""Takes networks of torchvision and timm all the way through the package and writes what works as a table.

    python benchmarks/networks.py --out docs/networks.md          # needs: pip install 'slimkernels[onnx]' timm
    python benchmarks/networks.py resnet18 timm/resnet10t         # some of them, to the terminal

Each network (random weights, batch norms of random statistics) is pruned to 80% zero blocks of 16x1, converted with
every layer swapped that a kernel takes, recorded by `graphed`, saved and loaded, traced by torch.jit, and exported to
ONNX and run in ONNX Runtime. Every step's outputs are compared with those of the pruned model. A network runs in a
process of its own; a step that fails is shown with its reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Input sizes: the smallest that the architecture takes.
TORCHVISION = {
    "resnet18": 64,
    "mobilenet_v3_small": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "vit_b_16": 224,
    "swin_t": 64,
    "maxvit_t": 224,
    "fcn_resnet50": 64,
    "fasterrcnn_resnet50_fpn": 96,
}
TIMM = {"resnet10t": 64, "regnety_002": 64, "repvgg_a0": 64, "mixer_s32_224": 224, "deit_tiny_patch16_224": 224}
NETWORKS = {**TORCHVISION, **{f"timm/{name}": size for name, size in TIMM.items()}}
STEPS = ("converted", "plain again", "recorded", "saved and loaded", "traced", "ONNX Runtime")
# Of the largest output: float32 rounding through up to a hundred layers.
TOLERANCE = 1e-3


def build(name: str) -> tuple[Any, Any]:
    """The network with random weights, and an example input."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    size = NETWORKS[name]
    x = torch.randn(1, 3, size, size)
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"), pretrained=False)
    else:
        import torchvision

        options: dict[str, Any] = {"weights": None}
        if name in ("googlenet", "inception_v3"):
            options |= {"init_weights": True, "aux_logits": False}
        if name.startswith(("fcn", "fasterrcnn")):
            options["weights_backbone"] = None
        if name.startswith("fasterrcnn"):
            # Random weights are sure of nothing, and without boxes there would be nothing to compare.
            options |= {"min_size": size, "max_size": size, "box_score_thresh": 0.0}
        model = torchvision.models.get_model(name, **options)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        # Some architectures begin with zeros in their last layer, which would hide all that comes before it.
        if parameter.dim() > 1 and not bool(parameter.detach().any()):
            nn.init.normal_(parameter, std=0.02)
    return model.eval(), [x[0]] if name.startswith("fasterrcnn") else x


def difference(expected: Any, got: Any) -> float:
    """The largest difference of any output over that output's largest value."""
    from torch.utils import _pytree

    # torch.jit and ONNX Runtime return the values of a mapping alone.
    pairs = zip(_leaves(expected, _pytree), _leaves(got, _pytree), strict=True)
    worst, compared = 0.0, False
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"an output of shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        if a.numel():
            compared = compared or bool(a.any())
            worst = max(worst, float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12))
    if not compared:
        raise ValueError("all outputs are empty or zero, so there is nothing to compare")
    if not worst <= TOLERANCE:
        raise ValueError(f"an output differs by {worst:.1e} of the largest")
    return worst


def _leaves(value: Any, pytree: Any) -> list[Any]:
    import torch

    return [leaf.double() for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def one(name: str) -> dict[str, Any]:
    """Every step of one network: the largest difference, or why it failed."""
    import torch

    import slimkernels as sk

    warnings.simplefilter("ignore")
    model, x = build(name)
    sk.finalize_(sk.prune_(model, 0.8, (16, 1)))
    with torch.no_grad():
        expected = model(x)
    example = (x,) if isinstance(x, list) else x
    policy = sk.Policy(min_speedup=0, measure=False, check_model=False)
    fast = sk.convert(model, [example], policy=policy)
    actions = [layer.action for layer in fast.slimkernels_plan.layers]
    result: dict[str, Any] = {
        "name": name,
        "input": NETWORKS[name],
        "swapped": actions.count("swap"),
        "kept": sum(
            layer.action == "keep" and layer.weight_shape is not None for layer in fast.slimkernels_plan.layers
        ),
    }

    def recorded() -> Any:
        return sk.graphed(fast, example)(x)

    def loaded() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            sk.save(fast, Path(folder) / "m.slim.safetensors")
            return sk.load(Path(folder) / "m.slim.safetensors", into=build(name)[0])(x)

    def traced(network: Any = fast) -> Any:
        # Detection returns mappings, which strict tracing refuses of any model.
        program = torch.jit.trace(network, (x,), strict=False, check_trace=not isinstance(x, list))
        return program(x)

    def in_onnx_runtime(network: Any = fast) -> Any:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            try:
                sk.export_onnx(network, path, example)
            except ValueError:
                sk.export_onnx(network, path, example, dynamo=False)
                result["exporter"] = "TorchScript"
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            inputs = x if isinstance(x, list) else [x]
            feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
            return [torch.from_numpy(v) for v in session.run(None, feeds)]

    ways: dict[str, Callable[..., Any]] = {
        "converted": lambda: fast(x),
        "plain again": lambda: sk.to_dense(fast)(x),
        "recorded": recorded,
        "saved and loaded": loaded,
        "traced": traced,
        "ONNX Runtime": in_onnx_runtime,
    }
    for step, run in ways.items():
        try:
            with torch.no_grad():
                result[step] = difference(expected, run())
        except Exception as error:  # a table of what works says what does not
            lines = str(error).strip().splitlines() or [type(error).__name__]
            result[step] = f"{type(error).__name__}: {lines[0]}"
            if step in ("traced", "ONNX Runtime"):
                result[step] += _of_the_original(lambda run=run: difference(expected, run(model)))
    return result


def _of_the_original(run: Callable[[], Any]) -> str:
    """Whether the dense model fails as well."""
    import torch

    try:
        with torch.no_grad():
            run()
    except Exception as error:  # as above
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f" (the dense model, never converted: {type(error).__name__}: {lines[0]})"
    return " (the dense model works)"


def table(results: Iterable[dict[str, Any]], versions: str) -> str:
    """The results as Markdown, reasons below."""
    head = ["network", "input", "swapped", "kept", *STEPS]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * 3 + " --- |" * len(STEPS)]
    reasons: list[str] = []
    for result in results:
        if "error" in result:
            reasons.append(f"{result['name']}: {result['error']}")
            lines.append(f"| {result['name']} | | | | {' | '.join(['no'] * len(STEPS))} |")
            continue
        cells = []
        for step in STEPS:
            value = result[step]
            if isinstance(value, str):
                reasons.append(f"{result['name']}, {step}: {value}")
                cells.append(f"no ({len(reasons)})")
            else:
                cells.append(f"{value:.0e}")
        shown = [result["name"], str(result["input"]), str(result["swapped"]), str(result["kept"]), *cells]
        if result.get("exporter"):
            shown[-1] += f" ({result['exporter']})"
        lines.append(f"| {' | '.join(shown)} |")
    notes = [f"{i}. {reason.replace('|', chr(92) + '|')}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes, *([""] if notes else []), versions])


HEADER = """# Networks

Networks of torchvision and timm (random weights), pruned to 80% zero blocks of 16x1, with every layer swapped that a
kernel takes. Each column is a way to run the result, and its number the largest difference from the pruned dense model,
as a share of the largest output: what rounding leaves. `benchmarks/networks.py` makes this table. It says what works,
not what is fast.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names of the table; all by default")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    parser.add_argument("--results", type=Path, help="keep results here, and do not run again what is in it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    unknown = set(options.networks) - set(NETWORKS)
    if unknown:
        parser.error(f"expected names out of {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    known: dict[str, dict[str, Any]] = {}
    if options.results is not None and options.results.exists():
        lines = map(json.loads, options.results.read_text().splitlines())
        known = {line["name"]: line for line in lines}
    results = []
    for name in options.networks or NETWORKS:
        if name in known:
            results.append(known[name])
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            results.append({"name": name, "error": (done.stderr.strip().splitlines() or ["killed"])[-1]})
        else:
            results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], file=sys.stderr, flush=True)
        if options.results is not None:
            with options.results.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    from importlib.metadata import version

    packages = {r["name"].split("/")[0] for r in results if "/" in r["name"]} | {"torch", "torchvision", "onnxruntime"}
    text = table(results, ", ".join(f"{package} {version(package)}" for package in sorted(packages)) + ".")
    if options.out:
        options.out.write_text(HEADER + text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
