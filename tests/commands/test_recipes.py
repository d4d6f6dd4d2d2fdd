"""Recipes as data: what a file may say, how placeholders are filled, and errors that name what was meant."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import slimkernels as sk
from slimkernels.compress.training.train import TrainConfig
from slimkernels.data import TensorLoader
from slimkernels.recipes import clock, companions, rows, sources, store
from slimkernels.recipes.figures import pareto_front
from slimkernels.recipes.schema import load_recipe, parse_recipe, recipe_names

MINIMAL = {
    "name": "small",
    "presets": {
        "a": {
            "data": "digits",
            "batch_size": 32,
            "variables": {"net": {"name": "vgg_digits", "width": 8}, "short": {"epochs": 2, "lr": 0.1}},
        },
        "b": {"batch_size": 64, "variables": {"net": {"name": "vgg_digits"}, "short": {"epochs": 3}}},
    },
    "rows": [
        {"name": "teacher", "group": "teacher", "model": "{net}", "steps": [{"train": "{short}"}]},
        {
            "name": "{how} {sparsity:.1%}",
            "group": "pruning",
            "each": {"how": ["cubic", "one_shot"], "level": [{"sparsity": 0.4}, {"sparsity": 0.875}]},
            "from": "teacher",
            "steps": [
                {
                    "train": {"use": "{short}", "lr": 0.02},
                    "prune": {"sparsity": "{sparsity}", "block_shape": "16x1", "schedule": "{how}"},
                },
                "finalize",
            ],
        },
    ],
}


def parse(change=None, preset="a"):
    data = copy.deepcopy(MINIMAL)
    if change is not None:
        change(data)
    return parse_recipe(yaml.safe_dump(data), preset, "small.yaml")


def test_rows_of_a_grid():
    recipe = parse()
    names = [row.name for row in recipe.rows]
    assert names == ["teacher", "cubic 40.0%", "cubic 87.5%", "one_shot 40.0%", "one_shot 87.5%"]
    row = recipe.rows[2]
    assert row.labels == {"how": "cubic", "sparsity": 0.875} and row.needs == ("teacher",)
    train, finalize = row.steps
    assert train.settings == {"epochs": 2, "lr": 0.02} and finalize.verb == "finalize"
    assert train.companions["prune"] == {"sparsity": 0.875, "block_shape": "16x1", "schedule": "cubic"}
    assert recipe.rows[0].model == {"name": "vgg_digits", "width": 8} and recipe.batch_size == 32
    assert parse(preset="b").rows[1].steps[0].settings == {"epochs": 3, "lr": 0.02}


POINT = {"name": "x", "network": "y", "compression": 2, "points": -1, "counted": "bytes", "source": "z"}


def _longer(data, how, **settings):
    """The rows of one schedule as an entry of their own, with other settings of their training."""
    other = copy.deepcopy(data["rows"][1])
    data["rows"][1]["each"]["how"].remove(how)
    other["each"]["how"] = [how]
    other["steps"][0]["train"].update(settings or {"epochs": 3})
    data["rows"].insert(1 if how == "cubic" else 2, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(row=1), "expected a key among .*, got 'row'; did you mean rows"),
        (lambda d: d["rows"][0].update(grup=1), "got 'grup'; did you mean group"),
        (lambda d: d["rows"][0]["steps"][0].update(prun=1), r"steps\[0\] \(train\): .*'prun'; did you mean prune"),
        (lambda d: d["rows"][1]["steps"][0]["train"].update(epoch=1), "train: .*'epoch'; did you mean epochs"),
        (lambda d: d["rows"][1]["steps"][0]["prune"].update(sparsty=1), "prune: .*'sparsty'; did you mean sparsity"),
        (
            lambda d: d["rows"][1]["steps"][0].update(quantize={"value": "int4"}),
            "quantize: .*'value'; did you mean values",
        ),
        (lambda d: d["rows"][1]["steps"][0].update(quantize={"begin": 0.5}), "quantize: expected key 'values'"),
        (
            lambda d: d["rows"][1]["steps"][0]["train"].update(lr="1e-3"),
            "train: TrainConfig: expected lr .* got '1e-3'",
        ),
        (lambda d: d["rows"][1]["steps"][0]["train"].update(epochs=-1), "train: TrainConfig: expected epochs >= 1"),
        (lambda d: d["rows"][1]["steps"][0]["train"].update(use=None), "train: expected key 'epochs'"),
        (lambda d: d.update(compared=3), "compared: expected a list, got 3"),
        (lambda d: d.update(published=3), "published: expected a list, got 3"),
        (
            lambda d: d["rows"][0]["steps"][0].update(train={"augment": {"flips": True}}),
            "augment: .*'flips'; did you mean",
        ),
        (lambda d: d["rows"][0].update(steps=[{"trian": {}}]), "expected a step .*'trian'; did you mean train"),
        (lambda d: d["rows"][0].update(steps=[{"prune": {}, "finalize": {}}]), "expected one step among"),
        (lambda d: d["rows"][1].update({"from": "teachr"}), "expected an earlier row .*'teachr'; did you mean teacher"),
        (lambda d: d["rows"].reverse(), "expected an earlier row among none, got 'teacher'"),
        (lambda d: d["rows"][0].update(model="{nett}"), "expected a variable .*'nett'; did you mean net"),
        (lambda d: d["rows"][0].update({"from": "teacher"}), "expected either model or from, got both"),
        (lambda d: d["rows"][0].pop("group"), "expected key 'group'"),
        (lambda d: d["rows"].append(d["rows"][0]), "expected rows of different names, got 'teacher' twice"),
        (lambda d: d["presets"]["a"].update(batch_size=0), "batch_size: expected a positive int, got 0"),
        (lambda d: d["presets"]["a"].update(leave_out=["cubik*"]), "leave_out: expected a row"),
        (lambda d: d["presets"]["a"]["variables"].update(net="{net}"), "stands for itself"),
        (lambda d: d["rows"][1].update(values="int5"), "values: expected one among fp32, .*'int5'; did you mean int"),
        (lambda d: d["presets"]["a"].update(dtype="bf61"), "dtype of preset a: expected one .*; did you mean bf16"),
        (lambda d: d["presets"]["a"].update(train_seconds=0), "train_seconds of preset a: expected a positive number"),
        (lambda d: d["rows"][1].update(seconds="1"), "seconds: expected a positive number of seconds, got '1'"),
        (lambda d: d["rows"][1].update(seeds=0), "seeds: expected a positive int, got 0"),
        (
            lambda d: d["presets"]["a"].update(goals=[{"speed": 2}]),
            "goals of preset a: .*'speed'; did you mean speedup",
        ),
        (lambda d: d.update(published=[{**POINT, "counted": "byte"}]), "counted: expected one .*; did you mean bytes"),
        (lambda d: d.update(published=[{**POINT, "sorce": 1}]), "published: .*'sorce'; did you mean source"),
        (lambda d: d.update(compared=[["prunning"]]), "compared: expected a row or .*'prunning'; did you mean pruning"),
        (lambda d: d.update(compared=["pruning"]), "compared: expected lists of rows or groups, got 'pruning'"),
        (
            lambda d: (d.update(compared=[["cubic*", "one_shot*"]]), _longer(d, "cubic")),
            "trained equally long, got 3 epochs of 'cubic 40.0%' and 2 epochs of 'one_shot 40.0%'",
        ),
        (
            lambda d: (d.update(compared=[["pruning"]]), _longer(d, "one_shot", images=7)),
            "got 2 epochs of 'cubic 40.0%' and 2 epochs of 7 images of 'one_shot 40.0%'",
        ),
    ],
)
def test_a_bad_recipe_says_what_was_meant(change, message):
    with pytest.raises((ValueError, TypeError), match="small.yaml.*" + message):
        parse(change)


def test_other_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"expected a preset among a, b, got 'c'"):
        parse(preset="c")
    with pytest.raises(ValueError, match="expected YAML"):
        parse_recipe("a: [", "a")
    with pytest.raises(ValueError, match=r"^recipe: expected every key once, got 'lr' once more in line 3"):
        parse_recipe("rows:\n- train: {lr: 0.1, epochs: 3,\n  lr: 0.2}", "a")
    with pytest.raises(TypeError, match="expected a mapping, got list"):
        parse_recipe("[]", "a")
    with pytest.raises(
        ValueError, match="expected a recipe among ranking, slimnets, got 'slimnet'; did you mean slimnets"
    ):
        load_recipe("slimnet", "cpu")
    with pytest.raises(ValueError, match=r"nowhere\.yaml, which does not exist"):
        load_recipe(tmp_path / "nowhere.yaml", "cpu")


def test_the_paper_is_the_paper():
    """Sparsities, ranks, networks and quoted numbers of arXiv 1808.00496 in the preset `paper`."""
    assert recipe_names() == ["ranking", "slimnets"]
    recipe = load_recipe("slimnets", "paper")
    found = {row.name: row for row in recipe.rows}
    assert found["teacher"].model == {"name": "vgg19_cifar"} and found["teacher"].paper["accuracy"] == 92.4
    ranks = found["low rank"].steps[0].settings
    assert ranks["rank"] == [5, 24, 48, 48, 64, 128, 128, 160, 192, 256, 320, 320, 320, 320, 320, 320]
    assert ranks["method"] == "tai" and ranks["batch_norm"] is True
    quoted = {name: row.paper.get("accuracy") for name, row in found.items()}
    for block in ("1x1", "16x1", "32x32", "128x16"):
        gradual = [quoted[f"gradual {block} {share}"] for share in ("40.0%", "75.0%", "87.5%")]
        one_shot = [quoted[f"one-shot {block} {share}"] for share in ("40.0%", "75.0%", "87.5%")]
        assert gradual == [92.22, 91.57, 88.82] and one_shot == [89.69, 89.13, 86.16]
    assert [quoted[f"NIN distilled, gradual 16x1 {s}"] for s in ("40.0%", "75.0%", "87.5%")] == [89.29, 88.69, 85.44]
    assert (quoted["NIN distilled"], quoted["NIN alone"]) == (90.57, 88.88)
    assert found["slim, 16x1 94.5%"].source == "slim, dense"


PRESETS = [("slimnets", preset) for preset in ("paper", "cpu", "smoke", "device", "device_rehearsal")]
PRESETS += [("ranking", preset) for preset in ("cpu", "device", "device_rehearsal")]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_training_step_of_the_package_is_valid(name, preset):
    """Settings make a TrainConfig, and what prunes while training a GradualPruning."""
    recipe = load_recipe(name, preset)
    network, images = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 128, 3)), torch.zeros(8, 3, 32, 32)
    steps = [step for row in recipe.rows for step in row.steps if step.verb in ("train", "distill")]
    assert len(steps) == len(recipe.rows)
    for step in steps:
        rows.training_config(step.settings, 0, torch.device("cpu"))
        if "prune" in step.companions:
            callback = companions.pruning(step.companions["prune"], network, images)
            shares = callback.sparsity.values() if isinstance(callback.sparsity, dict) else [callback.sparsity]
            assert all(0 < share < 1 for share in shares)
            blocks = callback.block_shape.values() if isinstance(callback.block_shape, dict) else [callback.block_shape]
            assert all(len(block) == 2 for block in blocks)
    models = {str(row.model) for row in recipe.rows if row.model}
    least = {"cpu": 2, "device": 2, "device_rehearsal": 2}.get(preset, 4)
    assert len(models) >= (least if name == "slimnets" else 1)


def test_rankings_are_compared_at_the_same_bytes_and_budgets():
    """Every way of ranking at every sparsity, from one teacher, trained equally long; budgets by predicted time."""
    recipe = load_recipe("ranking", "device")
    ranked = [row for row in recipe.rows if row.group == "ranking"]
    pruning = [row.steps[0].companions["prune"] for row in ranked]
    ways = {(p.get("scope", "layer"), p["sparsity"]) for p in pruning if "sparsity" in p}
    assert ways == {(scope, share) for scope in ("layer", "global", "latency") for share in (0.92, 0.95)}
    assert [p["speedup"] for p in pruning if "speedup" in p] == [4, 5]
    assert {row.source for row in ranked} == {"teacher"} and len({row.budget for row in ranked}) == 1


def test_predicted_time_is_that_of_the_dtype_that_is_timed(monkeypatch: pytest.MonkeyPatch):
    """A network trained in float32 and timed in bf16 is ranked, and given its budget, by layers in bf16."""
    recipe = replace(load_recipe("ranking", "device_rehearsal"), dtype="bf16")
    seen = []

    def asked(model, images, *rest, **options):
        seen.append({images.dtype, *(p.dtype for p in model.parameters())})
        raise InterruptedError

    monkeypatch.setattr(companions, "unit_costs", asked)
    monkeypatch.setattr(companions, "latency_budget", asked)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    loader = TensorLoader(images, torch.zeros(4, dtype=torch.int64))
    shared = rows.Workplace(recipe, Path(), loader, loader, "data", torch.device("cpu"))
    assert shared.largest_batch().shape == (16, 1, 8, 8)
    network = rows.build(recipe.row("teacher").model, 10, 0)
    for name in ("by predicted time 90.0%", "latency budget 2x"):
        with pytest.raises(InterruptedError):
            companions.callbacks_of(recipe.row(name).steps[0], network, shared.largest_batch())
    assert seen == [{torch.bfloat16}] * 2 and next(network.parameters()).dtype == torch.float32


def place() -> rows.Workplace:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    loader = TensorLoader(images, torch.zeros(4, dtype=torch.int64))
    return rows.Workplace(parse(), Path(), loader, loader, "data", torch.device("cpu"))


def test_a_step_prunes_by_predicted_time():
    model = rows.build({"name": "vgg_digits", "width": 32}, 10, 0)

    def pruned(**prune: object) -> dict[str, float]:
        step = parse(lambda data: data["rows"][1]["steps"][0].update(prune=prune)).rows[1].steps[0]
        (callback,) = companions.callbacks_of(step, model, place().largest_batch())
        network = copy.deepcopy(model)
        callback.prepare(network, 1)
        callback.on_step_begin(0, 1, network)
        return {name: 1 - mask.mask.float().mean().item() for name, mask in sk.masks(network).items()}

    shared = pruned(sparsity=0.75, schedule="one_shot", scope="global")
    timed = pruned(sparsity=0.75, schedule="one_shot", scope="latency", floor=0.05)
    assert timed.keys() == shared.keys() and max(timed.values()) <= 0.95 + 1e-6
    early, late = "features.3", "classifier.0"  # at 64 places of an image, and at one
    assert timed[early] > shared[early] and timed[late] < shared[late]
    fast = pruned(speedup=3.0, schedule="one_shot")
    plan = sk.latency_budget(model, torch.zeros(128, 1, 8, 8), 3.0, block_shapes=[(16, 1)], progress=False)
    assert fast.keys() <= shared.keys() and fast[early] == pytest.approx(plan.sparsity[early], abs=0.1)


def test_a_step_prunes_and_rounds():
    beside = {"quantize": {"values": "int8", "begin": 0.5}, "sparse": {"begin": 0.8}}
    step = parse(lambda data: data["rows"][1]["steps"][0].update(beside)).rows[1].steps[0]
    pruning, rounding, sparse = companions.callbacks_of(step, nn.Identity(), torch.zeros(0))
    assert isinstance(pruning, sk.GradualPruning) and isinstance(rounding, sk.QuantizationAware)
    assert (rounding.values, rounding.begin, sparse.begin) == ("int8", 0.5, 0.8)


def test_what_a_preset_leaves_empty_is_not_done():
    beside = {"quantize": None, "sparse": None}
    plain, emptied = (
        parse(change).rows[1].steps[0] for change in (None, lambda d: d["rows"][1]["steps"][0].update(beside))
    )
    assert emptied == plain


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_pruned_rows_train_through_the_sparse_kernels_where_layers_can_be_measured(name, preset):
    """Not in the steps of a CUDA graph, which `SparseTraining` refuses."""
    for row in load_recipe(name, preset).rows:
        for step in row.steps:
            if "prune" in step.companions and row.group != "slim":
                graphs = step.settings.get("cuda_graph", False) or preset == "device_rehearsal"
                assert ("sparse" in step.companions) == (not graphs), row.name


@pytest.mark.slow
def test_the_low_rank_row_fits_the_teacher_of_every_small_preset():
    for preset in ("cpu", "smoke", "device", "device_rehearsal"):
        recipe = load_recipe("slimnets", preset)
        model = rows.build(recipe.row("teacher").model, 10, 0)
        step = recipe.row("low rank").steps[0]
        found = rows._change(model, step)["layers"]
        assert sum(layer["kind"] == "tai" for layer in found) == len(step.settings["rank"])


def test_the_rows_of_the_cpu_preset():
    """What has to be shown there, the layers that shares are given of, and the weights that stay by them."""
    recipe = load_recipe("slimnets", "cpu")
    names = [row.name for row in recipe.rows]
    assert (
        names[0] == "teacher" and len(names) == 12 and "gradual 1x1 87.5%" in names and "one-shot 16x1 87.5%" in names
    )
    ours = [row for row in recipe.rows if row.group == "combination"]
    assert [row.values for row in ours] == ["int4"] * 3 and [row.seeds for row in ours] == [2, 1, 1]
    same = {row.budget for row in recipe.rows if row.source == "teacher"}
    assert len(same) == 1, "rows that start from the teacher are compared"
    net = rows.build(recipe.row("teacher").model, 10, 0)
    layers = dict(net.named_modules())
    weights = {
        name: layer.weight.numel() for name, layer in layers.items() if isinstance(layer, (nn.Conv2d, nn.Linear))
    }
    for row in ours:
        shares = row.steps[0].companions["prune"]["sparsity"]
        assert set(shares) == set(weights) - {"features.0", "classifier.6"}
        zeros = sum(weights[name] * share for name, share in shares.items()) / sum(weights[name] for name in shares)
        assert zeros == pytest.approx(row.labels["sparsity"], abs=0.002)


@pytest.mark.parametrize(("name", "least"), [("slimnets", 310), ("ranking", 240)])
def test_the_device_presets_fit_a_call(name, least):
    """Trainings by an H200's steps of VGG-19, 18 s for images, and 12 for the files of a row, all as measured there;
    a rehearsal has the same kinds of rows."""
    recipe, rehearsal = load_recipe(name, "device"), load_recipe(name, "device_rehearsal")
    assert [row.group for row in recipe.rows][:2] == [row.group for row in rehearsal.rows][:2]
    assert {row.group for row in recipe.rows} == {row.group for row in rehearsal.rows}
    assert recipe.train_seconds + 18 + 12 * len(recipe.rows) <= 530
    assert recipe.dtype == "bf16" and not recipe.checkpoints
    seconds = 0.0
    for row in recipe.rows:
        ((epochs, images),) = row.budget
        taught = any(step.verb == "distill" for step in row.steps)
        seconds += row.seeds * epochs * (0.9 if taught else 0.45) + 2
        assert images is None
        training = [step.settings for step in row.steps if step.verb in ("train", "distill")]
        assert all(settings["cuda_graph"] and settings["fuse_batch_norm"] for settings in training)
    assert least <= seconds <= recipe.train_seconds


def test_the_rows_of_the_device_preset():
    """Ours, what they are compared with, and the same in its rehearsal."""
    recipe = load_recipe("slimnets", "device")
    assert [row.name for row in load_recipe("slimnets", "device_rehearsal").rows] == [row.name for row in recipe.rows]
    shares = {row.labels["sparsity"] for row in recipe.rows if row.group == "combination"}
    assert shares == {0.875, 0.92, 0.95, 0.98}
    assert {"low rank", "NIN distilled", "NIN distilled, gradual 16x1 75.0%"} <= {row.name for row in recipe.rows}


def test_a_clock_predicts_from_the_epochs_so_far(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    told = []
    running = clock.Clock(50.0, told.append, work=600.0)
    assert running.predicted(10.0) is None
    running.check("row", 1e9)  # nothing is known yet
    watch = running.callback("row", None, work=100.0, images=80)
    for epoch in range(2):
        for step in range(2):
            watch.on_step_begin(2 * epoch + step, 4, None)
            now[0] += 2.0
        watch.on_epoch_end(epoch, None)
    assert running.predicted(50.0) == pytest.approx(2.0)
    (line,) = told  # 80 images in 4 s; 500 of 600 are left at 25 a second
    assert "20 images/s" in line and "about 20 s of training are left" in line
    running.check("row", 25.0 * 42 * 1.2)
    with pytest.raises(clock.OutOfTime, match="row: not begun, 42 s of training are left, of which it needs about 60"):
        running.check("row", 1500.0)
    boxed = running.callback("row", 3.0, work=1.0, images=1)
    boxed.on_step_begin(0, 4, None)
    now[0] += 3.5
    with pytest.raises(clock.OutOfTime, match="its time was over at step 1 of 4"):
        boxed.on_step_begin(1, 4, None)
    now[0] += 60.0
    with pytest.raises(clock.OutOfTime, match="0 s of training are left"):
        running.check("row", 0.0)


def test_automatic_precision(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    config = rows.training_config({"epochs": 2, "precision": "auto", "images": 10}, 3, torch.device("cpu"))
    assert config == TrainConfig(epochs=2, precision="bf16", seed=3)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert rows.training_config({"epochs": 2, "precision": "auto"}, 0, torch.device("cpu")).precision == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert rows.training_config({"epochs": 2, "precision": "auto"}, 0, torch.device("cpu")).precision == "fp32"
    with pytest.raises(ValueError, match="expected precision to be one of"):
        rows.training_config({"epochs": 2, "precision": "automatic"}, 0, torch.device("cpu"))


def test_conv_ranks_counts():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2))
    assert rows.conv_ranks(net, [2, 4]) == {"0": 2, "1": 4}
    with pytest.raises(ValueError, match="expected one rank for each of 2 convolutions, got 1"):
        rows.conv_ranks(net, [2])


@pytest.mark.parametrize("value", ["16x1", [16, 1], (16, 1), "16X1"])
def test_block_shapes(value):
    assert companions.block_shape(value) == (16, 1)


@pytest.mark.parametrize("value", ["16", "16x0", [1, 2, 3], 16, "ax1"])
def test_bad_block_shapes(value):
    with pytest.raises(ValueError, match="expected block_shape"):
        companions.block_shape(value)


def test_dropout_of_a_recipe_model():
    model = rows.build({"name": "vgg_digits", "width": 8, "dropout": 0.125}, 10, 0)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.125}
    again = rows.build({"name": "vgg_digits", "width": 8}, 10, 0)
    assert torch.equal(model.features[0].weight, again.features[0].weight)
    with pytest.raises(ValueError, match=re.escape("expected dropout in [0, 1), got 1.0")):
        rows.build({"name": "vgg_digits", "dropout": 1.0}, 10, 0)


def test_stratified_subset():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    chosen = rows.stratified(labels, 20)
    assert labels[chosen].bincount().tolist() == [12, 6, 2]
    assert torch.equal(chosen, rows.stratified(labels, 20)) and len(set(chosen.tolist())) == 20
    assert set(rows.stratified(labels, 10).tolist()) <= set(chosen.tolist())


def test_keys_see_every_part():
    base = {"step": {"verb": "train"}, "seed": 0}
    assert store.key_of(**base) == store.key_of(seed=0, step={"verb": "train"})
    assert len({store.key_of(**base), store.key_of(**base, x=1), store.key_of(step={}, seed=0)}) == 3


def test_a_finished_step_needs_its_key_and_its_state(tmp_path):
    state, result = tmp_path / "1.pt", tmp_path / "1.json"
    state.write_bytes(b"weights")
    store.write_result(result, {"key": "k", "state_sha256": store.file_sha256(state)})
    assert store.finished(result, "k", state) is not None
    assert store.finished(result, "other", state) is None
    state.write_bytes(b"weightt")
    assert store.finished(result, "k", state) is None
    result.write_text("{")
    assert store.finished(result, "k") is None


def test_a_result_with_one_changed_bit_is_not_believed(tmp_path):
    path, value = tmp_path / "1.json", {"key": "k", "losses": [0.125, 2.0], "settings": {"epochs": 3}, "pair": (1, 2)}
    store.write_result(path, value)
    data = path.read_bytes()
    assert store.read_result(path) == {**value, "pair": [1, 2]}
    believed = 0
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        found = store.read_result(path)
        assert found is None or found == {**value, "pair": [1, 2]}
        believed += found is not None
    assert believed < len(data) // 4  # white space between the values, another exponent letter


def test_pareto_front():
    points = [(1.0, 0.5), (2.0, 0.9), (1.5, 0.4), (3.0, 0.9), (1.0, 0.6)]
    assert pareto_front(points) == [4, 1]
    assert pareto_front([]) == []


@pytest.mark.parametrize(("draw", "panels"), [("pareto_figure", 3), ("published_figure", 1)])
def test_names_of_points_cover_nothing(tmp_path, draw, panels):
    """Of the committed report, whose points lie close together: no name covers another, a point or the frame."""
    import json
    from pathlib import Path

    from slimkernels.recipes import figures

    path = Path(__file__).resolve().parents[2] / "benchmarks/results/amd-epyc-zen3-2c/slimnets-cpu/report.json"
    seen = []
    place = figures.place_names

    def placed(panel, named, points):
        place(panel, named, points)
        texts = [text for text in panel.texts if text.get_text()]
        assert [text.get_text() for text in texts] == [name for *_, name in named]
        boxes = [text.get_window_extent() for text in texts]
        for text, box in zip(texts, boxes, strict=True):
            assert panel.get_window_extent().contains(*box.min) and panel.get_window_extent().contains(*box.max)
            assert not any(box.contains(*at) for at in panel.transData.transform(points)), text.get_text()
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        seen.append(len(texts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "place_names", placed)
        report = json.loads(path.read_text())
        report["published"] = load_recipe("slimnets", "cpu").published
        getattr(figures, draw)(report, tmp_path / "figure.png")
    assert len(seen) == panels and min(seen) > 3


def test_data_by_name(tmp_path):
    train, test = sources.open_data("digits", 32)
    assert train.batch_size == 32 and sources.data_title("digits", (train, test)) == "scikit-learn digits"
    with pytest.raises(ValueError, match="expected a folder as in cifar10:DIR"):
        sources.open_data("cifar10:", 32)
    with pytest.raises(OSError, match="nowhere"):
        sources.open_data(str(tmp_path / "nowhere"), 32)
