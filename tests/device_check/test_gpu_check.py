"""The GPU check without a GPU: its plan and commands, its time boxes, what is left on disk, and its report."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gpu_tables
import peers
import predict_gpu
import pytest
import report
import torch
import warm_triton_cache
from gpu_check import __main__ as driver
from gpu_check import (
    chain,
    correctness,
    counters,
    dry_run,
    layers,
    measure,
    plan,
    precompile,
    recipe,
    rows,
    sanitizer,
    served,
    summary,
    sweep,
    telling,
    tensor_cores,
    trainer,
    versions,
)
from gpu_check.plan import Stage
from places import ROOT, TESTS
from precision import fp32_precision
from torch import nn

import slimkernels as sk
from slimkernels import timing
from slimkernels.dispatch import tables
from slimkernels.dispatch.gpu_rates import H200
from slimkernels.dispatch.select import KernelChoice
from slimkernels.inference import warm_up
from slimkernels.kernels import KERNELS, KernelSpec
from slimkernels.kernels.problems import ConvProblem, FusedConvProblem
from slimkernels.kernels.triton.bsr_conv2d_config import configs, images_reason

BENCHMARKS = ROOT / "benchmarks"


MODULES = {
    "chain": chain, "correctness": correctness, "counters": counters, "precompile": precompile, "recipe": recipe,
    "sanitizer": sanitizer, "sweep": sweep, "tensor_cores": tensor_cores, "trainer": trainer, "versions": versions,
}  # fmt: skip


@pytest.fixture(autouse=True)
def precision_of_products() -> Iterator[None]:
    """Stages set torch's precision switches for their own process; here they are put back."""
    with fp32_precision("ieee"):
        yield


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{BENCHMARKS}"}


# The plan


@pytest.mark.parametrize("call", plan.CALL_SECONDS)
def test_the_stages_of_a_call_fit(call: int) -> None:
    total = sum(s.seconds for s in plan.stages_of(call) if not s.spare)
    assert 0 < total <= plan.CALL_SECONDS[call]
    assert plan.CALL_SECONDS == {1: 540, 2: 230, 3: 540}
    assert f"{total:>7}  in all, of at most {plan.CALL_SECONDS[call]}" in plan.plan_text()


def test_the_plan_is_printed_by_the_script() -> None:
    shell = subprocess.run(
        [str(BENCHMARKS / "gpu_check.sh"), "--plan"], env={**environment(), "PYTHON": sys.executable},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shell.stdout.strip() == plan.plan_text().strip()
    for stage in plan.STAGES:
        assert re.search(rf"^ *\(?{stage.seconds}\)?  {stage.name} ", shell.stdout, re.MULTILINE), stage.name


def test_stages_have_names_of_their_own_and_spare_ones_come_last() -> None:
    assert len({s.name for s in plan.STAGES}) == len(plan.STAGES)
    for call in plan.CALL_SECONDS:
        spare = [s.spare for s in plan.stages_of(call)]
        assert spare == sorted(spare)
    with pytest.raises(ValueError, match=r"^gpu_check: expected 1, 2, 3 or stages among versions, .*, got nonsense$"):
        driver.chosen(["nonsense"])
    assert [s.name for s in driver.chosen(["sweep", "vgg"])[0]] == ["sweep", "vgg"]


def filled(stage: Stage) -> list[str]:
    return [part.replace("{rows}", "rows.jsonl").replace("{state}", "state") for part in stage.command]


@pytest.mark.parametrize("stage", [s for s in plan.STAGES if s.command[1] != "pytest"], ids=lambda s: s.name)
def test_the_arguments_of_a_stage_parse(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the point where a device is asked for."""
    name = stage.command[1].removeprefix("gpu_check.")
    monkeypatch.setattr(
        versions if name == "versions" else MODULES[name].options, "options" if name == "versions" else "prepare", None
    )
    with pytest.raises((TypeError, AttributeError)) as stopped:
        MODULES[name].main(filled(stage)[2:])
    assert "NoneType" in str(stopped.value)


def collected(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "--collect-only"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )


def test_the_suites_of_the_stages_collect(tmp_path: Path) -> None:
    """The union of their options and of what they name, since a stage's options hold for every suite."""
    stages = [filled(s) for s in plan.STAGES if s.command[1] == "pytest" and "gpu_check.telling" not in s.command]
    named = dict.fromkeys(part for command in stages for part in command if part.startswith("benchmarks/"))
    others = dict.fromkeys(
        part for command in stages for part in command[2:] if part not in named and part not in ("-m", "pytest")
    )
    options = [part for part in others if "no:cacheprovider" not in part and part != "-p"]
    following = [pair for command in stages for pair in itertools.pairwise(command)]
    pairs = [f"{option}={value}" for option, value in following if option.startswith("--") and value[0] != "-"]
    flags = [part for part in options if part.startswith("-") and not any(p.startswith(f"{part}=") for p in pairs)]
    done = collected(["-m", "pytest", *dict.fromkeys(flags), *dict.fromkeys(pairs), *named])
    assert done.returncode == 0, done.stdout + done.stderr
    for name in named:
        assert name.split("/")[-1] in done.stdout.replace("\n", " ") or "::" not in name, name


def test_the_list_of_test_files_is_every_file_with_gpu_tests() -> None:
    marks = r"^\s*(@gpu$|@pytest\.mark\.gpu|pytestmark = pytest\.mark\.gpu)|marks=.*mark\.gpu"
    fixture = r"^from (tensor_core_device|graph_stand_in) import .*\b(device|place)\b"  # one of its devices is a GPU
    mark = re.compile(f"{marks}|{fixture}", re.MULTILINE)
    files = TESTS.rglob("test_*.py")
    marked = {path.relative_to(ROOT).as_posix() for path in files if mark.search(path.read_text())}
    assert marked == set(plan.GPU_TESTS)


# The order of the tests


def test_the_most_telling_tests_come_first_and_all_are_written(tmp_path: Path) -> None:
    """Failures, skips and errors as they come; a second run takes what failed, then what the first did not reach."""
    (tmp_path / "test_other.py").write_text("def test_last(): pass\n")
    (tmp_path / "test_graphs.py").write_text(
        "import pytest\ndef test_bad(): assert 1 == 2\ndef test_good(): pass\n"
        "def test_left_out(): pytest.skip('not here')\n"
    )
    base = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_check.telling", "-c", os.devnull]
    variables = {**environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    first = tmp_path / "first.jsonl"
    order = ["test_other.py", "test_graphs.py"]
    subprocess.run([*base, "--rows", str(first), *order], cwd=tmp_path, env=variables, capture_output=True)
    found = rows.of_suite(rows.read(first), "test")
    assert [(r["name"].split("::")[1], r["outcome"]) for r in found] == [
        ("test_bad", "failed"), ("test_good", "passed"), ("test_left_out", "skipped"), ("test_last", "passed"),
    ]  # fmt: skip
    assert rows.of_suite(rows.read(first), "tests")[0]["count"] == 4 and "assert 1 == 2" in found[0]["message"]
    assert found[0]["error"] == "assert 1 == 2"

    kept = [r for r in rows.read(first) if r["name"] != "test_other.py::test_last"]
    first.write_text("".join(json.dumps(r) + "\n" for r in kept))
    second = tmp_path / "second.jsonl"
    again = [*base, "--rows", str(second), "--again", str(first), *order]
    subprocess.run(again, cwd=tmp_path, env=variables, capture_output=True)
    assert [r["name"].split("::")[1] for r in rows.of_suite(rows.read(second), "test")] == ["test_bad", "test_last"]


def test_the_headline_kernels_come_before_the_long_tail() -> None:
    names = [
        "tests/on_gpu/test_triton_gpu.py::test_conv_block_shapes[64x16-stride]",
        "tests/on_gpu/test_triton_backward_gpu.py::test_a[bfloat16]",
        "tests/inference/test_graphs.py::test_a_captured_network",
        "tests/on_gpu/test_triton_gpu.py::test_every_configuration_the_tuner_may_try[float32-small]",
    ]
    assert sorted(names, key=telling.rank) == names
    assert telling.rank("tests/test_nowhere.py::test_x") == len(telling.ORDER)


# Time boxes


def script(code: str, name: str = "one", seconds: int = 20, **fields: object) -> Stage:
    return Stage(name, 1, seconds, "", ("-c", code), **fields)  # type: ignore[arg-type]


def row_code(value: int) -> str:
    row = json.dumps({"suite": "x", "name": "n", "value": value})
    return f"open(r'{{rows}}', 'a').write({row!r} + '\\n')\n"


def runner(tmp_path: Path, seconds: float = 60, grace: float = 1.0) -> driver.Runner:
    return driver.Runner(tmp_path / "state", tmp_path / "out", seconds, grace=grace, closing=1.0)


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def statuses(tmp_path: Path) -> dict[str, str]:
    return {s["stage"]: s["status"] for s in results(tmp_path)["stages"]}


def test_a_failing_stage_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    stages = [script(row_code(1) + "raise SystemExit(3)"), script(row_code(2), "two")]
    assert not runner(tmp_path).run(stages)
    assert statuses(tmp_path) == {"one": "failed: status 3", "two": "ok"}
    assert [(r["stage"], r["value"]) for r in results(tmp_path)["rows"]] == [("one", 1), ("two", 2)]


def test_a_hanging_stage_is_interrupted_and_keeps_what_it_has(tmp_path: Path) -> None:
    """It hears SIGINT, as pytest does to print its summary, and ends by itself."""
    code = row_code(1) + "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('the summary')\n"
    assert not runner(tmp_path).run([script(code, seconds=2), script("", "two")])
    assert statuses(tmp_path) == {"one": "out of time", "two": "ok"}
    assert "the summary" in (tmp_path / "out" / "log.txt").read_text()
    assert [r["value"] for r in results(tmp_path)["rows"]] == [1]


def test_a_stage_that_ignores_the_interrupt_is_killed_with_its_children(tmp_path: Path) -> None:
    deaf = "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    child = deaf + "print(os.getpid(), flush=True)\ntime.sleep(60)\n"
    code = f"{row_code(1)}{deaf}import subprocess, sys\n"
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)\n"
    assert not runner(tmp_path).run([script(code, seconds=2), script("", "two")])
    assert statuses(tmp_path) == {"one": "out of time, killed", "two": "ok"}
    pid = int((tmp_path / "state" / "logs" / "one.txt").read_text().split()[0])
    time.sleep(0.2)
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    assert [r["value"] for r in results(tmp_path)["rows"]] == [1]


def test_what_outlives_a_stage_is_killed(tmp_path: Path) -> None:
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"import subprocess, sys\nprint({child}.pid)\n"
    assert runner(tmp_path).run([script(code)])
    time.sleep(0.2)
    status = Path(f"/proc/{int((tmp_path / 'state' / 'logs' / 'one.txt').read_text())}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_a_call_ends_at_its_deadline(tmp_path: Path) -> None:
    """The last stages get no time, and the grace period and the closing stay inside."""
    stages = [script("import time; time.sleep(60)", seconds=4), script("", "two", seconds=2)]
    run = driver.Runner(tmp_path / "state", tmp_path / "out", 5, grace=0.5, closing=0.5)
    assert not run.run(stages)
    assert statuses(tmp_path) == {"one": "out of time", "two": "no time"}


def test_results_are_on_disk_before_the_next_stage_begins(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.json"
    seen = f"import json; print([r['value'] for r in json.load(open(r'{path}'))['rows']])"
    runner(tmp_path).run([script(row_code(7)), script(seen, "two")])
    assert (tmp_path / "state" / "logs" / "two.txt").read_text().strip() == "[7]"


def test_a_repeated_stage_replaces_its_rows_and_others_stay(tmp_path: Path) -> None:
    runner(tmp_path).run([script(row_code(1)), script(row_code(2), "two")])
    runner(tmp_path).run([script(row_code(3))])
    assert sorted((r["stage"], r["value"]) for r in results(tmp_path)["rows"]) == [("one", 3), ("two", 2)]


def two_runners(tmp_path: Path, stages: list[Stage]) -> None:
    """The stages as the rehearsal runs them: two at a time, with their results in one place."""
    shared = driver.Results(tmp_path / "state", tmp_path / "out")
    places = tmp_path / "state", tmp_path / "out", 60.0
    dry_run.run([driver.Runner(*places, closing=1.0, results=shared) for _ in range(2)], stages)


def test_stages_of_a_rehearsal_run_two_at_a_time(tmp_path: Path) -> None:
    """Each of the first two waits for the other one's file."""
    (tmp_path / "met").mkdir()
    meet = "from pathlib import Path\nimport time\nmet = Path(r'{state}').parent / 'met'\n(met / '%s').touch()\n"
    meet += "while not (met / '%s').exists(): time.sleep(0.01)\n"
    stages = [script(meet % ("a", "b") + row_code(1)), script(meet % ("b", "a") + row_code(2), "two")]
    stages += [script("raise SystemExit(3)", "three"), script(row_code(4), "four")]
    two_runners(tmp_path, stages)
    assert statuses(tmp_path) == {"one": "ok", "two": "ok", "three": "failed: status 3", "four": "ok"}
    assert sorted(r["value"] for r in results(tmp_path)["rows"]) == [1, 2, 4]


def test_a_rehearsal_that_is_stopped_ends_what_runs(tmp_path: Path) -> None:
    pids = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
    logs = [tmp_path / "state" / "logs" / f"{name}.txt" for name in ("one", "two")]

    def interrupt() -> None:
        while not all(log.exists() and log.read_text() for log in logs):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        two_runners(tmp_path, [script(pids), script(pids, "two"), script(pids, "three")])
    for log in logs:
        status = Path(f"/proc/{int(log.read_text())}/status")
        assert not status.exists() or "State:\tZ" in status.read_text()
    assert "three" not in {name for name, status in statuses(tmp_path).items() if status == "ok"}


def test_a_call_that_is_stopped_from_outside_keeps_its_results(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom gpu_check import __main__ as d, plan\n"
        "stage = plan.Stage('one', 1, 50, '', ('-c', 'import time; print(1, flush=True); time.sleep(50)'))\n"
        "d.chosen = lambda names: ([stage], 100.0)\n"
        f"sys.exit(d.main(['one', '--no-build', '--state', r'{tmp_path / 'state'}', '--out', r'{tmp_path / 'out'}']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    log = tmp_path / "state" / "logs" / "one.txt"
    end = time.monotonic() + 20
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and "stopped from outside" in output and (tmp_path / "out" / "results.json").exists()


def test_the_build_is_waited_for_only_where_it_is_needed(tmp_path: Path) -> None:
    marker = tmp_path / "built"
    look = f"import os; print(os.path.exists(r'{marker}'))"
    run = runner(tmp_path)
    run.build([sys.executable, "-c", f"import time; time.sleep(1.5); open(r'{marker}', 'w').close()"])
    assert run.run([script(look), script(look, "two", build_wait=10)])
    logs = {name: (tmp_path / "state" / "logs" / f"{name}.txt").read_text().strip() for name in ("one", "two")}
    assert logs == {"one": "False", "two": "True"} and results(tmp_path)["notes"]["build"] == "ok"


def test_what_is_taken_home_is_small(tmp_path: Path) -> None:
    """At most eight files of plain names in one folder, the log cut to its end."""
    state = tmp_path / "state"
    state.mkdir()
    for name in ("tests.xml", "again.xml", "counters.csv", "build.txt"):
        (state / name).write_text("x")
    (state / "swept" / "tuned").mkdir(parents=True)
    (state / "swept" / "tuned" / "nvidia-h200.json").write_text("{}")
    runner(tmp_path).run([script("print('x' * 3_000_000); print('the end')")])
    files = sorted((tmp_path / "out").rglob("*"))
    assert len(files) == 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+", f.name) and f.is_file() for f in files)
    assert sum(f.stat().st_size for f in files) < 2**21 + 2**16 and (tmp_path / "out" / "log.txt").read_text().endswith(
        "the end\n"
    )


def test_a_second_machine_takes_over_what_the_first_brought_home(tmp_path: Path) -> None:
    test = {"suite": "test", "name": "tests/test_a.py::test_b", "outcome": "failed"}
    run = driver.Runner(tmp_path / "state", tmp_path / "out", 60)
    rows.append(run.results.rows_path("tests"), {"environment": {"commit": None}}, test)
    run.results.stage(Stage("tests", 1, 10, "", ()), "failed: status 1", 1.0)
    table = tmp_path / "state" / "swept" / "tuned" / "nvidia-h100.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps({"device": "nvidia-h100", "rates": {"a": 1}, "entries": [1], "break_even": [2]}))
    run.results.write()

    other = driver.Runner(tmp_path / "state2", tmp_path / "out2", 60)
    other.results.restore(tmp_path / "out")
    assert rows.of_suite(rows.read(other.results.rows_path("tests")), "test") == [{"stage": "tests", **test}]
    assert json.loads((tmp_path / "state2/swept/tuned/nvidia-h100.json").read_text())["entries"] == [1]
    rates = json.loads((tmp_path / "state2/measured/tuned/nvidia-h100.json").read_text())
    assert rates["entries"] == [] and rates["rates"] == {"a": 1}
    with pytest.raises(ValueError, match=r"^gpu_check: expected a folder with results.json, got "):
        other.results.restore(tmp_path)


# Problems, checks and floors


def test_the_problems_of_a_row_are_those_of_the_pruned_network() -> None:
    """So the kernels that are compiled, checked and swept beforehand are those that the network launches."""
    network, sparsity, block_shape = "vgg19_cifar", 0.95, (128, 16)
    torch.manual_seed(0)
    model = sk.models.build(network, 10).eval()
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    for name, conv in convs:
        sk.prune_(model, sparsity, (min(block_shape[0], conv.out_channels), block_shape[1]), layers=[name])
    shapes = tuple({(min(block_shape[0], c.out_channels), block_shape[1]) for _, c in convs})
    x = torch.randn(1, 3, 32, 32)
    policy = sk.Policy(measure=False, min_speedup=0.0, check_model=False, dense_layers=False, block_shapes=shapes)
    fast = sk.convert(sk.finalize_(model), example_inputs=(x,), policy=policy)
    found: dict[ConvProblem, list[str]] = {}
    for k in warm_up(fast, x, calls=2).kernels:
        found.setdefault(k.problem, []).append(k.layer)
    row = layers.NetworkRow(network, 1, sparsity, block_shape)
    assert set(row.problems("cpu")) == set(found)
    assert [len(layer.names) for layer in layers.NETWORKS[network]] == [len(found[p]) for p in row.problems("cpu")]


def test_both_networks_have_eleven_distinct_layers() -> None:
    assert {name: len(found) for name, found in layers.NETWORKS.items()} == {"vgg19_cifar": 11, "vgg16_bn": 11}
    assert [layers.layer_name(p) for p in layers.HEADLINE.problems()][:3] == ["conv1_2", "conv2_1", "conv2_2"]
    assert set(counters.LAYERS) <= {layers.layer_name(p) for p in layers.HEADLINE.problems()}


SMALL = ConvProblem(
    3, 32, 8, 8, 32, 3, 3, (1, 1), (1, 1), (1, 1), (16, 1), 72, torch.float32, "cpu", "relu_maxpool2"
)  # fmt: skip


def test_a_right_layer_is_checked_and_a_wrong_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    row = correctness.checked(SMALL)
    assert row["match"] and row["errors"] == [] and 0 < row["worst_over_bound"] < 1
    call = layers.Bench.call

    def last_image_lost(self, choice):
        y = call(self, choice)
        y[-1, 3] += 0.01
        return y

    monkeypatch.setattr(layers.Bench, "call", last_image_lost)
    row = correctness.checked(SMALL)
    assert not row["match"] and any("elements out of bounds" in e for e in row["errors"])
    assert any(e.startswith("on the CPU") for e in row["errors"])


def test_an_element_left_unwritten_and_runs_that_differ_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = layers.Bench.call

    def unwritten(self, choice):
        y = call(self, choice)
        out = torch.empty_like(y)
        out[..., :-1] = y[..., :-1]
        return out

    monkeypatch.setattr(layers.Bench, "call", unwritten)
    assert not correctness.checked(SMALL)["match"]
    noise = iter(range(100))
    monkeypatch.setattr(layers.Bench, "call", lambda self, choice: call(self, choice) * (1 + 1e-7 * next(noise)))
    assert "3 runs differ" in correctness.checked(SMALL)["errors"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_layer_that_raises_is_a_row() -> None:
    row = correctness.checked(replace(SMALL, epilogue="sigmoid"))
    assert not row["match"] and len(row["errors"]) == 1


def test_limits_of_a_layer_by_hand() -> None:
    """conv3_2 of VGG-19: 1024 images of 8x8, 256 -> 256, 36 of 288 (128, 16) blocks in two block rows."""
    p = next(p for p in layers.HEADLINE.problems() if layers.layer_name(p) == "conv3_2")
    config = {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
    found = measure.floors_us(p, config, replace(H200, l2_bytes_s=5.5e12, matrix_flops=790e12))
    tiles, depth = 256 * 2, 36 * 16 / 2
    assert p.nnz_blocks == 36
    assert found["l2_us"] == pytest.approx(1e6 * tiles * depth * 384 * 2 / 5.5e12)
    assert found["matrix_us"] == pytest.approx(1e6 * 2 * 65536 * 128 * 2 * depth / 790e12)
    assert found["predicted_us"] > found["l2_us"] and set(summary.FLOORS) < set(found)
    # One position a tile: 121 of 144 taps are inside the image, and only those are loaded and multiplied.
    some = measure.floors_us(p, config, replace(H200, l2_bytes_s=5.5e12, matrix_flops=790e12), one_position=True)
    assert all(some[key] == pytest.approx(found[key] * 121 / 144) for key in ("l2_us", "matrix_us", "tags_us"))
    assert some["memory_us"] == found["memory_us"] and some["predicted_us"] < found["predicted_us"]


@pytest.fixture
def forward_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made from the forward kernels as if a GPU were there, by the model."""

    def listed(p: ConvProblem) -> Iterator[tuple[KernelSpec, dict[str, int]]]:
        for variant in ("pixels_on_m", "weights_on_m", "images_on_m", "taps_together"):
            spec = KERNELS["bsr_conv2d__triton" + ("" if variant == "pixels_on_m" else f"_{variant}")]
            if variant != "images_on_m" or images_reason(p) is None:
                yield from ((spec, c) for c in configs(p, variant, shared_memory=227 * 1024, processors=132))

    monkeypatch.setattr(sweep, "configurations", listed)
    monkeypatch.setattr(tables, "gpu_rates", lambda *_: H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    # The first convolution is dense and of another op: its choice does not matter here.
    def chosen(p: ConvProblem | FusedConvProblem, index: int) -> KernelChoice:
        return KernelChoice("bsr_conv2d__triton", configs(p)[0] if isinstance(p, ConvProblem) else {})

    monkeypatch.setattr(layers, "choose", chosen)


@pytest.mark.usefixtures("forward_kernels")
def test_one_position_a_tile_is_swept_and_checked_where_it_takes_the_layer() -> None:
    name = "bsr_conv2d__triton_images_on_m"
    taken = 0
    for p in layers.HEADLINE.problems():
        expected = p.epilogue != "relu_maxpool2"
        assert (name in {choice.name for choice in sweep.ways(p)}) == expected
        first, *others = layers.choices_of(p)
        assert first.name == "bsr_conv2d__triton" and [c.name for c in others] == [name] * expected
        taken += expected
    assert taken == 6
    checked = {(p, c.name) for p, c in precompile.jobs(["headline"], "cuda", swept=False) if c is not None}
    assert checked >= {(p, name) for p in layers.HEADLINE.problems() if p.epilogue != "relu_maxpool2"}


def test_a_sweep_rehearsed_on_the_cpu_leaves_rows_and_a_table(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--batch", "1", "--layers", "1", "--state", str(tmp_path), "--rows", str(out)]
    sweep.main(arguments)
    found = rows.of_suite(rows.read(out), "sweep")
    assert found and all(r["match"] and r["p50_ms"] > 0 and r["dense_p50_ms"] > 0 for r in found)
    (table,) = (tmp_path / "swept" / "tuned").glob("*.json")
    assert len(tables.Table.load(table).entries) == 1


def test_jobs_to_compile_are_each_there_once() -> None:
    found = precompile.jobs(["headline"], "cpu", training=True)
    keys = [(p, None if c is None else (c.name, str(sorted(c.config.items())))) for p, c in found]
    assert len(set(keys)) == len(keys)
    training = [p for p, c in found if c is None]
    # Each convolution with what the batch norm behind it takes.
    assert len(training) == 11 and {p.n for p in training} == {precompile.TRAINING_BATCH}
    assert {p.epilogue for p in training} == {"relu", "relu_maxpool2"}
    assert {p for p, c in found if c is not None} >= set(layers.HEADLINE.problems("cpu"))
    seconds, error = precompile.run((replace(SMALL, epilogue="none"), None))
    assert error is None and seconds > 0
    assert "ValueError" in (precompile.run((replace(SMALL, epilogue="sigmoid"), layers.choice_of(SMALL)))[1] or "")


def test_predictions_are_of_the_layers_that_are_measured() -> None:
    """A line for each distinct layer of the network and its first one; the last line is the whole of the others."""
    for name in ("batch_1", "vgg16_224"):
        row = layers.ROWS[name]
        lines = list(predict_gpu.layer_table(row, H200))
        first, *others = lines[2:-1]
        assert first.startswith("| 3 -> 64 @ ") and "no zeros" in first
        assert [line.split(" | ")[0] for line in others] == [
            f"| {predict_gpu.title(layer)}" for layer in layers.NETWORKS[row.network]
        ]
        counts = [len(layer.names) for layer in layers.NETWORKS[row.network]]
        dense = [float(line.split(" | ")[1]) for line in (first, *others)]
        ours = [float(line.split(" | ")[2]) for line in (first, *others)]
        cells = lines[-1].replace("*", "").split(" | ")
        assert float(cells[1]) == pytest.approx(sum(n * t for n, t in zip([1, *counts], dense, strict=True)), rel=0.02)
        whole = sum(n * t for n, t in zip([1, *counts], ours, strict=True))
        assert float(cells[2].split(",")[0]) == pytest.approx(whole, rel=0.02)
    assert sum(len(layer.names) for layer in layers.NETWORKS["vgg19_cifar"]) == 15


# The profiler's report and the versions


def test_metrics_that_the_profiler_does_not_know_are_left_out() -> None:
    listing = "Device NVIDIA H100\nlts__t_sectors   Counter  # of LTS sectors\ndram__bytes_read  Counter bytes\n"
    wanted = ("lts__t_sectors.sum", "l1tex__gone.sum", "dram__bytes_read.sum", "launch__grid_size")
    assert counters.known_metrics(wanted, listing) == [wanted[0], wanted[2], wanted[3]]


def test_the_profilers_csv_is_read() -> None:
    text = (
        '==PROF== Connected\n"ID","Kernel Name","lts__t_sectors.sum","gpu__time_duration.sum"\n"","","sector","ns"\n'
        '"0","bsr_conv2d_fwd_kernel","1,234","56.5"\n"1","bsr_conv2d_fwd_kernel","n/a","7"\n'
    )
    wanted = ("lts__t_sectors.sum", "gpu__time_duration.sum")
    assert counters.parsed_csv(text, wanted) == [
        {"lts__t_sectors.sum": 1234.0, "gpu__time_duration.sum": 56.5}, {"gpu__time_duration.sum": 7.0},
    ]  # fmt: skip
    assert counters.parsed_csv(text, wanted[:1]) == [{"lts__t_sectors.sum": 1234.0}, {}]
    assert counters.parsed_csv("==ERROR== nothing", wanted) == []


def test_nothing_but_what_was_asked_for_is_read() -> None:
    """A real report has the device's attributes in front, and four statistics of every metric."""
    text = (
        '"ID","device__attribute_architecture","numa__cpu_affinity","lts__t_sectors.avg","lts__t_sectors.sum"\n'
        '"","","","sector","sector"\n"0","384","3","2","8"\n'
    )
    assert counters.parsed_csv(text, counters.METRICS) == [{"lts__t_sectors.sum": 8.0}]


def test_reasons_of_waiting_are_those_that_the_profiler_knows() -> None:
    stem = "smsp__average_warps_issue_stalled_"
    listing = "\n".join(
        f"{stem}{name}  Ratio  average"
        for name in (
            "long_scoreboard_per_issue_active", "long_scoreboard_not_issued_per_issue_active",
            "math_pipe_throttle_per_issue_active", "barrier_per_warp_active",
        )
    )  # fmt: skip
    found = counters.stall_metrics(listing + "\nlts__t_sectors Counter sectors\n")
    assert found == [f"{stem}{n}_per_issue_active.ratio" for n in ("long_scoreboard", "math_pipe_throttle")]
    assert counters.stall_metrics("") == []
    metrics = {"lts__t_sectors.sum": 5.0, **dict(zip(found, (0.25, 1.5)))}
    first, second = summary.counter_lines([{"suite": "counters", "name": "conv3_2", "config": {}, "metrics": metrics}])
    assert first == "conv3_2 default: t_sectors.sum 5"
    assert second == "    warps waiting for: math_pipe_throttle 1.50 long_scoreboard 0.25"


def test_kernels_of_a_call_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten calls of two kernels, one of them launched twice, on a profiler that hands events over in another order."""
    names, start = ("conv", "pool", "conv"), itertools.count()
    cuda = torch.autograd.DeviceType.CUDA

    def event(name: str, us: float) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=cuda, time_range=SimpleNamespace(start=next(start), elapsed_us=lambda: us)
        )

    ran = [event(name, us) for call in range(10) for name, us in zip(names, (10.0 + call, 3.0, 20.0 + call))]
    ran.append(SimpleNamespace(name="a copy on the host", device_type=torch.autograd.DeviceType.CPU))
    profile = contextlib.nullcontext(SimpleNamespace(events=lambda: ran[::-1]))
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[int] = []
    kernels, launches = peers.kernel_times(lambda: calls.append(1), calls=10)
    assert len(calls) == 11
    assert kernels == [{"name": "conv", "us": 39.0, "calls": 2.0}, {"name": "pool", "us": 3.0, "calls": 1.0}]
    assert launches == [{"name": n, "us": us} for n, us in zip(names, (14.5, 3.0, 24.5))]
    row = {"suite": "kernel_counts", "stage": "vgg", "name": "headline", "kernel_times": kernels}
    assert summary.kernel_lines([row]) == [
        "[vgg] headline ours: 42 us in 3 kernels", "    39.0 us, 2 x conv", "    3.0 us, 1 x pool",
    ]  # fmt: skip
    ran.append(event("conv", 1.0))
    assert peers.kernel_times(lambda: None, calls=10)[1] == []


def test_a_triton_cache_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tarfile

    (tmp_path / "made" / "abc").mkdir(parents=True)
    (tmp_path / "made" / "abc" / "kernel.cubin").write_bytes(b"x")
    with tarfile.open(tmp_path / "triton-cache.tar.xz", "w:xz") as packed:
        packed.add(tmp_path / "made" / "abc", "abc")
    monkeypatch.setenv("TRITON_CACHE_TARBALL", str(tmp_path / "triton-cache.tar.xz"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "rows.jsonl"
    versions.main(["--device", "cpu", "--rows", str(out)])
    (row,) = rows.of_suite(rows.read(out), "versions")
    assert row["cached_kernels"] == 1 and (tmp_path / "cache" / "abc" / "kernel.cubin").exists()
    assert rows.read(out)[0]["environment"]["threads"] == torch.get_num_threads()


def test_launchers_made_without_a_driver_name_it_as_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that they find none of its functions on the device, and Triton makes them again."""
    warm_triton_cache.empty_libcuda(tmp_path)
    environment: dict[str, str] = {"TRITON_INTERPRET": "1"}
    monkeypatch.setattr(warm_triton_cache.os, "environ", environment)
    monkeypatch.setattr(warm_triton_cache.ctypes, "CDLL", lambda path: None)
    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(install=lambda **options: None))
    warm_triton_cache.prepare(str(tmp_path / "cache"), str(tmp_path))
    monkeypatch.undo()
    source, made = tmp_path / "launch.c", tmp_path / "launch.so"
    source.write_text("int cuLaunch(void);\nint launch(void) { return cuLaunch(); }\n")
    # As Triton calls a compiler; Debian's leaves out by default what is not needed, others do when told to.
    command = [environment["CC"], str(source), "-shared", "-fPIC", "-o", str(made), "-l:libcuda.so.1", f"-L{tmp_path}"]
    subprocess.run(command, check=True)
    assert b"libcuda.so.1" in made.read_bytes() and "TRITON_INTERPRET" not in environment


# The report


def example() -> dict:
    config = {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4, "SPLITS": 1}
    environment = {"commit": None, "cpu": "cpu", "gpu": "NVIDIA H200", "torch": "2.11", "threads": 16, "dirty": None,
                   "platform": "Linux", "argv": []}  # fmt: skip
    layer = {
        "name": "conv3_2",
        "batch": 1024,
        "block_shape": [128, 16],
        "kernel": "bsr_conv2d__triton",
        "config": config,
    }
    vgg = {"suite": "vgg", "stage": "vgg", "name": "test_vgg_gpu[headline]", "network": "vgg19_cifar",
           "sparsity": 0.875, "batch": 1024, "block_shape": [128, 16], "match": True, "error_ratio": 1.1,
           "p20_ms": 0.5, "p50_ms": 0.51, "p80_ms": 0.52, "n": 9, "dense_p50_ms": 1.53, "speedup": 3.0,
           "images_per_s": 2e6, "recorded": True, "baselines_p50_ms": {"graph": 1.53, "eager": 1.9},
           "predicted_ms": 0.4, "predicted_dense_ms": 1.4}  # fmt: skip
    found = [
        {"suite": "correctness", "stage": "correctness", **layer, "row": "headline", "match": False,
         "errors": ["3 runs differ"]},
        {"suite": "sweep", "stage": "sweep", **layer, "match": True, "p50_ms": 0.034, "dense_p50_ms": 0.129,
         "l2_us": 20.6, "memory_us": 22.4, "matrix_us": 12.2, "issue_us": 11.0},
        {"suite": "counters", "stage": "counters", **layer, "match": True, "metrics": {"lts__t_sectors.sum": 5.0}},
        vgg,
        {"suite": "kernel_counts", "stage": "vgg", "name": vgg["name"], "match": True, "kernels": 18,
         "dense_kernels": 37, "kernel_times": [{"name": "bsr_conv2d_fwd_kernel", "us": 412.5, "calls": 15.0}]},
        {"suite": "tests", "stage": "tests", "name": "collected", "count": 3},
        {"suite": "test", "stage": "tests", "name": "tests/a.py::b", "outcome": "failed",
         "message": ">  assert one == two\nE  assert 1 == 2\n\n/a/machine/a.py:7: AssertionError"},
        {"suite": "test", "stage": "tests", "name": "tests/a.py::c", "outcome": "passed"},
        {"suite": "sanitizer", "stage": "sanitizer", "name": "memcheck", "match": True, "kernels": 11, "of": 11,
         "summary": "ERROR SUMMARY: 0 errors"},
    ]  # fmt: skip
    stages = [{"stage": "vgg", "call": 1, "status": "ok", "seconds": 50.0, "limit": 75, "compiled": 3}]
    return {"format": 1, "environment": environment, "notes": {}, "stages": stages, "rows": found}


def test_results_become_a_record_and_a_report(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(example()))
    record = report.merged([path], "abc123")
    assert record["environment"]["commit"] == "abc123" and record["stages"] == example()["stages"]
    text = report.markdown(record)
    for wanted in ("**3.00x**", "18, 37", "**wrong**: 3 runs differ", "**34.0**", "22.4", "lts__t_sectors.sum",
                   "| ours | bsr_conv2d_fwd_kernel | 15 | 412.5 |",
                   "| tests | 1 | 1 | 0 | 1 |", "assert 1 == 2", "ERROR SUMMARY: 0 errors", "256x128x64 w8 s4",
                   ):  # fmt: skip
        assert wanted in text, wanted
    assert "tests/a.py::c" not in json.dumps(record)
    with pytest.raises(ValueError, match=r"^report: expected results with an environment"):
        gpu_tables.as_record({**example(), "environment": None})
    unchecked = example()
    next(r for r in unchecked["rows"] if r["suite"] == "vgg")["match"] = False
    path.write_text(json.dumps(unchecked))
    with pytest.raises(ValueError, match="was not checked against the reference"):
        report.merged([path], "abc123")


def test_kernels_beside_those_of_auto_are_tables_of_a_report() -> None:
    one = {"suite": "one_launch", "stage": "chain", "name": "b4", "in_one_launch": [], "error_ratio": 0.99}
    ways = [
        {**one, "way": "graph", "kernels": 26, "p50_ms": 0.1, "served_p50_ms": 0.12},
        {**one, "way": "chain", "kernels": 9, "p50_ms": 0.05, "served_p50_ms": 0.11, "in_one_launch": ["a to b"]},
        {**one, "name": "b1", "way": "graph", "kernels": 31, "p50_ms": 0.09, "served_p50_ms": 0.1},
        {"suite": "dense", "name": "b4", "p50_ms": 0.2, "baselines_p50_ms": {"eager": 1.3, "CUDA graph": 0.2}},
    ]
    lines = gpu_tables.one_launch_table(ways).splitlines()
    assert lines[2] == "| 1 | graph |  | 31 | 90.0 | 100.0 | 1.00x |  |  |  | 0.99 |"
    assert lines[4] == "| 4 | chain | a to b | 9 | 50.0 | 110.0 | 2.00x | CUDA graph | 200.0 | **4.00x** | 0.99 |"
    conv = {"suite": "tensor_cores", "stage": "tensor_cores", "name": "conv3_2", "config": {}, "worst_over_bound": 0.5,
            "problem": {"n": 1024, "block_shape": [32, 32]}}  # fmt: skip
    layers_of = [
        {**conv, "kernel": "bsr_conv2d__triton", "p50_ms": 0.036},
        {**conv, "kernel": "bsr_conv2d__cuda_tensor_cores", "p50_ms": 0.024, "config": {"variant": 1, "overlap": 1}},
        {**conv, "name": "stem", "kernel": "bsr_stem__cuda_tensor_cores", "p50_ms": 0.1, "expected_us": 90.0},
    ]
    lines = gpu_tables.tensor_cores_table(layers_of).splitlines()
    assert lines[2:] == [
        "| conv3_2 | 1024 | 32x32 | bsr_conv2d__triton | 36.0 | bsr_conv2d__cuda_tensor_cores | variant 1 overlap 1 "
        "| 24.0 | 1.50x |  | 0.50 |",
        "| stem | 1024 | 32x32 |  |  | bsr_stem__cuda_tensor_cores |  | 100.0 |  | 90.0 | 0.50 |",
    ]
    record = {"rows": ways + layers_of}
    text = "\n".join(gpu_tables.sections(record))
    assert text.count("## ") == 2 and lines[2] in text and "**4.00x**" in text


def test_what_a_failed_test_said_is_its_error() -> None:
    long = {"message": "E   torch.SomeError: it broke\nE   Set VERBOSE=1\n\nfile.py:7: SomeError"}
    assert summary.said(long) == "torch.SomeError: it broke"
    assert summary.said(long | {"error": "OtherError: first"}) == "OtherError: first"
    assert summary.said({"message": "E   assert 1 == 2\nfile.py:7: AssertionError"}) == "assert 1 == 2"
    assert summary.said({"message": "Timeout"}) == "Timeout" and summary.said({}) == ""


def test_the_closing_table_shows_what_matters_and_stays_short() -> None:
    result = example()
    text = summary.summary(result)
    for wanted in ("3.00x", "WRONG headline conv3_2: 3 runs differ", "floors l2 21 memory 22", "FAILED tests/a.py::b",
                   "1 not reached", "memcheck: 11 of 11", "vgg          call 1   50.0/75  s  ok, 3 compiled",
                   ):  # fmt: skip
        assert wanted in text, wanted
    result["rows"] += [{**result["rows"][6], "name": f"tests/a.py::{i}" * 20} for i in range(500)]
    result["rows"].append({"suite": "vgg", "name": "cut short"})
    text = summary.summary(result)
    assert len(text) <= summary.MOST_CHARACTERS and "not shown: KeyError" in text and "== stages" in text


# The tensor-core kernels of CUDA C++


def test_the_tensor_core_stage_times_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' calls are those of the emulation; one that is wrong, and one that cannot run, are rows."""
    from cuda_emulation import compiled

    from slimkernels.kernels import cuda, cuda_tensor_cores

    compiled().library.set_mode(-1, 227 * 1024)
    monkeypatch.setattr(cuda, "_require", lambda op, x: compiled())
    monkeypatch.setattr(cuda, "_target", lambda x: (0, 0))
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: cuda_tensor_cores.Limits(True, 227 * 1024, 2))
    monkeypatch.setattr(
        measure, "replay_timing", lambda call, *_, **__: timing.percentiles([0.001 * bool(len(call()))])
    )
    p = replace(layers.HEADLINE.problems("cpu")[0], n=1, h=8, w=8, dtype=torch.bfloat16)
    found = [*tensor_cores.of_stem(p, None), *tensor_cores.of_layer(p, None)]
    assert all(row["match"] for row in found), [row.get("errors") for row in found]
    ours = [row for row in found if row["kernel"] == cuda_tensor_cores.NAME]
    assert [row["config"]["variant"] for row in ours] == [2, 0, 2, 2, 2, 2] and len(found) == 3 + 1 + 6
    text = summary.tensor_core_lines(found)
    assert text[0] == "stem     cuda_tensor_cores: 1000.0 us variant 1"
    launch = cuda_tensor_cores.launch_bsr_conv2d
    monkeypatch.setattr(cuda_tensor_cores, "launch_bsr_conv2d", lambda *a: launch(*a) * (2 if a[-1]["variant"] else 1))
    wrong = list(tensor_cores.of_layer(p, None))
    assert [row["match"] for row in wrong] == [True, False, True, False, False, False, False]
    assert "WRONG" in summary.tensor_core_lines(wrong)[1]
    assert len(list(tensor_cores.of_layer(p, "no GPU"))) == 1 and not list(tensor_cores.of_stem(p, "no GPU"))


def test_the_chain_stage_times_and_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers at batch 2, on the emulation: all rows are right, a chain that is wrong in one layer is seen."""
    from cuda_emulation import compiled

    from slimkernels.kernels import cuda, cuda_chain, cuda_tensor_cores

    emulator = compiled()
    emulator.library.set_mode(-1, 227 * 1024)
    monkeypatch.setattr(cuda, "_require", lambda op, x: emulator)
    monkeypatch.setattr(cuda, "_target", lambda x: (0, 0))
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: cuda_tensor_cores.Limits(True, 227 * 1024, 20))
    monkeypatch.setattr(
        cuda_chain, "_groups_at_once",
        lambda group, barrier, dtype, device: emulator.cuda_chain_groups(group, barrier, cuda._DTYPES[dtype], device),
    )  # fmt: skip
    monkeypatch.setattr(
        measure, "replay_timing", lambda call, *_, **__: timing.percentiles([0.001 * bool(len(call()))])
    )
    monkeypatch.setattr(chain, "CONFIGURATIONS", ({}, {"group": 4, "overlap": 1}))
    problems = [replace(p, n=2, h=4, w=4, dtype=torch.bfloat16) for p in layers.ROWS["batch_1"].problems("cpu")[:2]]
    problems[1] = replace(problems[1], h=2, w=2)
    chained = [layers.Bench(p) for p in problems]
    found = list(chain.of_batch(chained, None))
    assert [row["match"] for row in found] == [True] * 3, [row.get("errors") for row in found]
    lines = summary.tensor_core_lines(found)
    assert lines[0].startswith("b2") and lines[2].endswith("group 4 images 1 overlap 1")
    launch = cuda_chain.launch_chain
    monkeypatch.setattr(cuda_chain, "launch_chain", lambda x, packed, *rest: launch(x, packed, *rest) * len(packed))
    assert [row["match"] for row in chain.of_batch(chained, None)] == [True, False, False]
    assert len(list(chain.of_batch(chained, "no GPU"))) == 1
    assert [layers.layer_name(b.problem) for b in chain.benches(1, "cpu", 3)] == ["conv1_2", "conv2_1", "conv2_2"]


def test_the_served_network_is_timed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network on the emulation: all ways are right, a wrong stem and a launch too many are seen."""
    from graph_stand_in import emulate_graphs

    from slimkernels.kernels import cuda_tensor_cores

    emulator = emulate_graphs(monkeypatch)
    names: list[str] = []
    for name in ("chain_conv2d", "stem_conv2d"):
        entry = getattr(emulator, f"cuda_{name}")
        monkeypatch.setattr(
            emulator, f"cuda_{name}", lambda *a, entry=entry, name=name: names.append(name) or entry(*a)
        )

    def kernel_times(call: Callable[[], object]) -> tuple[list[dict[str, object]], list[object]]:
        names.clear()
        call()
        return [{"name": f"{name}_kernel", "us": 1.0, "calls": names.count(name)} for name in set(names)], []

    one = timing.percentiles([0.001])
    monkeypatch.setattr(peers, "kernel_times", kernel_times)
    monkeypatch.setattr(measure, "replay_timing", lambda call, *_, **__: timing.percentiles([0.001 * len(call())]))
    monkeypatch.setattr(timing, "interleaved", lambda calls, **_: dict.fromkeys(calls, one))
    torch.manual_seed(0)
    convs = [nn.Conv2d(c, 64, 3, padding=1).bfloat16().requires_grad_(False) for c in (3, 64, 64)]
    sparse = [
        sk.nn.BlockSparseConv2d.from_dense(conv, (64, 16), torch.rand(1, 36) < 0.3, epilogue).eval()
        for conv, epilogue in zip(convs[1:], ("relu_maxpool2", "relu"), strict=True)
    ]
    tail = (nn.Flatten(), nn.Linear(64 * 12, 24, dtype=torch.bfloat16), nn.Linear(24, 10, dtype=torch.bfloat16))
    pruned = nn.Sequential(
        convs[0], nn.ReLU(), sparse[0].to_dense(), nn.ReLU(), nn.MaxPool2d(2), sparse[1].to_dense(), nn.ReLU(), *tail
    ).eval()
    fast = nn.Sequential(sk.nn.FusedConv2d.from_dense(convs[0], "relu"), *sparse, *tail).eval()
    whole = served.Network(pruned, fast, torch.randn(5, 3, 8, 6).bfloat16())
    assert [len(x) for x in whole.batches(2)] == [2, 2]
    found = {row["way"]: row for row in served.of_batch(whole, 2, served.WAYS, "cpu")}
    # Behind the stem one block-sparse layer is left, which is no chain.
    errors = {way: row.get("errors") for way, row in found.items() if not row["match"]}
    assert list(errors) == ["all"], errors
    assert "expected {'chain_conv2d': 2, 'stem_conv2d': 1, 'bsr_conv2d': 0}" in errors["all"][0]
    text = summary.one_launch_lines([*found.values()])
    assert text[0].startswith("b2 graph: 2000.0 us (1.00x), served 1000.0, 0 kernels, 1.00 of the modules' error")
    assert text[1].endswith("1 to 2 (2 layers)") and "WRONG a call launches" in text[-1]
    assert text[3].endswith("1 to 2 (2 layers), 4 to 5 (2 linear layers)")
    launch = cuda_tensor_cores.launch_stem_conv2d
    monkeypatch.setattr(cuda_tensor_cores, "launch_stem_conv2d", lambda *a: launch(*a) * 1.2)
    wrong = list(served.of_batch(whole, 2, {"stem": served.WAYS["stem"]}, "cpu"))
    assert not wrong[0]["match"] and "times as far from float64 as the modules are" in wrong[0]["errors"][0]
    monkeypatch.setattr(cuda_tensor_cores, "launch_stem_conv2d", lambda *a: launch(*a[:2]))
    (failed,) = served.of_batch(whole, 2, {"stem": served.WAYS["stem"]}, "cpu")
    assert not failed["match"] and "TypeError" in failed["errors"][0] and "p50_ms" not in failed


def test_the_tensor_core_stage_times_and_checks_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both gradients beside what a training step runs; one that is wrong is a row that says so."""
    from cuda_emulation import compiled

    from slimkernels.kernels import KERNELS, Request, cuda, cuda_gradients, cuda_tensor_cores

    compiled().library.set_mode(-1, 227 * 1024)
    monkeypatch.setattr(cuda, "_require", lambda op, x: compiled())
    monkeypatch.setattr(cuda, "_target", lambda x: (0, 0))
    monkeypatch.setattr(cuda_tensor_cores, "_limits", lambda x: cuda_tensor_cores.Limits(True, 227 * 1024, 2))
    monkeypatch.setattr(
        measure, "replay_timing", lambda call, *_, **__: timing.percentiles([0.001 * bool(len(call()))])
    )

    def exact(kernel: str, request: Request, stride: tuple[int, int]) -> KernelSpec:
        """The reference, rounded once: torch's own bf16 gradients on the CPU are beyond our bounds."""
        spec = KERNELS[f"{request.op}__reference"]

        def launch(*arguments: object) -> torch.Tensor:
            wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
            return spec.launch(*wide).to(request.dtype)

        return replace(spec, launch=launch)

    monkeypatch.setattr(tensor_cores, "resolve_gradient", exact)
    p = replace(layers.HEADLINE.problems("cpu")[0], n=1, h=6, w=6, dtype=torch.bfloat16)
    found = list(tensor_cores.of_gradients(p, None))
    assert [(row["name"], row["match"]) for row in found] == [
        (f"64-64@6 {name}", True) for name in ("dgrad", "dgrad", "wgrad", "wgrad")
    ], [row.get("errors") for row in found]
    assert [row["kernel"] for row in found][1::2] == [cuda_gradients.DGRAD, cuda_gradients.WGRAD]
    spec = KERNELS[cuda_gradients.WGRAD]
    monkeypatch.setitem(tensor_cores.KERNELS, spec.name, replace(spec, launch=lambda *a: spec.launch(*a) * 2))
    assert [row["match"] for row in tensor_cores.of_gradients(p, None)] == [True, True, True, False]
    assert not list(tensor_cores.of_gradients(p, "no GPU"))
