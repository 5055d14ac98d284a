"""benchmarks/bench_training.py, on the CPU: right gradients are timed, and nothing else is."""

import bench_training
import peers
import pytest
import torch
from bench_training import GPU, HOST
from peers import IN_PLACE, NEW, PEERS, Peer
from shapes import chosen
from tasks import TRAINING, Task
from test_bench_host import MACHINE, rows_of


def test_the_times_of_all_providers_without_a_gpu(tmp_path):
    path = tmp_path / "new" / "training.csv"
    rows, printed = rows_of("bench_training.py", path, "--shapes=1-token-32/8,32-tokens-64/8")
    assert list(rows[0])[: len(MACHINE)] == MACHINE
    tasks = list(dict.fromkeys((row["shape"], row["measure"]) for row in rows))
    assert tasks == [("1-token-32/8", GPU), ("32-tokens-64/8", GPU), ("16-tokens-32/8", HOST)]
    for task in tasks:
        results = {
            (row["provider"], row["call"]): row
            for row in rows
            if (row["shape"], row["measure"]) == task
        }
        assert {name for name, _ in results} == {*peers.names_for(TRAINING)}
        timed = [key for key, row in results.items() if row["status"] == "ok"]
        assert timed == [("rope_cupy", NEW), ("rope_cupy", IN_PLACE), ("torch eager", NEW)]
        for key, row in results.items():
            assert (key in timed) == (row["reason"] == "") == (row["microseconds"] != "")
    assert "\nrope_cupy, in place  " in printed


TASK = Task(chosen("1-token-32/8")[0], device="cpu", name=TRAINING)


def measured(monkeypatch, rotate):
    """The result of a provider that rotates so."""

    def training(task, inputs):
        return {NEW: lambda q, k: rotate(task, inputs, q, k)}

    monkeypatch.setitem(PEERS, "peer", Peer((), {TRAINING: training}, gpu_only=False))
    results = bench_training.measured(TASK, HOST, ["peer"])
    assert list(results) == [("peer", NEW)]
    return results["peer", NEW]


def rotated(task, inputs, q, k):
    return peers.call_of("torch eager", task, inputs)[NEW](q, k)


def unmoved(task, inputs, q, k):
    return 1 * q, 1 * k


class WrongGradient(torch.autograd.Function):
    """The rotation of q, with a gradient that is not turned back."""

    @staticmethod
    def forward(ctx, task, inputs, q, k):
        return rotated(task, inputs, q, k)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *grads


@pytest.mark.parametrize(
    ("rotate", "status"), [(rotated, "ok"), (unmoved, "wrong"), (WrongGradient.apply, "wrong")]
)
def test_a_wrong_result_or_gradient_is_not_timed(monkeypatch, rotate, status):
    result = measured(monkeypatch, rotate)
    assert (result.status, result.microseconds is not None) == (status, status == "ok")


def test_what_is_rotated_is_no_leaf_and_no_view(monkeypatch):
    seen = []

    def seeing(task, inputs, q, k):
        seen.extend((q, k))
        return rotated(task, inputs, q, k)

    measured(monkeypatch, seeing)
    assert seen and not any(x.is_leaf or x._is_view() for x in seen)
