"""The kernels, compiled by NVRTC without a GPU for every architecture, and their argument block."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product, repeat

import numpy as np
import pytest
import test_gpu
import test_rotary
from arrays import verify
from nvrtc import compiled, ptx
from test_plan import CACHE_FIELDS, NORM_FIELDS, Template, fields_of, template

import rope_cupy
from rope_cupy import cpu, jit
from rope_cupy.memory import ACCESS_BYTES, FLOATS_8
from rope_cupy.plan import launch_plan

try:
    compiled("", [], ())
except Exception as error:
    pytest.skip(f"NVRTC cannot be loaded ({error})", allow_module_level=True)

OPTIONS = (*jit.compile_options(), "-ftz=true")  # CuPy adds the last
SHARED = ["sm_75", "sm_100", "sm_120"]  # each kernel is compiled for one of these
ARCHITECTURES = ["sm_80", "sm_90", *SHARED]  # and for the first two
INDEX = "int", "long long"
BATCH = 32  # kernels in one compilation
ON_THE_CPU = {"cupy": "numpy", "torch-cuda": "torch", "dlpack-cuda": "dlpack"}


@pytest.fixture(scope="module")
def kernels():
    """The name of every kernel that the test matrices launch."""

    class FoundError(Exception):
        pass

    def record(problem, *_):
        names.add(launch_plan(problem).kernel)
        raise FoundError

    names = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "rotate", record)
        for case in {*test_rotary.CASES, *test_gpu.CASES}:
            libraries = {
                name: ON_THE_CPU.get(value, value)
                for name, value in case._asdict().items()
                if name in ("library", "table_library")
            }
            with pytest.raises(FoundError):
                verify(case._replace(**libraries))
        for call in fused_calls():
            with pytest.raises(FoundError):
                call()
    return sorted(names)


def fused_calls():
    """Calls that write caches, of every dtype, and packed arrays, with a norm and without."""
    angle = np.zeros((4, 16))
    for (dtype, cache_dtype), norm, interleaved, head_dim in product(
        [("f2", None), ("f4", None), ("f8", None), *product(("f2", "f4", "f8"), FLOATS_8)],
        (None, "head", "heads"),
        (False, True),
        (32, 64),
    ):
        q, k, v = (np.zeros((4, heads, head_dim), dtype) for heads in (4, 2, 2))
        caches = np.zeros((2, 9, 2, head_dim), "u1" if cache_dtype else dtype)
        options = {"norm": norm, "interleaved": interleaved}
        table = np.cos(angle), np.sin(angle)
        slots = np.zeros(4, np.int32 if interleaved else np.int64)
        more = options | {"slot_mapping": slots, "cache_dtype": cache_dtype}
        yield partial(rope_cupy.apply_rotary_kv_cache, q, k, v, *caches, table, **more)
        packed = np.concatenate([q, k, v], 1)
        heads = {"num_heads": 4, "num_kv_heads": 2}
        for out in (None, packed):
            yield partial(rope_cupy.apply_rotary_qkv, packed, table, out=out, **heads, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_the_matrix_compiles_and_keeps_all_in_registers(kernels, architecture):
    code = (jit.sources() / "rotary.cu").read_text()
    options = (*OPTIONS, f"-arch={architecture}", "--ptxas-options=-v")
    if architecture in SHARED:  # of which each has a third, for the time that compiling takes
        kernels = kernels[SHARED.index(architecture) :: len(SHARED)]
    batches = [kernels[i : i + BATCH] for i in range(0, len(kernels), BATCH)]
    # In threads: NVRTC compiles without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = "".join(pool.map(compiled, repeat(code), batches, repeat(options)))
    lines = [line for line in logs.splitlines() if "bytes stack frame" in line]
    assert len(lines) == len(kernels) > 600
    for line in lines:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line
    assert "warning" not in logs


def test_the_matrix_launches_kernels_of_every_kind(kernels):
    kinds = Template(*map(set, zip(*map(template, kernels), strict=True)))
    numbers, flags = {"float16", "bfloat16", "float", "double"}, {"true", "false"}
    assert (kinds.dtype, kinds.table) == (numbers, numbers | {"frequency"})
    assert kinds.position == {"void", "int", "long long", "Counted"} | {
        f"{kind}<{index}>"
        for kind in ("Offset", "Sections", "Mixed")
        for index in ("int", "long long")
    } | {f"Packed<{index}, {begin}>" for index in INDEX for begin in INDEX}
    assert (kinds.interleaved, kinds.conjugate, kinds.eager) == (flags, flags, flags)
    assert {kind.partition("<")[0] for kind in kinds.destination} == {"Outputs", "Slots"}
    assert kinds.tensors == {"2", "3"}
    assert {kind.partition(",")[0] for kind in kinds.norm} == {
        *("NoNorm", *(f"RmsNorm<{number}" for number in numbers))
    }
    assert (kinds.in_place, kinds.past_l1, kinds.common) == (flags, flags, flags)
    assert kinds.rows >= {"1", "2", "4"}
    assert kinds.pairs == {"1", "2", "4", "8"}
    assert kinds.form == {
        *("OneAngle<1, 0>", "OneAngle<2, 0>", "OneAngle<2, 1>"),
        *("ByElement", "Matrices<1>", "Matrices<4>"),
    }
    assert kinds.pass_run >= {"0", "1", "2", "4", "8"}


@pytest.mark.parametrize(
    "position",
    ["void", "int", "long long", "Offset<int>", "Packed<int, int>", "Sections<long long>"],
)
@pytest.mark.parametrize("pairing", ["false, false, false, 1, 8", "true, false, false, 2, 4"])
def test_the_kernels_of_plain_models_leave_room_for_40_warps(pairing, position):
    """Of a multiprocessor's 65,536 registers, which threads take by eights."""
    code = (jit.sources() / "rotary.cu").read_text()
    past_l1 = "false" if position == "void" else "true"
    types = f"bfloat16, float, {position}, NoNorm, Outputs, 2"
    name = f"rotary_kernel<{types}, {pairing}, OneAngle<1, 0>, 0, true, {past_l1}, true>"
    log = compiled(code, [name], (*OPTIONS, "-arch=sm_90", "--ptxas-options=-v"))
    (registers,) = re.findall(r"Used (\d+) registers", log)
    assert int(registers) <= 48


@pytest.mark.parametrize("table", ["float", "double", "frequency"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float", "double"])
def test_subnormal_numbers_are_not_flushed_to_zero(dtype, table):
    types = f"{dtype}, {table}, {'Counted' if table == 'frequency' else 'void'}"
    types += ", NoNorm, Outputs, 2"
    name = f"rotary_kernel<{types}, true, true, false, 2, 2, OneAngle<1, 0>, 0, true, false, true>"
    code = ptx((jit.sources() / "rotary.cu").read_text(), name, (*OPTIONS, "-arch=compute_80"))
    instructions = re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.]*)\s", code, re.MULTILINE)
    assert any(instruction.startswith("fma.rn.f") for instruction in instructions)
    flushing = [name for name in instructions if ".ftz" in name and not name.startswith("setp")]
    assert not flushing  # a comparison, which asks for NaN alone, may


def test_no_header_but_our_own_is_included():
    for path in jit.sources().glob("*.cu*"):
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                assert (jit.sources() / line.split('"')[1]).is_file(), (path, line)


def test_the_options_change_with_every_source(tmp_path, monkeypatch):
    before = jit.compile_options()[-1]
    for path in jit.sources().glob("*.cu*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(jit, "sources", lambda: tmp_path)
    assert jit.compile_options()[-1] == before
    for path in tmp_path.iterdir():
        path.write_text(path.read_text() + "\n")
        assert jit.compile_options()[-1] != before
        before = jit.compile_options()[-1]


NORM = [*NORM_FIELDS, "weights[0]", "weights[1]"]
CACHE = [*CACHE_FIELDS, "slots", "scales[0]", "scales[1]"]


@pytest.mark.parametrize(
    ("form", "norm", "destination", "tensors", "behind"),
    [
        ("OneAngle<1, 0>", "NoNorm", "Outputs", 2, []),
        ("ByElement", "NoNorm", "Outputs", 2, []),
        ("Matrices<4>", "RmsNorm<float, 0, 8, false, 1>", "Outputs", 2, NORM),
        ("OneAngle<2, 1>", "NoNorm", "Slots<int, float8_e5m2, double>", 3, CACHE),
        (
            *("Matrices<1>", "RmsNorm<double, 128, 32, true, 0>", "Slots<int, bfloat16, float>", 3),
            [*NORM, *CACHE, "column"],
        ),
    ],
)
def test_the_argument_block_is_packed_as_the_kernel_reads_it(
    form, norm, destination, tensors, behind
):
    """Every name of test_plan's fields is found where its integer is packed."""
    pointers = [f"{side}[{i}]" for side in ("x", "out") for i in range(tensors)]
    last = [f"position_arguments.{name}" for name in ("cu_seqlens", "first")]
    fields = [*pointers, "cos_data", "sin_data", "positions", *fields_of(tensors), *last, *behind]
    checks = [
        f'static_assert(__INTADDR__(&((Block*)0)->{field}) == {8 * i}, "{field}");'
        for i, field in enumerate(fields)
    ]
    size = 8 * len(fields)
    checks.append(f'static_assert(sizeof(Block) == {size}, "size");')
    checks.append(f'static_assert(kAccessBytes == {ACCESS_BYTES}, "the widest access");')
    block = f"Arguments<bfloat16, float, {form}, {norm}, {destination}, {tensors}>"
    code = f'#include "rotary.cu"\nusing Block = {block};\n' + "\n".join(checks)
    compiled(code, [], (*OPTIONS, "-arch=sm_90"))
