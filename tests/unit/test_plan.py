"""The launch plan: what each thread does, how blocks and rows are numbered, what is packed."""

import itertools
import math
import struct

import numpy as np
import pytest

from rope_cupy import arguments
from rope_cupy.arguments import Distance, divisor
from rope_cupy.memory import array_spec
from rope_cupy.options import Cache, Norm, Options, check_options
from rope_cupy.plan import BLOCK_BYTES, launch_plan
from rope_cupy.problem import (
    ANY_POSITION,
    MAX_ROWS,
    Pointers,
    TableSpec,
    rotary_problem,
)
from rope_cupy.template import RotaryKernel

VIEW, DIVISOR = arguments.View._fields, arguments.Divisor._fields


def spec(shape, dtype="bfloat16", strides=None, address=0):
    """The spec of an array at an address; dense unless strides are given."""
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return array_spec(shape, strides or dense, dtype, "cuda:0", address, True)


def problem(xs, rotary_dim, outs=None, table=None, **given):
    """The problem of rotating xs, in place unless outs are given, by a dense float32 table."""
    options = {name: given[name] for name in given if name in Options._fields}
    rows = {name: given[name] for name in given if name not in options}
    rows = tuple((name, array) for name, array in rows.items() if array is not None)
    chosen = {
        "interleaved": False,
        "layout": None,
        "head_dim": None,
        "rotary_offset": 0,
        "conjugate": False,
        "out_of_range": "nan",
        "mrope_section": None,
        "mrope_interleaved": False,
        "rounding": "once",
        "norm": None,
        "packed": None,
        "cache": None,
    } | options
    part = spec((4096, rotary_dim // 2), "float32")
    return rotary_problem(
        ("q", "k", "v")[: len(xs)],
        tuple(xs),
        tuple(outs or xs),
        outs is None,
        table or TableSpec(part, part, 1, 0),
        rows,
        check_options(*Options(**chosen)[:-3], parts=Options(**chosen)[-3:]),
    )


def matrices(rotary_dim, dtype="float32"):
    """A table of dense 2 x 2 matrices, as their first and second rows."""
    num_pairs = rotary_dim // 2
    row = spec((4096, num_pairs, 2), dtype, strides=(4 * num_pairs, 4, 1))
    return TableSpec(row, row, 4, 2, "matrices")


def frequencies(rotary_dim, address=0):
    """A table of frequencies, of which every position has the same row."""
    num_pairs = rotary_dim // 2
    part = spec((ANY_POSITION, num_pairs), "frequency", strides=(0, 1), address=address)
    scale = spec((ANY_POSITION, num_pairs), "frequency", strides=(0, 0), address=8 * num_pairs)
    return TableSpec(part, scale, 1, 0)


def template_of(*args, **options):
    return launch_plan(problem(*args, **options)).template


def fields(plan):
    """What a plan's argument block holds whatever is patched, by the names of the fields."""
    block = plan.argument_block(Pointers((0,) * 3, (0,) * 3, 0, 0))
    return {
        field.name: struct.unpack_from(f"<{field.type.format}", block, field.offset)[0]
        for field in plan.packer.fields
        if not field.is_patched
    }


def names_of(packer):
    """The names of what is patched."""
    return [item.name for item in packer.items if not isinstance(item, bytes)]


def patched(plan, pointers):
    """What a plan's argument block holds of addresses, by the names of what is patched."""
    block = plan.argument_block(pointers)
    found = [field for field in plan.packer.fields if field.is_patched]
    return {
        name: struct.unpack_from(f"<{field.type.format}", block, field.offset)[0]
        for name, field in zip(names_of(plan.packer), found, strict=True)
    }


# What one thread does.


@pytest.mark.parametrize(
    ("dtype", "interleaved", "head_dim", "rotary_dim", "pairs"),
    [
        ("bfloat16", False, 128, 128, 8),  # two accesses of 16 bytes
        ("bfloat16", True, 128, 128, 4),  # one
        ("float32", False, 128, 128, 4),
        ("float32", True, 80, 80, 2),
        ("float64", False, 64, 64, 2),
        ("float64", True, 64, 64, 1),
        ("float16", False, 72, 72, 4),  # 36 pairs are no multiple of 8
        ("float32", False, 6, 6, 1),
        ("bfloat16", False, 90, 24, 2),  # a row in two begins at 4 bytes
        ("bfloat16", True, 90, 24, 1),
    ],
)
def test_a_thread_rotates_what_one_access_of_every_half_or_run_holds(
    dtype, interleaved, head_dim, rotary_dim, pairs
):
    x = spec((1, 5, 4, head_dim), dtype)
    assert template_of([x], rotary_dim, interleaved=interleaved).pairs == (pairs)


def test_a_thread_beside_lanes_that_copy_has_one_access():
    x = spec((1, 5, 4, 128))
    assert template_of([x], 64).pairs == 8
    assert template_of([x], 64, outs=[x]).pairs == 4
    assert template_of([x], 128, outs=[x]).pairs == 8  # nothing to copy


@pytest.mark.parametrize(("dtype", "pairs"), [("float16", 8), ("float32", 4)])
def test_a_thread_has_one_access_where_the_angles_of_a_pair_take_16_bytes(dtype, pairs):
    x = spec((1, 5, 4, 128))
    assert template_of([x], 128, table=matrices(128, dtype)).pairs == pairs


@pytest.mark.parametrize(("address", "width"), [(0, 8), (8, 4), (4, 2), (2, 1), (256, 8), (6, 1)])
def test_an_access_is_as_wide_as_the_address_allows(address, width):
    plan = launch_plan(problem([spec((1, 5, 4, 128), address=address)], 128))
    assert fields(plan)["tensors[0].x.width"] == width
    assert plan.template.pairs == (width)


def test_the_width_is_chosen_for_each_tensor():
    q, k = spec((1, 5, 4, 128)), spec((1, 5, 2, 128), address=2)
    plan = launch_plan(problem([q, k], 128))
    packed = fields(plan)
    assert (packed["tensors[0].x.width"], packed["tensors[0].out.width"]) == (8, 8)
    assert (packed["tensors[1].x.width"], packed["tensors[1].out.width"]) == (1, 1)
    assert (plan.template.pairs, plan.template.common) == (8, False)
    assert template_of([k], 128, outs=[spec((1, 5, 2, 128))]).pairs == 8  # as of its output


def test_elements_that_do_not_touch_move_one_by_one():
    x = spec((1, 5, 4, 128), strides=(5120, 1024, 256, 2))
    plan = launch_plan(problem([x], 128))
    assert fields(plan)["tensors[0].x.width"] == 1
    assert (plan.template.pairs, plan.template.common) == (1, False)


def test_a_table_off_its_alignment_does_not_narrow_the_tensors():
    part = spec((4096, 64), "float32", address=4)
    plan = launch_plan(problem([spec((1, 5, 4, 128))], 128, table=TableSpec(part, part, 1, 0)))
    assert (fields(plan)["tensors[0].x.width"], fields(plan)["cos.width"]) == (8, 1)
    assert plan.template.pairs == 8


def test_every_template_argument_is_in_its_place():
    x, positions = spec((1, 5, 4, 192), "float16"), spec((5,), "int32")
    options = {"positions": positions, "interleaved": True, "rotary_offset": 128}
    chosen = template_of([x], 64, outs=[x], table=matrices(64, "float64"), **options)
    assert chosen == RotaryKernel(
        t="float16",
        table="double",
        position="int",
        norm="NoNorm",
        destination="Outputs",
        tensors=2,
        interleaved=True,
        conjugate=False,
        eager=False,
        rows=4,
        pairs=2,
        form="Matrices<4>",
        copy_width=8,
        in_place=False,
        past_l1=False,
        common=True,
    )
    other = template_of([x], 64, conjugate=True, positions=positions)
    assert other == chosen._replace(
        table="float",
        interleaved=False,
        conjugate=True,
        rows=1,
        pairs=8,
        form="OneAngle<1, 0>",
        copy_width=0,
        in_place=True,
        past_l1=True,
    )
    by_element = spec((4096, 64), "float32")
    for form, name in (("by element", "ByElement"), ("matrices", "Matrices<1>")):
        two = spec((4096, 32, 2), "float32", strides=(128, 1, 64))
        part = by_element if form == "by element" else two
        table = TableSpec(part, part, 1, 0, form)
        assert template_of([x], 64, outs=[x], table=table).form == name


BSHD, BHSD = "bshd", "bhsd"


@pytest.mark.parametrize(
    ("heads", "head_dim", "layout", "interleaved", "by_matrices", "rows"),
    [
        ((32, 8), 128, BSHD, False, False, 1),  # 32 bytes a row already
        ((32, 8), 128, BSHD, True, False, 2),
        ((32, 8), 8, BSHD, False, False, 2),  # 16 bytes of a head of 16
        ((32, 8), 128, BSHD, False, True, 4),
        ((32, 8), 128, BSHD, True, True, 4),
        ((7, 3), 128, BSHD, True, False, 1),  # heads that do not divide
        ((8, 3), 128, BSHD, True, False, 1),
        ((6, 2), 128, BSHD, True, True, 2),
        ((4, 0), 128, BSHD, True, True, 4),
        ((0, 6), 128, BSHD, True, False, 2),
        ((32, 8), 128, BHSD, True, False, 1),  # heads are not innermost
        ((32, 8), 72, BSHD, True, False, 1),  # 9 lanes do not fill a warp
        ((32, 8), 96, BSHD, True, True, 1),
        ((32, 8), 512, BSHD, True, False, 2),  # 64 lanes are two warps
    ],
)
def test_a_thread_takes_several_heads_where_it_reads_little_of_each(
    heads, head_dim, layout, interleaved, by_matrices, rows
):
    shapes = [(2, 37, h, head_dim) if layout == BSHD else (2, h, 37, head_dim) for h in heads]
    table = matrices(head_dim) if by_matrices else None
    options = {"layout": layout, "interleaved": interleaved, "table": table}
    assert template_of([spec(shape) for shape in shapes], head_dim, **options).rows == (rows)


@pytest.mark.parametrize("shape", [(2, 37, 8, 128), (1, 37, 8, 128), (2, 1, 8, 128), (37, 8, 128)])
def test_heads_are_innermost_whatever_axes_have_one_index_or_are_not_there(shape):
    positions = spec((shape[-3],), "int32")
    chosen = template_of([spec(shape)], 128, interleaved=True, positions=positions)
    assert (chosen.rows, chosen.past_l1) == (2, True)


def test_lanes_that_copy_count_among_those_that_fill_warps():
    x = spec((2, 5, 4, 192))  # 8 lanes that rotate, 16 that copy
    assert template_of([x], 64, interleaved=True).rows == 2
    assert template_of([x], 64, outs=[x], interleaved=True).rows == 1


def test_a_thread_takes_four_heads_by_complex_numbers_of_16_bytes():
    part = spec((4096, 64), "float64", strides=(128, 2))
    table = TableSpec(part, part, 2, 1)
    assert template_of([spec((2, 5, 4, 128))], 128, table=table).rows == 4


def test_the_heads_of_k_are_innermost_where_q_has_one():
    packed = fields(launch_plan(problem([spec((2, 37, 1, 128)), spec((2, 37, 8, 128))], 128)))
    assert [packed[f"tensors[1].x.{axis}"] for axis in ("outer", "middle", "inner")] == [
        37 * 8 * 128,
        8 * 128,
        128,
    ]


@pytest.mark.parametrize("of_heads", ["cos", "sin"])
def test_a_thread_takes_one_head_where_heads_have_angles_of_their_own(of_heads):
    x, parts = spec((2, 5, 4, 128)), {name: spec((2, 5, 1, 64), "float32") for name in "cs"}
    table = TableSpec(parts["c"], parts["s"], 1, 0)
    assert template_of([x], 128, table=table, interleaved=True).rows == 2
    parts[of_heads[0]] = spec((2, 5, 4, 64), "float32")
    table = TableSpec(parts["c"], parts["s"], 1, 0)
    assert template_of([x], 128, table=table, interleaved=True).rows == 1


OF_HEADS = TableSpec(*[spec((2, 5, 4, 64), "float32")] * 2, 1, 0)
TOGETHER = Norm("heads", 1e-6, 0.0, True)


@pytest.mark.parametrize("norm", [None, TOGETHER])
def test_a_thread_takes_a_head_of_q_and_of_k_that_have_its_angles(norm):
    x, given = spec((2, 5, 4, 128)), {"table": OF_HEADS, "norm": norm}
    weights = ("q_weight", "k_weight") if norm else ()
    weights = dict.fromkeys(weights, spec((4 * 128,), "bfloat16"))
    plan = launch_plan(problem([x, x], 128, **given, **weights))
    alone = launch_plan(problem([x], 128, **given))
    assert (plan.template.rows, alone.template.rows) == (2, 1)
    assert (plan.grid, plan.block) == (alone.grid, alone.block)
    assert fields(plan)["table_heads[0].value"] == 1
    steps = [item for item in plan.packer.items if isinstance(item, Distance)]
    per_tensor = ["x0", "out0"]
    assert [step.begin for step in steps] == 2 * per_tensor + (["q_weight"] * 2 if norm else [])
    at = Pointers((4096, 1024), (8192, 8192 + 640), 16, 16, q_weight=64, k_weight=320)
    block = plan.argument_block(at)
    found = {
        field.name: struct.unpack_from("<q", block, field.offset)[0] for field in plan.packer.fields
    }
    assert (found["tensors[0].x_step"], found["tensors[0].out_step"]) == (-1536, 320)
    if norm:
        assert found["layout[0].step"] == 128
        assert plan.template.norm.apart


def test_a_token_that_fits_no_block_is_told_by_the_heads_of_one_tensor():
    x, table = spec((2, 5, 200, 128)), TableSpec(*[spec((2, 5, 200, 64), "float32")] * 2, 1, 0)
    with pytest.raises(ValueError, match=r"must have tokens that fit .*, got 200 heads of"):
        launch_plan(problem([x, x], 128, table=table, norm=TOGETHER))


@pytest.mark.parametrize(
    "other",
    [
        {"xs": [spec((2, 5, 4, 128)), spec((2, 5, 8, 128))]},
        {"xs": [spec((2, 5, 4, 128)), spec((2, 5, 4, 128), strides=(5000, 1000, 128, 1))]},
        {"outs": [spec((2, 5, 4, 128)), spec((2, 5, 4, 128), strides=(5000, 1000, 128, 1))]},
        {"xs": [spec((2, 5, 4, 128), "float64")] * 2},
        {"table": TableSpec(*[spec((2, 5, 1, 64), "float32")] * 2, 1, 0)},
        {"norm": Norm("head", 1e-6, 0.0, True)},
        {"norm": TOGETHER._replace(after=True)},
        {"norm": TOGETHER, "q_weight": spec((4 * 128,), "float32")},
    ],
    ids=str,
)
def test_a_thread_takes_heads_of_one_where_q_and_k_are_not_alike(other):
    given = {"xs": [spec((2, 5, 4, 128))] * 2, "table": OF_HEADS} | other
    plan = launch_plan(problem(given.pop("xs"), 128, **given))
    assert not any(isinstance(item, Distance) for item in plan.packer.items)


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "offset", "run", "lanes"),
    [
        (128, 128, 0, 0, 8),
        (128, 64, 64, 8, 8 + 8),
        (192, 64, 128, 8, 8 + 16),
        (90, 24, 13, 1, 12 + 66),
        (80, 24, 4, 4, 6 + 14),
        (20, 8, 8, 4, 2 + 3),  # 12 elements are no multiple of 8
        (36, 12, 8, 4, 3 + 6),  # those behind the slice begin at 20
    ],
)
def test_out_of_place_the_rest_of_the_head_is_copied_by_lanes_of_its_own(
    head_dim, rotary_dim, offset, run, lanes
):
    x = spec((2, 5, 4, head_dim))
    plan = launch_plan(problem([x], rotary_dim, outs=[x], rotary_offset=offset))
    assert plan.template.copy_width == run
    assert fields(plan)["num_lanes"] == lanes
    in_place = launch_plan(problem([x], rotary_dim, rotary_offset=offset))
    assert in_place.template.copy_width == 0
    assert fields(in_place)["num_lanes"] == fields(in_place)["num_pair_lanes"]


# Blocks.


@pytest.mark.parametrize(
    ("dtype", "head_dim", "interleaved", "block"),
    [
        ("bfloat16", 128, False, (8, 16)),
        ("bfloat16", 128, True, (16, 8)),
        ("bfloat16", 64, False, (4, 32)),
        ("float32", 128, False, (16, 8)),
        ("float64", 256, False, (64, 2)),
        ("bfloat16", 1024, False, (64, 2)),
    ],
)
def test_a_block_moves_4_kb(dtype, head_dim, interleaved, block):
    x = spec((2, 37, 4, head_dim), dtype)
    plan = launch_plan(problem([x], head_dim, interleaved=interleaved))
    thread_bytes = BLOCK_BYTES // math.prod(block)
    rows, pairs = plan.template.rows, plan.template.pairs
    assert rows * 2 * pairs * {"bfloat16": 2, "float32": 4, "float64": 8}[dtype] == thread_bytes
    assert plan.block == block


def test_a_block_has_128_threads_where_fewer_would_move_4_kb():
    plan = launch_plan(problem([spec((2, 37, 4, 128))], 128, table=matrices(128)))
    assert (plan.template.rows, plan.block) == (4, (16, 8))


@pytest.mark.parametrize("address", [0, 4])  # 16 and 4 bytes an access, 128 and 256 threads
def test_a_block_is_whole_warps_of_at_most_512_threads(address):
    for num_lanes in range(1, 1100):
        pairs = 4 if address == 0 else 1
        x = spec((1, 5, 4, 2 * pairs * num_lanes), "float32", address=address)
        plan = launch_plan(problem([x], 2 * pairs * num_lanes))
        (block_x, block_y), threads = plan.block, math.prod(plan.block)
        assert fields(plan)["num_lanes"] == num_lanes
        assert block_x <= 256
        assert threads <= 512
        whole_warps = math.lcm(32, block_x)
        assert threads % 32 == 0 or whole_warps > 512
        wanted = 128 if address == 0 else 256
        assert wanted / 2 < threads <= wanted or threads == whole_warps or block_y == 1


# Rows and lanes.


def divide(number, by):
    """Divide as the kernel does, in 64 bits, unsigned."""
    _, multiplier, shift = map(np.uint64, by)
    return (np.uint64(2) * number * multiplier >> np.uint64(32)) >> shift


def sets_of_blocks(plan):
    """As the kernel numbers them: which tensor is a block's, and the set of each of its rows."""
    packed = fields(plan)
    block = np.arange(plan.grid[0], dtype=np.uint64)
    by = [packed[f"period.{part}"] for part in DIVISOR]
    period = divide(block, by)
    block = np.int64(block - period * np.uint64(by[0]))
    blocks = np.array([packed[f"tensors[{i}].blocks"] for i in range(2)])
    which = np.int64(block >= blocks[0])
    group = np.int64(period) * blocks[which] + block - which * blocks[0]
    return which, group[:, None] * plan.block[1] + np.arange(plan.block[1])


def rows_of(plan, i):
    """Each row of tensor i that the launch rotates: elements to its x, its out and its cosines."""
    packed = {name.removeprefix(f"tensors[{i}]."): n for name, n in fields(plan).items()}
    which, sets = sets_of_blocks(plan)
    sets = sets[which == i].ravel()
    rest, at = np.uint64(sets[sets < packed["num_row_groups"]]), {}
    for axis in ("inner", "middle"):
        quotient = divide(rest, [packed[f"{axis}.{part}"] for part in DIVISOR])
        at[axis], rest = rest - quotient * np.uint64(packed[f"{axis}.value"]), quotient
    at["outer"] = rest
    x, out, cos = (
        sum(np.int64(index) * packed[f"{view}.{axis}"] for axis, index in at.items())
        for view in ("x", "out", "cos")
    )
    rows = np.arange(plan.template.rows)[:, None]
    places = (x + rows * packed["x_step"], out + rows * packed["out_step"], cos + 0 * rows)
    return np.stack([place.ravel() for place in places], axis=1)


def rows_wanted(posed, tensor):
    """Each row of a tensor once, alike."""
    sizes = (posed.batch, posed.num_tokens, tensor.num_heads)
    at = np.indices(sizes).reshape(3, -1)
    views = (tensor.x, tensor.out, posed.cos)
    return np.stack([np.array(view.strides[:3]) @ at for view in views], axis=1)


def in_order(rows):
    return rows[np.lexsort(rows.T)]


HEADS = [(32, 8), (24, 24), (7, 3), (33, 1), (1, 1), (0, 4), (4, 0), (1021, 7), (5,), (40,)]


@pytest.mark.parametrize("layout", [BSHD, BHSD, "sbhd"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 677])
def test_the_blocks_cover_every_row_of_q_and_of_k_once(tokens, heads, interleaved, layout):
    sizes = {"b": 2, "s": tokens, "d": 64}
    xs = [spec(tuple((sizes | {"h": h})[axis] for axis in layout)) for h in heads]
    outs = [spec(x.shape, strides=(*(2 * n for n in x.strides[:3]), 1)) for x in xs]
    posed = problem(xs, 64, outs, interleaved=interleaved, layout=layout)
    plan = launch_plan(posed)
    for i, tensor in enumerate(posed.tensors):
        assert np.array_equal(in_order(rows_of(plan, i)), in_order(rows_wanted(posed, tensor)))


@pytest.mark.parametrize("heads", [(32, 8), (6, 2), (0, 4)], ids=str)
def test_the_blocks_cover_every_row_once_where_a_set_has_four(heads):
    xs = [spec((2, 677, h, 64)) for h in heads]
    posed = problem(xs, 64, table=matrices(64))
    plan = launch_plan(posed)
    assert plan.template.rows == (math.gcd(4, *heads))
    for i, tensor in enumerate(posed.tensors):
        assert np.array_equal(in_order(rows_of(plan, i)), in_order(rows_wanted(posed, tensor)))


def test_the_rows_of_a_set_lie_as_far_apart_as_there_are_sets():
    x = spec((2, 37, 8, 64), strides=(37 * 8 * 80, 8 * 80, 80, 1))
    plan = launch_plan(problem([x], 64, outs=[spec((2, 37, 8, 64))], table=matrices(64)))
    packed = fields(plan)
    assert plan.template.rows == 4
    assert packed["tensors[0].inner.value"] == 8 // 4
    assert packed["tensors[0].num_row_groups"] == 2 * 37 * 8 // 4
    assert (packed["tensors[0].x_step"], packed["tensors[0].out_step"]) == (2 * 80, 2 * 64)


@pytest.mark.parametrize("write", ["in place", "new"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "offset"),
    [
        *(
            (2, 2, 0),
            (6, 2, 3),
            (20, 8, 8),
            (72, 72, 0),
            (90, 24, 13),
            (90, 24, 66),
            (192, 64, 128),
        ),
        *((512, 64, 448), (514, 514, 0), (1026, 1026, 0), (2**17, 2**16, 2**10), (2**22, 2**22, 0)),
    ],
)
def test_the_lanes_cover_every_element_of_a_head_once(head_dim, rotary_dim, offset, write):
    x = spec((1, 3, 2, head_dim))
    outs = None if write == "in place" else [x]
    plan = launch_plan(problem([x], rotary_dim, outs, rotary_offset=offset))
    packed, chosen = fields(plan), plan.template
    num_lanes, num_pair_lanes = packed["num_lanes"], packed["num_pair_lanes"]
    assert (plan.grid[1] - 1) * plan.block[0] < num_lanes <= plan.grid[1] * plan.block[0]
    assert plan.grid[1] < 2**16
    num_pairs, pairs, run = packed["num_pairs"], chosen.pairs, chosen.copy_width
    first = (np.arange(num_pair_lanes)[:, None] * pairs + np.arange(pairs)).ravel()
    copied = np.arange(num_lanes - num_pair_lanes) * run - packed["rotary_offset"]
    copied[copied >= 0] += 2 * num_pairs
    copied = (copied[:, None] + np.arange(run)).ravel()
    elements = offset + np.sort(np.concatenate([first, first + num_pairs, copied]))
    wanted = range(head_dim) if outs else range(offset, offset + rotary_dim)
    assert np.array_equal(elements, wanted)


# Periods.


@pytest.mark.parametrize("heads", [(32, 8), (24, 24), (7, 3), (33, 1), (5,)], ids=str)
def test_many_blocks_alternate_between_q_and_k_as_their_heads_do(heads):
    posed = problem([spec((1, 4001, h, 128)) for h in heads], 128)
    plan = launch_plan(posed)
    which, sets = sets_of_blocks(plan)
    period = sum(heads) // math.gcd(*heads)
    of_q = np.arange(len(which)) % period < heads[0] // math.gcd(*heads)
    assert np.array_equal(which == 0, of_q)
    num_sets = np.array([posed.num_rows_of(tensor) for tensor in posed.tensors])
    empty = sets[:, 0] >= num_sets[which]
    assert np.sum(empty) < period <= len(which) / 16
    for i in range(len(heads)):  # both run through the tokens from the first to the last
        assert np.all(np.diff(sets[which == i].ravel()) == 1)


@pytest.mark.parametrize("tokens", [1, 16, 24])
@pytest.mark.parametrize("heads", [(32, 8), (33, 1), (7, 3), (5,)], ids=str)
def test_few_blocks_are_one_period_of_which_none_is_empty(tokens, heads):
    posed = problem([spec((1, tokens, h, 128)) for h in heads], 128)
    plan = launch_plan(posed)
    packed = fields(plan)
    assert packed["period.value"] == plan.grid[0]
    which, sets = sets_of_blocks(plan)
    num_sets = np.array([posed.num_rows_of(tensor) for tensor in posed.tensors])
    assert np.all(sets[:, 0] < num_sets[which])


def test_sets_of_two_rows_take_half_as_many_blocks():
    plan = launch_plan(problem([spec((2, 4000, 32, 128))], 128, interleaved=True))
    assert (plan.template.rows, plan.block) == (2, (16, 8))
    assert plan.grid[0] == 2 * 4000 * 32 // (2 * 8)


def test_many_heads_that_share_no_divisor_are_one_period():
    plan = launch_plan(problem([spec((1, 4096, h, 128)) for h in (1021, 7)], 128))
    packed = fields(plan)
    assert packed["period.value"] == plan.grid[0]
    assert [packed[f"tensors[{i}].blocks"] for i in (0, 1)] == [4096 * h // 16 for h in (1021, 7)]


@pytest.mark.parametrize("head_dim", [2, 72, 128, 4096, 2**13])
@pytest.mark.parametrize("heads", [(1,), (1, 1), (509, 2), (1021, 7), (0, 1)], ids=str)
def test_the_largest_launch_fits_the_grid_and_counts_in_32_bits(heads, head_dim):
    tokens = MAX_ROWS // sum(heads)
    plan = launch_plan(problem([spec((1, tokens, h, head_dim)) for h in heads], head_dim))
    packed = fields(plan)
    assert plan.grid[0] < 2**31
    assert plan.grid[0] % packed["period.value"] == 0
    periods = plan.grid[0] // packed["period.value"]
    for i, h in enumerate(heads):
        groups = periods * packed[f"tensors[{i}].blocks"]
        assert (
            tokens * h == packed[f"tensors[{i}].num_row_groups"] <= groups * plan.block[1] < 2**32
        )


# Tiles of tokens, which all heads pass before the next.


def head_major(tokens=8192, heads=(5, 2), batch=2, gap=0, **options):
    """The problem of tensors in which a head's tokens lie beside each other."""
    xs = []
    for h in heads:
        strides = ((h * tokens + gap) * 64, tokens * 64, 64, 1)
        xs.append(spec((batch, h, tokens, 64), strides=strides))
    part = spec((tokens, 32), "float32")
    options = {"table": TableSpec(part, part, 1, 0), "layout": "bhsd"} | options
    return problem(xs, 64, **options)


@pytest.fixture
def small_l2(monkeypatch):
    """Tables of more than 1 MiB count as large, of which half are 2048 tokens with 64 elements."""
    monkeypatch.setattr("rope_cupy.row_order.L2_BYTES", 2**20)
    monkeypatch.setattr("rope_cupy.row_order.TILE_BYTES", 2**19)
    launch_plan.cache_clear()
    yield
    launch_plan.cache_clear()


@pytest.mark.parametrize(
    ("tokens", "tile"), [(8192, 2048), (75_600, 1890), (6000, 2000), (118_800, 1980)]
)
def test_heads_that_would_each_read_a_large_table_pass_a_tile_of_it(tokens, tile, small_l2):
    packed = fields(launch_plan(head_major(tokens, batch=1)))
    assert packed["tensors[0].inner.value"] == tile
    assert [packed[f"tensors[0].x.{axis}"] for axis in ("outer", "middle", "inner")] == [
        tile * 64,
        tokens * 64,
        64,
    ]


@pytest.mark.parametrize("positions", [None, (8192,), (1, 8192)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [(5, 2), (32, 8), (3,), (1, 1)])
def test_tiles_cover_every_row_of_q_and_of_k_once(heads, batch, positions, small_l2):
    rows = spec(positions, "int64") if positions else None
    posed = head_major(heads=heads, batch=batch, positions=rows)
    plan = launch_plan(posed)
    if heads[0] > 1:
        assert fields(plan)["tensors[0].inner.value"] == 2048
        assert fields(plan)["position.outer"] == (2048 if positions else 0)
    for i, tensor in enumerate(posed.tensors):
        assert np.array_equal(in_order(rows_of(plan, i)), in_order(rows_wanted(posed, tensor)))


NOT_TILED = {
    "heads innermost": lambda: problem([spec((1, 8192, 5, 64))], 64, table=LARGE),
    "a batch that does not follow on": lambda: head_major(gap=8),
    "a table of heads": lambda: head_major(table=of_each(2, 8192, 5), heads=(5, 5)),
    "a table of batches": lambda: head_major(table=of_each(2, 8192)),
    "positions of batches": lambda: head_major(positions=spec((2, 8192), "int64")),
    "a prime number of tokens": lambda: head_major(tokens=8191),
    "a small table": lambda: head_major(tokens=2048),
    "frequencies": lambda: head_major(table=frequencies(64)),
}
LARGE = TableSpec(spec((8192, 32), "float32"), spec((8192, 32), "float32"), 1, 0)


def of_each(*sizes):
    part = spec((*sizes, 32), "float32")
    return TableSpec(part, part, 1, 0)


@pytest.mark.parametrize("case", NOT_TILED)
def test_there_are_no_tiles_of(case, small_l2):
    posed = NOT_TILED[case]()
    inner = fields(launch_plan(posed))["tensors[0].inner.value"]
    assert inner in (posed.num_tokens, posed.tensors[0].num_heads // 2, posed.tensors[0].num_heads)


@pytest.mark.parametrize(("stride", "tile"), [(2**20 - 1, 2048), (2**20, 1024), (2**23, 8192)])
def test_offsets_of_a_tile_fit_32_bits(stride, tile, small_l2):
    far = [spec((1, 5, 8192, 64), strides=(0, stride * 8192, stride, 1))]
    part = spec((8192, 32), "float32")
    posed = problem(far, 64, table=TableSpec(part, part, 1, 0), layout="bhsd")
    assert fields(launch_plan(posed))["tensors[0].inner.value"] == tile


def test_a_tile_of_a_video_is_4_mib_of_its_table_at_most():
    x, part = spec((1, 40, 75_600, 128)), spec((75_600, 64), "float32")
    posed = problem([x, x], 128, table=TableSpec(part, part, 1, 0), layout="bhsd")
    assert fields(launch_plan(posed))["tensors[0].inner.value"] == 7560


@pytest.mark.parametrize(
    "value", [1, 2, 3, 5, 7, 24, 40, 641, 2**16 + 1, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1]
)
def test_the_divisor_divides_every_number_below_2_to_the_31(value):
    rng = np.random.default_rng(value)
    numbers = rng.integers(0, 2**31, 20_000)
    near = (numbers[:5000] // value) * value  # where the quotient changes
    numbers = np.concatenate([numbers, near, near - 1, [0, 1, value - 1, value, 2**31 - 1]])
    numbers = numbers[(numbers >= 0) & (numbers < 2**31)].astype(np.uint64)
    by = divisor(value)
    assert by[0] == value
    assert 2**31 <= by[1] < 2**32
    assert 0 <= by[2] < 32
    assert 2 * (2**31 - 1) * by[1] < 2**64
    assert np.array_equal(divide(numbers, by), numbers // np.uint64(value))


# What is packed.


@pytest.mark.parametrize(
    ("layout", "inner"), [("bshd", 4), ("bhsd", 37), ("sbhd", 4), ("hbsd", 37)]
)
def test_rows_are_numbered_as_they_lie_in_memory(layout, inner):
    sizes = {"b": 2, "s": 37, "h": 4, "d": 64}
    shape = tuple(sizes[axis] for axis in layout)
    packed = fields(launch_plan(problem([spec(shape)], 64, layout=layout)))
    strides = [packed[f"tensors[0].x.{axis}"] for axis in ("outer", "middle", "inner")]
    assert strides == sorted(strides, reverse=True)
    assert packed["tensors[0].inner.value"] == inner


def test_rows_that_run_backward_are_numbered_as_they_lie_too():
    packed = fields(launch_plan(problem([spec((2, 5, 4, 128), strides=(2560, -512, 128, 1))], 128)))
    strides = [packed[f"tensors[0].x.{axis}"] for axis in ("outer", "middle", "inner")]
    assert strides == [2560, -512, 128]


def view(outer, middle, inner, element, width):
    return dict(zip(VIEW, (outer, middle, inner, element, width), strict=True))


def by(value):
    return dict(zip(DIVISOR, divisor(value), strict=True))


def flat(nested):
    """Names and integers, a view's or a divisor's by its name and a dot."""
    return {
        f"{name}.{part}" if part else name: number
        for name, value in nested.items()
        for part, number in (value if isinstance(value, dict) else {"": value}).items()
    }


POSITION_ARGUMENTS = "axis", "section_ends[0]", "section_ends[1]", "num_sequences", "cu_stride"
NO_POSITIONS = {f"position_arguments.{name}": 0 for name in POSITION_ARGUMENTS}


def test_every_integer_of_a_launch_by_a_table_of_heads():
    q = spec((2, 5, 3, 90), strides=(5000, 700, 200, 2))
    k = spec((2, 5, 3, 90), strides=(1350, 90, 450, 1))
    outs = [spec((2, 5, 3, 90), address=4), spec((2, 5, 3, 90), address=2)]
    cos = spec((2, 5, 3, 12), "float32", strides=(800, 160, 40, 1))
    sin = spec((2, 5, 3, 12), "float32", strides=(900, 150, 50, 3))
    posed = problem(
        [q, k], 24, outs, table=TableSpec(cos, sin, 1, 0), rotary_offset=6, out_of_range="keep"
    )
    plan = launch_plan(posed)
    blocks = 6  # of 5 rows of 45 lanes
    tensor = {"inner": by(3), "middle": by(5), "num_row_groups": 2 * 5 * 3, "blocks": blocks}
    tensors = [
        {"x": view(5000, 700, 200, 2, 1), "out": view(1350, 270, 90, 1, 2), "x_step": 600},
        {"x": view(1350, 90, 450, 1, 2), "out": view(1350, 270, 90, 1, 1), "x_step": 1350},
    ]
    expected = {
        **{"token": view(0, 1, 0, 0, 0)} | NO_POSITIONS,
        **{
            f"tensors[{i}].{name}": value
            for i in (0, 1)
            for name, value in (tensors[i] | tensor | {"out_step": 270}).items()
        },
        **{"period": by(2 * blocks)},
        **{"cos": view(800, 160, 40, 1, 4), "sin": view(900, 150, 50, 3, 1)},
        **{"position": view(0, 0, 0, 0, 0), "num_positions": 1},
        **{"cos_row": 0, "sin_row": 0, "keep_out_of_range": 1, "rotary_offset": 6},
        **{"num_pairs": 12, "num_pair_lanes": 12, "num_lanes": 12 + 66 // 2},
        **{"head_axis": 2, "table_heads[0]": by(1), "table_heads[1]": by(1)},
    }
    assert fields(plan) == flat(expected)
    assert (plan.grid, plan.block) == ((2 * blocks, 1), (45, 5))
    assert plan.template.common is False


def test_heads_share_those_of_a_table_that_has_fewer():
    table = TableSpec(*[spec((2, 5, 2, 64), "float32")] * 2, 1, 0)
    for order, axis in (("bshd", 2), ("bhsd", 1)):
        q, k = (spec((2, 5, h, 128) if order == "bshd" else (2, h, 5, 128)) for h in (8, 2))
        packed = fields(launch_plan(problem([q, k], 128, table=table, layout=order)))
        assert (packed["head_axis"], packed["cos.inner" if axis == 2 else "cos.middle"]) == (
            axis,
            64,
        )
        assert [packed[f"table_heads[{i}].value"] for i in (0, 1)] == [4, 1]


def test_every_integer_of_a_launch_by_positions():
    x = spec((2, 3, 5, 128))  # batch, heads, tokens
    cos = spec((40, 64), "float32", strides=(200, 2))
    sin = spec((40, 64), "float32", strides=(300, 2))
    positions = spec((2, 5), "int64", strides=(11, 2))
    posed = problem([x], 128, table=TableSpec(cos, sin, 2, 0), positions=positions, layout="bhsd")
    plan = launch_plan(posed)
    tensor = {
        **{"x": view(1920, 640, 128, 1, 8), "out": view(1920, 640, 128, 1, 8)},
        **{"inner": by(5), "middle": by(3), "x_step": 1920, "out_step": 1920},
        **{"num_row_groups": 30, "blocks": 2},
    }
    expected = {
        **{"token": view(0, 0, 1, 0, 0)} | NO_POSITIONS,
        # No block asks for the second of one tensor.
        **{f"tensors[{i}].{name}": value for i in (0, 1) for name, value in tensor.items()},
        **{"period": by(2), "cos": view(0, 0, 0, 1, 4), "sin": view(0, 0, 0, 1, 4)},
        **{"position": view(11, 0, 2, 0, 0), "num_positions": 40},
        **{"cos_row": 200, "sin_row": 300, "keep_out_of_range": 0, "rotary_offset": 0},
        **{"num_pairs": 64, "num_pair_lanes": 8, "num_lanes": 8},
        **{"head_axis": 1, "table_heads[0]": by(1), "table_heads[1]": by(1)},
    }
    assert fields(plan) == flat(expected)
    assert (plan.grid, plan.block) == ((2, 1), (8, 16))
    chosen = plan.template
    assert (chosen.position, chosen.common) == ("long long", False)  # rows of sin lie elsewhere


def test_the_integers_of_positions_on_three_axes():
    x, positions = spec((2, 5, 3, 128)), spec((3, 2, 5), "int32", strides=(40, 7, 1))
    options = {"positions": positions, "mrope_section": (24, 20, 20)}
    plan = launch_plan(problem([x], 128, **options))
    packed, chosen = fields(plan), plan.template
    assert (chosen.position, chosen.pairs) == ("SectionedMrope<int>", 4)
    assert [packed[f"position_arguments.{name}"] for name in POSITION_ARGUMENTS] == [
        40,
        24,
        44,
        0,
        0,
    ]
    assert (packed["position.outer"], packed["position.middle"]) == (7, 1)

    plan = launch_plan(problem([x], 128, **options, mrope_interleaved=True))
    packed, chosen = fields(plan), plan.template
    assert chosen.position == "InterleavedMrope<int>"
    assert [packed[f"position_arguments.{name}"] for name in POSITION_ARGUMENTS] == [
        40,
        60,
        60,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("section", "pairs"), [((16, 24, 24), 8), ((20, 22, 22), 2), ((63, 1, 0), 1)]
)
def test_the_pairs_of_a_thread_are_of_one_section(section, pairs):
    x, positions = spec((1, 5, 3, 128)), spec((3, 5), "int64")
    assert template_of([x], 128, positions=positions, mrope_section=section).pairs == (pairs)
    mixed = {"mrope_section": (24, 20, 20), "mrope_interleaved": True}
    assert template_of([x], 128, positions=positions, **mixed).pairs == 4


def test_the_integers_of_packed_sequences():
    x = spec((9, 3, 128))
    cu_seqlens, offsets = spec((5,), "int32", strides=(3,)), spec((4,), "int64", strides=(-2,))
    plan = launch_plan(problem([x], 128, seqlen_offsets=offsets, cu_seqlens=cu_seqlens))
    packed = fields(plan)
    assert plan.template.position == "Packed<long long, int>"
    assert [packed[f"position_arguments.{name}"] for name in POSITION_ARGUMENTS] == [-2, 0, 0, 4, 3]
    assert (packed["token.outer"], packed["token.middle"], packed["token.inner"]) == (0, 1, 0)
    assert packed["position.middle"] == 0


def test_the_integers_of_an_offset_for_every_batch():
    plan = launch_plan(problem([spec((4, 9, 3, 128))], 128, seqlen_offsets=spec((4,), "int32")))
    packed = fields(plan)
    assert plan.template.position == "Offset<int>"
    assert [packed[f"position.{axis}"] for axis in ("outer", "middle", "inner")] == [1, 0, 0]
    assert [packed[f"token.{axis}"] for axis in ("outer", "middle", "inner")] == [0, 1, 0]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_pairs", [64, 63])  # of an odd number the scale is off 16 bytes
def test_the_integers_of_frequencies(interleaved, num_pairs):
    x = spec((2, 5, 8, 128))
    options = {"table": frequencies(2 * num_pairs), "interleaved": interleaved}
    plan = launch_plan(problem([x], 2 * num_pairs, **options))
    packed, chosen = fields(plan), plan.template
    assert (chosen.table, chosen.position) == ("frequency", "TokenIndex")
    if num_pairs == 64:
        assert (chosen.rows, chosen.pairs, chosen.common) == (4, 4, True)
    assert [packed[f"cos.{part}"] for part in VIEW] == [0, 0, 0, 1, 2]
    assert (packed["num_positions"], packed["cos_row"]) == (2**63 - 1, 0)
    assert [packed[f"token.{axis}"] for axis in ("outer", "middle", "inner")] == [0, 1, 0]
    assert packed["position.middle"] == 0
    positions = {"positions": spec((5,), "int64")}
    chosen = template_of([x], 2 * num_pairs, **options | positions)
    assert (chosen.table, chosen.position) == ("frequency", "long long")


def test_the_pointers_lead_to_the_slice_in_bytes():
    q, k = spec((1, 5, 4, 90), strides=(4000, 800, 200, 2)), spec((1, 5, 2, 90))
    outs = [spec((1, 5, 4, 90)), spec((1, 5, 2, 90), strides=(4000, 800, 400, 3))]
    plan = launch_plan(problem([q, k], 24, outs, rotary_offset=6))
    assert patched(plan, Pointers((1000, 2000), (3000, 4000), 5000, 6000, 7000)) == {
        **{"x0": 1000 + 6 * 2 * 2, "x1": 2000 + 6 * 2, "out0": 3000 + 6 * 2},
        **{"out1": 4000 + 6 * 3 * 2, "cos": 5000, "sin": 6000, "positions": 7000},
        **{"cu_seqlens": 0, "position_offset": 0},
    }
    pointers = Pointers((1000, 2000), (3000, 4000), 5000, 6000, 7000, 8000, position_offset=-9)
    found = patched(plan, pointers)
    assert (found["cu_seqlens"], found["position_offset"]) == (8000, -9)


def test_a_launch_of_one_tensor_repeats_its_pointers():
    plan = launch_plan(problem([spec((1, 5, 4, 128), "float32")], 64, rotary_offset=64))
    found = patched(plan, Pointers((1000,), (2000,), 5000, 6000, 0))
    assert [found[name] for name in ("x0", "x1", "out0", "out1")] == [1256, 1256, 2256, 2256]


def test_weights_slots_and_scales_are_patched_where_there_are_any():
    q, kv = spec((5, 4, 128), "float32"), spec((5, 2, 128), "float32")
    caches = [spec((9, 2, 128), "float8_e5m2")] * 2
    arrays = {"slot_mapping": spec((5,), "int64"), "q_weight": spec((128,), strides=(3,))}
    norm, cache = Norm("head", 1e-6, 1.0, True), Cache("NHD", None, 0.5, 2.0)
    options = arrays | {"norm": norm, "cache": cache, "rotary_offset": 64}
    plan = launch_plan(problem([q, kv, kv], 64, [q, *caches], **options))
    pointers = Pointers((1000,) * 3, (2000,) * 3, 1, 2, q_weight=3000, slots=4000, v_scale=5000)
    found = patched(plan, pointers)
    assert found == {
        **{"x0": 1256, "x1": 1256, "x2": 1256, "out0": 2256, "out1": 2064, "out2": 2064},
        **{"cos": 1, "sin": 2, "positions": 0, "cu_seqlens": 0, "position_offset": 0},
        **{"q_weight": 3000 + 64 * 3 * 2, "k_weight": 0, "slots": 4000, "k_scale": 0},
        **{"v_scale": 5000},
    }
    packed = fields(plan)
    real = ("inverse_count[0]", "eps", "weight_offset", "scale[0]", "scale[1]")
    assert [packed[name] for name in real] == [1 / 128, np.float32(1e-6), 1.0, 0.5, 2.0]
    assert (packed["layout[0].element"], packed["num_slots"]) == (3, 9)


def test_a_block_is_packed_into_any_buffer_and_nothing_else_is_touched():
    plan = launch_plan(problem([spec((1, 5, 4, 128))], 128))
    packer, buffer = plan.packer, bytearray(b"\xa5" * 1024)
    values = itertools.count(1)
    items = [item if isinstance(item, bytes) else next(values) for item in packer.items]
    packer.pack_into(buffer, 8, *items)
    block = plan.argument_block(Pointers((1, 2), (3, 4), 5, 6, 7, 8, position_offset=9))
    assert names_of(packer)[-1] == "position_offset"
    assert buffer == b"\xa5" * 8 + block + b"\xa5" * (1024 - 8 - packer.size)


def test_one_plan_serves_every_address_of_the_same_alignment():
    plans = [
        launch_plan(problem([spec((1, 5, 4, 128), address=a)], 128)) for a in (4096, 8192 + 16)
    ]
    assert plans[0] is plans[1]


# What may be taken for granted, and what passes L1 by.


@pytest.mark.parametrize(
    "change", ["out strides", "sin strides", "table of heads", "table element", "table address"]
)
def test_what_the_common_path_takes_for_granted_holds_there(change):
    x, part = spec((2, 5, 4, 128)), spec((5, 64), "float32")
    outs, table = [x], TableSpec(part, part, 1, 0)
    assert template_of([x], 128, outs, table=table).common is True
    if change == "out strides":
        outs = [spec((2, 5, 4, 128), strides=(128 * 40, 128 * 8, 128, 1))]
    elif change == "sin strides":
        table = TableSpec(part, spec((5, 64), "float32", strides=(128, 1)), 1, 0)
    elif change == "table of heads":
        part = spec((2, 5, 4, 64), "float32")
        table = TableSpec(part, part, 1, 0)
    elif change == "table element":
        part = spec((5, 64), "float32", strides=(128, 2))
        table = TableSpec(part, part, 1, 0)
    else:
        table = TableSpec(part, spec((5, 64), "float32", address=8), 1, 0)
    assert template_of([x], 128, outs, table=table).common is False


@pytest.mark.parametrize(
    ("xs", "outs", "interleaved"),
    [
        ([0], [8], False),  # addresses: a narrower output,
        ([0, 8], None, True),  # a narrower k, whose runs are twice as long as its halves,
        ([8], [8], False),  # lanes that copy more than those that rotate
    ],
)
def test_every_access_is_whole_on_the_common_path(xs, outs, interleaved):
    def common(xs, outs):
        xs, outs = ([spec((2, 5, 4, 128), address=a) for a in y] if y else None for y in (xs, outs))
        return template_of(xs, 64, outs, interleaved=interleaved).common

    assert common([0] * len(xs), outs and [0] * len(outs)) is True
    assert common(xs, outs) is False


@pytest.mark.parametrize(("step", "stride", "address"), [(1, 2, 0), (4, 4, 4)])
def test_angles_of_single_pairs_are_beside_each_other_and_whole_on_the_common_path(
    step, stride, address
):
    def common(stride, address):
        part = spec((5, 64), "float32", strides=(64 * stride, stride), address=address)
        table = TableSpec(part, part, step, step // 2)
        return template_of([spec((2, 5, 4, 128), address=2)], 128, table=table).common

    assert common(step, 0) is True
    assert common(stride, address) is False


def test_2_31_positions_leave_the_common_path():
    for size, common in ((2**31 - 1, True), (2**31, False)):
        part = spec((size, 64), "float32")
        options = {"table": TableSpec(part, part, 1, 0), "positions": spec((5,), "int64")}
        assert template_of([spec((2, 5, 4, 128))], 128, **options).common == common


@pytest.mark.parametrize("what", ["x", "k", "backward", "table", "row of a table", "positions"])
def test_strides_beyond_32_bits_leave_the_common_path(what):
    def common(stride):
        x, part, positions = spec((2, 5, 4, 128)), spec((5, 64), "float32"), None
        xs = [x]
        if what in ("x", "k", "backward"):
            stride = -stride if what == "backward" else stride
            far = spec((2, 5, 4, 128), strides=(stride, 512, 128, 1))
            xs = [x, far] if what == "k" else [far]
        elif what == "positions":
            positions = spec((2, 5), "int32", strides=(stride, 1))
        else:
            part = spec((5, 64), "float32", strides=(stride, 1))
            positions = spec((5,), "int32") if what == "row of a table" else None
        table = TableSpec(part, part, 1, 0)
        return template_of(xs, 128, table=table, positions=positions).common

    assert common(2**31 - 128) is True
    assert common(2**31) is False


@pytest.mark.parametrize(
    ("layout", "write", "by_positions", "address", "past_l1"),
    [
        (BSHD, "in place", False, 0, False),
        (BSHD, "in place", True, 0, True),
        (BSHD, "new", False, 0, False),
        (BSHD, "new", True, 0, False),
        (BHSD, "in place", True, 0, False),  # heads are not innermost
        (BSHD, "in place", True, 2, True),  # narrow, and whole even so
    ],
)
def test_in_place_and_with_positions_the_tensors_pass_l1_by(
    layout, write, by_positions, address, past_l1
):
    x = spec((2, 5, 7, 128), address=address)
    positions = spec((x.shape[1 if layout == BSHD else 2],), "int32") if by_positions else None
    outs = None if write == "in place" else [x]
    chosen = template_of([x], 128, outs, positions=positions, layout=layout)
    assert (chosen.common, chosen.past_l1) == (True, past_l1)
    assert chosen.in_place == (write == "in place")


def test_nothing_passes_l1_by_off_the_common_path():
    part, positions = spec((4096, 64), "float32", address=4), spec((5,), "int32")
    table = TableSpec(part, part, 1, 0)
    chosen = template_of([spec((2, 5, 4, 128))], 128, table=table, positions=positions)
    assert (chosen.common, chosen.past_l1) == (False, False)
