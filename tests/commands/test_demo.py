"""The demo end to end, much reduced: what it writes is complete, consistent and loadable."""

from __future__ import annotations

import json
import math

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

import slimkernels as sk
from slimkernels.cli import app as cli
from slimkernels.cli.demo import BATCHES, SPARSITY, DemoResult, _same, run_demo
from slimkernels.cli.plots import demo_figure
from slimkernels.cli.weights import load_model
from slimkernels.data import digits_loaders
from slimkernels.models import vgg_digits


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    lines: list[str] = []
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = run_demo(folder / "out", epochs=2, seconds=0.0, width=16, progress=False, say=lines.append)
    finally:
        torch.set_num_threads(threads)
    return result, folder / "out", lines


def test_the_weights_feed_the_other_commands(demo):
    _, folder, _ = demo
    model, name, classes, description = load_model(folder / "dense.safetensors")
    assert (name, classes, dict(description.options)) == ("vgg_digits", 10, {"width": 16})
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("command", ["explain", "eval"])
@pytest.mark.parametrize("file", ["pruned.slim.safetensors", "low-rank.slim.safetensors"])
def test_the_converted_files_feed_the_other_commands(demo, command, file):
    result, folder, _ = demo
    done = CliRunner().invoke(cli.app, [command, str(folder / file), "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    if command == "eval":
        (entry,) = [entry for entry in result.entries if entry.file == file]
        assert data["accuracy"] == pytest.approx(entry.accuracy, abs=1 / 450)
    else:
        assert data["file_bytes"] == (folder / file).stat().st_size


def test_files(demo):
    result, folder, lines = demo
    assert sorted(path.name for path in folder.iterdir()) == [
        "demo.json",
        "demo.png",
        "dense.safetensors",
        "low-rank.slim.safetensors",
        "pruned.slim.safetensors",
    ]
    told = [line for line in lines if not line.startswith("measured again")]  # as often as the machine is busy
    assert [line[:4] for line in told] == [f"{i}/5 " for i in range(1, 6)]
    for entry in result.entries:
        assert entry.bytes == (folder / entry.file).stat().st_size


def test_json_is_the_result(demo):
    result, folder, _ = demo
    data = json.loads((folder / "demo.json").read_text())
    assert data == json.loads(result.to_json())
    assert data["settings"]["epochs"] == 2 and data["environment"]["torch"] == torch.__version__.split("+")[0]
    assert "1347 training and 450 test" in data["settings"]["data"]


def test_picture(demo):
    _, folder, _ = demo
    pixels = matplotlib.image.imread(folder / "demo.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1400
    colours = {tuple(c) for c in (pixels[::3, ::3, :3].reshape(-1, 3) * 255).round().astype(int)}
    assert {(0x7F, 0x7F, 0x7F), (0xE6, 0x9F, 0x00)} <= colours


def test_the_picture_shows_the_difference_and_says_of_what(demo, tmp_path, monkeypatch):
    """The axis of accuracies ends where they do; model, machine and the limits of each speed-up can be read."""
    result, folder, _ = demo
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: seen.append(self))
    demo_figure(DemoResult.from_json((folder / "demo.json").read_text()), tmp_path / "x.png")
    (figure,) = seen
    _, accuracy, latency = figure.axes
    low, high = accuracy.get_ylim()
    shown = [100 * entry.accuracy for entry in result.entries if entry.name != "pruned, masked"]
    assert low < min(shown) and high == 100 and low > 100 - 4 * (100 - min(shown))
    title = figure.get_suptitle()
    assert result.environment["cpu"] in title and "million parameters" in title
    texts = " ".join(text.get_text() for text in latency.texts)
    entry = result.entries[2]
    assert f"{entry.speedup[64]:.1f}x ({entry.speedup_low[64]:.1f} to {entry.speedup_high[64]:.1f})" in texts


def test_numbers(demo):
    result, _, _ = demo
    entries = {entry.name: entry for entry in result.entries}
    assert list(entries) == ["dense", "pruned, masked", "pruned, converted", "low-rank, converted"]
    assert entries["pruned, masked"].accuracy == pytest.approx(entries["pruned, converted"].accuracy, abs=1 / 450)
    assert all(entry.accuracy > 0.5 for entry in entries.values())
    for entry in entries.values():
        assert set(entry.latency) == set(entry.speedup) == set(BATCHES)
        for batch in BATCHES:
            row = entry.latency[batch]
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["n"] >= 5
            expected = entries["dense"].latency[batch]["p50_ms"] / row["p50_ms"]
            assert math.isclose(entry.speedup[batch], expected, rel_tol=1e-9)
    assert entries["dense"].max_abs_difference is None
    assert 0 <= entries["pruned, converted"].max_abs_difference < 1e-2


def test_layers(demo):
    result, _, _ = demo
    layers = {layer.name: layer for layer in result.layers}
    assert layers["features.0"].block_sparsity == layers["classifier.3"].block_sparsity == 0
    pruned = [layers[f"features.{i}"] for i in (3, 7, 10, 14, 17)]
    assert all(layer.block_sparsity == pytest.approx(SPARSITY, abs=0.005) for layer in pruned)
    assert all(layer.action in ("swap", "keep") and layer.reason for layer in layers.values())
    assert "features.17" in result.report


def test_written_models_load_elsewhere(demo):
    result, folder, _ = demo
    test = digits_loaders()[1]
    for entry in result.entries:
        if entry.name.endswith("converted"):
            model = sk.load(folder / entry.file, into=vgg_digits(width=16))
            assert sk.evaluate(model, test) == pytest.approx(entry.accuracy, abs=1 / 450)


def test_a_wrong_conversion_is_refused():
    torch.manual_seed(0)
    model, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    inputs = {2: torch.randn(2, 4)}
    assert _same("pruned", model, model, inputs) == 0
    with pytest.raises(RuntimeError, match="converted pruned model differs"):
        _same("pruned", model, other, inputs)
    with torch.no_grad():
        other.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="differs from the compressed one by nan"):
        _same("pruned", model, other, inputs)


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="run_demo: expected epochs >= 1"):
        run_demo(tmp_path / "out", epochs=0)
    assert not (tmp_path / "out").exists()
