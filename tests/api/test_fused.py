"""The fused functions beside the plain ones: their options, what they share, what they repeat."""

import inspect
from itertools import product

import numpy as np
import pytest
import torch
from arrays import Held, Producer, hold, in_every_library, place
from mistakes import (
    CACHE,
    FUSED,
    HALF,
    KV,
    MAKERS,
    D,
    H,
    T,
    X,
    every_fused_function,
    numpy_array,
    of_kv_cache,
    pair_of,
)
from reference import decode, encode, layer_normalised, to_bits, to_float64

from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
)

CACHED = "q", "k", "v", "k_cache", "v_cache"
in_numpy_and_torch = pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@every_fused_function
def test_every_option_of_the_plain_function_is_one_of_the_fused(function):
    plain, fused = (inspect.signature(f).parameters for f in (apply_rotary_qk, function))
    of_k = {"k_table", "k_positions"} - {*fused}  # of functions of q and k alone
    options = [p for p in plain.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    options = [p for p in options if p.name not in of_k]
    assert len(options) == 15 - len(of_k)
    assert not of_k or function is not apply_qk_norm_rotary
    for option in options:
        assert fused[option.name].kind is option.kind
        assert fused[option.name].default == option.default
    assert list(fused)[-len(options) :] == [option.name for option in options]


# Shared memory.


def overlapping(wrap):
    """What is written, by which names, over what else of a buffer."""
    buffer = numpy_array((40, 2, D))
    words = buffer.view(np.int32)

    def at(start, tokens=T):
        return wrap(buffer[start : start + tokens])

    return buffer, {
        "both in one": {"k_cache": at(0), "v_cache": at(0)},
        "both a slot apart": {"k_cache": at(0), "v_cache": at(1)},
        "k's in k": {"k": at(0), "k_cache": at(4, 9)},
        "k's is k": {"k": at(0), "k_cache": at(0)},
        "v's is v": {"v": at(0), "v_cache": at(0)},
        "each is its input": {"k": at(0), "k_cache": at(0), "v": at(9), "v_cache": at(9)},
        "v's is k": {"k": at(0), "v_cache": at(0)},
        "k's in q": {"q": at(0), "k_cache": at(3)},
        "k's in out": {"out": at(0), "k_cache": at(3)},
        "v's is out": {"out": at(0), "v_cache": at(0)},
        "out in k": {"out": at(0), "k": at(2)},
        "k's in the slots": {"slot_mapping": wrap(words[:T, 0, 0]), "k_cache": at(0, 9)},
        "k's in a table": {
            "table": (wrap(buffer[:6, 1, :4]), at(20).reshape(-1, D)[:6, :4]),
            "k_cache": at(0),
        },
        "v's in weights": {"q_weight": wrap(buffer[2, 1]), "v_cache": at(0)},
        "v's in positions": {"positions": wrap(words[:T, 1, 7]), "v_cache": at(0)},
        "k beside its cache in k": {"k": at(0), "k_out": at(1)},
        "k beside its cache is q": {"q": at(0), "k_out": at(0)},
        "k beside its cache is v": {"v": at(0), "k_out": at(0)},
        "k beside its cache in v's": {"k_out": at(3), "v_cache": at(0)},
        "k beside its cache in the slots": {
            "slot_mapping": wrap(words[:T, 0, 0]),
            "k_out": at(0),
        },
    }


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", overlapping(np.asarray)[1])
@in_numpy_and_torch
def test_a_cache_that_shares_memory_with_any_other_array_is_refused(case, wrap, in_place):
    buffer, cases = overlapping(wrap)
    changed = cases[case]
    given = [changed[name] for name in ("k_cache", "v_cache") if name in changed]
    sizes = dict.fromkeys(("k_cache", "v_cache"), max(map(len, given), default=T))
    arguments = {name: wrap(numpy_array((sizes.get(name, T), 2, D))) for name in CACHED}
    arguments |= {"table": (wrap(numpy_array(HALF)), wrap(numpy_array(HALF)))}
    arguments |= {"slot_mapping": wrap(np.arange(T))} | changed
    if in_place:
        arguments = {"out": arguments["q"]} | arguments
    before = buffer.tobytes()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"must .*share no memory with .*, got two arrays that"
        ):
            apply_rotary_kv_cache(**arguments)
    assert buffer.tobytes() == before


@in_numpy_and_torch
def test_a_packed_array_may_be_written_in_place_or_apart_and_not_in_part(wrap):
    values = numpy_array((T, H + 4, D))
    table = wrap(numpy_array(HALF)), wrap(numpy_array(HALF))
    options = {"table": table, "num_heads": H, "num_kv_heads": 2}
    expected = np.asarray(apply_rotary_qkv(wrap(values), **options))
    assert np.array_equal(expected[:, -2:], values[:, -2:])

    def views(x_at, out_at):
        buffer = np.full((2 * T + 2, H + 6, D), np.nan, np.float32)
        x = buffer[x_at]
        x[...] = values
        return buffer, wrap(x), wrap(buffer[out_at])

    first, later, next_head = np.s_[:T, :7], np.s_[T + 1 : -1, :7], np.s_[:T, 1:8]
    for out_at in (first, later, np.s_[T + 2 :, 2:]):
        buffer, x, out = views(first, out_at)
        before = buffer.copy()
        assert apply_rotary_qkv(x, **options, out=out) is out
        before[out_at] = expected
        assert np.array_equal(buffer, before, equal_nan=True)
    for out_at in (
        np.s_[1 : T + 1, :7],
        next_head,
        np.s_[T - 1 : -3, :7],
        np.s_[T - 1 : 2 * T - 1, 2:],
    ):
        buffer, x, out = views(first, out_at)
        before = buffer.tobytes()
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"^out must be its input or share no memory with qkv"
            ):
                apply_rotary_qkv(x, **options, out=out)
        assert buffer.tobytes() == before


# What there is nothing of.


def empty(make):
    x, kv, table = make(X), make(KV), pair_of(make)
    slots, caches = make(T, "int64") * 0, (make(CACHE), make(CACHE))
    heads = {"num_heads": H, "num_kv_heads": 2}

    def cached(q, k, caches, **options):
        return lambda **norm: apply_rotary_kv_cache(
            q, k, k, *caches, table, slot_mapping=slots[: len(q)], **options, **norm
        )

    return {
        "tokens": lambda **norm: apply_norm_rotary(x[:0], None, table, **norm),
        "heads": lambda **norm: apply_norm_rotary(x[:, :0], None, table, **norm),
        "batches": lambda **norm: apply_norm_rotary(x[None][:0], None, table, **norm),
        "tokens of q and k": lambda **norm: apply_qk_norm_rotary(
            x[:0], x[:0], None, None, table, **norm
        ),
        "heads of k": lambda **norm: apply_qk_norm_rotary(x, x[:, :0], None, None, table, **norm),
        "packed tokens": lambda **norm: apply_rotary_qkv(make((0, 7, D)), table, **heads, **norm),
        "cached tokens": cached(x[:0], kv[:0], caches),
        "cached heads": cached(x, kv[:, :0], [cache[:, :, :0] for cache in caches]),
        "slots": cached(x, kv, [cache[0, :0] for cache in caches]),
        "blocks": cached(x, kv, [cache[:0] for cache in caches]),
        "slots in blocks": cached(x, kv, [cache[:, :0] for cache in caches]),
        "tokens, of 8 bits": cached(
            *(x[:0], kv[:0], [make(CACHE, "uint8") for _ in range(2)]),
            cache_dtype="float8_e5m2",
            k_scale=2.0,
        ),
    }


@pytest.mark.parametrize("norm", ["head", "heads", "layer"])
@pytest.mark.parametrize("case", empty(numpy_array))
def test_where_there_is_nothing_of_something_nothing_is_done_about_it(case, norm, make):
    for _ in range(2):
        empty(make)[case](norm=norm)


@pytest.mark.host_cuda
@pytest.mark.parametrize("norm", ["head", "heads"])
@pytest.mark.parametrize(
    "case", ["heads of k", "cached heads", "slots", "blocks", "slots in blocks"]
)
def test_kernels_do_nothing_about_it_either(case, norm):
    empty(numpy_array)[case](norm=norm)


# Arrays that are nothing but DLPack.


def test_the_kind_of_q_comes_back_where_a_cache_is_written():
    jax = pytest.importorskip("jax.numpy")
    for kind in (jax.asarray, lambda array: Producer(torch.from_numpy(array))):
        arguments = of_kv_cache(numpy_array)
        expected = apply_rotary_kv_cache(**arguments)
        q, k, v = (kind(arguments.pop(name)) for name in "qkv")
        y = apply_rotary_kv_cache(q, k, v, **arguments)
        assert type(y) is type(q)
        assert np.array_equal(np.asarray(getattr(y, "array", y)), expected)


def test_the_kind_of_any_other_input_comes_back():
    for function in (apply_norm_rotary, apply_qk_norm_rotary, apply_rotary_qkv):
        arguments = FUSED[function](numpy_array)
        expected = function(**arguments)
        names = [name for name in ("x", "q", "k", "qkv") if name in arguments]
        changed = {name: Producer(torch.from_numpy(arguments[name])) for name in names}
        results = [function(**arguments | changed), expected]
        results = [each if type(each) is tuple else (each,) for each in results]
        for y, wanted in zip(*results, strict=True):
            assert type(y) is Producer
            assert np.array_equal(y.array.numpy(), wanted)


# One result, whichever function is called.

OPTIONS = {
    "plain": {},
    "interleaved": {"interleaved": True, "positions": 3},
    "a slice": {"rotary_offset": 4, "conjugate": True},
    "eager": {"rounding": "eager"},
    "no table": {},
}
NORMS = {
    "no norm": {},
    "of heads": {"norm": "head"},
    "of tokens": {"norm": "heads", "round_norm": False},
    "layer": {"norm": "layer"},
    "after": {"norm": "head", "norm_after": True},
    "of tokens, after": {"norm": "heads", "norm_after": True, "round_norm": "before_weight"},
    "layer, after": {"norm": "layer", "norm_after": True, "round_norm": False},
}


class Packed:
    """q, k and v side by side in random bits or in numbers, a table, and weights."""

    def __init__(self, library, dtype="float16", head_dim=24):
        self.library, self.head_dim = library, head_dim
        rng = np.random.default_rng(7)
        self.values = 2 * rng.standard_normal((2, T, H + 4, head_dim))
        self.bits = encode(self.values, dtype)
        noise = rng.integers(0, 2**16, self.bits[:, :, -2:].shape, np.uint16)
        self.bits[:, :, -2:] = noise  # of v, NaNs of any payload too
        self.held = Held(self.bits, dtype, library, place(self.bits.shape, "dense"))
        angle = rng.uniform(-3, 3, (20, 8))
        self.table = RotaryTable(*(self.array(f(angle), dtype) for f in (np.cos, np.sin)))

    def array(self, values, dtype):
        return hold(values, dtype, self.library).array

    def parts(self):
        qkv = self.held.array
        return qkv[:, :, :H], qkv[:, :, H : H + 2], qkv[:, :, H + 2 :]

    def weights(self, norm):
        rng, each = np.random.default_rng(8), norm.get("norm") == "heads"
        if not norm:
            return {}
        sizes = {"q_weight": (H if each else 1), "k_weight": (2 if each else 1)}
        if norm["norm"] == "layer":
            sizes |= {"q_bias": 1, "k_bias": 1}
        return {
            name: self.array(rng.uniform(0.5, 2, n * self.head_dim), "float32")
            for name, n in sizes.items()
        }


WAYS = "packed", "a cache", "packed apart", "packed in place"


@pytest.mark.parametrize(
    ("options", "norm"),
    [(*each,) for each in product(OPTIONS, NORMS) if each != ("no table", "no norm")],
)
@in_every_library
def test_packed_or_apart_or_into_a_cache_the_bits_are_the_same(library, options, norm, request):
    """All ways; those whose kernels must be built for the CPU are every second one in turn.

    So each option and each norm meets every way there too, and each option every norm.
    """
    packed, ways = Packed(library), WAYS
    if request.node.get_closest_marker("host_cuda"):
        ways = WAYS[([*OPTIONS].index(options) + [*NORMS].index(norm)) % 2 :: 2]
    table = None if options == "no table" else packed.table
    options, norm = OPTIONS[options], NORMS[norm]
    weights = packed.weights(norm)
    q, k, v = packed.parts()
    if norm:
        expected = apply_qk_norm_rotary(q, k, table=table, **weights, **options, **norm)
        of_q = {name.removeprefix("q_"): each for name, each in weights.items() if name[0] == "q"}
        alone = apply_norm_rotary(q, table=table, **of_q, **options, **norm)
    else:
        expected = apply_rotary_qk(q, k, table, **options)
        alone = apply_rotary(q, table, **options)
    q_bits, k_bits = map(to_bits, expected)
    assert np.array_equal(to_bits(alone), q_bits)

    call = {"num_heads": H, "num_kv_heads": 2, **weights, **options, **norm}
    whole = np.concatenate([q_bits, k_bits, packed.bits[:, :, -2:]], 2)
    if "packed" in ways:
        assert np.array_equal(to_bits(apply_rotary_qkv(packed.held.array, table, **call)), whole)
    if "packed apart" in ways:
        apart = hold(packed.values, "float16", library)
        apply_rotary_qkv(packed.held.array, table, **call, out=apart.array)
        assert np.array_equal(to_bits(apart.array), whole)
    packed.held.assert_unchanged()

    if "a cache" in ways:
        caches = [hold(np.zeros((3, 7, 2, packed.head_dim)), "float16", library) for _ in range(2)]
        slots = np.random.default_rng(9).permutation(21)[: 2 * T].reshape(2, T)
        slot_mapping = packed.array(slots, "int64")
        cached = {"slot_mapping": slot_mapping, **weights, **options, **norm}
        y = apply_rotary_kv_cache(q, k, v, *(held.array for held in caches), table, **cached)
        assert np.array_equal(to_bits(y), q_bits)
        for held, bits in zip(caches, (k_bits, packed.bits[:, :, -2:]), strict=True):
            assert np.array_equal(to_bits(held.array)[np.divmod(slots, 7)], bits)

    if "packed in place" in ways:
        apply_rotary_qkv(packed.held.array, table, **call, out=packed.held.array)
        assert np.array_equal(to_bits(packed.held.array), whole)
        packed.held.assert_guarded()


@pytest.mark.parametrize("mean", [0.0, 30.0, -1e4])
@pytest.mark.parametrize("head_dim", [64, 72])
@in_every_library
def test_a_layer_far_from_zero_keeps_its_variance(library, head_dim, mean):
    """Where a mean of squares, less the square of the mean, would have lost it."""
    rng = np.random.default_rng(12)
    values = mean + rng.standard_normal((2, T, H, head_dim))
    x = hold(values, "float32", library)
    exact = layer_normalised(np.float64(decode(x.elements, "float32")), 1e-6)
    result = to_float64(apply_norm_rotary(x.array, None, None, norm="layer", eps=1e-6))
    # The mean of float32 numbers is off by a few units in their last place.
    assert np.abs(result - exact).max() <= 4e-7 * (4 + abs(mean))


# What is repeated.


@in_every_library
@pytest.mark.parametrize("name", ["weights", "slots", "scales", "inputs"])
def test_what_has_changed_in_memory_is_read_anew(library, name):
    """The same arrays, called again and again, give what new ones of the same values do."""
    rng = np.random.default_rng(3)
    dtype = "float32"

    def drawn():
        return {
            "inputs": [rng.standard_normal((T, n, D)) for n in (H, 2, 2)],
            "weights": [rng.uniform(0.5, 2, D) for _ in range(2)],
            "slots": [rng.permutation(12)[:T]],
            "scales": [rng.uniform(0.5, 2, 1) for _ in range(2)],
        }

    def arrays(values):
        dtypes = {"slots": "int64"}
        return {
            kind: [hold(x, dtypes.get(kind, dtype), library).array for x in each]
            for kind, each in values.items()
        }

    def call(given):
        caches = [hold(np.zeros(3 * 4 * 2 * D // 4), "float32", library).array for _ in range(2)]
        caches = [words(cache, library).reshape(3, 4, 2, D) for cache in caches]
        q_weight, k_weight = given["weights"]
        k_scale, v_scale = given["scales"]
        y = apply_rotary_kv_cache(
            *(*given["inputs"], *caches, table),
            slot_mapping=given["slots"][0],
            cache_dtype="float8_e4m3fn",
            q_weight=q_weight,
            k_weight=k_weight,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return [to_bits(each) for each in (y, *caches)]

    table = RotaryTable(*(hold(rng.uniform(-1, 1, (9, 4)), dtype, library).array for _ in range(2)))
    given = arrays(drawn())
    seen = [call(given)]
    for _ in range(3):
        for array, other in zip(given[name], arrays(drawn())[name], strict=True):
            array[...] = other
        copies = {kind: [each + 0 for each in of_kind] for kind, of_kind in given.items()}
        results = call(given)
        for result, expected in zip(results, call(copies), strict=True):
            assert np.array_equal(result, expected)
        assert not all(map(np.array_equal, results, seen[-1]))
        seen.append(results)


def words(array, library):
    """The memory of an array as bytes."""
    return array.view(torch.uint8) if library.startswith("torch") else array.view("uint8")


@in_every_library
def test_an_option_is_not_taken_for_another_that_was_seen(library):
    """One after another, twice: each gives what it gave, and others give other numbers."""
    rng = np.random.default_rng(4)
    x, weight = (hold(rng.standard_normal(shape), "float64", library).array for shape in (X, D))
    out = hold(np.zeros(X), "float64", library).array
    tables = [hold(rng.uniform(-1, 1, (9, 4)), "float64", library).array for _ in range(2)]
    table = RotaryTable(*tables)
    options = [
        {"eps": 0.0},
        {"eps": 1.0},
        {"eps": 0.5},
        {"weight_offset": 1.0},
        {"norm": "heads"},
        {"norm": "layer"},
        {"norm_after": True},
        {"eps": 1.0, "weight_offset": 1.0},
        {"conjugate": True},
        {"interleaved": True},
    ]

    def call(option):
        given = None if option.get("norm") else weight
        return to_bits(apply_norm_rotary(x, given, table, **option, out=out)).copy()

    first = [call(option) for option in options]
    assert all(
        np.array_equal(call(option), bits) for option, bits in zip(options, first, strict=True)
    )
    assert len({bits.tobytes() for bits in first}) == len(options)
    for option, equal in (({"eps": 0}, 0), ({"eps": np.float32(1)}, 1), ({"eps": 1}, 1)):
        assert np.array_equal(call(option), first[equal])
    for wrong in ({"eps": True}, {"eps": False}, {"weight_offset": True}, {"round_norm": 1}):
        with pytest.raises(
            TypeError, match=r"must be (a number|True, False or 'before_weight'), got"
        ):
            call(wrong)


@pytest.mark.parametrize("name", ["q_weight", "slot_mapping", "v", "k_cache", "v_cache"])
@in_every_library
def test_an_array_in_another_place_is_another_array(library, name):
    """Where all but its address is as before."""
    rng = np.random.default_rng(5)
    shapes = {"q": X, "k": KV, "v": KV, "k_cache": CACHE, "v_cache": CACHE, "q_weight": (D,)}
    table = [hold(rng.uniform(-1, 1, HALF), "float32", library).array for _ in range(2)]

    def fresh():
        values = {each: rng.standard_normal(shape) for each, shape in shapes.items()}
        arrays = {each: hold(x, "float32", library).array for each, x in values.items()}
        slots = hold(rng.permutation(12)[:T], "int64", library).array
        return arrays | {"slot_mapping": slots, "table": tuple(table)}

    arguments, kept = fresh(), []
    for _ in range(3):
        arguments[name] = fresh()[name]
        kept.append(arguments[name])  # so that the next one lies elsewhere
        copies = {each: x if each == "table" else x + 0 for each, x in arguments.items()}
        results = [
            [to_bits(apply_rotary_kv_cache(**given)), *(to_bits(given[x]) for x in CACHED[3:])]
            for given in (arguments, copies)
        ]
        assert all(map(np.array_equal, *results))
