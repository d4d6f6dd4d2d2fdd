"""Every command through its options: the flow train -> compress -> convert -> explain, JSON, errors and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import slimkernels as sk
from slimkernels.cli import app as cli
from slimkernels.cli.bench import run_bench
from slimkernels.cli.weights import load_model, write_weights
from slimkernels.data import digits_loaders
from slimkernels.models import vgg_digits

COMMANDS = ["demo", "info", "train", "compress", "distill", "convert", "explain", "tune", "bench", "reproduce"]


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def run_json(*arguments: object) -> dict:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Weights of a digits VGG after one epoch."""
    out = tmp_path_factory.mktemp("cli") / "teacher.safetensors"
    data = run_json("train", "--out", out, "--epochs", 1, "--lr", 0.02, "--batch-size", 32)
    assert data["file"] == str(out) and data["bytes"] == out.stat().st_size
    assert data["parameters"] == 1_214_410 and len(data["epochs"]) == 1
    assert data["accuracy"] == data["epochs"][0]["val_accuracy"] > 0.3
    return out


def test_help_lists_the_commands():
    text = run("--help").stdout
    assert all(f" {command} " in text for command in COMMANDS)
    for command in COMMANDS:
        assert "--json" in run(command, "--help").stdout


def test_version():
    assert run("--version").stdout == f"slimkernels {sk.__version__}\n"


def test_info():
    data = run_json("info")
    assert "bsr_conv2d__reference" in data["kernels"]
    assert "bsr_conv2d__reference" in run("info").stdout


def test_trained_weights_are_those_of_the_report(trained):
    model, name, classes, description = load_model(trained)
    assert (name, classes) == ("vgg_digits", 10)
    assert sk.evaluate(model, digits_loaders()[1]) == pytest.approx(description.notes["accuracy"])


def test_prune_convert_explain(trained, tmp_path):
    pruned, fast = tmp_path / "pruned.safetensors", tmp_path / "fast.slim.safetensors"
    data = run_json("compress", trained, "--sparsity", 0.75, "--out", pruned)
    model = load_model(pruned)[0]
    assert data["accuracy"] is None and data["epochs"] == []
    assert data["nonzero"] == sum(int(p.count_nonzero()) for p in model.parameters()) < 0.4 * data["parameters"]
    data = run_json("convert", pruned, "--batch", 1, "--batch", 8, "--out", fast)
    assert data["bytes"] == fast.stat().st_size and data["plan"]["decided"] == "measured"
    assert len(data["plan"]["layers"][0]["dense_ms"]) == 2
    x = torch.randn(3, 1, 8, 8)
    converted = sk.load(fast, into=vgg_digits())
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-3, atol=1e-3)
    rows = run_json("explain", fast)["rows"]
    assert {"features.17", "classifier.0"} <= {row["name"] for row in rows}
    text = run("explain", fast).stdout
    assert "features.17" in text and "layers swapped" in text
    small = tmp_path / "small.slim.safetensors"
    compact = run_json("convert", pruned, "--without-shapes", "--values", "int4", "--out", small)
    report = run_json("explain", small)
    assert compact["bytes"] == report["file_bytes"] == small.stat().st_size < 0.3 * data["bytes"]
    assert 0.5 < sum(report["file_bound"].values()) / compact["bytes"] < 1
    assert sk.load(small)(x).shape == (3, 10)


def test_default_output_names(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("compress", trained, "--method", "svd", "--rank", 16, "--layer", "features.17")
    assert os.listdir(tmp_path) == ["teacher.compressed.safetensors"]
    text = run("convert", "teacher.compressed.safetensors", "--without-shapes").stdout
    assert "wrote teacher.slim.safetensors" in text and "without shapes" in text
    assert "features.17" in run("explain", "teacher.slim.safetensors").stdout


def test_factorized_file_rebuilds_its_layers(trained, tmp_path):
    out = tmp_path / "low.safetensors"
    run("compress", trained, "--method", "tucker2", "--energy", 0.5, "--exclude", "features.0", "--out", out)
    model = load_model(out)[0]
    assert isinstance(model.features[17], sk.nn.LowRankConv2d) and model.features[17].kind == "tucker2"
    assert isinstance(model.classifier[0], sk.nn.LowRankLinear) and isinstance(model.features[0], torch.nn.Conv2d)


@pytest.mark.parametrize("teach", ["--teach", "--no-teach"])
def test_compress_recovers_accuracy(trained, tmp_path, teach):
    out = tmp_path / "pruned.safetensors"
    recipe = ["--data", "digits", "--epochs", 1, "--lr", 0.01, "--batch-size", 32, teach]
    data = run_json("compress", trained, "--sparsity", 0.5, *recipe, "--out", out)
    assert data["accuracy"] > 0.5
    weight = load_model(out)[0].features[17].weight
    assert 1 - weight.count_nonzero() / weight.numel() == pytest.approx(0.5)


def test_compress_trains_the_values_that_convert_writes(trained, tmp_path):
    out, fast = tmp_path / "rounded.safetensors", tmp_path / "fast.slim.safetensors"
    recipe = ["--data", "digits", "--epochs", 1, "--quantize", "int4", "--quantize-begin", 0.3]
    data = run_json("compress", trained, "--sparsity", 0.5, *recipe, "--out", out)
    run_json("convert", out, "--without-shapes", "--values", "int4", "--out", fast)
    rounded = sk.load(fast)
    assert sk.evaluate(rounded, digits_loaders()[1]) == pytest.approx(data["accuracy"], abs=0.003)
    weight, expected = sk.to_dense(rounded).classifier[0].weight, load_model(out)[0].classifier[0].weight
    assert torch.equal(weight, expected) and all(len(row.unique()) <= 15 for row in weight)


def test_distill_prunes_gradually_and_resumes(trained, tmp_path):
    out, state = tmp_path / "student.safetensors", tmp_path / "run.pt"
    common = ["--student", "vgg_digits", "--epochs", 1, "--sparsity", 0.5, "--checkpoint", state, "--resume"]
    first = run_json("distill", trained, *common, "--out", out)
    assert state.exists()
    before = out.read_bytes()
    again = run_json("distill", trained, *common, "--out", out)
    assert again["epochs"] == first["epochs"] and out.read_bytes() == before
    weight = load_model(out)[0].features[17].weight
    assert 1 - weight.count_nonzero() / weight.numel() == pytest.approx(0.5)
    result = run("distill", trained, *common, "--temperature", 9, code=1)
    assert "expected temperature=4.0 as in the checkpoint" in result.stderr


def mixed_images(root: Path) -> None:
    """Two classes of colour images of two sizes, eight of each for training and for the test."""
    for split in ("train", "test"):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(8):
                pixels = torch.randint(100 * label, 100 * label + 100, ((9, 12) if i % 2 else (10, 10)) + (3,))
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / split / f"class{label}" / f"{i}.png")


def test_images_of_several_sizes_are_scaled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed_images(Path("mixed"))
    common = ["--data", "mixed", "--image-size", 32]
    run("train", "--model", "nin_cifar", "--option", "width=0.1", *common, "--epochs", 1, "--batch-size", 8)
    found = run_json("eval", "nin_cifar.safetensors", *common)
    assert found["images"] == 16 and 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "vgg20"], "models.build: expected one of "),
        (["train", "--data", "nowhere"], "got nowhere, which does not exist"),
        (["train", "--resume"], "--resume: expected --checkpoint FILE"),
        (
            ["train", "--model", "nin_cifar"],
            "train: expected images that the model takes, got 1x8x8 in digits (RuntimeError",
        ),
        (["train", "--image-size", 16], "loaders_for: expected size=None for digits, whose images have one size"),
        (["train", "--data", "cifar10:x", "--image-size", 16], "--image-size: expected none for cifar10:x"),
        (["train", "--data", "MIXED"], "or a size to scale all to (size=, --image-size), got 12x9 in "),
        (["eval", "TRAINED", "--data", "MIXED", "--image-size", 8], "got 3x8x8 in mixed (RuntimeError: "),
        (["compress", "TRAINED", "--data", "MIXED", "--image-size", 8], "compress: expected images that "),
        (["distill", "TRAINED", "--data", "MIXED", "--image-size", 32], "distill: expected images that "),
        (["compress", "nowhere.pt"], "nowhere.pt, which does not exist"),
        (["compress", "TRAINED", "--method", "magic"], "expected method prune, svd, tai or tucker2, got 'magic'"),
        (["compress", "TRAINED", "--sparsity", 1.5], "prune_: expected sparsity in [0, 1), got 1.5"),
        (["compress", "TRAINED", "--block-shape", "16"], "--block-shape: expected two positive numbers"),
        (["compress", "TRAINED", "--block-shape", "0x1"], "--block-shape: expected two positive numbers"),
        (["compress", "TRAINED", "--method", "svd"], "factorize_: expected one of rank, energy"),
        (["compress", "TRAINED", "--layer", "features.18"], "prune_: expected layers"),
        (["compress", "TRAINED", "--layer", "features.71"], "near matches: features.7, features.17"),
        (["compress", "TRAINED", "--method", "svd", "--rank", 999, "--layer", "features.17"], "expected rank in [1, "),
        (["compress", "TRAINED", "--gradual"], "expected --method prune and --data with --gradual"),
        (["compress", "TRAINED", "--quantize", "int4"], "expected --data with --quantize"),
        (["distill", "TRAINED", "--quantize", "int2"], "expected values in bf16, int8, int4, got 'int2'"),
        (["compress", "TRAINED", "--option", "width"], "--option: expected NAME=VALUE"),
        (["train", "--option", "widht=8"], "models.build: expected options of vgg_digits among"),
        (["train", "--precision", "fp64"], "TrainConfig: expected precision to be one of"),
        (["train", "--precision", "fp16"], "fp16"),
        (["train", "--ema", 1.5], "TrainConfig: expected ema_decay in (0, 1)"),
        (["train", "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["train", "--data", "cifar10:"], "--data: expected a folder as in cifar10:DIR"),
        (["train", "--data", "BROKEN"], "cat/1.png"),
        (["distill", "TRAINED", "--student", "vgg_digits", "--student-weights", "FIVE"], "same number of classes"),
        (["distill", "FIVE", "--student", "vgg_digits"], "expected labels in [0, 5)"),
        (["reproduce", "slimnet"], "a recipe among ranking, slimnets, got 'slimnet'; did you mean slimnets"),
        (["reproduce", "--preset", "papers"], "did you mean paper"),
        (["reproduce", "--preset", "cpu"], "expected data for preset 'cpu'"),
        (["reproduce", "--preset", "smoke", "--only", "teecher"], "near matches: teacher"),
        (["compress", "TRAINED", "--model", "nin_cifar"], "expected model 'vgg_digits' as"),
        (["convert", "TRAINED", "--values", "int2"], "--values in fp32, bf16, int8, int4, got 'int2'"),
        (["convert", "TRAINED", "--size", "big"], "--size: expected two positive numbers"),
        (["distill", "TRAINED", "--student", "vgg_digits", "--temperature", 0], "distill: expected temperature > 0"),
        (["explain", "TRAINED"], "expected"),
        (["bench", "--sparsity", 2], "run_bench: expected sparsities in [0, 1)"),
    ],
)
def test_errors_are_one_line(arguments, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "FIVE" in arguments:
        write_weights(vgg_digits(5), "five.safetensors", name="vgg_digits", num_classes=5)
    if "BROKEN" in arguments:
        for file in ("train/cat/1.png", "test/cat/1.png"):
            Path("broken", file).parent.mkdir(parents=True)
            Path("broken", file).write_bytes(b"no image")
    if "MIXED" in arguments:
        mixed_images(Path("mixed"))
    files = {"TRAINED": trained, "FIVE": "five.safetensors", "BROKEN": "broken", "MIXED": "mixed"}
    result = run(*[files.get(argument, argument) for argument in arguments], code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("slimkernels: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("command", ["compress", "train"])
def test_a_full_disk_loses_nothing(command, trained, tmp_path):
    """Writing fails beyond 50 kB: one line, exit code 1, and the file that was there is whole."""
    import resource

    out, state = tmp_path / "out.safetensors", tmp_path / "run.pt"
    out.write_bytes(b"before")
    arguments = ["compress", trained, "--out", out]
    if command == "train":
        arguments = ["train", "--epochs", 1, "--option", "width=16", "--out", out, "--checkpoint", state]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        result = run(*arguments, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    *before, error = result.stderr.splitlines()
    assert error.startswith("slimkernels: ") and all(
        line.startswith("fine_tune: epoch 1 of 1: loss") for line in before
    )
    assert "too large" in error.lower() or "write" in error
    assert os.listdir(tmp_path) == ["out.safetensors"] and out.read_bytes() == b"before"


def test_model_options_travel_with_the_weights(tmp_path):
    out, small = tmp_path / "narrow.safetensors", ["--option", "width=8", "--epochs", 1, "--batch-size", 256]
    data = run_json("train", *small, "--log-dir", tmp_path / "log", "--ema", 0.9, "--out", out)
    assert data["accuracy"] == data["epochs"][-1]["ema_val_accuracy"]
    assert (tmp_path / "log" / "epochs.csv").exists() and (tmp_path / "log" / "steps.csv").exists()
    model, _, _, description = load_model(out)
    assert description.options == {"width": 8} and model.features[0].out_channels == 8
    pruned = tmp_path / "pruned.safetensors"
    run("compress", out, "--sparsity", 0.5, "--block-shape", "8x1", "--out", pruned)
    assert load_model(pruned)[0].features[0].out_channels == 8
    assert run("compress", out, "--option", "width=16", code=1).stderr.startswith("slimkernels: load_model: expected")


def test_other_ranks_stay_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("info").stdout == ""
    assert run("train", "--resume", code=1).stderr.startswith("slimkernels: rank 1: --resume")


def test_debug_shows_where():
    result = CliRunner().invoke(cli.app, ["--debug", "train", "--resume"])
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("arguments", [["fly"], ["train", "--epochs", "0"], ["bench", "--batch", "0"], ["explain"]])
def test_wrong_usage_is_code_2(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_interrupt_is_code_130(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimkernels.cli.info.report", interrupted)
    assert run("info", code=130).stderr == "slimkernels: interrupted\n"


BENCH = ("bench", "--model", "vgg_digits", "--seconds", 0, "--no-compile")


def test_bench_rows():
    data = run_json(*BENCH, "--batch", 1, "--batch", 4, "--sparsity", 0.75, "--no-peers")
    assert data["weights"] == "random, pruned by magnitude" and data["environment"]["threads"] >= 1
    assert [(row["batch"], row["sparsity"], row["block_shape"]) for row in data["rows"]] == [
        (1, 0.75, [16, 1]),
        (4, 0.75, [16, 1]),
    ]
    for row in data["rows"]:
        assert row["baseline"] in row["baselines"] and row["dense"]["p50_ms"] == min(row["baselines"].values())
        assert set(row["baselines"]) == {"eager channels_last", "eager contiguous"} and row["recorded"]
        assert row["speedup"] == pytest.approx(row["dense"]["p50_ms"] / row["converted"]["p50_ms"])
        assert row["speedup_low"] < row["speedup"] < row["speedup_high"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["converted"]["p50_ms"])


def test_bench_table():
    text = run(*BENCH, "--batch", 2, "--sparsity", 0.5, "--no-peers", "--modules").stdout
    told = " ".join(text.split())
    assert "weights random, pruned by magnitude" in told and "50.0%, 16x1" in told and "eager" in told
    assert "ours is called module by module" in told and "batch 2: eager c" in told


def test_the_rows_of_the_readme_are_the_benchs():
    """Each row of the README's table of a CPU is one of `bench --readme`, in the same words."""
    from slimkernels.cli.bench import README_CASES, SLIMNETS_RANKS

    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    table = text[text.index("| batch | zero blocks |") :].split("\n\n")[0].splitlines()[2:]
    rows = [tuple(part.strip() for part in line.strip("|").split("|")) for line in table]
    assert [int(row[0]) for row in rows] == [case.batch for case in README_CASES]
    for row, case in zip(rows, README_CASES, strict=True):
        words = case.compression.replace("1x1", "unstructured").replace(".0%", "%")
        assert row[1].startswith(words), (row, case)
    assert len(SLIMNETS_RANKS) == 16
    assert "--readme without --model" in run("bench", "--readme", "--batch", 2, code=1).stderr


def test_low_rank_cases_are_of_a_vgg19():
    from slimkernels.cli.bench import Case

    with pytest.raises(ValueError, match=r"run_bench: expected a network of 16 convolutions, a VGG-19, .* got 6"):
        run_bench("vgg_digits", cases=[Case(1, 0.0, None)], seconds=0, compile=False)


def test_engines_that_are_not_installed_are_named(monkeypatch):
    from slimkernels.cli import peers

    def engine(model, x):
        with torch.no_grad():
            out = model(x)
        return lambda: out

    model, x, notes = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)).eval(), torch.randn(1, 1, 4, 4), []
    table = {
        "there": (engine, ("torch",)),
        "absent": (engine, ("torch", "no_such_engine")),
        "broken": (lambda model, x: 1 / 0, ()),
        "wrong": (lambda model, x: engine(lambda y: model(y) + 1, x), ()),
    }
    monkeypatch.setattr(peers, "_PEERS", table)
    found = peers.cpu_peers(model, x, notes.append)
    assert list(found) == ["there"] and len(notes) == 3
    assert notes[0] == "absent left out: not installed (pip install no_such_engine)"
    assert notes[1] == "broken left out: ZeroDivisionError: division by zero"
    assert notes[2].startswith("wrong left out: AssertionError: Tensor-likes are not close")


@pytest.mark.parametrize("engine", ["OpenVINO", "ONNX Runtime"])
def test_installed_engines_compute_what_torch_does(engine):
    from slimkernels.cli import peers

    for package in peers._PEERS[engine][1]:
        pytest.importorskip(package)
    model, notes = vgg_digits(width=8).eval(), []
    found = peers.cpu_peers(model, torch.randn(2, 1, 8, 8), notes.append)
    assert engine in found, notes


class Times:
    """Timings of `timing.interleaved` as told: dense is ``factor`` times as slow, once for each factor, then 2.

    The quick reading of the baselines alone, which comes first, is not one of them.
    """

    def __init__(self, *factors):
        self.factors, self.seconds = list(factors), []

    def __call__(self, callables, seconds, **rest):
        from slimkernels import timing

        assert rest["pause"] > 0 and rest["settle"] > 0
        quick, factor = not any("converted" in name for name in callables), 2.0
        if not quick:
            self.seconds.append(seconds)
            factor = self.factors.pop(0) if self.factors else 2.0

        def of(name):
            p50 = 1e-3 if "converted" in name else 1e-3 * factor
            p50 *= 1000 if quick and name == "eager contiguous" else 1  # so far behind that it never takes part
            return timing.Timing(p50, p50, p50, 5, (p50,) * 5)

        return {name: of(name) for name in callables}


@pytest.mark.parametrize(("factors", "budgets", "told"), [((87.0,), [1, 2], 0), ((491.0,) * 3, [1, 2, 3], 1)])
def test_implausible_ratios_are_measured_again(factors, budgets, told, monkeypatch):
    """At 75% zeros four times the saved work is 16x: 87x is the machine's doing."""
    times, lines = Times(*factors), []
    monkeypatch.setattr("slimkernels.cli.comparison.timing.interleaved", times)
    settings = {"sparsities": [0.75], "batches": [1], "compile": False, "peers": False, "seconds": 1}
    result = run_bench("vgg_digits", **settings, say=lines.append)
    assert times.seconds == budgets and len(result.notes) == told
    again = [line for line in lines if line.startswith("measured again")]
    assert len(again) == len(budgets) - 1 and "is more than the saved work explains (at most 16x)" in again[0]
    (row,) = result.rows
    assert row.speedup == pytest.approx(2.0 if not told else 491.0) and row.speedup_low < row.speedup
    assert row.baseline == "eager channels_last" and row.baselines["eager contiguous"] == pytest.approx(2000.0)
    if told:
        assert result.notes[0].startswith("batch 1, 75.0%, 16x1: 491.00x (") and "busy" in result.notes[0]


def test_wide_ratios_are_in_doubt():
    from slimkernels.cli.comparison import doubt
    from slimkernels.conversion.spread import Ratio

    assert doubt(Ratio(1.9, 2.0, 2.1), 16) is None
    assert doubt(Ratio(1.0, 2.0, 3.0), 16) == "2.00x (1.00x to 3.00x) is too wide a range"


def test_bench_refuses_a_wrong_conversion(monkeypatch):
    monkeypatch.setattr(
        "slimkernels.cli.bench.convert", lambda model, **kwargs: torch.nn.Sequential(model, torch.nn.ReLU())
    )
    with pytest.raises(RuntimeError, match=r"with 50\.0%, 16x1 the converted model"):
        run_bench("vgg_digits", sparsities=[0.5], batches=[1], seconds=0, compile=False)


def test_demo_table(tmp_path):
    from slimkernels.cli.demo import DemoResult, Entry
    from slimkernels.cli.tables import demo_table

    latency = {1: {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "n": 9}}
    entry = Entry("pruned, converted", 0.975, 123_456, "x", latency, {1: 4.5}, 1e-6, {"bsr": 3}, {1: 4.25}, {1: 4.8})
    facts = {"threads": 2, "cpu": "a CPU"}
    result = DemoResult([entry], [], "out", "out/demo.png", "", {"data": "digits"}, facts, ["a speed-up in doubt"])
    with pytest.MonkeyPatch.context() as patch:
        import io

        stream = io.StringIO()
        patch.setattr(sys, "stdout", stream)
        demo_table(result)
    text = stream.getvalue()
    told = " ".join(text.replace("│", " ").split())
    assert all(part in told for part in ("97.50%", "123 kB", "2.000 4.50x", "3 block-sparse", "1.0e-06", "a CPU"))
    assert "(4.25x to 4.80x)" in told and "note: a speed-up in doubt" in told


def test_the_real_command(tmp_path):
    command = [sys.executable, "-m", "slimkernels.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "info", "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["kernels"]
    done = subprocess.run(
        [*command, "explain", "nowhere.slim.safetensors"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("slimkernels: ") and "nowhere.slim.safetensors" in done.stderr


def test_starting_the_command_imports_little():
    code = """
import sys
import slimkernels.cli
late = {"torchvision", "sklearn", "matplotlib", "safetensors", "triton"} & set(sys.modules)
assert not late, late
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_epochs_are_shown_without_a_terminal_unless_a_machine_reads(tmp_path):
    small = ["train", "--option", "width=8", "--epochs", 2, "--batch-size", 256, "--out", tmp_path / "w.safetensors"]
    lines = run(*small).stderr.splitlines()
    assert [line[:23] for line in lines] == ["fine_tune: epoch 1 of 2", "fine_tune: epoch 2 of 2"]
    assert run(*small, "--json").stderr == ""


def test_a_run_in_the_checkpoint_is_not_overwritten_unasked(tmp_path):
    out, state = tmp_path / "w.safetensors", tmp_path / "run.pt"
    small = ["train", "--option", "width=8", "--batch-size", 256, "--out", out, "--checkpoint", state]
    run(*small, "--epochs", 2)
    whole = state.read_bytes()
    error = run(*small, "--epochs", 1, code=1).stderr
    assert "run.pt holds a run already" in error and "--resume" in error and state.read_bytes() == whole
    assert len(run_json(*small, "--epochs", 2, "--resume")["epochs"]) == 2


def test_where_nothing_can_be_written_nothing_is_trained(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("train", "--epochs", 1, "--out", tmp_path / "file" / "w.safetensors", code=1)
    assert (
        result.stderr.startswith("slimkernels: --out: expected a file that can be written")
        and "epoch" not in result.stderr
    )
