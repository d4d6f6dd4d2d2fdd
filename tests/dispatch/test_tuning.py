"""Tuned tables: the file, the nearest entry and its one warning, break-even, fitted rates, and `slimkernels tune`."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import slimkernels as sk
from slimkernels import tuning
from slimkernels.cli.app import app
from slimkernels.dispatch import cpu_cost, select, tables
from slimkernels.dispatch.break_even import Curve, curves
from slimkernels.dispatch.cpu_cost import CPU_RATES, CpuRates
from slimkernels.dispatch.devices import cpu_device_name, device_name
from slimkernels.dispatch.gpu_rates import H200
from slimkernels.dispatch.tables import Entry, Table
from slimkernels.kernels import KERNELS
from slimkernels.kernels.problems import ConvProblem, LinearProblem, LowRankConvProblem, LowRankLinearProblem
from slimkernels.kernels.triton.bsr_conv2d_config import configs

SHIPPED = Path(sk.__file__).parent / "tuned"
CONV = ConvProblem(1, 80, 8, 8, 64, 3, 3, (1, 1), (1, 1), (1, 1), (16, 1), 288, torch.float32, "cpu", "relu")
LINEAR = LinearProblem(4, 64, 128, (16, 1), 128, torch.float32, "cpu")
LOW_RANK = LowRankLinearProblem(16, 64, 64, 8, torch.float32, "cpu")
TAI = LowRankConvProblem(
    1, 8, 8, "tai", ((4, 8, 3, 1), (8, 4, 1, 3)), (1, 1), (1, 1), (1, 1), torch.float32, "cpu"
)  # fmt: skip
ISA = select.machine_isa()
KERNEL = f"bsr_conv2d_f32__{ISA}"
native = pytest.mark.skipif(KERNELS[KERNEL].available() is not None, reason="native library not built")


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path) -> Path:
    """A cache folder of the test's own and no shipped tables; nothing remembered before or after."""
    monkeypatch.setenv("SLIMKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    # A layer that takes a tenth of a second is no help here.
    monkeypatch.setattr(tuning, "LINEAR_LAYERS", ((64, 64), (96, 96)))
    for name in ("SLIMKERNELS_ISA", "SLIMKERNELS_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "shipped").mkdir()
    select.forget()
    yield tmp_path
    select.forget()


def entries(problem: ConvProblem, dense: float, times: dict[float, float], kernel: str = KERNEL) -> list[Entry]:
    blocks = problem.c_out * problem.c_in * problem.r * problem.s // (problem.block_shape[0] * problem.block_shape[1])
    return [
        Entry(replace(problem, nnz_blocks=blocks - round(blocks * s)), kernel, {}, t, dense) for s, t in times.items()
    ]


def test_a_table_comes_back_from_its_file(own_tables) -> None:
    table = Table("some-cpu", {"threads": 2}, [], CPU_RATES["avx2"])
    for problem in (CONV, LINEAR, LOW_RANK, TAI, replace(CONV, dtype=torch.bfloat16, device="cuda")):
        table.put(Entry(problem, "kernel", {"BLOCK_M": 128}, 1e-3, 2e-3, 3))
    path = own_tables / "deep" / "table.json"
    table.save(path)
    assert Table.load(path) == table
    table.put(Entry(CONV, "kernel", {}, 5e-4, 2e-3))
    assert len(table.entries) == 5 and table.entry(CONV).seconds == 5e-4
    gpu = Table("nvidia-h200", {}, [], H200)
    gpu.save(path)
    assert Table.load(path).rates == H200


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(format=9), "expected format 1, got 9"),
        (lambda d: d["entries"][0].update(seconds=-1.0), "expected positive times"),
        (lambda d: d["entries"][0]["problem"].update(op="conv3d"), "expected op in .*, got 'conv3d'"),
        (lambda d: d["entries"][0]["problem"].pop("c_in"), "c_in"),
        (lambda d: d.pop("device"), "device"),
    ],
)
def test_a_damaged_table_is_named(own_tables, change, why) -> None:
    path = own_tables / "t.json"
    Table("x", {}, [Entry(CONV, "k", {}, 1e-3, 2e-3)]).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"tuned table .*t\.json: .*{why}"):
        Table.load(path)


def test_a_damaged_table_of_the_user_is_passed_over_with_a_warning() -> None:
    path = tables.user_path(device_name())
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match="ignoring a damaged tuned table"):
        assert tables.table_for("cpu") == (None, False)


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (("AuthenticAMD", "25", "1", "AMD EPYC 7B13 64-Core"), "amd-epyc-zen3"),
        (("AuthenticAMD", "25", "17", "AMD EPYC 9B14"), "amd-epyc-zen4"),
        (("AuthenticAMD", "23", "49", "AMD Ryzen 9"), "amd-ryzen-zen2"),
        (("GenuineIntel", "6", "143", "Intel(R) Xeon(R) 8481C"), "intel-xeon-sapphirerapids"),
        (("GenuineIntel", "6", "999", "Intel"), "intel-model999"),
        (("", "", "", "Neoverse V2"), "neoverse-v2"),
    ],
)
def test_names_of_processors(info, name) -> None:
    assert cpu_device_name(dict(zip(("vendor_id", "cpu family", "model", "model name"), info))) == name


def test_the_users_entries_come_before_the_shipped_ones() -> None:
    name = device_name()
    Table(name, {}, [Entry(CONV, "shipped", {}, 1e-3, 2e-3), Entry(LINEAR, "shipped", {}, 1e-3, 2e-3)]).save(
        tables.SHIPPED / f"{name}.json"
    )
    Table(name, {}, [Entry(CONV, "own", {}, 1e-3, 2e-3)]).save(tables.user_path(name))
    table, own = tables.table_for("cpu")
    assert own and {e.problem: e.kernel for e in table.entries} == {CONV: "own", LINEAR: "shipped"}


def test_the_nearest_entry_is_near_in_log_space() -> None:
    table = Table(device_name(), {}, [Entry(replace(CONV, n=n), f"n={n}", {}, 1e-3, 2e-3) for n in (1, 16, 128)])
    table.save(tables.user_path(device_name()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n, expected, away in ((16, 16, 0.0), (5, 16, 1.678), (3, 1, 1.585), (400, 128, 1.644)):
            entry, distance = tables.nearest(replace(CONV, n=n))
            assert entry.kernel == f"n={expected}" and distance == pytest.approx(away, abs=1e-3)
    assert tables.distance(CONV, replace(CONV, block_shape=(16, 4))) == float("inf")
    assert tables.distance(CONV, LINEAR) == float("inf")
    with pytest.warns(UserWarning, match=r"no tuned entry near bsr_conv2d \(16, 1\).*`slimkernels tune`"):
        assert tables.nearest(replace(CONV, n=1 << 14)) is None


REFERENCE = "low_rank_linear__reference"


@pytest.fixture
def two_configs(monkeypatch) -> None:
    """A reference kernel with two configurations, so that there is something to choose."""
    spec = KERNELS[REFERENCE]
    monkeypatch.setitem(KERNELS, REFERENCE, replace(spec, configs=lambda problem: ({"TILE": 1}, {"TILE": 2})))


def test_another_devices_table_stands_in_with_one_warning(two_configs) -> None:
    Table("other-cpu", {}, [Entry(LOW_RANK, REFERENCE, {"TILE": 2}, 1e-3, 2e-3)], CPU_RATES["avx2"]).save(
        tables.SHIPPED / "other-cpu.json"
    )
    name = device_name()
    with pytest.warns(UserWarning, match=f"no tuned table for {name}, the nearest entry of another device") as seen:
        choice = select.choose(LOW_RANK, "reference")
        select.choose(replace(LOW_RANK, m=17), "reference")
    assert choice.config == {"TILE": 2} and choice.reason == "tuned on this shape: 1e+03 us"
    assert len(seen) == 1


def test_a_choice_follows_the_table_and_else_the_cost_model(two_configs, monkeypatch) -> None:
    for tile in (1, 2):
        Table(device_name(), {}, [Entry(LOW_RANK, REFERENCE, {"TILE": tile}, 1e-3, 2e-3)]).save(
            tables.user_path(device_name())
        )
        select.forget()
        assert select.choose(LOW_RANK, "reference").config == {"TILE": tile}
        near = select.choose(replace(LOW_RANK, m=20), "reference")
        assert near.config == {"TILE": tile} and near.reason == "tuned on a shape 0.3 doublings away: 1e+03 us"
    monkeypatch.setattr(select, "predicted_seconds", lambda spec, problem, config, index: 1.0 / config["TILE"])
    with pytest.warns(UserWarning, match="no tuned entry near"):
        far = select.choose(replace(LOW_RANK, m=1 << 20), "reference")
    assert far.config == {"TILE": 2} and far.reason == "cost model: 5e+05 us"
    stale = Entry(LOW_RANK, REFERENCE, {"TILE": 3}, 1e-3, 2e-3)
    Table(device_name(), {}, [stale]).save(tables.user_path(device_name()))
    select.forget()
    assert select.choose(LOW_RANK, "reference").config == {"TILE": 2}, "a configuration that is gone is not run"


def test_a_configuration_reaches_the_launch(monkeypatch) -> None:
    """The tuned configuration, another one where none is tuned, and the one that is forced."""
    seen: list[dict[str, int] | None] = []
    spec = KERNELS["bsr_conv2d__reference"]

    def launch(*args, config=None):
        seen.append(config)
        return spec.launch(*args)

    configs = ({"BLOCK_M": 64}, {"BLOCK_M": 128})
    monkeypatch.setitem(KERNELS, spec.name, replace(spec, launch=launch, configs=lambda problem: configs))
    case = replace(CONV, dtype=torch.float64, block_shape=(5, 3), c_out=10, c_in=6, n=2, nnz_blocks=8, epilogue="none")
    Table(device_name(), {}, [Entry(case, spec.name, {"BLOCK_M": 128}, 1e-3, 2e-3)]).save(
        tables.user_path(device_name())
    )
    select.forget()
    weight = torch.zeros(10, 6, 3, 3, dtype=torch.float64)
    weight[:, :3, 0] = 1.0  # 2 x 3 blocks
    weight[:5, 3:, 1, 1] = 1.0
    bsr = sk.BSRWeight.from_dense(weight, (5, 3))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)

    def run(kernel: str = spec.name) -> torch.Tensor:
        return sk.ops.bsr_conv2d(x, bsr.values, bsr.crow_indices, bsr.col_indices, weight_shape=bsr.weight_shape,
                                 block_shape=(5, 3), padding=(1, 1), kernel=kernel)  # fmt: skip

    expected = nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(run(), expected)
    torch.testing.assert_close(run("auto"), expected)
    with select.forced(select.KernelChoice(spec.name, {"BLOCK_M": 32})):
        run()
    run()
    assert seen == [{"BLOCK_M": 128}, {"BLOCK_M": 128}, {"BLOCK_M": 32}, {"BLOCK_M": 128}]


def test_break_even_is_where_the_line_crosses() -> None:
    curve = Curve(CONV, KERNEL, 1.0, ((0.5, 1.5), (0.75, 0.75), (0.9, 0.3)))
    assert curve.break_even() == pytest.approx(0.5 + 0.25 * 0.5 / 0.75)
    assert curve.break_even(2.0) == pytest.approx(0.75 + 0.15 * 0.25 / 0.45)
    assert curve.break_even(4.0) is None
    assert Curve(CONV, KERNEL, 2.0, curve.points).break_even() == pytest.approx(0.5 - 0.5 / 3)
    assert Curve(CONV, KERNEL, 9.0, curve.points).break_even() == 0.0
    assert curve.seconds(0.825) == pytest.approx(0.525) and curve.seconds(0.99) == pytest.approx(0.03)


def test_curves_group_sparsities_of_one_layer_and_size() -> None:
    rows = entries(CONV, 1e-3, {0.9: 2e-4, 0.5: 8e-4}) + entries(replace(CONV, n=16), 9e-3, {0.5: 5e-3})
    found = {c.problem.n: c for c in curves(rows)}
    assert found[1].points == ((0.5, 8e-4), (0.9, 2e-4)) and found[16].dense_s == 9e-3


def write_table(times: dict[float, float], dense: float = 1e-3, kernel: str = KERNEL) -> None:
    rows = [
        e for n in (1, 16) for e in entries(replace(CONV, n=n), dense * n, {s: t * n for s, t in times.items()}, kernel)
    ]
    Table(device_name(), {}, rows, CPU_RATES[ISA]).save(tables.user_path(device_name()))
    select.forget()


def pruned(sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(80, 64, 3, padding=1), nn.ReLU())
    return sk.finalize_(sk.prune_(model, sparsity, (16, 1), layers=["0"]))


@native
def test_convert_without_shapes_follows_the_break_even() -> None:
    """Break-even at 70%: a layer of 80% is swapped, one of 60% stays; where it holds at one size only, both stay."""
    policy = sk.Policy(block_shapes=((16, 1),), min_speedup=1.0)
    write_table({0.5: 1.5e-3, 0.9: 5e-4})  # crosses 1e-3 at 70%
    assert sk.convert(pruned(0.8), policy=policy).slimkernels_plan.swapped == ["0"]
    kept = sk.convert(pruned(0.6), policy=policy).slimkernels_plan["0"]
    assert kept.action == "keep" and "decided without shapes" in kept.reason and "0.80x" in kept.reason
    table = Table.load(tables.user_path(device_name()))
    for e in [e for e in table.entries if e.problem.n == 16]:
        table.put(replace(e, dense_seconds=e.dense_seconds / 3))
    table.save(tables.user_path(device_name()))
    select.forget()
    assert sk.convert(pruned(0.8), policy=policy).slimkernels_plan.swapped == []


@native
def test_a_table_of_other_kernels_or_layers_does_not_decide() -> None:
    shape = (64, 80, 3, 3)
    write_table({0.5: 1.5e-3, 0.9: 5e-4}, kernel="bsr_conv2d__reference")
    model = pruned(0.8)
    by_model = sk.analyze(model)["0"].patterns[0].predicted_s
    assert len(by_model) == 8, "the cost model judges at its own list of sizes"
    write_table({0.5: 1.5e-3, 0.9: 5e-4})
    assert len(tables.layer_curves(shape, (16, 1), torch.float32, "cpu")) == 2
    assert len(tables.layer_curves((128, 64, 3, 3), (16, 1), torch.float32, "cpu")) == 2
    assert tables.layer_curves((64, 64, 1, 1), (16, 1), torch.float32, "cpu") == []
    assert tables.layer_curves((4096, 4096, 3, 3), (16, 1), torch.float32, "cpu") == []
    assert tables.layer_curves(shape, (32, 1), torch.float32, "cpu") == []
    assert tables.layer_curves(shape, (16, 1), torch.float16, "cpu") == []


def test_rates_are_fitted_from_entries_that_follow_them() -> None:
    truth = CpuRates("avx2", 60e9, 12e-6, 1.5e10, 45e9, 25e9, 20e-6)
    rows = []
    for c, size in ((64, 32), (128, 16), (512, 4), (512, 2)):
        for n in (1, 16):
            for block, nnz in (((16, 1), 9 * c * c // 16 // 8), ((8, 1), 9 * c * c // 8 // 4)):
                p = replace(CONV, n=n, c_in=c, c_out=c, h=size, w=size, block_shape=block, nnz_blocks=nnz)
                sparse, dense = cpu_cost.cpu_seconds(p, truth, 2), cpu_cost.cpu_dense_seconds(p, truth, 2)
                rows.append(Entry(p, "bsr_conv2d_f32__avx2", {}, sparse, dense))
    fitted = tuning.fit_cpu_rates(rows, "avx2", 2)
    for name in (
        "dense_flops",
        "dense_call_s",
        "dense_bytes_s",
        "sparse_flops",
        "sparse_flops_strip8",
        "sparse_call_s",
    ):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=1e-3), name
    assert tuning.fit_cpu_rates(rows[:3], "avx2", 2) is None and tuning.fit_cpu_rates(rows, "avx512", 2) is None


def test_work_of_dense_layers() -> None:
    assert CONV.dense_work() == (64 * 64 * 80 * 9, 64 * 80 * 9 * 4)
    assert LINEAR.dense_work() == (4 * 64 * 128, 64 * 128 * 4)
    assert TAI.dense_work()[1] == 8 * 8 * 9 * 4


@pytest.mark.parametrize("problem", [CONV, LINEAR, LOW_RANK, TAI], ids=lambda p: p.op)
def test_what_is_measured_is_the_problem(problem) -> None:
    """The layer that is timed stores what the problem says and computes what its dense twin does."""
    layer, dense, x = tuning.build(problem)
    act = nn.functional.relu if problem.epilogue == "relu" else (lambda y: y)
    torch.testing.assert_close(layer(x), act(dense(x)), rtol=1e-4, atol=1e-3)
    if problem.op.startswith("bsr"):
        weight = layer.weight_bsr()
        assert weight.nnz_blocks == problem.nnz_blocks and (weight.crow_indices.diff() > 0).all()
    from slimkernels.inference import problem_of

    assert problem_of(layer, x) == problem


def test_standard_families_cover_both_devices_and_refuse_nonsense() -> None:
    cpu, cuda = tuning.standard_families("cpu"), tuning.standard_families("cuda")
    assert {p.dtype for f in cuda for p in f.problems} == {torch.bfloat16}
    assert {p.op for f in cpu for p in f.problems} == {p.op for f in cuda for p in f.problems} == set(sk.kernels.OPS)
    assert {(64, 16), (128, 16), (16, 16), (32, 32), (64, 64)} <= {p.block_shape for f in cuda for p in f.problems}
    for families in (cpu, cuda):
        assert len({f.label for f in families}) == len(families)
    for bad in ({"batches": [0]}, {"sparsities": [1.0]}, {"ops": ["conv3d"]}, {"block_shapes": [(0, 1)]}):
        with pytest.raises(ValueError, match=r"^standard_families: expected"):
            tuning.standard_families("cpu", **bad)


def test_tuning_a_gpu_begins_with_the_headline_layers() -> None:
    """Every convolution of VGG-19 at 1024 images in tall blocks, and the commands that ask for less get less."""
    first = [f.problems[0] for f in tuning.standard_families("cuda")[: len(tuning.HEADLINE_LAYERS)]]
    assert {p.n for p in first} == {1024} and all(p.block_shape == (min(128, p.c_out), 16) for p in first)
    model = sk.models.vgg19_cifar()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
    assert {(p.c_in, p.c_out) for p in first} == {(c.in_channels, c.out_channels) for c in convs}
    assert sum(p.epilogue == "relu_maxpool2" for p in first) == sum(isinstance(m, nn.MaxPool2d) for m in model.features)
    small = tuning.standard_families("cuda", batches=[16], block_shapes=[(32, 32)], ops=["bsr_conv2d"])
    assert {p.n for f in small for p in f.problems} == {16, 32}
    assert {p.block_shape for f in small for p in f.problems} == {(32, 32)}


ARGUMENTS = ["tune", "--op", "bsr_linear", "--batch", "1", "--block-shape", "16x1", "--sparsity", "0.75", "--sparsity"]
ARGUMENTS += ["0.9", "--seconds", "0", "--json"]


@native
def test_tune_writes_a_table_that_choice_and_conversion_read(own_tables) -> None:
    out = own_tables / "table.json"
    result = CliRunner().invoke(app, [*ARGUMENTS, "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["measured"], data["entries"], data["families"]) == (2, 4, 2)
    table = Table.load(out)
    assert table.device == device_name() and table.rates.isa == ISA and table.environment["threads"] >= 1
    assert all(e.kernel == f"bsr_linear_f32__{ISA}" and e.seconds > 0 for e in table.entries)
    assert len(json.loads(out.read_text())["break_even"]) == 2
    again = json.loads(CliRunner().invoke(app, [*ARGUMENTS, "--out", str(out)]).stdout)
    assert again["measured"] == 0, "what the table holds is not measured again"


@native
def test_an_interrupted_tune_keeps_what_it_measured(own_tables, monkeypatch) -> None:
    out = own_tables / "table.json"
    calls = []
    measure = tuning.measure_family

    def interrupted(family, seconds):
        calls.append(family)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(family, seconds)

    monkeypatch.setattr(tuning, "measure_family", interrupted)
    assert CliRunner().invoke(app, [*ARGUMENTS, "--out", str(out)]).exit_code == 130
    assert len(Table.load(out).entries) == 2
    rest = json.loads(CliRunner().invoke(app, [*ARGUMENTS, "--out", str(out)]).stdout)
    assert rest["measured"] == 1 and rest["entries"] == 4


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--device", "tpu"], "expected --device cpu or cuda, got 'tpu'"),
        (["--block-shape", "16"], "expected two positive numbers as in 16x1, got '16'"),
        (["--op", "conv3d"], "got 'conv3d'"),
    ],
)
def test_wrong_arguments_of_tune_are_one_line(arguments, why) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == 1 and why in result.stderr and len(result.stderr.splitlines()) == 1


def test_tune_refuses_another_devices_table(own_tables) -> None:
    Table("other-cpu").save(own_tables / "t.json")
    result = CliRunner().invoke(app, ["tune", "--out", str(own_tables / "t.json")])
    assert result.exit_code == 1 and "is the table of other-cpu, and this is" in result.stderr


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_tables_load_and_name_kernels_that_exist(path) -> None:
    table = Table.load(path)
    assert table.device == path.stem and table.entries and table.rates is not None
    assert {e.kernel for e in table.entries} <= set(KERNELS)
    assert all(KERNELS[e.kernel].op == e.problem.op for e in table.entries)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("nvidia-*.json")), ids=lambda p: p.stem)
def test_shipped_tables_of_gpus_decide_on_their_device(path, monkeypatch, recwarn) -> None:
    """Every entry is found as its own problem, with the device's measured ceilings, and nothing is said about it."""
    monkeypatch.setattr(tables, "SHIPPED", SHIPPED)
    monkeypatch.setattr(tables, "device_name", lru_cache(lambda *args: path.stem))
    entries = Table.load(path).entries
    assert all(tables.nearest(e.problem) == (e, 0.0) for e in entries)
    assert tables.gpu_rates().name == path.stem and not recwarn.list
    # An entry whose configuration the library does not list would be passed over.
    limits = {"shared_memory": H200.shared_memory, "processors": H200.processors}
    for e in entries:
        assert e.seconds < e.dense_seconds or e.problem.op == "low_rank_linear", e  # whose merged layer is the faster
        if e.problem.op == "bsr_conv2d":
            variant = e.kernel.removeprefix("bsr_conv2d__triton").lstrip("_") or "pixels_on_m"
            assert dict(e.config) in configs(e.problem, variant, **limits), e
        elif e.problem.op == "fused_conv2d":
            assert dict(e.config) in KERNELS[e.kernel].configs(e.problem), e
        else:
            assert dict(e.config) == {}, e


class RecordedStreams:
    """Stands in for what `captured` and `graphed` use of torch.cuda; ``events`` holds what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, ...]] = []
        self._current = "current"
        log = self.events

        class Stream:
            def __init__(self, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                log.append((self.name, "waits for", other.name))

        @contextmanager
        def stream(entered: Stream):
            before, self._current = self._current, entered.name
            yield
            self._current = before

        class Graph:
            def replay(self) -> None:
                log.append(("replayed",))

            def pool(self) -> None:
                return None

        fakes = {
            "Stream": Stream, "stream": stream, "current_stream": lambda *_: Stream(self._current),
            "synchronize": lambda *_: log.append(("synchronised",)), "CUDAGraph": Graph,
            "graph": lambda *_, **__: nullcontext(), "device": lambda *_: nullcontext(),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self, *_: object) -> None:
        self.events.append((self._current, "calls"))


def test_a_captured_call_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph does not: once a model's copy was freed, the next capture gave its memory back under the graph."""
    monkeypatch.setattr(tuning, "capture", lambda call, calls: (SimpleNamespace(replay=lambda: None), call().detach()))
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    weight = weakref.ref(layer.weight)
    call = partial(layer, x)
    replay = tuning.captured(call, "cuda")
    monkeypatch.undo()
    del layer, call
    gc.collect()
    assert weight() is not None and replay() is None
    del replay
    gc.collect()
    assert weight() is None


def test_a_side_stream_waits_for_the_inputs_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the GPU that is still on its way when a kernel reads it: wrong numbers, and indices out of bounds."""
    from slimkernels.inference.cuda_graph import CudaGraphs

    class Model(nn.Module):
        def __init__(self, streams: RecordedStreams) -> None:
            super().__init__()
            self.streams = streams

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.streams.call()
            return x

    for begin in (
        lambda own: tuning.captured(own.call, "cuda"),
        lambda own: CudaGraphs(Model(own).eval(), torch.device("cuda"), 2, False).record((torch.zeros(1),), {}),
    ):
        streams = RecordedStreams(monkeypatch)
        begin(streams)
        calls = [i for i, event in enumerate(streams.events) if event == ("side", "calls")]
        assert len(calls) == 2 and ("side", "waits for", "current") in streams.events[: calls[0]]
        assert ("synchronised",) in streams.events[calls[-1] :]
