"""The kernels' real sources, run on the CPU under sanitizers; and proof that these see mistakes."""

import mmap
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path
from typing import NamedTuple

import host_cuda
import numpy as np
import pytest
import test_position_sums
import test_rotary
from arrays import Case, alike, possible, verify
from covering import covering, kernel_of
from host_cuda import Array, KernelError
from numpy.lib.stride_tricks import as_strided
from reference import check, rotate

import rope_cupy
from rope_cupy import apply_rotary, jit
from rope_cupy.plan import launch_plan

pytestmark = pytest.mark.host_cuda

PARTS = 16  # that processes of pytest-xdist share out
MAP_NORESERVE = 0x4000  # of Linux; the module mmap names it from Python 3.13 on
COLLECTIVES = Path(host_cuda.__file__).with_name("collectives.cu")


@pytest.fixture(scope="module")
def cases():
    """Calls of every kind, with every value of every option, and a kernel to compile for each.

    They are fewer than NumPy's, but two template arguments that meet in one of those meet in these.
    """
    by_kernel = {kernel_of(partial(verify, case)): case for case in test_rotary.CASES}
    chosen = [by_kernel[kernel] for kernel in covering([*by_kernel], 2)]
    shown = {value for case in chosen for value in case._asdict().items()}
    for case in test_rotary.CASES:
        values = {*case._asdict().items()}
        if not values <= shown:
            chosen.append(case)
            shown |= values
    return chosen


@pytest.mark.parametrize("part", range(PARTS))
def test_a_call_of_any_kind_is_right(part, cases, record):
    for case in cases[part::PARTS]:
        record(case.kind, *verify(case))


@pytest.mark.launches_nothing
def test_the_kernel_compiles_without_a_warning(tmp_path):
    types = "bfloat16, float, int, NoNorm, Outputs, 2"
    kernel = (
        f"rotary_kernel<{types}, true, false, false, 2, 4, OneAngle<1, 0>, 8, false, false, false, "
        "1>"
    )
    options = host_cuda.kernel_options(jit.sources() / "rotary.cu", kernel)
    command = host_cuda.command(*options, "-o", str(tmp_path / "kernel.so"))
    assert {"-Wall", "-Wextra"} <= set(command)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Where 32 bits are not enough. What is not touched of an array takes no memory.


def sparse(shape, strides):
    """Zeros in float16 of any strides, in elements."""
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    buffer = np.frombuffer(mmap.mmap(-1, 2 * (reach + 1), flags), np.float16)
    return as_strided(buffer, shape, [2 * stride for stride in strides])


def rotate_far_apart(axis, stride):
    """The error of a rotation in place where one axis has a stride of its own."""
    sizes, strides = [2, 2, 2, 64], [512, 256, 64, 1]
    at = "bsh".index(axis)
    sizes[at], strides[at] = (2 if abs(stride) >= 2**31 else 4), abs(stride)
    x = sparse(sizes, strides)
    x = np.flip(x, at) if stride < 0 else x
    rng = np.random.default_rng(1)
    x[...] = rng.standard_normal(x.shape)
    angle = rng.uniform(-np.pi, np.pi, (sizes[1], 32))
    exact = rotate(np.float64(x), np.cos(angle), np.sin(angle))
    apply_rotary(x, (np.cos(angle), np.sin(angle)), out=x)
    return check(np.float64(x), exact, "float16")


@pytest.mark.parametrize("stride", [2**31 + 128, 2**30 + 64, -(2**30) - 64])
@pytest.mark.parametrize("axis", ["b", "s", "h"])
def test_elements_may_lie_2_31_elements_apart(axis, stride, record):
    record("float16", rotate_far_apart(axis, stride))


@pytest.mark.parametrize("stride", [2**31 + 64, 2**28 + 32])
def test_rows_of_a_table_may_lie_2_31_elements_apart(stride, record):
    rng, last = np.random.default_rng(2), -(-(2**31) // stride)
    cos, sin = (sparse((last + 1, 32), (stride, 1)) for _ in range(2))
    angle = rng.uniform(-np.pi, np.pi, cos.shape)
    cos[...], sin[...] = np.cos(angle), np.sin(angle)
    x, positions = rng.standard_normal((1, 4, 2, 64)), np.array([last, 0, last, last + 1])
    y = apply_rotary(x, (cos, sin), positions=positions)
    exact = rotate(x, np.float64(cos), np.float64(sin), positions=positions)
    record("float64", check(y, exact, "float64"))


@pytest.fixture
def tiles_of_two_tokens(monkeypatch):
    monkeypatch.setattr("rope_cupy.row_order.L2_BYTES", 0)
    row_bytes = 64 * 4  # of 64 float32 numbers
    monkeypatch.setattr("rope_cupy.row_order.TILE_BYTES", 2 * row_bytes)
    monkeypatch.setattr("rope_cupy.row_order.MIN_TILE", 2)
    launch_plan.cache_clear()
    yield
    launch_plan.cache_clear()


@pytest.mark.parametrize("positions", ["none", "int32 s"])
@pytest.mark.parametrize("sizes", [(1, 6, 3, 1), (3, 6, 4, 2), (2, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("write", ["new", "in place"])
def test_tiles_of_tokens_give_the_same(sizes, write, positions, tiles_of_two_tokens, record):
    case = Case("float16", sizes=sizes, layout="bhsd", write=write, positions=positions)
    record(case.dtype, *verify(possible(case)))


@pytest.mark.parametrize("case", alike(40, seed=7, library=["numpy"]), ids=str)
def test_a_thread_may_have_a_head_of_q_and_of_k(case, record):
    record(case.kind, *verify(case))


def fill_caches(norm, batch=2, num_slots=9, kept=False):
    """Hold caches of 8 bits, paged and written in part, against those that NumPy fills."""
    rng = np.random.default_rng(6)
    q, k, v = (np.float32(rng.standard_normal((batch, 9, heads, 24))) for heads in (4, 2, 2))
    angle = rng.uniform(-np.pi, np.pi, (9, 8))
    slots = rng.permutation(40) - 2  # of 36
    slots = slots[: batch * num_slots].reshape(batch, num_slots)  # behind which others lie
    scales = {"k_scale": np.float32([0.37]), "v_scale": 0.5}
    results, before = [], k
    for way in (rope_cupy.cpu.rotate, BY_NUMPY):
        k = before.copy()
        buffer = np.zeros((2, 9, 2, 4, 2, 24), np.uint8)  # of k, then of v, in each block
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rope_cupy.cpu, "rotate", way)
            q_out = rope_cupy.apply_rotary_kv_cache(
                *(q, k, v, buffer[1, :, 0], buffer[1, :, 1], (np.cos(angle), np.sin(angle))),
                slot_mapping=slots,
                cache_dtype="float8_e5m2",
                norm=None if norm == "none" else norm,
                k_out=k if kept else None,
                **scales,
            )
        results.append((q_out, k, buffer))
    (q_out, k, buffer), (exact_q, exact_k, exact) = results
    assert np.allclose(q_out, exact_q, atol=1e-5), f"float32 at q_out, expected {exact_q}"
    assert np.allclose(k, exact_k, atol=1e-5), f"float32 at k_out, expected {exact_k}"
    assert np.array_equal(buffer, exact), f"float8 at the cache, expected {exact}"


BY_NUMPY = rope_cupy.cpu.rotate


# Mistakes are seen.


class Mutant(NamedTuple):
    """A kernel source with a mistake, what it is seen by, and a call that shows it."""

    file: str
    right: str
    wrong: str
    seen_by: str
    case: Case = Case("float32", sizes=(2, 5, 3, 1))

    def show(self):
        verify(possible(self.case))


class FarApart(Mutant):
    def show(self):
        rotate_far_apart("s", 2**30 + 64)


class OfManySizes(Mutant):
    def show(self):
        batch, _, *heads = self.case.sizes
        for tokens in range(40, 48):
            verify(possible(self.case._replace(sizes=(batch, tokens, *heads))))


class Cached(Mutant):
    def show(self):
        fill_caches(self.case.norm)


class CachedAndKept(Mutant):
    def show(self):
        fill_caches(self.case.norm, kept=True)


class CachedInPart(Mutant):
    def show(self):
        fill_caches(self.case.norm, 1, 4)


class OfTheirOwn(Mutant):
    def show(self):
        rows = [[8, 0, 3, 3, 7, 1, 2]] * 2
        styles = "dense", "padded"
        test_rotary.test_cosines_and_sines_have_strides_of_their_own("numpy", rows, styles)


class OfSums(Mutant):
    def show(self):
        least = -(2**63)
        add = test_position_sums.test_the_sum_of_a_position_and_a_batchs_offset
        add(least, least, [None] * 4, "numpy")
        add(least, 2**63 - 1, [None, 0, 1, 2], "numpy")


PLAIN = Mutant._field_defaults["case"]
GATHERED = PLAIN._replace(positions="int64 bs", outside="nan")
ON_AXES = PLAIN._replace(positions="int64 3bs", outside="nan", sizes=(2, 40, 3, 1))
IN_TURN = PLAIN._replace(positions="int64 3bs mixed", sizes=(2, 7, 3, 1))
PACKED = PLAIN._replace(
    positions="int64 packed offset", outside="nan", sizes=(1, 43, 3, 1), write="out"
)
TWO_ROWS = PLAIN._replace(interleaved=True, sizes=(2, 5, 4, 2))  # of one thread
COMPUTED = PLAIN._replace(form="frequencies", sizes=(2, 40, 3, 1))
NORMAL = PLAIN._replace(norm="head", weights="float32", sizes=(2, 5, 4, 2))
OF_TOKENS = NORMAL._replace(norm="heads", dtype="float16", sizes=(1, 9, 8, 4))
ROUNDED = NORMAL._replace(dtype="bfloat16", library="torch", round_norm=True, sizes=(2, 50, 4, 2))
LAYER = NORMAL._replace(norm="layer")
AFTER = ROUNDED._replace(norm_after=True)
BY_ELEMENT = PLAIN._replace(form="elementwise")
TRANSPOSED = BY_ELEMENT._replace(conjugate=True)
DENSE = PLAIN._replace(form="matrices")
STRIDED = DENSE._replace(table_style="transposed")
UNWRITTEN = PLAIN._replace(write="out")  # shows: the arrays hold other numbers
OUT_OF_BOUNDS = "AddressSanitizer: (use-after-poison|SEGV)"
OF_ORDER = "the result depends on the order of the threads"
WRONG = "^(bfloat16|float(8|16|32|64)) at .* expected "
CHANGED = "what is not rotated must keep its bits"
MUTANTS = {
    "an index off by one": Mutant(
        "rotary.cu",
        "args.cos_data + to_pair *",
        "args.cos_data + (to_pair + 1) *",
        OUT_OF_BOUNDS,
        PLAIN._replace(table_style="offset1"),
    ),
    "a wrong stride": Mutant(
        "rotary.cu",
        "x_offset = tensor.x.",
        "x_offset = args.tensors[0].x.",
        OUT_OF_BOUNDS,
        PLAIN._replace(k_style="padded"),
    ),
    "a missing bound": Mutant(
        "rotary.cu",
        "if (!is_inside) {",
        "if (false) {",
        OUT_OF_BOUNDS,
        GATHERED,
    ),
    "a bound on the last of three axes alone": Mutant(
        "rotary.cu", "is_inside &= ", "is_inside = ", f"{OUT_OF_BOUNDS}|{WRONG}", ON_AXES
    ),
    "positions of the first of three axes": Mutant(
        "positions.cuh", "return address[axis * args.axis];", "return *address;", WRONG, ON_AXES
    ),
    "a section one pair too long": Mutant(
        "positions.cuh",
        "pair >= args.section_ends[0]",
        "pair > args.section_ends[0]",
        WRONG,
        ON_AXES,
    ),
    "pairs in turn beyond those of their axis": OfManySizes(
        "positions.cuh", "&& pair < args.section_ends[axis - 1]", "", WRONG, IN_TURN
    ),
    "pairs in turn counted from the lane's first": Mutant(
        "rotary.cu",
        "args.position_arguments, pair + i)",
        "args.position_arguments, i)",
        WRONG,
        IN_TURN,
    ),
    "a token counted from its batch's offset alone": Mutant(
        "positions.cuh",
        "sum_of(token, args.position_offset, *address)",
        "sum_of(args.position_offset, *address)",
        WRONG,
        PLAIN._replace(positions="int64 offset"),
    ),
    "an offset of another batch": Mutant(
        "rotary.cu",
        "args.position.template offset<kCommon>(at)",
        "0",
        WRONG,
        PLAIN._replace(positions="int64 offset"),
    ),
    "a sum that wraps around": OfSums(
        "positions.cuh", "return high == 0 ?", "return true ?", r"^assert \[0, 1, 2, 3\]"
    ),
    "a carry that is lost": OfSums(
        "positions.cuh",
        "(low < static_cast<unsigned long long>(number)) -",
        "-",
        r"^assert \[None, None, None, None\]",
    ),
    "a sequence that holds its end": OfManySizes(
        "positions.cuh", "<= token) {", "< token) {", WRONG, PACKED
    ),
    "a token behind the last sequence": OfManySizes(
        "positions.cuh",
        "token < begin || sequence == end",
        "token < begin",
        f"{OUT_OF_BOUNDS}|{WRONG}",
        PACKED,
    ),
    "a token before the first sequence": OfManySizes(
        "positions.cuh", "token < begin || sequence == end", "sequence == end", WRONG, PACKED
    ),
    "the offset of the first sequence for all": OfManySizes(
        "positions.cuh", "offsets[sequence * args.axis]", "offsets[0]", WRONG, PACKED
    ),
    "a token counted from the first of all": Mutant(
        "positions.cuh",
        "return token + args.position_offset;",
        "return token;",
        WRONG,
        COMPUTED._replace(positions="int"),
    ),
    "a quarter of a turn that ends where the next begins": Mutant(
        "angles.cuh", "quarter = high + (1u << 29)", "quarter = high", WRONG, COMPUTED
    ),
    "a sine of the wrong sign": Mutant(
        "angles.cuh", "sin_bits ^ (quarter & 1u << 31)", "sin_bits", WRONG, COMPUTED
    ),
    "a cosine of the wrong sign": Mutant(
        "angles.cuh", "(quarter + (1u << 30)) & 1u << 31", "quarter & 1u << 31", WRONG, COMPUTED
    ),
    "half of a position's bits": Mutant(
        "angles.cuh",
        "static_cast<unsigned long long>(position_of(i))",
        "static_cast<unsigned char>(position_of(i))",
        WRONG,
        COMPUTED._replace(positions="int64 bs"),
    ),
    "angles of pairs in turn by the lane's first": Mutant(
        "rotary.cu",
        "kIsInterleavedMrope<Position> ? pair + i : pair",
        "pair",
        WRONG,
        COMPUTED._replace(positions="int64 3bs mixed"),
    ),
    "float for double": Mutant(
        "numeric.cuh", "double, float>::Type", "float, float>::Type", WRONG, Case("float64")
    ),
    "a swapped sign": Mutant("pairs.cuh", "cos, negate(x), ", "cos, x, ", WRONG),
    "rows that are no rows": Mutant(
        "rotary.cu",
        "row_group >= static_cast<unsigned>(tensor.num_row_groups) ||",
        "",
        OUT_OF_BOUNDS,
    ),
    "lanes that are no lanes": Mutant(
        "rotary.cu",
        "||\n      lane >= static_cast<int>(args.num_lanes)",
        "",
        OUT_OF_BOUNDS,
        PLAIN._replace(head=(514, 514, 0)),
    ),
    "elements copied past the head": Mutant(
        "rotary.cu",
        "int element = copy_lane * kCopyWidth",
        "int element = (copy_lane + 1) * kCopyWidth",
        OUT_OF_BOUNDS,
        PLAIN._replace(head=(96, 64, 0), sizes=(1, 5, 3, 0)),
    ),
    "an access wider than its address allows": Mutant(
        "vec.cuh",
        "if (access.width >= kWholeWidth<T, kSize>) {\n"
        "    if constexpr (kPastL1 && Pieces<Run>::kCount) {\n      Pieces<Run> loaded",
        "if (access.stride == 1) {\n"
        "    if constexpr (kPastL1 && Pieces<Run>::kCount) {\n      Pieces<Run> loaded",
        "runtime error: .* misaligned address",
        PLAIN._replace(k_style="offset1"),
    ),
    "an offset in 32 bits": FarApart(
        "views.cuh",
        "multiply_add(at.outer, static_cast<int>(outer), 0)",
        "at.outer * static_cast<int>(outer)",
        "runtime error: signed integer overflow",
    ),
    "int32 positions for int64": Mutant(
        "positions.cuh",
        "return *address;",
        "return *static_cast<const int*>(static_cast<const void*>(address));",
        WRONG,
        GATHERED,
    ),
    "a NaN for a padding token": Mutant(
        "rotary.cu", "args.keep_out_of_range ?", "false ?", WRONG, GATHERED._replace(outside="keep")
    ),
    "a padding token kept in the first row alone": Mutant(
        "rotary.cu",
        "} else {\n              copy_pairs(i, args.keep",
        "} else if (i < 1) {\n              copy_pairs(i, args.keep",
        WRONG,
        TWO_ROWS._replace(positions="int64 bs", outside="keep", write="out", sizes=(2, 25, 4, 2)),
    ),
    "a rotation forward for backward": Mutant(
        "pairs.cuh",
        "kConjugate ? negate(angles.sin[i + kSecond])",
        "false ? negate(angles.sin[i + kSecond])",
        WRONG,
        PLAIN._replace(conjugate=True),
    ),
    "a first element rotated back by its own angle": Mutant(
        "pairs.cuh", "negate(angles.sin[i + kSecond])", "negate(angles.sin[i])", WRONG, TRANSPOSED
    ),
    "a second element rotated back by its own angle": Mutant(
        "pairs.cuh",
        "second_sin = kConjugate ? negate(angles.sin[i])",
        "second_sin = kConjugate ? negate(angles.sin[i + kSecond])",
        WRONG,
        TRANSPOSED,
    ),
    "a second element by the first one's cosine": Mutant(
        "pairs.cuh",
        "difference_of_products(y, second_cos",
        "difference_of_products(y, cos",
        WRONG,
        BY_ELEMENT,
    ),
    "the angles of neighbours taken for those of halves": Mutant(
        "angles.cuh",
        "const int second = kInterleaved ? 2 * i + 1 : i + kPairs;",
        "const int second = i + kPairs;",
        WRONG,
        BY_ELEMENT._replace(interleaved=True),
    ),
    "a row of matrices with the sign of the other": Mutant(
        "angles.cuh",
        "negate(matrices.values[4 * i + 1])",
        "matrices.values[4 * i + 1]",
        WRONG,
        DENSE,
    ),
    "a sign lost where the numbers of a matrix lie apart": Mutant(
        "angles.cuh", "negate(m01.values[i])", "m01.values[i]", WRONG, STRIDED
    ),
    "the first column of a matrix for the second": Mutant(
        "angles.cuh", "second_row + args.column", "second_row", WRONG, STRIDED
    ),
    "the angles of pairs in turn, of their first elements alone": Mutant(
        "rotary.cu",
        "of < Form::kAngles * kPairs; of += kPairs",
        "of < kPairs; of += kPairs",
        WRONG,
        IN_TURN._replace(form="elementwise"),
    ),
    "k's rows by q's heads": Mutant(
        "rotary.cu",
        "= tensor.coordinates(row_group)",
        "= args.tensors[0].coordinates(row_group)",
        WRONG,
    ),
    "sines by the rows of cosines": OfTheirOwn(
        "table_rows.cuh",
        "sin_offset = row * args.sin_row",
        "sin_offset = row * args.cos_row",
        f"{OUT_OF_BOUNDS}|{WRONG}",
    ),
    "the second row of a set beside the first": Mutant(
        "rotary.cu",
        "x_run + i * tensor.x_step,",
        "x_run + i * tensor.x.inner,",
        WRONG,
        TWO_ROWS,
    ),
    "the second row of a set copied from the first": Mutant(
        "rotary.cu",
        "x_slice + i * tensor.x_step + element",
        "x_slice + element",
        CHANGED,
        TWO_ROWS._replace(head=(128, 64, 0)),
    ),
    "k's first block taken for q's": Mutant(
        "arguments.cuh", "block >= q_blocks", "block > q_blocks", WRONG, UNWRITTEN
    ),
    "k's blocks numbered from q's first": Mutant(
        "arguments.cuh", "+ block - first_block", "+ block", WRONG, UNWRITTEN
    ),
    "every period the first": Mutant(
        "arguments.cuh",
        "period * blocks + block",
        "block",
        WRONG,
        UNWRITTEN._replace(sizes=(2, 150, 1, 1)),
    ),
    "two neighbours swapped where they are narrowed": Mutant(
        "numeric.cuh",
        "word_of(narrow<T>(first).bits, narrow<T>(second).bits)",
        "word_of(narrow<T>(second).bits, narrow<T>(first).bits)",
        WRONG,
        Case("float16"),
    ),
    "two neighbours swapped where they are loaded one by one": Mutant(
        "vec.cuh",
        "word_of(low.words[0].bits, high.words[0].bits)",
        "word_of(high.words[0].bits, low.words[0].bits)",
        WRONG,
        Case("float16", style="offset1"),
    ),
    "two neighbours swapped where they are stored one by one": Mutant(
        "vec.cuh",
        ">> 16 * kHalf",
        ">> 16 * (1 - kHalf)",
        WRONG,
        Case("float16", k_style="offset1", write="out"),
    ),
    "k's weights those of q": Mutant(
        "rotary.cu",
        "args.weights[which]",
        "args.weights[0]",
        f"{WRONG}|{OUT_OF_BOUNDS}",
        NORMAL._replace(sizes=(2, 4, 4, 2)),  # with weights of its own
    ),
    "k's mean that of q": Mutant(
        "norm.cuh", "args.inverse_count[which]", "args.inverse_count[0]", WRONG, OF_TOKENS
    ),
    "a half of a row's sum": Mutant(
        "norm.cuh", "int lanes = kSpan / 2", "int lanes = kSpan / 4", WRONG, NORMAL
    ),
    "the sum of the block's first row for all": Mutant(
        "norm.cuh",
        "shared[row][first / kSpan + i]",
        "shared[row][i]",
        WRONG,
        NORMAL._replace(head=(72, 72, 0)),
    ),
    "a sum that others have not yet added to": Mutant(
        "norm.cuh",
        "sums[row];\n      }\n      __syncthreads();",
        "sums[row];\n      }",
        f"{WRONG}|{OF_ORDER}",
        NORMAL._replace(head=(72, 72, 0)),
    ),
    "the weights of the first head for all of a thread": Mutant(
        "rotary.cu",
        "weights + i * layout.step",
        "weights",
        WRONG,
        OF_TOKENS._replace(dtype="float32", head=(256, 256, 0)),
    ),
    "the first head's weights for all": Mutant(
        "rotary.cu", "weights += at.inner * layout.head;", "", WRONG, OF_TOKENS
    ),
    "weights without their offset": Mutant(
        "norm.cuh",
        "Real factor = add(weight.values[i], offset)",
        "Real factor = weight.values[i]",
        WRONG,
        NORMAL,
    ),
    "a norm of the slice alone": Mutant(
        "rotary.cu",
        "copies ? sum_of_squares(widen<Real>(copied[i]))",
        "copies ? 0",
        WRONG,
        NORMAL._replace(head=(96, 32, 16)),
    ),
    "a norm that is not rounded": Mutant(
        "norm.cuh",
        "return kRoundings > 0 ?",
        "return false ?",
        WRONG,
        ROUNDED,
    ),
    "a norm that is not rounded before its weights": Mutant(
        "norm.cuh",
        "return kRoundings == 2 ?",
        "return false ?",
        WRONG,
        ROUNDED._replace(round_norm="before_weight"),
    ),
    "a mean that is not subtracted": Mutant(
        "norm.cuh", "subtract(numbers.values[i], mean)", "numbers.values[i]", WRONG, LAYER
    ),
    "a mean of the slice alone": Mutant(
        "rotary.cu",
        "copies ? sum_of(widen<Real>(copied[i]))",
        "copies ? 0",
        WRONG,
        LAYER._replace(head=(96, 32, 16)),
    ),
    "a sum that is overwritten before all have read it": Mutant(
        "norm.cuh",
        "if constexpr (kCrossWarp) __syncthreads();",
        "",
        f"{WRONG}|{OF_ORDER}",
        LAYER._replace(head=(72, 72, 0)),
    ),
    "biases that are not added": Mutant(
        "norm.cuh",
        "multiply_add(number, factor, bias.values[i])",
        "multiply(number, factor)",
        WRONG,
        LAYER,
    ),
    "k's biases those of q": Mutant(
        "rotary.cu",
        "args.biases[which]",
        "args.biases[0]",
        WRONG,
        LAYER._replace(sizes=(2, 9, 4, 2)),  # with biases of its own
    ),
    "biases by the strides of weights": Mutant(
        "rotary.cu",
        "args.bias_layout[which]",
        "args.layout[which]",
        WRONG,
        LAYER._replace(sizes=(2, 10, 4, 2)),  # with strides of their own
    ),
    "a norm of what is not yet rotated": Mutant(
        "rotary.cu", "return rotated[i];", "return pairs[i];", WRONG, AFTER
    ),
    "a rotation that is not rounded before its norm": Mutant(
        "rotary.cu",
        "Conditional<Norm::kRounds, T, Real>",
        "Conditional<false, T, Real>",
        WRONG,
        AFTER,
    ),
    "sums that are not rounded before a norm": Mutant(
        "rotary.cu",
        "narrow<Rotated>(widen<Real>(narrow<Product>(numbers)))",
        "narrow<Rotated>(numbers)",
        WRONG,
        AFTER._replace(table_dtype="bfloat16", rounding="eager", round_norm=False),
    ),
    "a padding token lost before its norm": Mutant(
        "rotary.cu",
        "const bool keeps = !of_launch.rotates || args.keep_out_of_range;",
        "const bool keeps = false;",
        WRONG,
        AFTER._replace(positions="int64 bs", outside="keep"),
    ),
    "products that are not rounded": Mutant(
        "pairs.cuh",
        "rounded<Product>(multiply(a, b))",
        "multiply(a, b)",
        WRONG,
        PLAIN._replace(dtype="float16", table_dtype="float16", rounding="eager"),
    ),
    "one sum of all heads of q and of k": Mutant(
        *("norm.cuh", "kPerToken && !kApart", "kPerToken", WRONG),
        PLAIN._replace(norm="heads", rows="head", sizes=(2, 5, 4, 4)),
    ),
    "a slot that the cache does not hold": Cached(
        "rotary.cu", "(cache.num_slots);", "(~0ull);", OUT_OF_BOUNDS
    ),
    "a key that is kept where it has a slot alone": CachedAndKept(
        "rotary.cu", "if (!is_cached && !keeps) return;", "if (!is_cached) return;", WRONG
    ),
    "a value that is kept as a key is": CachedAndKept(
        *("rotary.cu", "Destination::kKeepsK && which == 1", "Destination::kKeepsK"),
        f"{WRONG}|{OF_ORDER}",
    ),
    "a key that is kept where its cache would have it": CachedAndKept(
        *("rotary.cu", "cache.k_out.template offset<kCommon>(at)", "out_offset"),
        f"{WRONG}|{OF_ORDER}",
    ),
    "a slot behind the last one": CachedInPart(
        "rotary.cu", "has_slot = slot_offset < args.end_of_slots", "has_slot = true", WRONG
    ),
    "v's blocks those of k": Cached(
        "rotary.cu",
        "cache.place[which - 1]",
        "cache.place[which - 1] * which",
        f"{WRONG}|{OUT_OF_BOUNDS}",
    ),
    "k's scale for v": Cached(
        "destinations.cuh", "args.scale[cache].value", "args.scale[0].value", WRONG
    ),
    "v rotated as k is": Cached(
        "rotary.cu", "if (kTensors > 2 && which == 2) {", "if (false) {", f"{WRONG}|{OUT_OF_BOUNDS}"
    ),
    "a quotient that is not right": Cached(
        "destinations.cuh",
        "multiply_add(excess, negate(reciprocal), quotient)",
        "multiply_add(excess, negate(reciprocal), 1.5f * quotient)",
        WRONG,
        PLAIN._replace(norm="head"),
    ),
    "arguments of another shape": Mutant(
        "arguments.cuh",
        "long long cos_row;",
        "long long cos_row, cos_of_v;",
        "the kernel takes 744 bytes of arguments, got 736",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_kernel_is_seen(name, tmp_path, monkeypatch):
    mutant = MUTANTS[name]
    mutant.show()
    sources = shutil.copytree(jit.sources(), tmp_path / "kernels")
    file = sources / mutant.file
    code = file.read_text()
    assert code.count(mutant.right) == 1
    file.write_text(code.replace(mutant.right, mutant.wrong))
    monkeypatch.setattr(jit, "sources", lambda: sources)
    monkeypatch.setattr(host_cuda, "BUILDS", tmp_path / "builds")
    with pytest.raises((KernelError, AssertionError), match=mutant.seen_by):
        mutant.show()


# What the threads of a block do together.


def collectives(size):
    """What `collectives_kernel` gives by CUDA's definitions: a row for each operation."""
    thread = np.arange(size)
    lane, warp = thread % 32, thread // 32 * 32
    bit = 1 << (32 + lane) % 64

    def shuffled(source, first=warp, last=warp + 31):
        return np.where((source < first) | (source > last), thread, source)

    half = lane % 2
    votes = np.where(half, 0xAA, 0x55)
    first_warp = np.where(thread < 32, 31, 0)
    eight, sixteen = thread // 8 * 8, thread // 16 * 16
    return np.array(
        [
            (size - 1 - thread) ** 2,
            np.full(size, np.sum(thread**2)),
            warp + 5,
            warp + 3,
            eight + 3,
            shuffled(thread - 3),
            shuffled(thread - 3, sixteen),
            shuffled(thread + 3),
            shuffled(thread + 3, warp, sixteen + 15),
            thread ^ 17,
            shuffled(thread ^ 9, warp, eight + 7),
            bit[thread ^ 1] >> 32,
            warp * 32 + 31 * 16,
            [sum(1 << i for i in range(32) if (w + i) % 3 == 0) for w in warp],
            (40 >= warp) & (40 < warp + 32),
            warp + 31 < 40,
            warp + 7 - (1 - half) + votes,
            first_warp,
        ],
        np.uint32,
    )


def run_collectives(kernel, size):
    out = np.zeros((18, size), np.uint32)
    arrays = {"out": Array(out.ctypes.data, 4, out.shape, (size, 1), written=True)}
    address = out.ctypes.data + host_cuda.moves_of(arrays)["out"]
    host_cuda.run(COLLECTIVES, kernel, (1, 1), (size, 1), struct.pack("<Q", address), arrays)
    return out


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_barriers_shuffles_and_votes_do_what_they_do_in_cuda(size):
    assert np.array_equal(run_collectives("collectives_kernel", size), collectives(size))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("kDivergentBarrier", "waits at __sync(threads|warp) for threads that never come"),
        ("kOutsideMask", r"thread \(0, 0\) of block \(0, 0\) is not in its mask of __shfl_sync"),
        ("kAbsentLane", "reads a lane that takes no part in __shfl_sync"),
        ("kEndedLane", "reads a lane that takes no part in __shfl_sync"),
        ("kPastTheEnd", "runtime error: index 32 out of bounds"),
        ("kRace", OF_ORDER),
    ],
)
def test_what_threads_must_not_do_together_is_an_error(mistake, message):
    run_collectives("mistaken_kernel<kNone>", 32)
    with pytest.raises(KernelError, match=message):
        run_collectives(f"mistaken_kernel<{mistake}>", 32)
