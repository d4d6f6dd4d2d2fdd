"""Policy, LayerPlan, ModelPlan: validation, the JSON round trip, and the decision rule."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversion_models import FORCE, sparse_tiny
from hypothesis import given
from hypothesis import strategies as st

from slimkernels import LayerPlan, ModelPlan, Policy, convert, explain
from slimkernels.conversion import measure
from slimkernels.conversion.plan import faster_everywhere

SWAP = LayerPlan(
    "conv", "Conv2d", "swap", "why", format="bsr", weight_shape=(32, 16, 3, 3), block_shape=(16, 1), bias=True,
    stride=(1, 1), padding=(1, 1), dilation=(1, 1), dtype="float32", epilogue="relu", kernel="k", dense_ms=(1.5, 2.0),
)  # fmt: skip
LOW_RANK = LayerPlan(
    "fc", "Linear", "swap", "why", format="low_rank", weight_shape=(8, 6), kind="svd", ranks=(2,), dtype="float32"
)
PLAN = ModelPlan(
    (SWAP, LayerPlan("bn", "BatchNorm2d", "fold", into="conv"), LOW_RANK, LayerPlan("c", "Conv2d", "keep", "no zeros")),
    "measured", versions={"torch": "2"}, dense_ms=(3.0,), converted_ms=(1.0,), notes=("n",),
    contiguous_outputs=("features", "c"),
)  # fmt: skip


def test_json_round_trip() -> None:
    assert ModelPlan.from_json(PLAN.to_json()) == PLAN
    plan = explain(convert(sparse_tiny(), policy=FORCE)).plan
    assert ModelPlan.from_json(plan.to_json()) == plan
    assert PLAN["fc"] is LOW_RANK and PLAN.swapped == ["conv", "fc"]
    with pytest.raises(KeyError):
        PLAN["nothing"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "drop"}, "expected action in swap, keep, fold, fuse, got 'drop'"),
        ({"format": None}, "expected format in bsr, low_rank, fused, dense of a swap alone, got None"),
        ({"format": "coo"}, "got 'coo'"),
        ({"into": "x"}, "expected into of a fold or fuse alone, got 'x'"),
        ({"weight_shape": None}, "expected weight_shape of 2 or 4 positive sizes, got None"),
        ({"weight_shape": (3, 0)}, "expected weight_shape of 2 or 4 positive sizes"),
        ({"block_shape": None}, "expected block_shape of format 'bsr' alone, got None"),
        ({"block_shape": (16, 0)}, "expected block_shape of 2 positive sizes"),
        ({"epilogue": "gelu"}, "expected epilogue in"),
        ({"dtype": "int8"}, "expected dtype in float64, float32, float16, bfloat16, got 'int8'"),
        ({"stride": None}, "expected stride of 2 sizes, got None"),
        ({"padding": (-1, 0)}, "expected padding of 2 sizes"),
        ({"format": "low_rank", "block_shape": None, "kind": "cp"}, "expected kind in svd, tai, tucker2, got 'cp'"),
        ({"format": "low_rank", "block_shape": None, "kind": "tai"}, "expected 1 positive ranks, got None"),
    ],
)
def test_layer_plans_are_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^LayerPlan 'conv': ") as error:
        dataclasses.replace(SWAP, **change)
    assert message in str(error.value)


def test_model_plans_are_validated() -> None:
    with pytest.raises(ValueError, match=r"^ModelPlan: expected decided in .*got 'guessed'"):
        ModelPlan((), "guessed")
    with pytest.raises(ValueError, match=r"^ModelPlan: expected each layer once, got 'conv' twice"):
        ModelPlan((SWAP, SWAP), "measured")
    with pytest.raises(ValueError, match=r"^LayerPlan 'bn': expected into to name a layer, got 'gone'"):
        ModelPlan((LayerPlan("bn", "BatchNorm2d", "fold", into="gone"),), "measured")


def edited(**changes: Any) -> str:
    data = json.loads(PLAN.to_json())
    data.update(changes)
    return json.dumps(data)


def edited_layer(**changes: Any) -> str:
    data = json.loads(PLAN.to_json())
    data["layers"][0].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "ModelPlan: expected JSON, got"),
        ("[" * 100000, "ModelPlan: expected JSON, got"),
        ("[]", "ModelPlan: expected a JSON object, got list"),
        (edited(plan_version=99), "ModelPlan: expected plan_version 1, got 99"),
        (edited(layers={}), "ModelPlan: expected layers to be a list, got dict"),
        (edited(layers=[3]), r"ModelPlan: layers\[0\]: expected an object, got int"),
        (edited(colour="red"), "ModelPlan: unknown field 'colour'"),
        (edited(threads="two"), "ModelPlan: expected threads to be int, got 'two'"),
        (edited(training=1), "ModelPlan: expected training to be bool, got 1"),
        (edited(notes=[1]), "ModelPlan: expected notes to be"),
        (edited(dense_ms=["x"]), "ModelPlan: expected dense_ms to be"),
        (edited(versions={"torch": 2}), "ModelPlan: expected versions to be"),
        (edited_layer(size=3), r"ModelPlan: layers\[0\]: unknown field 'size'"),
        (edited_layer(name=3), r"ModelPlan: layers\[0\]: expected name to be str, got 3"),
        (edited_layer(weight_shape=[32, 16, 3, 2.5]), r"ModelPlan: layers\[0\]: expected weight_shape to be"),
        (edited_layer(stride=3), r"ModelPlan: layers\[0\]: expected stride to be"),
        (edited_layer(action="x"), r"ModelPlan: layers\[0\]: LayerPlan 'conv': expected action in"),
        (edited_layer(sparsity="x"), r"ModelPlan: layers\[0\]: expected sparsity to be float"),
        (edited_layer(sparsity=None), r"ModelPlan: layers\[0\]: expected sparsity to be float"),
        (edited(layers=[{"name": "x"}]), r"layers\[0\]: expected field 'type', got none"),
    ],
)  # fmt: skip
def test_damaged_json_is_refused_with_the_field(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelPlan.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["layers", "name", "decided", "action"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_a_plan_or_a_value_error(value: Any) -> None:
    if isinstance(value, dict):
        value["plan_version"] = 1
    with pytest.raises(ValueError, match=r"ModelPlan|LayerPlan"):
        ModelPlan.from_json(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "gpu"}, "expected backend in auto, reference, cpu, triton, cuda, got 'gpu'"),
        ({"min_speedup": -1}, "expected min_speedup >= 0, got -1"),
        ({"min_speedup": float("nan")}, "expected min_speedup >= 0, got nan"),
        ({"measured_candidates": 0}, "expected measured_candidates >= 1, got 0"),
        ({"repeats": 0}, "expected repeats >= 1, got 0"),
        ({"budget_s": -1.0}, "expected budget_s >= 0, got -1"),
        ({"block_shapes": ()}, "expected at least one block shape, got none"),
        ({"block_shapes": ((16, 0),)}, "expected block_shape"),
        ({"exclude": "conv"}, "expected exclude to be names of layers, got the string 'conv'"),
    ],
)
def test_policies_are_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Policy(**change)
    assert message in str(error.value)


def test_policies_take_lists() -> None:
    policy = Policy(block_shapes=[[16, 1]], exclude=["a"])  # type: ignore[arg-type]
    assert policy.block_shapes == ((16, 1),) and policy.exclude == ("a",)
    assert hash(policy) == hash(Policy(block_shapes=((16, 1),), exclude=("a",)))


# The rule


def test_the_rule_needs_every_size() -> None:
    assert faster_everywhere([2.0, 2.0], [1.0, 1.9], 1.05)
    assert not faster_everywhere([2.0, 2.0], [1.0, 1.95], 1.05)
    assert faster_everywhere([1.0], [1.0], 1.0)
    assert not faster_everywhere([], [], 0.0)


@given(
    st.lists(st.tuples(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3)), min_size=1, max_size=5),
    st.floats(1.0, 10.0),
)
def test_what_the_rule_takes_is_never_slower_than_dense(times: list[tuple[float, float]], min_speedup: float) -> None:
    dense, sparse = zip(*times, strict=True)
    if faster_everywhere(dense, sparse, min_speedup):
        assert all(s <= d for d, s in times)


def test_typical_seconds_takes_turns_and_ignores_slow_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the callables advance: the second costs twice the first; both are slow in 2 of 5 rounds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    order: list[int] = []

    def callable_(i: int, cost: float) -> Any:
        count = [0]

        def run() -> None:
            order.append(i)
            count[0] += 1
            now[0] += cost * (50 if count[0] % 5 in (3, 4) else 1)

        return run

    found = measure.typical_seconds([callable_(0, 0.03), callable_(1, 0.06)], device="cpu", repeats=5, budget_s=1e9)
    assert found == pytest.approx([0.03, 0.06])
    assert order[4:8] == [1, 0, 0, 1]  # after one untimed call and one reading each, the order rotates


def test_typical_seconds_respects_budget_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls = [0]

    def run() -> None:
        calls[0] += 1
        now[0] += 1.0

    measure.typical_seconds([run], device="cpu", repeats=9, budget_s=0)
    assert calls[0] == 1 + 3
    calls[0] = 0
    measure.typical_seconds([run], device="cpu", repeats=9, budget_s=1e9)
    assert calls[0] == 1 + 9


def test_typical_seconds_warms_short_calls_and_repeats_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls = [0]

    def run() -> None:
        calls[0] += 1
        now[0] += 10e-6

    assert measure.typical_seconds([run], device="cpu", repeats=4, budget_s=1e9) == pytest.approx([10e-6])
    assert calls[0] == 2 + 4 * (1 + 9) or calls[0] == 2 + 4 * (1 + 10)  # readings of 100 us, one untimed call before


def test_typical_seconds_are_those_of_one_of_the_calls_that_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten calls of 10 us each are a reading; ten of 3 ms are too long to be made once untimed before it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls = [0]

    def run_of(cost: float) -> Callable[[], None]:
        def run() -> None:
            calls[0] += 1
            now[0] += 10 * cost

        return run

    limits = {"device": "cpu", "repeats": 4, "budget_s": 1e9, "held": 10}
    assert measure.typical_seconds([run_of(11e-6)], **limits) == pytest.approx([11e-6])
    assert calls[0] == 2 + 4 * (1 + 1)
    calls[0] = 0
    assert measure.typical_seconds([run_of(3e-3)], **limits) == pytest.approx([3e-3])
    assert calls[0] == 2 + 3  # the first reading counts


def test_a_layer_that_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(call: Any, calls: int) -> Any:
        raise ValueError("operation not permitted")

    monkeypatch.setattr(measure, "capture", capture)
    run = measure.LayerRun(torch.nn.ReLU(), [torch.zeros(1)], False)
    with pytest.raises(measure.RunError) as error:
        measure.GraphRun(run)
    assert error.value.run is run and str(error.value.__cause__) == "operation not permitted"
