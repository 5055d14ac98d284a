"""Checks that no array of this machine can fail: other devices, and more rows than memory holds."""

import re

import pytest
from test_plan import problem, spec

from rope_cupy.problem import MAX_ROWS, TableSpec

X = spec((2, 5, 3, 64))
TABLE = TableSpec(spec((9, 32), "float32"), spec((9, 32), "float32"), 1, 0)


def elsewhere(array):
    return array._replace(device="cuda:1")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("q_out", {"outs": [elsewhere(X)]}),
        ("table", {"table": TableSpec(*map(elsewhere, TABLE[:2]), 1, 0)}),
        ("positions", {"positions": elsewhere(spec((5,), "int64"))}),
    ],
)
def test_every_array_is_on_the_device_of_x(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} must be on .*device cuda:0, got cuda:1$"):
        problem([X], 64, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("q", {"xs": [spec((2, 5, 3, 64), address=1)], "outs": [X]}),
        ("q_out", {"outs": [spec((2, 5, 3, 64), address=3)]}),
        ("table", {"table": TableSpec(TABLE.cos, spec((9, 32), "float32", address=2), 1, 0)}),
        ("positions", {"positions": spec((5,), "int64", address=4)}),
    ],
)
def test_an_address_between_two_elements_is_refused_on_a_gpu(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} must begin at a multiple of .*, got one of "):
        problem(**{"xs": [X], "rotary_dim": 64} | arguments)


def test_as_many_rows_as_the_kernel_can_number_are_accepted_and_no_more():
    most = spec((1, MAX_ROWS, 1, 64))
    assert problem([most], 64).num_rows == MAX_ROWS
    with pytest.raises(ValueError, match=re.escape(f"at most {MAX_ROWS} ")):
        problem([most, spec((1, MAX_ROWS, 1, 64))], 64)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "hbsd", "shbd", "hsbd"])
def test_a_layout_names_the_axes_in_their_order(layout):
    sizes = {"b": 2, "s": 5, "h": 3, "d": 64}
    x = spec(tuple(sizes[axis] for axis in layout))
    posed = problem([x], 64, layout=layout)
    strides = dict(zip(layout, x.strides, strict=True))
    (tensor,) = posed.tensors
    assert (posed.batch, posed.num_tokens, tensor.num_heads, posed.head_dim) == (2, 5, 3, 64)
    assert tensor.x.strides == tuple(strides[axis] for axis in "bshd")


def test_head_dim_splits_the_last_axis():
    posed = problem([spec((2, 5, 192))], 64, head_dim=64)
    assert posed.tensors == problem([X], 64).tensors
