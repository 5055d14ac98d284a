"""Which bytes a strided array touches, against an enumeration of them."""

import itertools

import numpy as np
import pytest

from rope_cupy.memory import ITEMSIZE, alignment, array_spec, may_overlap_itself, overlap


def addresses(spec, pointer):
    """Every element's first address."""
    steps = [[i * stride for i in range(n)] for n, stride in zip(spec.shape, spec.strides)]  # noqa: B905
    return [pointer + ITEMSIZE[spec.dtype] * sum(offsets) for offsets in itertools.product(*steps)]


def touched(spec, pointer):
    return {first + i for first in addresses(spec, pointer) for i in range(ITEMSIZE[spec.dtype])}


def random_arrays(seed):
    rng = np.random.default_rng(seed)
    for dtype in rng.choice(["float16", "float32", "float64"], 2):
        shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, 5, 3))
        strides = tuple(int(n) for n in rng.integers(-7, 12, 3))
        pointer = 4096 + 8 * int(rng.integers(0, 8))
        yield array_spec(shape, strides, str(dtype), "cpu", pointer, True), pointer


def test_overlap_is_what_an_enumeration_of_the_bytes_finds():
    found = set()
    for seed in range(1500):
        (a, a_pointer), (b, b_pointer) = random_arrays(seed)
        shared = bool(touched(a, a_pointer) & touched(b, b_pointer))
        assert overlap(a, a_pointer, b, b_pointer) == shared, (seed, a, b)
        found.add(shared)
    assert found == {False, True}


def test_an_array_whose_elements_share_memory_is_always_found():
    for seed in range(1500):
        (a, pointer), _ = random_arrays(seed)
        places = addresses(a, pointer)
        if len(set(places)) < len(places):
            assert may_overlap_itself(a), (seed, a)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3, 4), (12, 4, 1)),
        ((4, 3, 2), (1, 4, 12)),
        ((2, 3, 4), (-12, 4, -1)),
        ((2, 3, 4), (100, 30, 2)),
        ((2, 1, 4), (4, 0, 1)),
        ((0, 3, 4), (0, 0, 0)),
    ],
)
def test_views_of_distinct_elements_are_not_suspected(shape, strides):
    assert not may_overlap_itself(array_spec(shape, strides, "float32", "cpu", 0, True))


def test_arrays_on_two_devices_never_overlap():
    a = array_spec((4,), (1,), "float32", "cuda:0", 0, True)
    assert overlap(a, 4096, a, 4096)
    assert not overlap(a, 4096, a._replace(device="cuda:1"), 4096)


@pytest.mark.parametrize(
    ("pointer", "expected"), [(0, 16), (1, 1), (6, 2), (12, 4), (24, 8), (4096, 16)]
)
def test_alignment_is_the_largest_power_of_two_up_to_16(pointer, expected):
    assert alignment(pointer) == expected
