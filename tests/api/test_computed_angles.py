"""Tables of frequencies, ``precompute=False``: cosines and sines that a call computes by itself.

A head of pairs (1, 0) becomes one of pairs (cos, sin), which are held against integers' arithmetic.
"""

import copy
import pickle

import numpy as np
import pytest
from arrays import hold, in_both_pairings, in_every_library
from reference import check, cos_sin_at, rotate, to_bits, to_float64

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk, frequencies
from rope_cupy.tables import MOST_RADIANS, source_of

ROTARY_DIM = 64
INV_FREQ = frequencies.inverse_frequencies(ROTARY_DIM, 10000.0)
POSITIONS = [0, 1, 2, 1000, 65_537, 999_999, 1_000_000, 2**24 + 1, 2**31 - 1]
FAR = [2**31, 2**33 + 5, 2**40 - 1]
UNIT = 2 * np.pi * 2.0**-65  # radians that a frequency may be off by


def table_like(library, inv_freq=INV_FREQ, dtype="float32", **options):
    like = hold([0.0], dtype, library).array
    return RotaryTable.from_inverse_frequencies(inv_freq, like=like, precompute=False, **options)


def cosines_and_sines(library, positions, table, *, dtype="float32", interleaved=False):
    """What a call computes for positions, (positions, pairs) each."""
    positions = np.asarray(positions)
    num_pairs = table.rotary_dim // 2
    x = np.zeros((len(positions), 1, 2 * num_pairs))
    x[..., slice(None, None, 2) if interleaved else slice(num_pairs)] = 1
    y = apply_rotary(
        hold(x, dtype, library).array,
        table,
        positions=hold(positions, str(positions.dtype), library).array,
        interleaved=interleaved,
    )
    y = to_float64(y)[:, 0]
    return (y[:, ::2], y[:, 1::2]) if interleaved else (y[:, :num_pairs], y[:, num_pairs:])


@in_every_library
@in_both_pairings
@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_cosines_and_sines_are_right_at_any_position(library, interleaved, kind, record_property):
    positions = np.array(POSITIONS + (FAR if kind == "int64" else []), kind)
    for dtype, rounding in (("float32", 1e-7), ("float64", 5e-16)):
        table = table_like(library, dtype=dtype)
        parts = cosines_and_sines(library, positions, table, dtype=dtype, interleaved=interleaved)
        for actual, exact in zip(parts, cos_sin_at(positions, INV_FREQ), strict=True):
            error = np.abs(actual - exact)
            assert (error <= rounding + UNIT * positions[:, None].astype(float)).all()
            record_property(f"error at 1,000,000, {dtype}", float(error[6].max()))


@in_every_library
def test_every_part_of_a_turn_is_right(library, record_property):
    """Frequencies of a 4,096th of a turn and less, where each polynomial ends and begins."""
    turns = np.array([1 / 4096, 1 / 4096 + 2.0**-33, 1 / 8, 1 / 8 - 2.0**-34, 1 / 4 + 2.0**-40])
    inv_freq, positions = 2 * np.pi * turns, np.arange(8193, dtype=np.int64)
    parts = cosines_and_sines(library, positions, table_like(library, inv_freq))
    for actual, exact in zip(parts, cos_sin_at(positions, inv_freq), strict=True):
        assert np.abs(actual - exact).max() <= 1e-7
        record_property("error", float(np.abs(actual - exact).max()))


@in_every_library
def test_positions_are_as_those_of_a_table_without_an_end(library):
    """None, an int, arrays, offsets, packed sequences and three axes; a negative one is outside."""
    rng, heads = np.random.default_rng(0), (2, 6, 3, ROTARY_DIM)
    q = hold(rng.standard_normal(heads), "float32", library)
    x, table = to_float64(q.array), table_like(library)

    def held(values):
        return hold(np.asarray(values), "int64", library).array

    def exact(rows, **options):
        used, row = np.unique(np.where(rows < 0, 0, rows), return_inverse=True)
        row = np.where(rows < 0, -1, row.reshape(rows.shape))
        return rotate(x, *cos_sin_at(used, INV_FREQ), positions=row, **options)

    count, far = np.arange(6), 3_000_000_000
    given = rng.integers(0, 2**33, (2, 6))
    given[0, 3], given[1, 5] = -1, -(2**63)
    axes = rng.integers(0, 2**20, (3, 2, 6))
    axes[1, 0, 2] = -7
    section = {"mrope_section": (8, 12, 12)}
    offsets = np.array([far, -2])
    for rows, how, options in (
        (count, {}, {}),
        (count + far, {"positions": far}, {}),
        (given, {"positions": held(given)}, {}),
        (count + offsets[:, None], {"seqlen_offsets": held(offsets)}, {}),
        (axes, {"positions": held(axes)}, section),
        (
            *(axes, {"positions": held(axes)}),
            {"mrope_section": (12, 11, 9), "mrope_interleaved": True},
        ),
    ):
        for outside in ("nan", "keep"):
            options = options | {"out_of_range": outside}
            y = apply_rotary(q.array, table, **how, **options)
            check(to_float64(y), exact(rows, **options), "float32")

    packed = hold(x[:1], "float32", library).array
    y = apply_rotary(packed, table, cu_seqlens=held([1, 4, 6]), seqlen_offsets=held([far, 5]))
    rows = np.array([-1, far, far + 1, far + 2, 5, 6])
    check(to_float64(y), exact(rows)[:1], "float32")


@in_every_library
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention_scaling_multiplies_cosines_and_sines(library, dtype):
    table = table_like(library, dtype=dtype, attention_scaling=1.375)
    parts = cosines_and_sines(library, [5, 70_000], table, dtype=dtype)
    for actual, exact in zip(parts, cos_sin_at(np.array([5, 70_000]), INV_FREQ), strict=True):
        assert np.abs(actual - 1.375 * exact).max() <= 2e-7


@in_every_library
def test_at_the_position_0_every_bit_stays(library):
    x = hold(np.random.default_rng(1).standard_normal((1, 2, ROTARY_DIM)), "float32", library).array
    assert np.array_equal(to_bits(apply_rotary(x, table_like(library))), to_bits(x))


@in_every_library
@pytest.mark.parametrize("head_dim", [2, 6, 72, 512])
def test_frequencies_may_be_of_any_size(library, head_dim):
    """Above a turn from one position to the next, none, negative, and next to nothing."""
    odd = [0.0, 1e-300, -1.0, 2 * np.pi, 1e9, -1e19, 700.5, 3.0]
    inv_freq = np.resize(odd, head_dim // 2)
    positions = np.arange(5) * 1000
    parts = cosines_and_sines(library, positions, table_like(library, inv_freq))
    for actual, exact in zip(parts, cos_sin_at(positions, inv_freq), strict=True):
        assert np.abs(actual - exact).max() <= 1e-7


def test_a_frequency_is_kept_to_half_a_unit_of_2_64_turns():
    mpmath = pytest.importorskip("mpmath")
    inv_freq = np.append(INV_FREQ, [1e19, -0.3, 5e-324])
    words = np.ascontiguousarray(table_like("numpy", inv_freq)._source.arrays[0])
    turns = words.view(np.uint64).ravel()[:-1].tolist()
    with mpmath.workdps(60):
        for each, frequency in zip(turns, inv_freq.tolist(), strict=True):
            exact = mpmath.mpf(frequency) / (2 * mpmath.pi) * 2**64
            off = (each - exact) % 2**64
            assert min(off, 2**64 - off) <= 0.5


def test_it_tells_what_it_is_and_can_be_copied():
    table = table_like("numpy")
    told = table.shape, table.num_positions, table.rotary_dim, table.dtype, table.device
    assert told == ((2**63 - 1, 32), 2**63 - 1, ROTARY_DIM, "frequency", "cpu")
    x = np.random.default_rng(2).standard_normal((4, 2, ROTARY_DIM))
    expected = apply_rotary(x, table)
    for twin in (copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert np.array_equal(apply_rotary(x, twin), expected)
    assert source_of(copy.deepcopy(table)).arrays[0] is not source_of(table).arrays[0]


def test_a_config_gives_its_frequencies_and_its_scaling():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = {"head_dim": ROTARY_DIM, "rope_theta": 1e6, "rope_scaling": yarn}
    config["max_position_embeddings"] = 256
    inv_freq, scaling = frequencies.from_config(config)
    table = RotaryTable.from_config(config, like=np.zeros(1), precompute=False)
    same = table_like("numpy", inv_freq, attention_scaling=scaling)
    words, others = (source_of(each).arrays[0] for each in (table, same))
    assert scaling != 1
    assert np.array_equal(words, others)


@pytest.mark.parametrize("name", ["q", "k"])
def test_it_rotates_gradients_back(name):
    torch = pytest.importorskip("torch")
    q, k = (torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    table = RotaryTable.from_inverse_frequencies([1.0, 0.3, 0.1, 0.0], like=q, precompute=False)

    def rotated(x):
        both = apply_rotary_qk(*((x, k) if name == "q" else (q, x)), table, positions=10**6)
        return both[name == "k"]

    assert torch.autograd.gradcheck(rotated, q if name == "q" else k)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_is_compiled_into_one_graph(backend):
    torch = pytest.importorskip("torch")
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    table = RotaryTable.from_inverse_frequencies([1.0, 0.3, 0.1, 0.0], like=q, precompute=False)
    offsets = torch.tensor([7, 1_000_000])

    def rotated(q, k):
        return apply_rotary_qk(q, k, table, seqlen_offsets=offsets)

    compiled = torch.compile(rotated, backend=backend, fullgraph=True)
    for actual, expected in zip(compiled(q, k), rotated(q, k), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "precompute must be True or False, got 1", {"precompute": 1}),
        (
            TypeError,
            "num_positions must be an int, or precompute False, got None",
            {"precompute": True},
        ),
        (ValueError, "num_positions must be None with precompute=False, got 9", {"num": 9}),
        (ValueError, "inv_freq must be finite in float64, got inf", {"inv_freq": [1.0, np.inf]}),
        (ValueError, "inv_freq must be finite in float64, got nan", {"inv_freq": [np.nan]}),
        (ValueError, "inv_freq must be below", {"inv_freq": [-float(MOST_RADIANS)]}),
        (ValueError, "attention_scaling must be finite", {"attention_scaling": np.inf}),
    ],
)
def test_what_is_no_frequency_is_refused(error, message, arguments):
    arguments = {"inv_freq": [1.0], "precompute": False, "like": np.zeros(1)} | arguments
    if "num" in arguments:
        arguments["num_positions"] = arguments.pop("num")
    with pytest.raises(error, match=message):
        RotaryTable.from_inverse_frequencies(**arguments)


@pytest.mark.parametrize("positions", [-1, 2**63 - 3, 2**70])
def test_an_int_that_no_position_is_is_refused(positions):
    x = np.zeros((5, 1, ROTARY_DIM), np.float32)
    with pytest.raises(ValueError, match=r"^(positions|table) must"):
        apply_rotary(x, table_like("numpy"), positions=positions)
