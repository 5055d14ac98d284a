"""A call that looks like one seen before goes a shorter way, and is checked where it must be.

Equal shapes, dtypes, strides and options are recognised; addresses, gradients, flags and modes are
looked at every time.
"""

import enum
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from arrays import hold
from forgetting import forget
from reference import check, rotate, to_float64

from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_rotary,
    apply_rotary_qk,
    arrays,
    eager,
    table_forms,
)
from rope_cupy.call import parse

TOKENS, HEADS, HEAD_DIM, PAIRS = 6, 3, 16, 6  # the last 4 elements of a head pass through
RNG = np.random.default_rng(12)
ANGLE = RNG.uniform(-3, 3, (20, PAIRS))
COS, SIN = np.cos(ANGLE), np.sin(ANGLE)

in_every_library = pytest.mark.parametrize(
    "library",
    [
        "numpy",
        "torch",
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cupy", "torch-cuda")),
        pytest.param("numpy", marks=pytest.mark.host_cuda, id="host_cuda"),
    ],
)


# What options are by default, in the order of their record.
PLAIN = (None, None, None, 0, False, "nan", None, False, "once")


@pytest.fixture(autouse=True)
def nothing_seen():
    """A process in which no call has been seen."""
    forget()


@pytest.fixture
def described(monkeypatch):
    """The names of the arrays that have been described, as is done for calls never seen."""
    names = []

    def describe(name, *arguments, describe=arrays.describe):
        names.append(name)
        return describe(name, *arguments)

    for module in (arrays, table_forms):
        monkeypatch.setattr(module, "describe", describe)
    return names


def fresh(library="torch", shape=(1, TOKENS, HEADS, HEAD_DIM)):
    values = RNG.standard_normal(shape)
    return hold(values, "float64", library).array, values


def make_table(library="torch"):
    return RotaryTable(*(hold(part, "float64", library).array for part in (COS, SIN)))


def assert_right(y, x, **options):
    check(to_float64(y), rotate(x, COS, SIN, **options), "float64")


@in_every_library
@pytest.mark.parametrize("positions", [None, 3, "array"])
@pytest.mark.parametrize("write", ["new", "out", "in place"])
def test_what_has_been_seen_is_not_described_again(library, positions, write, described):
    table = make_table(library)
    for i in range(4):
        rows = positions
        if positions == "array":
            values = RNG.integers(0, 20, TOKENS)
            rows = hold(values, "int64", library).array
        elif positions is not None:
            rows = values = positions + i  # another start is no other call
        else:
            values = None
        q, q_values = fresh(library)
        k, k_values = fresh(library, (1, TOKENS, 1, HEAD_DIM))
        out = {"new": None, "out": (fresh(library)[0], q_like(k, library)), "in place": (q, k)}
        results = apply_rotary_qk(q, k, table, positions=rows, out=out[write])
        for y, x in zip(results, (q_values, k_values), strict=True):
            assert_right(y, x, positions=values)
        assert (not described) == (i > 0)
        described.clear()


def q_like(k, library):
    return fresh(library, tuple(k.shape))[0]


@in_every_library
def test_one_array_tells_of_positions_in_calls_of_its_own(library):
    """By another name, or of other sections, it means others."""
    table, (x, values) = make_table(library), fresh(library, (TOKENS, TOKENS, HEADS, HEAD_DIM))
    rows = np.array([5, 0, 3, 3, 12, 1])
    held = hold(rows, "int64", library).array
    out = fresh(library, values.shape)[0]
    counted = np.arange(TOKENS) + rows[:, None]
    for _ in range(3):
        for name, expected in (("positions", rows), ("seqlen_offsets", counted)):
            for start in (None, 2) if name == "seqlen_offsets" else (None,):
                where = {name: held} | ({} if start is None else {"positions": start})
                assert apply_rotary(x, table, **where, out=out) is out
                assert_right(out, values, positions=expected + (start or 0))

    axes = RNG.integers(0, 20, (3, TOKENS))
    held = hold(axes, "int64", library).array
    for _ in range(3):
        for section in ((2, 2, 2), (3, 2, 1)):
            for in_turn in (False, True):
                options = {"mrope_section": section, "mrope_interleaved": in_turn}
                apply_rotary(x, table, positions=held, **options, out=out)
                assert_right(out, values, positions=axes, **options)


@in_every_library
def test_in_place_and_apart_are_two_calls(library):
    table = make_table(library)
    for _ in range(2):
        for in_place in (True, False):
            x, values = fresh(library)
            out = x if in_place else fresh(library)[0]
            assert apply_rotary(x, table, out=out) is out
            assert_right(out, values)


@in_every_library
def test_one_of_q_and_k_in_place_is_another_call_than_the_other(library):
    table = make_table(library)
    for _ in range(2):
        for places in ((0,), (1,), (0, 1), ()):
            (q, q_values), (k, k_values) = fresh(library), fresh(library)
            outs = tuple(x if i in places else fresh(library)[0] for i, x in enumerate((q, k)))
            apply_rotary_qk(q, k, table, out=outs)
            assert_right(outs[0], q_values)
            assert_right(outs[1], k_values)


@in_every_library
def test_an_overlap_is_refused_after_arrays_apart_that_look_the_same(library):
    table = make_table(library)
    buffer, values = fresh(library, (4 * TOKENS, HEADS, HEAD_DIM))
    apply_rotary(buffer[:TOKENS], table, out=buffer[TOKENS : 2 * TOKENS])
    for start in (1, TOKENS - 1):
        with pytest.raises(ValueError, match=r"^out must be its input or share no memory with x"):
            apply_rotary(buffer[:TOKENS], table, out=buffer[start : start + TOKENS])
    apply_rotary(buffer[:TOKENS], table, out=buffer[2 * TOKENS : 3 * TOKENS])
    for part in (buffer[TOKENS : 2 * TOKENS], buffer[2 * TOKENS : 3 * TOKENS]):
        assert_right(part[None], values[None, :TOKENS])


@in_every_library
def test_a_start_past_the_table_is_refused_after_one_inside(library):
    table = make_table(library)
    x, values = fresh(library)
    assert_right(apply_rotary(x, table, positions=14), values, positions=14)
    for _ in range(2):
        with pytest.raises(ValueError, match="positions 15 to 20 of the 6 tokens, got 20"):
            apply_rotary(x, table, positions=15)
    with pytest.raises(ValueError, match="positions must be 0 or more"):
        apply_rotary(x, table, positions=-1)


@in_every_library
def test_a_start_in_a_table_by_token_is_asked_for_at_every_call(library):
    by_token = [part[None] for part in make_table(library)._source.arrays]
    more = RotaryTable(by_token[0][:, : TOKENS + 2], by_token[1][:, : TOKENS + 2])
    x, values = fresh(library)
    before = values.copy()
    for start in (0, 2, 1, 2):
        cut = [part[:, start : start + TOKENS] for part in by_token]
        found, exact = apply_rotary(x, more, positions=start), apply_rotary(x, tuple(cut))
        np.testing.assert_array_equal(to_float64(found), to_float64(exact))
    refused = (
        (more, None, "must have a row for each of 6 tokens, or one for all"),
        (more, 3, "positions 3 to 8 of the 6 tokens"),
    )
    for table, start, message in (*refused, *refused, (tuple(cut), 1, "positions 1 to 6")):
        for out in (None, x):
            with pytest.raises(ValueError, match=message):
                apply_rotary(x, table, positions=start, out=out)
    np.testing.assert_array_equal(to_float64(x), before)


@in_every_library
def test_signatures_in_turn_are_each_found_and_the_last_one_first(library, described):
    table = make_table(library)
    calls = [fresh(library, (1, TOKENS, heads, HEAD_DIM)) for heads in (1, 2, 3)]
    for _ in range(3):
        for x, _ in calls:
            apply_rotary(x, table)
    described.clear()
    kind = parse(("x",), (calls[0][0],), table, (None,) * 3, PLAIN, None).kind
    for _ in range(2):
        for x, values in calls:
            assert_right(apply_rotary(x, table), values)
            ((_, prepared), *others) = kind.recent[()]
            assert prepared.problem.tensors[0].num_heads == x.shape[2] and len(others) == 2
    assert not described


@pytest.mark.parametrize("wrong", [1, 1.0, np.True_], ids=repr)
def test_an_option_of_a_wrong_type_is_refused_after_its_equal(wrong):
    x, table = fresh()[0], make_table()
    apply_rotary(x, table, interleaved=True)
    with pytest.raises(TypeError, match="interleaved must be None, True or False"):
        apply_rotary(x, table, interleaved=wrong)


class Name(str, enum.Enum):
    """Options as a program may keep them."""

    BEFORE, KEEP, ONCE, HEAD, LAYOUT = "before_weight", "keep", "once", "head", "bshd"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_option_of_an_enumeration_of_strings_is_its_string(device):
    x, table = torch.randn(1, 4, 2, 8), torch.randn(2, 4, 4)
    weight, (cos, sin) = torch.rand(8) + 1, (part.to(device) for part in table)
    given = {"round_norm": Name.BEFORE, "out_of_range": Name.KEEP, "rounding": Name.ONCE}
    given |= {"norm": Name.HEAD, "layout": Name.LAYOUT}
    plain = {name: each.value for name, each in given.items()}
    results = [
        apply_norm_rotary(x.to(device), weight.to(device), (cos, sin), **options)
        for options in (given, plain, given)
    ]
    assert all(each.shape == x.shape and each.device.type == device for each in results)
    if device == "cpu":
        assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[1])


@pytest.mark.parametrize("wrong", [5, True, 1.0, object, torch.tensor(3)], ids=repr)
def test_sections_that_are_no_sections_are_refused_by_name(wrong):
    with pytest.raises(TypeError, match="mrope_section must be None or three ints, got"):
        apply_rotary(fresh()[0], make_table(), mrope_section=wrong)


def test_an_option_that_cannot_be_hashed_is_refused_by_name():
    with pytest.raises(TypeError, match=r"layout must be a string of axis names or None, got \["):
        apply_rotary(fresh()[0], make_table(), layout=["s", "h", "d"])


def test_a_gradient_is_asked_for_after_none():
    x, table = fresh()[0], make_table()
    apply_rotary(x, table)
    x.requires_grad_()
    for _ in range(3):
        assert apply_rotary(x, table).requires_grad
        with torch.no_grad():
            assert not apply_rotary(x, table).requires_grad
    x.requires_grad_(False)
    assert not apply_rotary(x, table).requires_grad


def test_a_lazily_negated_view_of_the_same_numbers_is_refused():
    numbers = torch.view_as_complex(torch.randn(1, TOKENS, HEADS, HEAD_DIM, 2))
    table = make_table()
    apply_rotary(numbers.imag, table)
    negated = numbers.conj().imag
    assert negated.data_ptr() == numbers.imag.data_ptr()
    with pytest.raises(ValueError, match="x must hold its own values, got a lazy view"):
        apply_rotary(negated, table)


def test_an_array_that_has_become_read_only_is_refused():
    x, table = fresh("numpy")[0], make_table("numpy")
    apply_rotary(x, table, out=x)
    x.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable"):
        apply_rotary(x, table, out=x)


def test_a_subclass_that_looks_the_same_is_described():
    x, table = fresh("numpy")[0], make_table("numpy")
    apply_rotary(x, table)
    with pytest.raises(TypeError, match="x must be an array without a mask"):
        apply_rotary(np.ma.masked_array(x), table)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_dual_tensor_and_a_mode_are_refused_and_a_trace_recorded_after_plain_tensors():
    x, table = fresh()[0], make_table()
    apply_rotary(x, table)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match="must not carry a forward-mode tangent"):
            apply_rotary(dual, table)
    make_fx = importlib.import_module("torch.fx.experimental.proxy_tensor").make_fx
    assert "rope_cupy.rotate" in make_fx(lambda x: apply_rotary(x, table))(x).code
    with pytest.raises((TypeError, RuntimeError)):
        torch.func.grad(lambda x: apply_rotary(x, table).sum())(x)


def test_a_version_counter_moves_every_time():
    x, table = fresh()[0], make_table()
    for _ in range(3):
        version = x._version
        apply_rotary(x, table, out=x)
        assert x._version > version
    with torch.inference_mode():
        y = x.clone()
        for _ in range(2):
            apply_rotary(y, table, out=y)


def test_arrays_of_two_libraries_that_look_alike_are_not_taken_for_each_other():
    table = make_table("numpy")
    for library in ("numpy", "torch", "numpy", "torch"):
        x, values = fresh(library)
        y = apply_rotary(x, table)
        assert type(y) is type(x)
        assert_right(y, values)


@in_every_library
def test_threads_that_call_at_once_get_their_own_results(library):
    table = make_table(library)
    work = [(fresh(library), fresh(library)[0]) for _ in range(32)]
    start = threading.Barrier(8)

    def call(i):
        if i < 8:
            start.wait(60)
        (x, _), out = work[i]
        return apply_rotary(x, table, out=None if i % 2 else out)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(32)))
    for y, ((_, values), _) in zip(results, work, strict=True):
        assert_right(y, values)


@in_every_library
def test_what_is_prepared_is_bounded_and_the_oldest_goes_first(library, monkeypatch, described):
    monkeypatch.setattr(eager, "MAX_PREPARED", 5)
    monkeypatch.setattr(eager, "MAX_RECENT", 3)
    table = make_table(library)
    for heads in range(1, 20):
        x, values = fresh(library, (1, TOKENS, heads, HEAD_DIM))
        for _ in range(2):
            assert_right(apply_rotary(x, table), values)
        for first in range(5):
            out = fresh(library, tuple(x.shape))[0]
            assert_right(apply_rotary(x, table, positions=first, out=out), values, positions=first)
        assert len(eager._prepared) <= 5
        kind = parse(("x",), (x,), table, (None,) * 3, PLAIN, None).kind
        assert kind.recent and all(1 <= len(recent) <= 3 for recent in kind.recent.values())
    described.clear()
    for heads in (18, 19):  # the last ones are still there
        apply_rotary(fresh(library, (1, TOKENS, heads, HEAD_DIM))[0], table)
    assert not described


@in_every_library
def test_new_shapes_at_known_addresses_are_another_call(library):
    table = make_table(library)
    buffer, values = fresh(library, (2 * TOKENS, HEADS, HEAD_DIM))
    for tokens in (TOKENS, 4, TOKENS, 2, 4, TOKENS, TOKENS):
        assert_right(apply_rotary(buffer[:tokens], table)[None], values[None, :tokens])
    flat = buffer.reshape(TOKENS, 2 * HEADS, HEAD_DIM)  # the same address and size
    for _ in range(3):
        assert_right(apply_rotary(flat, table)[None], values.reshape(1, TOKENS, -1, HEAD_DIM))
        assert_right(apply_rotary(buffer, table)[None], values[None])


@in_every_library
def test_other_strides_at_known_addresses_are_another_call(library):
    table = make_table(library)
    square, values = fresh(library, (HEADS, HEADS, HEAD_DIM))
    for _ in range(3):
        assert_right(apply_rotary(square, table)[None], values[None])
        turned = square.swapaxes(0, 1)  # the same address and shape
        assert_right(apply_rotary(turned, table)[None], values.swapaxes(0, 1)[None])


def test_a_table_whose_tensor_changes_in_place_is_looked_at_again():
    x, values = fresh()
    cos, sin = (torch.from_numpy(part.copy()) for part in (COS, SIN))
    table = RotaryTable(cos, sin)
    for _ in range(3):
        assert_right(apply_rotary(x, table, out=torch.empty_like(x)), values)
    for part in (cos, sin):
        part.data = part[:3]  # of the same address
    with pytest.raises(ValueError, match="positions 0 to 5 of the 6 tokens, got 3"):
        apply_rotary(x, table, out=torch.empty_like(x))


@pytest.mark.gpu
def test_a_table_of_cupy_arrays_keeps_the_shape_that_it_was_made_with():
    x, values = fresh("cupy")
    cos, sin = (hold(part, "float64", "cupy").array for part in (COS, SIN))
    table = RotaryTable(cos, sin)
    for _ in range(3):
        assert_right(apply_rotary(x, table), values)
        cos.shape = sin.shape = (PAIRS, 20)
        assert_right(apply_rotary(x, table), values)
        cos.shape = sin.shape = (20, PAIRS)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_mode_of_pytorch_changes_no_result(guarded, monkeypatch):
    if not guarded:  # of another PyTorch
        monkeypatch.setattr(
            type(arrays.library_of("x", torch.empty(1))), "matcher", lambda *_: None
        )
    x, table = fresh()[0], make_table()
    out, expected = torch.empty_like(x), apply_rotary(x, table)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")) * 2:
        for _ in range(3):
            apply_rotary(x, table, out=out)
            with mode():
                assert torch.equal(apply_rotary(x, table, out=out.zero_()), expected)


def test_pytorch_guards_what_it_is_asked_to():
    pair = fresh()[0], fresh()[0]
    guard = arrays.library_of("x", pair[0]).matcher(pair)
    assert guard is not None, "this PyTorch has no TensorGuards: calls are slower with it"
    assert guard(*pair)
    assert not guard(pair[0], pair[1].float())
    assert not guard(pair[0], pair[1][:, 1:])
    assert not guard(pair[0], pair[1].swapaxes(1, 2).contiguous().swapaxes(1, 2))
    assert not guard(pair[0], torch.nn.Parameter(pair[1], requires_grad=False))
    assert not guard(pair[0], pair[1].requires_grad_())


def test_a_tensor_that_is_given_twice_is_matched_as_it_was():
    x, y = fresh()[0], fresh()[0]
    match = arrays.library_of("x", x).matcher((x, y, x))
    assert match(x, y, x) and match(y, x, y)
    assert not match(x, y, y) and not match(x, x, x) and not match(x, y, x.clone())
