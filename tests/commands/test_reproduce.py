"""`slimkernels reproduce`, small: steps that are skipped, resumed after a kill, measured, and reported."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import slimkernels as sk
from slimkernels.data import digits_loaders
from slimkernels.models import vgg_digits
from slimkernels.recipes import measurement, rows
from slimkernels.recipes.runner import reproduce
from slimkernels.recipes.schema import load_recipe

RECIPE = """
name: small
published:
  - {name: Others, network: VGG-16, compression: 154.25, points: -0.1, counted: bytes, source: a paper}
  - {name: Counted, network: VGG-16, compression: 20, points: -1.5, counted: parameters, source: another}
presets:
  test:
    data: digits
    batch_size: 64
    batches: [1, 8]
    seconds: 0.0
    policy: {repeats: 3, budget_s: 0.002}
    goals: [{rows: taught, compression: 4, points: -100}, {compression: 4, relative_accuracy: 1.5, speedup: 0.001}]
rows:
  - name: teacher
    group: teacher
    model: {name: vgg_digits, width: 16, dropout: 0.0}
    paper: {accuracy: 92.4, compression: 1, speedup: 1, row: VGG-19}
    steps:
      - train: {epochs: 2, lr: 0.05}
  - name: gradual 16x1 75.0%
    group: gradual pruning
    each: {block: [16x1], sparsity: [0.75]}
    from: teacher
    paper: {accuracy: 91.57}
    steps:
      - train: {epochs: 1, lr: 0.02}
        prune: {sparsity: "{sparsity}", block_shape: "{block}", end: 0.5}
  - name: one-shot 16x1 75.0%
    group: one-shot pruning
    each: {block: [16x1], sparsity: [0.75]}
    from: teacher
    steps:
      - prune: {sparsity: "{sparsity}", block_shape: "{block}"}
      - train: {epochs: 1, lr: 0.02, images: 640}
  - name: low rank
    group: low rank
    from: teacher
    steps:
      - factorize: {method: tai, rank: [3, 12, 16, 16, 24, 24], batch_norm: true}
      - finalize
  - name: taught
    group: combination
    each: {sparsity: [0.875]}
    from: one-shot 16x1 75.0%
    seeds: 2
    steps:
      - distill: {epochs: 1, lr: 0.02, images: 320, augment: {crop_padding: 1, padding_mode: reflect, cutout: 2}}
        teacher: teacher
        temperature: 2.0
        prune: {sparsity: "{sparsity}", block_shape: 16x1, scope: global}
        quantize: {values: int4, begin: 0.4}
      - convert: {min_speedup: 0.0, check_model: false}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(recipe, out, **options):
    lines: list[str] = []
    settings = {"preset": "test", "compile": False, "progress": False, **options}
    return reproduce(recipe, out=out, say=lines.append, **settings), lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    report, lines = run(write_recipe(folder), folder / "out")
    return folder, report, lines


def test_report_and_its_files(finished):
    folder, report, _ = finished
    out = folder / "out"
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert {f["file"] for f in report["figures"]} == {"sparsity.png", "loss.png", "pareto.png", "published.png"}
    assert all((out / f["file"]).stat().st_size > 10_000 for f in report["figures"])
    text = (out / "report.md").read_text()
    assert "**scikit-learn digits**, 1,347 training and 450 test images" in text and "91.57" in text
    assert all(row["name"] in text for row in report["rows"]) and "Rows not run yet" not in text
    assert torch.__version__.split("+")[0] in text and "1 to 2 seeds a row" in text


def test_numbers_of_the_rows(finished):
    folder, report, _ = finished
    test = digits_loaders()[1]
    rows = {row["name"]: row for row in report["rows"]}
    teacher = rows["teacher"]
    assert teacher["accuracy"]["mean"] > 0.6 and teacher["accuracy"]["std"] is None and teacher["points"] == 0
    pruned = rows["gradual 16x1 75.0%"]
    assert 0.74 < pruned["conv_sparsity"] <= 0.75 and pruned["parameters"] == teacher["parameters"]
    assert rows["low rank"]["parameters"] < 0.6 * teacher["parameters"]
    assert 0.8 < rows["taught"]["conv_sparsity"] < 0.95, "87.5% of all layers together"
    for row in report["rows"]:
        own = row["measurement"]
        file = folder / "out" / own["file"]
        assert own["bytes"] == file.stat().st_size and own["smallest_bytes"] <= own["bytes"]
        assert row["compression"] == pytest.approx(report["dense_bytes"] / own["bytes"])
        assert own["max_abs_deviation"] <= measurement.MAX_RELATIVE_DEVIATION * own["largest_logit"]
        assert set(own["latency"]) == {"1", "8"}
        for latency in own["latency"].values():
            assert latency["speedup"] == pytest.approx(latency["teacher"]["p50_ms"] / latency["recorded"]["p50_ms"])
        assert row["relative_accuracy"] == pytest.approx(row["accuracy"]["mean"] / teacher["accuracy"]["mean"])
    dense = folder / "out" / "rows" / "teacher" / "seed0" / "dense.safetensors"
    assert report["dense_bytes"] == dense.stat().st_size > 4 * teacher["parameters"]
    own = rows["taught"]["measurement"]
    assert own["swapped"] == {"bsr": 8}, "convert: {min_speedup: 0} swaps every layer"
    loaded = sk.load(folder / "out" / own["file"], into=vgg_digits(width=16))
    assert sk.evaluate(loaded, test) == own["files"][0]["accuracy"]


def test_published_points_stand_beside_the_rows_that_no_smaller_one_equals(finished):
    folder, report, _ = finished
    text = (folder / "out" / "report.md").read_text().split("## Beside published compression")[1].split("##")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert "| Others | VGG-16 | 154.2x | bytes | -0.10 |  | a paper |" in lines
    sizes = [float(line.split("|")[3].strip().removesuffix("x")) for line in lines[1:]]
    assert sizes == sorted(sizes)
    measured = report["rows"][1:]
    front = [
        row["name"]
        for row in measured
        if not any(
            other["compression"] >= row["compression"]
            and other["points"] >= row["points"]
            and (other["compression"], other["points"]) != (row["compression"], row["points"])
            for other in measured
        )
    ]
    assert front and {line.split("**")[1] for line in lines if "**" in line} == set(front)


def test_verdicts(finished):
    _, report, _ = finished
    gradual, small, good, int8, int4, bound, equal = report["verdicts"]
    rows = {row["name"]: row for row in report["rows"]}
    better = rows["gradual 16x1 75.0%"]["accuracy"]["mean"] >= rows["one-shot 16x1 75.0%"]["accuracy"]["mean"]
    assert gradual["holds"] is better and f"{int(better)} of 1 pairs" in gradual["text"]
    assert small["reached"] == {"compression": True, "points": True} and small["text"].startswith("taught: ")
    assert f"{rows['taught']['compression']:.1f}x smaller (asked for: at least 4x)" in small["text"]
    assert good["holds"] is False and good["reached"]["relative_accuracy"] is False and good["reached"]["speedup"]
    assert " faster at batch 8 (asked for" in good["text"], "the largest batch, where a goal names none"
    by = {name: row["measurement"]["by_values"] for name, row in rows.items()}
    loss = min(100 * (of["int8"]["accuracy"] - of["fp32"]["accuracy"]) for of in by.values())
    assert int8["holds"] is (loss >= -0.3) and f"{loss:+.2f} points" in int8["text"]
    assert int4["holds"] is (100 * (by["taught"]["int4"]["accuracy"] - by["taught"]["fp32"]["accuracy"]) >= -1.0)
    assert "above their bound" in bound["text"] and equal["holds"] is True


def test_bytes_and_accuracy_are_those_of_the_file(finished):
    """Of every seed: the file is loaded again and evaluated."""
    folder, report, _ = finished
    row = next(row for row in report["rows"] if row["name"] == "taught")
    own, test = row["measurement"], digits_loaders()[1]
    assert own["values"] == "int4" and own["bound"] < own["bytes"] and [file["seed"] for file in own["files"]] == [0, 1]
    for file in own["files"]:
        path = folder / "out" / "rows" / "taught" / f"seed{file['seed']}" / "model.slim.safetensors"
        assert path.stat().st_size == file["bytes"]
        # The architecture is in the file.
        assert sk.evaluate(sk.load(path), test) == file["accuracy"]
        assert sk.explain(path).file_bound is not None
    accuracies = [file["accuracy"] for file in own["files"]]
    assert row["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2) and row["seeds"] == [0, 1]
    assert (
        own["bytes"]
        == own["files"][0]["bytes"]
        == own["by_values"]["int4"]["bytes"]
        < own["by_values"]["int8"]["bytes"]
    )
    assert list(own["by_values"]) == ["fp32", "bf16", "int8", "int4"]
    text = (folder / "out" / "report.md").read_text()
    assert f"{own['by_values']['bf16']['bytes']:,}" in text and " int4, " in text


def test_what_is_timed_is_what_was_loaded(finished, tmp_path, monkeypatch):
    """A file that holds other weights than the network fails, though the network itself converts rightly."""
    folder, _, _ = finished
    for row in ("teacher", "one-shot-16x1-75.0", "taught"):
        shutil.copytree(folder / "out" / "rows" / row, tmp_path / "out" / "rows" / row)
    right = measurement.checkpoint.load

    def wrong(path, into=None):
        loaded = right(path, into=into)
        if "taught" in str(path):
            with torch.no_grad():
                loaded.classifier[-1].bias += 1.0
        return loaded

    monkeypatch.setattr(measurement.checkpoint, "load", wrong)
    with pytest.raises(RuntimeError, match="converted networks differ from the compressed ones: taught"):
        run(folder / "small.yaml", tmp_path / "out", only=["measure"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "the loaded file's logits differ" in report["rows"][-1]["measurement"]["error"]


def test_a_second_seed_takes_what_its_sources_have(finished):
    """A row with two seeds whose source and teacher have one: both start from the first, and are trained apart."""
    folder, _, lines = finished
    assert [line for line in lines if line.startswith("[")][-2:] == ["[5/6] taught (seed 0)", "[6/6] taught (seed 1)"]
    assert [path.name for path in (folder / "out" / "rows" / "teacher").iterdir()] == ["seed0"]
    states = [
        torch.load(folder / "out" / "rows" / "taught" / f"seed{seed}" / "1-distill.pt", weights_only=True)
        for seed in (0, 1)
    ]
    key = next(key for key in states[0] if key.endswith("original"))
    assert not torch.equal(states[0][key], states[1][key])


def test_rows_that_do_not_fit_their_time_are_named_and_done_later(finished, tmp_path):
    """One row's training ends at its box, the row that needs it is not begun, and all others are there."""
    folder, _, _ = finished
    shutil.copytree(folder / "out" / "rows" / "teacher", tmp_path / "out" / "rows" / "teacher")
    late = write_recipe(
        tmp_path, RECIPE.replace("name: one-shot 16x1 75.0%\n", "name: one-shot 16x1 75.0%\n    seconds: 1.0e-9\n")
    )
    report, lines = run(late, tmp_path / "out", only=["taught", "low rank", "report"])
    assert report["unfit"] == ["one-shot 16x1 75.0%", "taught"]
    assert [row["name"] for row in report["rows"]] == ["teacher", "low rank"]
    assert "one-shot 16x1 75.0%: its time was over at step 0 of 10" in "".join(lines)
    assert "taught: not begun, it needs one-shot 16x1 75.0%" in "".join(lines)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "did not fit into the time: one-shot 16x1 75.0%, taught." in text
    report, _ = run(folder / "small.yaml", tmp_path / "out", only=["taught", "report"])
    assert report["unfit"] == [] and report["rows"][-1]["seeds"] == [0, 1]


def test_the_time_of_all_trainings_ends_the_run(finished, tmp_path):
    folder, _, _ = finished
    shutil.copytree(folder / "out" / "rows" / "teacher", tmp_path / "out" / "rows" / "teacher")
    recipe = write_recipe(tmp_path, RECIPE.replace("seconds: 0.0\n", "seconds: 0.0\n    train_seconds: 1.0e-9\n"))
    report, lines = run(recipe, tmp_path / "out", only=["gradual*", "low rank"])
    assert report["unfit"] == ["gradual 16x1 75.0%"]
    assert "gradual 16x1 75.0%: not begun, 0 s of training are left" in "".join(lines)


def test_the_first_epoch_tells_what_is_left(finished):
    _, _, lines = finished
    told = [line for line in lines if "images/s; by their multiply-adds about" in line]
    assert len(told) == 5, "once a training"
    assert re.search(r"about \d+(\.\d)? (s|minutes|hours) of training are left$", told[0])


def test_without_checkpoints_there_are_none(tmp_path, monkeypatch):
    seen = []
    right = rows.fine_tune
    monkeypatch.setattr(
        rows, "fine_tune", lambda *args, **kw: seen.append((kw["checkpoint"], kw["resume"])) or right(*args, **kw)
    )
    run(
        write_recipe(tmp_path, RECIPE.replace("seconds: 0.0\n", "seconds: 0.0\n    checkpoints: false\n")),
        tmp_path / "out",
        only=["teacher"],
    )
    assert seen == [(None, False)]


def test_compact_rows_need_their_package_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match="reproduce: expected the package constriction"):
        run(write_recipe(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finished_steps_are_skipped(finished):
    folder, report, lines = finished
    trained = [line for line in lines if ": train" in line or ": distill" in line]
    assert len(trained) == 5
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.pt")}
    assert len(stamps) == 5
    again, lines = run(folder / "small.yaml", folder / "out", only=["report"])
    assert [row["accuracy"] for row in again["rows"]] == [row["accuracy"] for row in report["rows"]]
    _, lines = run(folder / "small.yaml", folder / "out", only=["teacher", "taught"])
    assert not [line for line in lines if ": train" in line or ": distill" in line]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_changed_step_and_what_follows_run_again(finished, tmp_path):
    """Another learning rate of one row: that row and the one that starts from it, nothing else."""
    folder, _, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    recipe = write_recipe(tmp_path, RECIPE.replace("lr: 0.02, images: 640", "lr: 0.01, images: 640"))
    with pytest.raises(ValueError, match=r"step 2 \(train\) of row 'one-shot 16x1 75.0%' to be finished"):
        run(recipe, tmp_path / "out", only=["measure"])
    _, lines = run(recipe, tmp_path / "out", only=["taught", "low rank"])
    trained = [line.split(":")[0].strip() for line in lines if ": train" in line or ": distill" in line]
    assert trained == ["one-shot 16x1 75.0%", "taught", "taught"]


def test_what_was_measured_of_another_network_is_not_reported(finished, tmp_path):
    """Bytes, accuracy and times of a row are those of the network that it has now, converted as the recipe says now."""
    folder, report, _ = finished
    before = {row["name"]: row for row in report["rows"]}
    shutil.copytree(folder / "out", tmp_path / "out")
    trained = RECIPE.replace("lr: 0.02, images: 640", "lr: 0.01, images: 640")
    changes = [
        (trained, ["taught", "report"], ["one-shot 16x1 75.0%", "taught"]),
        (trained.replace("values: int4", "values: int8"), ["taught", "report"], ["one-shot 16x1 75.0%", "taught"]),
        (RECIPE.replace("min_speedup: 0.0", "min_speedup: 0.5"), ["report"], ["one-shot 16x1 75.0%", "taught"]),
        (RECIPE, ["taught", "report"], []),
        (RECIPE.replace("min_speedup: 0.0", "min_speedup: 0.5"), ["report"], ["taught"]),
    ]
    for text, only, outdated in changes:
        again, _ = run(write_recipe(tmp_path, text), tmp_path / "out", only=only)
        assert [row["name"] for row in again["rows"] if row["measurement"] is None] == outdated
        notes = [note for note in again["notes"] if note.startswith("trained or converted otherwise since")]
        assert (
            notes
            == [f"trained or converted otherwise since they were measured: {', '.join(outdated)}"][: len(outdated)]
        )
        for row in again["rows"]:
            if row["name"] not in outdated:
                assert row["measurement"] == before[row["name"]]["measurement"]
            else:
                assert "compression" not in row and row["accuracy"]["mean"] == row["accuracy"]["trained"]


def test_a_damaged_state_is_made_again(finished, tmp_path):
    folder, report, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    state = tmp_path / "out" / "rows" / "gradual-16x1-75.0" / "seed0" / "1-train.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:-7] + b"damaged")
    again, lines = run(folder / "small.yaml", tmp_path / "out", only=["gradual*"])
    assert any("gradual 16x1 75.0%: train" in line for line in lines)
    accuracy = {row["name"]: row["accuracy"]["mean"] for row in again["rows"]}
    assert accuracy == {row["name"]: row["accuracy"]["mean"] for row in report["rows"]}


def test_seeds_give_a_spread(tmp_path):
    report, lines = run(write_recipe(tmp_path), tmp_path / "out", only=["teacher", "one-shot*"], seeds=2)
    assert [line for line in lines if line.startswith("[") and "teacher" in line] == [
        "[1/4] teacher (seed 0)",
        "[3/4] teacher (seed 1)",
    ]
    for row in report["rows"]:
        accuracy = row["accuracy"]
        assert row["seeds"] == [0, 1] and accuracy["std"] is not None
        assert accuracy["min"] <= accuracy["mean"] <= accuracy["max"]
    weights = [
        torch.load(tmp_path / "out" / "rows" / "teacher" / f"seed{s}" / "1-train.pt")["features.0.weight"]
        for s in (0, 1)
    ]
    assert not torch.equal(*weights)
    assert report["missing"] == ["gradual 16x1 75.0%", "low rank", "taught"]
    assert report["rows"][0]["measurement"] is None and "±" in (tmp_path / "out" / "report.md").read_text()


def test_a_wrong_conversion_is_reported_and_fails(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    for row in ("teacher", "low-rank"):
        shutil.copytree(folder / "out" / "rows" / row, tmp_path / "out" / "rows" / row)
    right = measurement.convert

    def wrong(model, example_inputs=None, **options):
        fast = right(model, example_inputs, **options)
        if example_inputs is not None and any(type(m).__name__ == "LowRankConv2d" for m in model.modules()):
            with torch.no_grad():
                fast.classifier[-1].bias += 1.0
        return fast

    monkeypatch.setattr(measurement, "convert", wrong)
    with pytest.raises(RuntimeError, match="converted networks differ from the compressed ones: low rank"):
        run(folder / "small.yaml", tmp_path / "out", only=["measure"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [v["holds"] for v in report["verdicts"]][-1] is False
    assert {row["name"]: row["measurement"]["latency"] for row in report["rows"]}["low rank"] == {}


def test_bad_requests(tmp_path):
    recipe = write_recipe(tmp_path)
    with pytest.raises(ValueError, match=r"expected --only to name rows.*'gradul'; near matches: gradual"):
        run(recipe, tmp_path / "out", only=["gradul"])
    with pytest.raises(ValueError, match="expected seeds >= 1, got 0"):
        run(recipe, tmp_path / "out", seeds=0)
    with pytest.raises(ValueError, match="expected data for preset 'cpu' of slimnets, got none"):
        run("slimnets", tmp_path / "out", preset="cpu")
    with pytest.raises(ValueError, match="expected row 'teacher' to be finished"):
        run(recipe, tmp_path / "out", only=["measure"])


KILLED = """
import sys, torch
torch.set_num_threads(1)
from slimkernels.recipes.runner import reproduce
reproduce(sys.argv[1], preset="test", out=sys.argv[2], only=["gradual*"], progress=False, compile=False)
"""


@pytest.mark.slow
def test_kill_in_the_middle_resumes_to_the_same_weights(tmp_path):
    """SIGKILL after the second of four epochs of a step: the rest is trained, and the weights are bitwise those of an
    uninterrupted run."""
    text = RECIPE.replace(
        'train: {epochs: 1, lr: 0.02}\n        prune: {sparsity: "{sparsity}", block_shape: "{block}", end: 0.5}',
        'train: {epochs: 4, lr: 0.02, deterministic: true}\n        prune: {sparsity: "{sparsity}", block_shape: 16x1}',
    )
    assert "epochs: 4" in text
    recipe = write_recipe(tmp_path, text)
    run(recipe, tmp_path / "whole", only=["gradual*"])
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(recipe), str(tmp_path / "cut")])
    step = tmp_path / "cut" / "rows" / "gradual-16x1-75.0" / "seed0" / "1-train"
    try:
        deadline = time.monotonic() + 240
        while not _epochs_logged(step.with_name("1-train-log") / "epochs.csv") >= 2:
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert step.with_suffix(".ckpt").exists() and not step.with_suffix(".pt").exists()
    teacher = tmp_path / "cut" / "rows" / "teacher" / "seed0" / "1-train.pt"
    before = os.stat(teacher).st_mtime_ns
    run(recipe, tmp_path / "cut", only=["gradual*"])
    assert os.stat(teacher).st_mtime_ns == before
    logged = json.loads(step.with_suffix(".json").read_text())
    assert len(logged["losses"]) == 4 and not step.with_suffix(".ckpt").exists()
    expected, got = (
        torch.load(tmp_path / run_ / "rows" / "gradual-16x1-75.0" / "seed0" / "1-train.pt") for run_ in ("whole", "cut")
    )
    assert list(expected) == list(got)
    assert all(torch.equal(expected[k], got[k]) for k in expected if isinstance(expected[k], torch.Tensor))


def _epochs_logged(path: Path) -> int:
    try:
        return len(path.read_text().splitlines()) - 1
    except OSError:
        return 0


@pytest.mark.slow
def test_the_smoke_preset_runs_every_kind_of_row(tmp_path):
    """The rows of the shipped recipe, tiny, through the same code path as the others."""
    report, _ = run("slimnets", tmp_path / "out", preset="smoke")
    recipe = load_recipe("slimnets", "smoke")
    assert [row["name"] for row in report["rows"]] == [row.name for row in recipe.rows]
    assert {row["group"] for row in report["rows"]} >= {row.group for row in load_recipe("slimnets", "cpu").rows}
    assert all(row["measurement"]["latency"] for row in report["rows"])


@pytest.mark.slow
def test_the_preset_for_a_device_is_rehearsed(tmp_path):
    """Its rows, its dtype, its files to take home and its clock, with tiny networks on the CPU."""
    report, _ = run("slimnets", tmp_path / "out", preset="device_rehearsal")
    recipe = load_recipe("slimnets", "device")
    assert [row["name"] for row in report["rows"]] == [row.name for row in recipe.rows]
    assert report["unfit"] == report["missing"] == []
    ours = [row for row in recipe.rows if row.group == "combination"]
    kept = sorted((tmp_path / "out" / "checkpoints").iterdir())
    assert [path.name for path in kept] == sorted(f"{row.slug}.slim.safetensors" for row in ours) and len(kept) == 8
    for row in report["rows"]:
        assert row["measurement"]["latency"] and "error" not in row["measurement"]
    path = tmp_path / "out" / "checkpoints" / f"{ours[1].slug}.slim.safetensors"
    weights = [p for p in sk.load(path).parameters() if p.is_floating_point()]
    assert {p.dtype for p in weights} == {torch.bfloat16}, "the file names its architecture and its dtype"
    sk.load(path, dtype=torch.float32)(torch.zeros(1, 1, 8, 8))
    assert not list((tmp_path / "out").rglob("*.ckpt"))


@pytest.mark.slow
def test_the_comparison_of_rankings_is_rehearsed(tmp_path):
    """The preset for a device with a tiny network: every way of ranking is trained, stored and timed."""
    report, _ = run("ranking", tmp_path / "out", preset="device_rehearsal")
    assert [row["name"] for row in report["rows"]] == [
        row.name for row in load_recipe("ranking", "device_rehearsal").rows
    ]
    assert report["unfit"] == report["missing"] == []
    for row in report["rows"]:
        assert row["measurement"]["latency"] and "error" not in row["measurement"]
