"""The launch plan: how wide threads read and write, how rows are numbered, what is packed."""

import math
import struct

import numpy as np
import pytest

from rope_cupy.memory import array_spec
from rope_cupy.plan import BLOCK_THREADS, divisor, launch_plan
from rope_cupy.problem import MAX_ROWS, Options, TableSpec, rotary_options, rotary_problem

# The integers of the argument block, in the order of kernels/rotary.cu (test_kernels.py compares).
VIEW = ("origin", "outer", "middle", "inner", "element", "width")
DIVISOR = ("value", "multiplier", "shift")
XY = ("x", "out")
FIELDS = [
    *(f"tensors[{i}].{array}.{part}" for i in range(2) for array in ("x", "out") for part in VIEW),
    *(f"{table}.{part}" for table in ("cos", "sin") for part in VIEW),
    *("cos_of_k", "sin_of_k"),
    *(f"position.{part}" for part in VIEW),
    *("position_bytes", "num_positions", "cos_row", "sin_row", "keep", "num_rows"),
    *(f"{axis}.{part}" for axis in ("inner", "middle") for part in DIVISOR),
    *("head_axis", "num_q_heads", "rotary_offset", "num_pairs", "num_pair_lanes", "num_lanes"),
]


def spec(shape, dtype="bfloat16", strides=None, address=0):
    """The spec of an array at an address; dense unless strides are given."""
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return array_spec(shape, strides or dense, dtype, "cuda:0", address, True)


def problem(xs, rotary_dim, outs=None, positions=None, table=None, **options):
    """The problem of rotating xs, in place unless outs are given, by a dense float32 table."""
    chosen = {
        "interleaved": False,
        "layout": None,
        "head_dim": None,
        "rotary_offset": 0,
        "conjugate": False,
        "out_of_range": "nan",
    } | options
    part = spec((4096, rotary_dim // 2), "float32")
    return rotary_problem(
        ("q", "k")[: len(xs)],
        tuple(xs),
        tuple(outs or xs),
        outs is None,
        table or TableSpec(part, part, 1, 0),
        positions,
        rotary_options(*Options(**chosen)),
    )


def template_arguments(plan):
    name, _, rest = plan.kernel.partition("<")
    assert name == "rotary_kernel"
    return rest.removesuffix(">").split(", ")


def fields(plan):
    """The integers of a plan's argument block by name."""
    assert len(plan.arguments) == 8 * len(FIELDS)
    return dict(zip(FIELDS, struct.unpack(f"<{len(FIELDS)}q", plan.arguments), strict=True))


@pytest.mark.parametrize(
    ("dtype", "interleaved", "head_dim", "rotary_dim", "kernel"),
    [
        ("bfloat16", True, 128, 128, "bfloat16, float, true, false, 8, 1, 0, 0, true"),
        ("bfloat16", False, 128, 128, "bfloat16, float, false, false, 8, 1, 0, 0, true"),
        ("float16", False, 72, 72, "float16, float, false, false, 4, 1, 0, 0, true"),
        ("float32", True, 80, 80, "float, float, true, false, 4, 1, 0, 0, true"),
        ("float64", True, 64, 64, "double, float, true, false, 2, 1, 0, 0, true"),
        ("float32", False, 6, 6, "float, float, false, false, 1, 1, 0, 0, true"),
        ("bfloat16", False, 90, 24, "bfloat16, float, false, false, 2, 1, 0, 0, true"),
        ("bfloat16", True, 90, 24, "bfloat16, float, true, false, 1, 1, 0, 0, true"),
    ],
)
def test_dense_tensors_get_the_widest_accesses_that_their_rows_allow(
    dtype, interleaved, head_dim, rotary_dim, kernel
):
    posed = problem([spec((1, 5, 4, head_dim), dtype)], rotary_dim, interleaved=interleaved)
    assert launch_plan(posed).kernel == f"rotary_kernel<{kernel}>"


@pytest.mark.parametrize(("address", "width"), [(0, 8), (8, 4), (4, 2), (2, 1), (256, 8), (6, 1)])
def test_an_access_is_as_wide_as_the_address_allows(address, width):
    plan = launch_plan(problem([spec((1, 5, 4, 128), address=address)], 128))
    assert fields(plan)["tensors[0].x.width"] == width
    assert template_arguments(plan)[4] == str(width)  # pairs of a thread


def test_the_width_is_chosen_for_each_tensor():
    q, k = spec((1, 5, 4, 128)), spec((1, 5, 2, 128), address=2)
    plan = launch_plan(problem([q, k], 128))
    packed = fields(plan)
    assert (packed["tensors[0].x.width"], packed["tensors[0].out.width"]) == (8, 8)
    assert (packed["tensors[1].x.width"], packed["tensors[1].out.width"]) == (1, 1)
    assert template_arguments(plan)[-1] == "false"


def test_elements_that_do_not_touch_move_one_by_one():
    x = spec((1, 5, 4, 128), strides=(5120, 1024, 256, 2))
    plan = launch_plan(problem([x], 128))
    assert fields(plan)["tensors[0].x.width"] == 1
    assert template_arguments(plan)[4:] == ["1", "1", "0", "0", "false"]


def test_a_table_off_its_alignment_does_not_narrow_the_tensors():
    part = spec((4096, 64), "float32", address=4)
    plan = launch_plan(problem([spec((1, 5, 4, 128))], 128, table=TableSpec(part, part, 1, 0)))
    assert (fields(plan)["tensors[0].x.width"], fields(plan)["cos.width"]) == (8, 1)
    assert template_arguments(plan)[4] == "8"


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "offset", "run", "lanes"),
    [(128, 128, 0, 0, 8), (128, 64, 64, 8, 12), (192, 64, 128, 8, 20), (90, 24, 13, 1, 12 + 66)],
)
def test_out_of_place_the_rest_of_the_head_is_copied_by_lanes_of_its_own(
    head_dim, rotary_dim, offset, run, lanes
):
    x = spec((2, 5, 4, head_dim))
    plan = launch_plan(problem([x], rotary_dim, outs=[x], rotary_offset=offset))
    assert template_arguments(plan)[7] == str(run)
    assert fields(plan)["num_lanes"] == lanes
    in_place = launch_plan(problem([x], rotary_dim, rotary_offset=offset))
    assert template_arguments(in_place)[7] == "0"


@pytest.mark.parametrize("head_dim", [2, 6, 64, 72, 90, 128, 320, 512, 1026, 4096])
@pytest.mark.parametrize("heads", [(1, 1), (32, 8), (7, 3)])
def test_the_grid_covers_every_row_and_lane_once(head_dim, heads):
    plan = launch_plan(problem([spec((2, 37, h, head_dim)) for h in heads], head_dim))
    (grid_x, grid_y), (block_x, block_y), lanes = plan.grid, plan.block, fields(plan)["num_lanes"]
    rows = 2 * 37 * sum(heads)
    assert block_x * block_y <= BLOCK_THREADS
    assert (grid_x - 1) * block_y < rows <= grid_x * block_y
    assert (grid_y - 1) * block_x < lanes <= grid_y * block_x


def test_the_last_block_of_the_largest_launch_counts_its_rows_in_32_bits():
    for head_dim in (2, 128, 2048):
        plan = launch_plan(problem([spec((1, MAX_ROWS, 1, head_dim))], head_dim))
        assert MAX_ROWS <= plan.grid[0] * plan.block[1] < 2**31


@pytest.mark.parametrize(("layout", "inner"), [("bshd", 4), ("bhsd", 37), ("sbhd", 4), ("hsd", 37)])
def test_rows_are_numbered_as_they_lie_in_memory(layout, inner):
    sizes = {"b": 2, "s": 37, "h": 4, "d": 64}
    shape = tuple(sizes[axis] for axis in layout)
    packed = fields(launch_plan(problem([spec(shape)], 64, layout=layout)))
    strides = [packed[f"tensors[0].x.{axis}"] for axis in ("outer", "middle", "inner")]
    assert sorted(strides, reverse=True)[: len(layout) - 1] == strides[: len(layout) - 1]
    assert packed["inner.value"] == (inner if "b" in layout else 1)


def view(origin, outer, middle, inner, element, width):
    return dict(zip(VIEW, (origin, outer, middle, inner, element, width), strict=True))


def flat(**nested):
    """Names and integers, a view's by its name and a dot."""
    return {
        f"{name}.{part}" if part else name: number
        for name, value in nested.items()
        for part, number in (value if isinstance(value, dict) else {"": value}).items()
    }


def test_every_integer_of_a_launch_by_a_table_of_heads():
    q = spec((2, 5, 3, 90), strides=(5000, 700, 200, 2))
    k = spec((2, 3, 5, 90), "bfloat16")  # to be seen as (2, 5, 3, 90)
    k = k._replace(shape=(2, 5, 3, 90), strides=(1350, 90, 450, 1))
    outs = [spec((2, 5, 3, 90), address=4), spec((2, 5, 3, 90), address=2)]
    cos = spec((2, 5, 3, 12), "float32", strides=(800, 160, 40, 1))
    sin = spec((2, 5, 3, 12), "float32", strides=(900, 150, 50, 3))
    posed = problem(
        [q, k], 24, outs, table=TableSpec(cos, sin, 1, 0), rotary_offset=6, out_of_range="keep"
    )
    packed = fields(launch_plan(posed))
    expected = flat(
        **{
            "tensors[0].x": view(12, 5000, 700, 200, 2, 1),
            "tensors[0].out": view(6, 1350, 270, 90, 1, 2),
            "tensors[1].x": view(6 - 3 * 450, 1350, 90, 450, 1, 2),
            "tensors[1].out": view(6 - 3 * 90, 1350, 270, 90, 1, 1),
            "cos": view(0, 800, 160, 40, 1, 4),
            "sin": view(0, 900, 150, 50, 3, 1),
            "cos_of_k": -3 * 40,
            "sin_of_k": -3 * 50,
            "position": view(0, 0, 0, 0, 0, 0),
            "inner": dict(zip(DIVISOR, divisor(6), strict=True)),
            "middle": dict(zip(DIVISOR, divisor(5), strict=True)),
        },
        **{"position_bytes": 0, "num_positions": 1, "cos_row": 0, "sin_row": 0, "keep": 1},
        **{"num_rows": 2 * 5 * 6, "head_axis": 2, "num_q_heads": 3, "rotary_offset": 6},
        **{"num_pairs": 12, "num_pair_lanes": 12 // 2, "num_lanes": 12 // 2 + 66 // 2},
    )
    assert packed == expected


def test_every_integer_of_a_launch_by_positions():
    x = spec((2, 3, 5, 128))  # batch, heads, tokens
    cos = spec((40, 64), "float32", strides=(200, 2))
    sin = spec((40, 64), "float32", strides=(300, 2))
    positions = spec((2, 5), "int64", strides=(11, 2))
    posed = problem([x], 128, table=TableSpec(cos, sin, 2, 0), positions=positions, layout="bhsd")
    inner, middle = divisor(5), divisor(3)
    assert fields(launch_plan(posed)) == flat(
        **{
            f"tensors[{i}].{y}": view(-3 * 640 * i, 1920, 640, 128, 1, 8)
            for i in (0, 1)
            for y in XY
        },
        cos=view(0, 0, 0, 0, 1, 4),
        sin=view(0, 0, 0, 0, 1, 4),
        position=view(0, 11, 0, 2, 0, 0),
        inner=dict(zip(DIVISOR, inner, strict=True)),
        middle=dict(zip(DIVISOR, middle, strict=True)),
        **{"cos_of_k": 0, "sin_of_k": 0, "position_bytes": 8, "num_positions": 40, "cos_row": 200},
        **{"sin_row": 300, "keep": 0, "num_rows": 30, "head_axis": 1, "num_q_heads": 3},
        **{"rotary_offset": 0, "num_pairs": 64, "num_pair_lanes": 8, "num_lanes": 8},
    )
    assert template_arguments(launch_plan(posed))[-1] == "false"  # the rows of sin lie elsewhere


@pytest.mark.parametrize(
    "change", ["out strides", "sin strides", "table of heads", "table element"]
)
def test_what_the_common_path_takes_for_granted_holds_there(change):
    x, part = spec((2, 5, 4, 128)), spec((5, 64), "float32")
    outs, table = [x], TableSpec(part, part, 1, 0)
    assert template_arguments(launch_plan(problem([x], 128, outs, table=table)))[-1] == "true"
    if change == "out strides":
        outs = [spec((2, 5, 4, 128), strides=(128 * 40, 128 * 8, 128, 1))]
    elif change == "sin strides":
        table = TableSpec(part, spec((5, 64), "float32", strides=(128, 1)), 1, 0)
    elif change == "table of heads":
        part = spec((2, 5, 4, 64), "float32")
        table = TableSpec(part, part, 1, 0)
    else:
        part = spec((5, 64), "float32", strides=(128, 2))
        table = TableSpec(part, part, 1, 0)
    assert template_arguments(launch_plan(problem([x], 128, outs, table=table)))[-1] == "false"


def test_strides_beyond_32_bits_leave_the_common_path():
    x = spec((2, 5, 4, 128), strides=(2**31, 512, 128, 1))
    assert template_arguments(launch_plan(problem([x], 128)))[-1] == "false"
    x = spec((2, 5, 4, 128), strides=(2**31 - 128, 512, 128, 1))
    assert template_arguments(launch_plan(problem([x], 128)))[-1] == "true"


def test_one_plan_serves_every_address_of_the_same_alignment():
    plans = [
        launch_plan(problem([spec((1, 5, 4, 128), address=a)], 128)) for a in (4096, 8192 + 16)
    ]
    assert plans[0] is plans[1]


def test_a_launch_of_one_tensor_asks_for_no_second():
    packed = fields(launch_plan(problem([spec((1, 5, 4, 128))], 128)))
    assert packed["num_q_heads"] == 4  # every head is the first tensor's


@pytest.mark.parametrize(
    "value", [1, 2, 3, 5, 7, 24, 40, 641, 2**16 + 1, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1]
)
def test_the_divisor_divides_every_number_below_2_to_the_31(value):
    rng = np.random.default_rng(value)
    numbers = rng.integers(0, 2**31, 20_000)
    near = (numbers[:5000] // value) * value  # where the quotient changes
    numbers = np.concatenate([numbers, near, near - 1, [0, 1, value - 1, value, 2**31 - 1]])
    numbers = numbers[(numbers >= 0) & (numbers < 2**31)].astype(np.uint64)
    _, multiplier, shift = divisor(value)
    assert 0 < multiplier < 2**32
    quotients = numbers * np.uint64(multiplier) >> np.uint64(shift)
    assert np.array_equal(quotients, numbers // np.uint64(value))
