"""Two gloo processes under torchrun against one process: the same gradients, masks, statistics and files."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_runs
import pytest
import torch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo is tested on POSIX systems")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ranks 0 and 1 of one torchrun saved."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, distributed_runs.__file__, str(folder)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "rank0.pt"), torch.load(folder / "rank1.pt")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal up to rounding: the sums over a batch are taken in another order."""
    torch.testing.assert_close(got["model"], expected["model"], rtol=2e-5, atol=2e-6)
    for (loss, *accuracies), (expected_loss, *expected_accuracies) in zip(
        got["history"], expected["history"], strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-5) and accuracies == expected_accuracies


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["history"] == b["history"] and a["model"].keys() == b["model"].keys()
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())


@pytest.mark.parametrize(
    "name",
    [
        "accumulated",
        "uneven",
        "frozen",
        "dataloader",
        "batches",
        "running_statistics",
        "pruned",
        "resumed",
        "quantized",
    ],
)
def test_both_ranks_end_with_the_same_model_and_history(two, name):
    assert_same(two[0][name], two[1][name])


def test_two_ranks_are_one_process_with_two_micro_batches(two):
    assert_close(two[0]["accumulated"], distributed_runs.accumulated(16, accumulate=2))
    assert_close(two[0]["accumulated"], distributed_runs.accumulated())


@pytest.mark.parametrize("name", ["uneven", "frozen", "dataloader", "batches"])
def test_two_ranks_are_one_process_with_whole_batches(two, name):
    assert_close(two[0][name], getattr(distributed_runs, name)())


def test_evaluation_needs_no_sample_for_every_rank_and_training_says_that_it_does(two):
    alone = distributed_runs.few()
    for rank in two:
        for (loss, *accuracies), (expected, *others) in zip(
            (h[0] for h in rank["few"]["histories"]), (h[0] for h in alone["histories"]), strict=True
        ):
            assert loss == pytest.approx(expected, rel=1e-5) and accuracies == others
        for message in rank["few"]["refused"]:
            assert message.startswith(
                "fine_tune: expected training batches of at least 2 samples, one for each process"
            )
    assert alone["refused"] == ["", "", ""]


def test_a_loader_that_divides_the_samples_already_is_refused(two):
    for rank in two:
        assert (
            rank["divided"].startswith("fine_tune: expected a loader of all samples")
            and "Distributed" in rank["divided"]
        )


def test_running_statistics_are_rank_0_s_and_random_numbers_differ(two, folder):
    seen = [rank["running_statistics"]["seen"] for rank in two]
    saved = torch.load(folder / "bn" / "bn.pt", weights_only=True)["model"]["1.running_mean"]
    assert torch.equal(seen[0][-1], saved) and not torch.equal(seen[1][-1], saved)
    # after the first batch, that ranks share the numbers of, every rank draws its own
    assert all(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_every_rank_holds_the_same_masks(two):
    masks = [rank["pruned"]["masks"] for rank in two]
    assert masks[0].keys() == masks[1].keys() and len(masks[0]) == 1
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])
        assert 1 - mask.float().mean() == 0.5


def test_two_ranks_resume_to_the_same_weights(two):
    assert two[0]["stopped"] == {}
    assert_same(two[0]["resumed"], two[0]["pruned"])


def test_only_rank_0_writes(two, folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "bn", "log-0", "part.previous.pt", "part.pt", "rank0.pt", "rank1.pt", "whole.previous.pt", "whole.pt",
    ]  # fmt: skip
    with open(folder / "log-0" / "steps.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(12))
