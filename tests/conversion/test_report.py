"""What `explain` shows: to people in a terminal of any width, in a notebook, in Markdown; and what it counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion_models import BACKEND, FORCE, images, sparse_tiny
from torch import nn

import slimkernels as sk
from slimkernels.conversion.plan import LayerPlan, ModelPlan

needs_native = pytest.mark.skipif(BACKEND == "reference", reason="no native kernel is built")


def layer(name: str, **fields: object) -> LayerPlan:
    return LayerPlan(name, **{"type": "Conv2d", "action": "keep", "bytes_dense": 4096, "bytes_stored": 4096, **fields})  # type: ignore[arg-type]


def timed(name: str, ms: float, reason: str = "dense is as fast or faster") -> LayerPlan:
    return layer(name, weight_shape=(8, 8, 3, 3), dense_ms=(ms,), sparse_ms=(2 * ms,), reason=reason)


def plan(*layers: LayerPlan, **fields: object) -> ModelPlan:
    return ModelPlan(layers, "measured", **fields)  # type: ignore[arg-type]


def names(text: str) -> list[str]:
    """First words of the rows."""
    return [line.split()[0] for line in text.split("\n\n")[0].splitlines()[2:]]


def test_the_layers_that_take_the_time_come_first() -> None:
    report = sk.explain(plan(timed("quick", 0.1), timed("slow", 9.0), timed("middle", 1.0)))
    assert names(report.text()) == ["slow", "middle", "quick"]
    assert names(report.text(order="model")) == ["quick", "slow", "middle"]
    unmeasured = [layer("small", weight_shape=(1, 1), reason="a"), layer("large", bytes_stored=9000, reason="b")]
    assert names(sk.explain(plan(*unmeasured)).text()) == ["large", "small"]


def test_what_was_folded_and_fused_is_said_by_its_layer() -> None:
    text = str(sk.explain(sk.convert(sparse_tiny(), policy=FORCE)))
    assert "bsr 16x1 +bn +relu" in text
    assert not {"features.4", "features.5"} & set(names(text))  # the batch norm and the ReLU


def test_layers_kept_for_one_reason_share_a_row() -> None:
    alike = [layer(f"block.{i}.norm", type="BatchNorm2d", reason="not folded: why") for i in range(70)]
    grouped = [layer(f"g{i}", weight_shape=(8, 1, 3, 3), reason="groups=8 is not supported") for i in range(3)]
    lines = sk.explain(plan(*alike, *grouped, layer("two", reason="x"), layer("more", reason="x"))).splitlines()
    assert sum("block." in line for line in lines) == 1
    assert any(line.startswith("block.0.norm and 69 more  ") and "not folded: why" in line for line in lines)
    assert any(line.startswith("g0 and 2 more ") for line in lines)
    assert {"two", "more"} <= {line.split(" ")[0] for line in lines}


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_lines_fit_the_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "measured 2.31x (2.20x to 2.45x) the speed of dense, and very much more than fits into any line " * 3
    long = "features.denseblock3.denselayer24.and.so.on.conv1"
    some = plan(timed(long, 1.0, reason), replace(timed("b", 2.0), sparsity=0.5), layer("c", type="BatchNorm2d"))
    table = sk.explain(some).text(width=width).split("\n\n")[0]
    assert width - 2 <= max(map(len, table.splitlines())) <= width
    assert ("…selayer24.and.so.on.conv1" in table) == (width == 80)
    assert "…" in table and table.splitlines()[0].split()[0] == "layer"
    monkeypatch.setenv("COLUMNS", str(width))
    assert str(sk.explain(some)).split("\n\n")[0] == table
    assert reason.strip() in sk.explain(some).to_markdown()


def test_long_models_are_cut_and_say_so() -> None:
    report = sk.explain(plan(*(timed(f"layer{i}", 1.0 + i) for i in range(100))))
    lines = report.splitlines()
    assert "... and 60 more rows: .text(rows=None) shows all" in lines and len(lines) < 50
    assert len(names(report.text(rows=None))) == 100
    assert names(report.text(rows=1))[0] == "layer99"
    with pytest.raises(ValueError, match=r"Report\.text: expected rows >= 1 or None, got 0"):
        report.text(rows=0)
    with pytest.raises(ValueError, match=r"Report\.to_markdown: expected order in cost, model, got 'size'"):
        report.to_markdown(order="size")


def test_the_report_is_text_where_text_is_wanted() -> None:
    report = sk.explain(sk.convert(sparse_tiny(), policy=FORCE))
    text = str(report)
    assert (report[:30], report[-5:], report[0], len(report)) == (text[:30], text[-5:], text[0], len(text))
    assert "layers swapped" in report and repr(report) == text and report.splitlines() == text.splitlines()


def test_html_and_markdown_hold_the_same_rows() -> None:
    some = plan(timed("a|b", 1.0, "1 < 2 & <b>"), timed("c", 2.0), notes=("a <note>",))
    report = sk.explain(some)
    shown = report._repr_html_()
    assert shown.count("<tr>") == 3 and "1 &lt; 2 &amp; &lt;b&gt;" in shown and "<b>" not in shown
    assert "note: a &lt;note&gt;" in shown
    markdown = report.to_markdown().splitlines()
    assert markdown[0].startswith("| layer | type |") and set(markdown[1]) <= set("| -:")
    assert markdown[3].startswith("| a\\|b | Conv2d | keep |") and "- note: a <note>" in markdown


class WithMoreThanLayers(nn.Module):
    """Half of the parameters are in no layer that conversion looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 64)
        self.linear = nn.Linear(64, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(x))


@needs_native
def test_smaller_counts_every_parameter_of_the_model(tmp_path: Path) -> None:
    model = WithMoreThanLayers().eval()
    sk.finalize_(sk.prune_(model, 0.75, (16, 1), layers=["linear"], skip_first=False))
    fast = sk.convert(model, policy=FORCE)
    report = sk.explain(fast)
    before, after = (sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (model, fast))
    assert (report.bytes_dense, report.bytes_stored) == (before, after)
    assert before == 2 * 256 * 64 * 4 and f"{before / after:.2f}x smaller" in report
    sk.save(fast, tmp_path / "m.slim.safetensors")
    of_file = sk.explain(tmp_path / "m.slim.safetensors")
    assert (of_file.bytes_dense, of_file.bytes_stored) == (before, after)
    assert json.loads(of_file.to_json())["bytes_stored"] == after


def test_folded_batch_norms_count_as_they_were() -> None:
    model = sparse_tiny()
    report = sk.explain(sk.convert(model, policy=FORCE))
    before = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # A bias for each of the two convolutions that took a batch norm in is new.
    assert before <= report.bytes_dense <= before + 4 * (32 + 64 + 64)


@needs_native
def test_single_zeros_that_save_nothing_say_what_would() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3)).eval()
    sk.finalize_(sk.prune_(model, 0.5, (1, 1), granularity="element", skip_first=False))
    kept = sk.explain(sk.convert(model, images(2, 16), policy=sk.Policy(measure=False, min_speedup=1e9)))
    assert kept.plan.swapped == []
    (hint,) = [line for line in kept.text(width=1000).splitlines() if line.startswith("hint: ")]
    assert hint.startswith("hint: 2 layers, such as 0, have 50% zeros and stayed dense")
    assert "prune_(model, sparsity, block_shape=(16, 1))" in hint and "shrink_(model)" in hint
    assert "hint:" not in sk.explain(sk.convert(model, policy=FORCE))


def test_ratios_carry_their_spread() -> None:
    spread = plan(timed("a", 1.0), dense_ms=(3.0,), converted_ms=(2.0,), speedup_low=(1.4,), speedup_high=(1.6,))
    assert "3 ms dense, 2 ms converted, 1.50x faster (1.40x to 1.60x)" in sk.explain(spread)
    old = ModelPlan.from_json(replace(spread, speedup_low=(), speedup_high=()).to_json())  # of an earlier version
    assert sk.explain(old).text().endswith("1.50x faster")


@needs_native
def test_a_model_that_grew_is_said_to_be_larger() -> None:
    """Blocks of 16 rows over 10 outputs are filled up with 6 rows of zeros."""
    fast = sk.convert(nn.Sequential(nn.Linear(2048, 10)).eval(), policy=FORCE)
    report = sk.explain(fast)
    assert report.bytes_stored > report.bytes_dense
    assert f": {report.bytes_stored / report.bytes_dense:.2f}x larger" in report
