"""The kernels, compiled by NVRTC without a GPU for every architecture, and their argument block."""

import os
import re
import struct
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations, product, repeat

import numpy as np
import pytest
import test_gpu
import test_rotary
from arrays import verify
from covering import covering, kernel_of
from nvrtc import NOTHING, compiled, ptx, usage
from test_plan import frequencies, matrices, problem, spec

import rope_cupy
from rope_cupy import jit
from rope_cupy.arguments import FIELD_BYTES
from rope_cupy.memory import ACCESS_BYTES, FLOATS_8
from rope_cupy.options import Cache, Norm, Packed
from rope_cupy.plan import launch_plan
from rope_cupy.problem import TableSpec
from rope_cupy.template import AfterRotation, LayerNorm, RmsNorm, RotaryKernel, instance

try:
    compiled("", [], ())
except Exception as error:
    pytest.skip(f"NVRTC cannot be loaded ({error})", allow_module_level=True)

OPTIONS = (*jit.compile_options(), "-ftz=true")  # CuPy adds the last
ARCHITECTURES = ["sm_90", "sm_75", "sm_80", "sm_100", "sm_120"]
MARGIN = 24  # registers; of 240 kernels none took more for another than for the first
CLOSE = 20  # registers; kernels like those that leave fewer are 21 of the 24 that leave under 12
INDEX = "int", "long long"
BATCH = 32  # kernels in one compilation
ON_THE_CPU = {"cupy": "numpy", "torch-cuda": "torch", "dlpack-cuda": "dlpack"}


@pytest.fixture(scope="module")
def kernels():
    """The template arguments of every kernel that the test matrices launch."""

    found = set()
    for case in {*test_rotary.CASES, *test_gpu.CASES}:
        libraries = {
            name: ON_THE_CPU.get(value, value)
            for name, value in case._asdict().items()
            if name in ("library", "table_library")
        }
        found.add(kernel_of(partial(verify, case._replace(**libraries))))
    found.update(map(kernel_of, fused_calls()))
    return sorted(found, key=lambda template: template.name)


def fused_calls():
    """Calls that write caches, of every dtype, and packed arrays, with a norm and without."""
    angle = np.zeros((4, 16))
    for (dtype, cache_dtype), norm, interleaved, head_dim in product(
        [("f2", None), ("f4", None), ("f8", None), *product(("f2", "f4", "f8"), FLOATS_8)],
        (None, "head", "heads", "layer", "after"),
        (False, True),
        (32, 64),
    ):
        after = norm == "after"
        q, k, v = (np.zeros((4, heads, head_dim), dtype) for heads in (4, 2, 2))
        caches = np.zeros((2, 9, 2, head_dim), "u1" if cache_dtype else dtype)
        options = {"norm": "head" if after else norm, "interleaved": interleaved}
        options |= {"norm_after": True} if after else {}
        table = np.cos(angle), np.sin(angle)
        slots = np.zeros(4, np.int32 if interleaved else np.int64)
        more = options | {"slot_mapping": slots, "cache_dtype": cache_dtype}
        for k_out in (None, k)[: head_dim // 32]:  # of whole heads alone
            more["k_out"] = k_out
            yield partial(rope_cupy.apply_rotary_kv_cache, q, k, v, *caches, table, **more)
        packed = np.concatenate([q, k, v], 1)
        heads = {"num_heads": 4, "num_kv_heads": 2}
        for out in (None, packed):
            yield partial(rope_cupy.apply_rotary_qkv, packed, table, out=out, **heads, **options)


def registers_left(architecture, kernels):
    """Compile kernels, which must keep all in registers; how many registers each leaves."""
    code = (jit.sources() / "rotary.cu").read_text()
    options = (*OPTIONS, f"-arch={architecture}")
    names = [kernel.name for kernel in kernels]
    batches = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
    # In threads: NVRTC compiles without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = [*pool.map(usage, repeat(code), batches, repeat(options))]
    assert not any("warning" in log for log, _ in results), architecture
    left = {}
    for kernel, used in ChainMap(*(kernels for _, kernels in results)).items():
        assert used.memory == NOTHING, f"{kernel} on {architecture} takes {used.memory}"
        left[kernel] = used.most_registers - used.registers
    assert left.keys() == set(names)
    return left


# Next to each other, so that two processes which share the tests out seldom find the kernels twice.


def test_the_matrix_launches_kernels_of_every_kind(kernels):
    kinds = RotaryKernel(*map(set, zip(*kernels, strict=True)))
    numbers, flags = {"float16", "bfloat16", "float", "double"}, {True, False}
    assert (kinds.t, kinds.table) == (numbers, numbers | {"frequency"})
    assert kinds.position == {"void", "int", "long long", "TokenIndex"} | {
        f"{kind}<{index}>"
        for kind in ("Offset", "SectionedMrope", "InterleavedMrope")
        for index in INDEX
    } | {f"Packed<{index}, {begin}>" for index in INDEX for begin in INDEX}
    assert (kinds.interleaved, kinds.conjugate, kinds.eager) == (flags, flags, flags)
    assert {kind.partition("<")[0] for kind in kinds.destination} == {
        *("Outputs", "Slots", "SlotsAndK"),
    }
    assert kinds.tensors == {2, 3}
    norms = {getattr(norm, "norm", norm) for norm in kinds.norm}  # of what is rotated first, too
    for kind in (RmsNorm, LayerNorm):
        assert {norm.weight for norm in norms if isinstance(norm, kind)} == numbers
        after = {AfterRotation(norm) for norm in norms if isinstance(norm, kind)} & kinds.norm
        assert {each.norm.roundings for each in after} == {0, 1, 2}
    assert "NoNorm" in norms
    assert (kinds.in_place, kinds.past_l1, kinds.common) == (flags, flags, flags)
    assert kinds.rows >= {1, 2, 4}
    assert kinds.pairs == {1, 2, 4, 8}
    assert kinds.form == {
        *("OneAngle<1, 0>", "OneAngle<2, 0>", "OneAngle<2, 1>"),
        *("ByElement", "Matrices<1>", "Matrices<4>", "NoTable"),
    }
    assert kinds.copy_width >= {0, 1, 2, 4, 8}


ON_A_GPUS_MACHINE = pytest.param(True, marks=[pytest.mark.gpu, pytest.mark.long], id="every")


@pytest.mark.parametrize("every", [pytest.param(False, id="cover"), ON_A_GPUS_MACHINE])
def test_the_kernels_of_the_matrix_compile_and_keep_all_in_registers(kernels, every):
    """For one architecture all pairs of arguments, and what is like a kernel that might spill.

    What might spill is compiled for an older and a newer one too, half of it for each pair of them,
    and every argument where the sources have other branches than for those before. A machine with a
    GPU, and many cores, compiles all, and for the others all pairs and all that might spill.
    """
    assert len(kernels) > 1800
    first, *others = ARCHITECTURES
    pairs = covering(kernels, 2)
    left, more = {}, kernels if every else pairs
    while more:
        left |= registers_left(first, more)
        near = [kernel for kernel in kernels if left.get(kernel.name, MARGIN) < MARGIN]
        close = [kernel for kernel in near if left[kernel.name] < CLOSE]
        missing = [kernel for kernel in kernels if kernel.name not in left]
        more = [kernel for kernel in missing if any(unlike(kernel, other) <= 3 for other in close)]
    read, single = {branches(first)}, covering(kernels, 1)
    for number, architecture in enumerate(others):
        some = pairs if every else [] if branches(architecture) in read else single
        of_near = near if every else near[number % 2 :: 2]
        registers_left(architecture, sorted({*of_near, *some}, key=lambda kernel: kernel.name))
        read.add(branches(architecture))


def branches(architecture):
    """The architectures for which the sources have code of their own, up to this one."""
    code = "".join(path.read_text() for path in jit.sources().glob("*.cu*"))
    conditions = re.findall(r"__CUDA_ARCH__ *([<>=!]+ *\w+)", code)
    assert all(condition.startswith(">= ") for condition in conditions)
    numbers = {int(condition.removeprefix(">= ")) for condition in conditions}
    return max((number for number in numbers if number <= 10 * int(architecture[3:])), default=0)


def unlike(kernel, other):
    """In how many template arguments two kernels differ."""
    return sum(a != b for a, b in zip(kernel, other, strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_fewer_kernels_cover_all_arguments_that_meet(count):
    def met(kernels):
        return {found for kernel in kernels for found in combinations(enumerate(kernel), count)}

    every = product("ab", "cd", "efg", "ab", "hi", "kl")
    kernels = [kernel for kernel in every if kernel[0] != kernel[3]]
    chosen = covering(kernels, count)
    assert met(chosen) == met(kernels)
    assert len(chosen) < len(kernels)


SPILLING = """
__global__ void __launch_bounds__(512, 2) spilling(float* x) {
  float kept[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) kept[i] = x[i * 512 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) x[(127 - i) * 512 + threadIdx.x] = kept[i] * kept[i / 2];
}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kernel_that_spills_is_seen(architecture):
    _, used = usage(SPILLING, ["spilling"], (*OPTIONS, f"-arch={architecture}"))
    assert used["spilling"].registers == used["spilling"].most_registers == 64
    assert re.search(r"[1-9]\d* bytes spill stores", used["spilling"].memory)


def test_the_template_arguments_are_named_as_in_the_kernel():
    code = (jit.sources() / "rotary.cu").read_text()
    parameters = re.search(r"template <([^>]*)>\s*__global__", code).group(1).split(",")
    names = [re.sub(r"^k(?=[A-Z])", "", parameter.split()[-1]) for parameter in parameters]
    snake = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in names]
    assert snake == [*RotaryKernel._fields]


PLAIN = RotaryKernel(
    t="bfloat16",
    table="float",
    position="void",
    norm="NoNorm",
    destination="Outputs",
    tensors=2,
    interleaved=True,
    conjugate=True,
    eager=False,
    rows=2,
    pairs=4,
    form="OneAngle<1, 0>",
    copy_width=0,
    in_place=True,
    past_l1=False,
    common=True,
)


@pytest.mark.parametrize(
    "position",
    ["void", "int", "long long", "Offset<int>", "Packed<int, int>", "SectionedMrope<long long>"],
)
@pytest.mark.parametrize(("interleaved", "rows", "pairs"), [(False, 1, 8), (True, 2, 4)])
def test_the_kernels_of_plain_models_leave_room_for_40_warps(interleaved, rows, pairs, position):
    """Of a multiprocessor's 65,536 registers, which threads take by eights."""
    code = (jit.sources() / "rotary.cu").read_text()
    chosen = PLAIN._replace(
        position=position,
        interleaved=interleaved,
        conjugate=False,
        rows=rows,
        pairs=pairs,
        past_l1=position != "void",
    )
    _, used = usage(code, [chosen.name], (*OPTIONS, "-arch=sm_90"))
    assert used[chosen.name].registers <= 48


@pytest.mark.parametrize("table", ["float", "double", "frequency"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float", "double"])
def test_subnormal_numbers_are_not_flushed_to_zero(dtype, table):
    position = "TokenIndex" if table == "frequency" else "void"
    name = PLAIN._replace(t=dtype, table=table, position=position, pairs=2).name
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


def of_one_angle():
    part = spec((4096, 32), "float32")
    return TableSpec(part, part, 1, 0)


def of_matrices_apart():
    row = spec((4096, 32, 2), "float32", strides=(128, 1, 64))
    return TableSpec(row, row, 1, 0, "matrices")


HEADS, TOKENS = Norm("head", 1e-6, 0.0, True), Norm("heads", 1e-6, 0.0, True)
LAYERS, AFTER = Norm("layer", 1e-6, 0.0, True), Norm("layer", 1e-6, 0.0, False, True)


@pytest.mark.parametrize(
    ("table", "destination", "norm", "dtype"),
    [
        (of_one_angle, "out", None, "bfloat16"),
        (partial(frequencies, 64), "packed", HEADS, "bfloat16"),
        (partial(matrices, 64), "cache", None, "float64"),
        (of_matrices_apart, "out", None, "bfloat16"),
        (of_matrices_apart, "cache", TOKENS, "bfloat16"),
        (of_matrices_apart, "cache", HEADS, "float64"),
        (of_one_angle, "packed", LAYERS, "bfloat16"),
        (of_matrices_apart, "cache", AFTER, "float64"),
        (of_matrices_apart, "cache and k", HEADS, "bfloat16"),
    ],
)
def test_the_argument_block_is_packed_as_the_kernel_reads_it(table, destination, norm, dtype):
    """The compiler puts every field of the plan's description where its number is packed."""
    x, packed = spec((5, 2, 64), dtype), None
    xs, outs, arrays = [x, x], None, {}
    if destination == "packed":
        xs, packed = [spec((5, 6, 64), dtype)], Packed(2, 2)
        outs = xs
    elif destination.startswith("cache"):
        xs, outs = [x, x, x], [x, *[spec((9, 2, 64), dtype)] * 2]
        outs += [x] if destination == "cache and k" else []
        arrays = {"slot_mapping": spec((5,), "int32"), "cache": Cache("NHD", None, 1.0, 1.0)}
    plan = launch_plan(problem(xs, 64, outs, table(), norm=norm, packed=packed, **arrays))
    chosen, packer = plan.template, plan.packer
    norm = instance("", chosen.norm)[1:-1]
    types = chosen.t, chosen.table, chosen.form, norm, chosen.destination, chosen.tensors
    end = packer.fields[-1].offset + FIELD_BYTES
    checks = [
        ("sizeof(Block)", packer.size),
        ("sizeof(Block)", end),
        ("alignof(Block)", FIELD_BYTES),
        ("kAccessBytes", ACCESS_BYTES),
    ]
    for field in packer.fields:
        checks += [
            (f"__INTADDR__(&((Block*)0)->{field.name})", field.offset),
            (f"sizeof(((Block*)0)->{field.name})", struct.calcsize(field.type.format)),
            (f"sizeof({field.type.name})", FIELD_BYTES),
        ]
    code = f'#include "rotary.cu"\nusing Block = {instance("Arguments", *types)};\n'
    code += "\n".join(f'static_assert({left} == {right}, "{left}");' for left, right in checks)
    compiled(code, [], (*OPTIONS, "-arch=sm_90"))
