"""benchmarks/bench_training.py, on the CPU: right gradients are timed, and nothing else is."""

import bench_training
import pytest
import torch
from bench_training import GPU, HOST, IN_PLACE, NEW, Task
from shapes import chosen
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
        assert {name for name, _ in results} == {*bench_training.PROVIDERS}
        timed = [key for key, row in results.items() if row["status"] == "ok"]
        assert timed == [("rope_cupy", NEW), ("rope_cupy", IN_PLACE), ("torch eager", NEW)]
        for key, row in results.items():
            assert (key in timed) == (row["reason"] == "") == (row["microseconds"] != "")
    assert "rope_cupy, in place    " in printed


TASK = Task(chosen("1-token-32/8")[0], HOST)


def measured(monkeypatch, rotate):
    """The result of a provider that rotates so."""
    providers = {"peer": lambda case, table: {NEW: lambda q, k: rotate(case, table, q, k)}}
    monkeypatch.setattr(bench_training, "PROVIDERS", providers)
    ((name, call, result),) = bench_training.measured(TASK, ["peer"], "cpu")
    assert (name, call) == ("peer", NEW)
    return result


def rotated(case, table, q, k):
    return bench_training.torch_eager(case, table)[NEW](q, k)


def unmoved(case, table, q, k):
    return 1 * q, 1 * k


class WrongGradient(torch.autograd.Function):
    """The rotation of q, with a gradient that is not turned back."""

    @staticmethod
    def forward(ctx, case, table, q, k):
        return rotated(case, table, q, k)

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

    def seeing(case, table, q, k):
        seen.extend((q, k))
        return rotated(case, table, q, k)

    measured(monkeypatch, seeing)
    assert seen and not any(x.is_leaf or x._is_view() for x in seen)
