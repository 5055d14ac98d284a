"""DTensors in two processes: sharded q and k turn where they are, by their tokens' positions."""

import copy
import itertools
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_compile import environment
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk
from rope_cupy.torch import RotaryEmbedding
from rope_cupy.ways.dtensor import _part

WORLD = 2
PLACES = {"b": 0, "s": 1, "h": 2, "": None}  # axes of (b, s, h, d)


CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.undisturbed])


def in_processes(module, checks, device, tmp_path):
    """Run functions of a module, one after another, in processes that share a mesh."""
    if device == "cuda" and torch.cuda.device_count() < WORLD:
        pytest.skip(f"wants {WORLD} GPUs")
    functions = ", ".join(f"{module}.{check}" for check in checks)
    code = f"import test_dtensor, {module}; test_dtensor.run([{functions}], {device!r}, "
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code}{rank}, {str(tmp_path / 'store')!r})"],
            cwd=Path(__file__).parent,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_two_processes(device, tmp_path):
    checks = "check_axes", "check_tables", "check_others", "check_compiled", "check_fsdp"
    in_processes("test_dtensor", checks, device, tmp_path)


@pytest.mark.parametrize("mesh", [(2,), (3,), (4, 2), (2, 3)])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 12, 13])
def test_a_process_has_the_chunks_that_torch_makes(mesh, size):
    for place in itertools.product(*map(range, mesh)):
        for sharded in itertools.product((True, False), repeat=len(mesh)):
            tokens = torch.arange(size)
            for number, rank, is_sharded in zip(mesh, place, sharded, strict=True):
                if is_sharded:
                    chunks = tokens.chunk(number)
                    tokens = chunks[rank] if rank < len(chunks) else tokens[:0]
            x = SimpleNamespace(
                shape=(3, size),
                device_mesh=SimpleNamespace(
                    size=mesh.__getitem__, get_local_rank=place.__getitem__
                ),
                placements=[Shard(1) if is_sharded else Replicate() for is_sharded in sharded],
            )
            part = _part("s", x, 1)
            assert [*range(part.start, part.stop)] == tokens.tolist() and part.of == size


def run(checks, device, rank, store):
    backend = "gloo" if device == "cpu" else "nccl"
    if device == "cuda":
        torch.cuda.set_device(rank)
    options = {"rank": rank, "world_size": WORLD, "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", **options)
    for check in checks:
        torch.manual_seed(0)  # every process has the whole tensors
        check(torch.distributed.init_device_mesh(device, (WORLD,)), device)
        torch.compiler.reset()
        torch.distributed.barrier()
    os._exit(0)  # past gloo's threads, whose end may abort a process that has done its work


def parts(device, *shape):
    angles = torch.rand(*shape, 32, device=device) * 6
    return angles.cos(), angles.sin()


def distribute(x, mesh, axis, axes="bshd"):
    placement = Replicate() if not axis else Shard(axes.index(axis))
    return distribute_tensor(x, mesh, [placement])


def compare(mesh, axis, q, k, table, axes="bshd", **options):
    """Rotate sharded tensors, forward and backward, without a word to the other process."""
    from torch.distributed.tensor.debug import CommDebugMode

    wholes = [x.detach().requires_grad_() for x in (q, k)]
    wanted = apply_rotary_qk(*wholes, table, **options)
    weights = [torch.randn_like(x) for x in wholes]
    exact_grads = torch.autograd.grad(wanted, wholes, weights)
    shards = [distribute(x.detach(), mesh, axis, axes).requires_grad_() for x in (q, k)]
    shard_weights = [distribute(x, mesh, axis, axes) for x in weights]
    with CommDebugMode() as messages:
        results = apply_rotary_qk(*shards, table, **options)
        grads = torch.autograd.grad(results, shards, shard_weights)
    assert messages.get_total_counts() == 0
    parts = zip((*results, *grads), (*wanted, *exact_grads), 2 * shards, strict=True)
    for result, exact, shard in parts:
        assert result.placements == shard.placements
        assert torch.equal(result.full_tensor(), exact)
    for result, exact in zip(results, wanted, strict=True):
        assert result.shape == exact.shape and result.stride() == exact.stride()


def check_axes(mesh, device):
    table = parts(device, 64)
    q, k = (torch.randn(2, 7, heads, 64, device=device) for heads in (4, 2))  # 7: uneven shards
    by_batch = torch.randint(64, (2, 7), device=device)
    for axis, positions in itertools.product("bsh", (None, 9, by_batch[0], by_batch, by_batch[:1])):
        compare(mesh, axis, q, k, table, positions=positions)
        compare(mesh, axis, q, k, table, positions=positions, conjugate=True, interleaved=True)
    compare(mesh, "", q, k, table)
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    for axis in "bsh":
        compare(mesh, axis, q, k, table, "bhsd", layout="bhsd", positions=by_batch)
    offsets, axes = torch.tensor([3, 40], device=device), by_batch.repeat(3, 1, 1) * 5 % 64
    for axis in "bsh":
        q, k = (torch.randn(2, 7, heads, 64, device=device) for heads in (4, 2))
        compare(mesh, axis, q, k, table, seqlen_offsets=offsets)
        compare(mesh, axis, q, k, table, seqlen_offsets=offsets, positions=2)
        compare(mesh, axis, q, k, table, seqlen_offsets=9)
        for rows in (axes, axes[:, :1], axes[:, 0]):
            sections = {"positions": rows, "mrope_section": (12, 11, 9)}
            compare(mesh, axis, q, k, table, **sections)
            compare(mesh, axis, q, k, table, **sections, mrope_interleaved=True)
    ends = torch.tensor([0, 3, 7], device=device)
    compare(mesh, "h", q[:1], k[:1], table, cu_seqlens=ends, seqlen_offsets=offsets)
    with pytest.raises(ValueError, match="cu_seqlens must be None where tokens are sharded"):
        apply_rotary(distribute(q[:1], mesh, "s"), table, cu_seqlens=ends)
    one = torch.randn(1, 1, 1, 64, device=device)  # which one process has, and the other not
    for axis in "bsh":
        compare(mesh, axis, one, one + 1, table, positions=by_batch[:1, :1])
        compare(mesh, axis, one, one.repeat(1, 1, 2, 1), parts(device, 1, 1, 1))
    # Zigzag: of four pieces the first process has the outer ones.
    order = torch.arange(8, device=device).view(4, 2)[[0, 3, 1, 2]].flatten()
    q, k = (torch.randn(2, 8, heads, 64, device=device)[:, order] for heads in (4, 2))
    compare(mesh, "s", q, k, table, positions=order)


def check_tables(mesh, device):
    q, k = (torch.randn(2, 6, 4, 64, device=device) for _ in "qk")
    computed = {"like": q, "precompute": False}
    table = RotaryTable.from_inverse_frequencies(torch.rand(32), **computed)
    for axis, positions in itertools.product("bsh", (None, 10**6, torch.randint(99, (2, 6)))):
        rows = positions.to(device) if isinstance(positions, torch.Tensor) else positions
        compare(mesh, axis, q, k, table, positions=rows)
    for shape in ((2, 6), (1, 6), (2, 6, 4), (2, 6, 1)):
        cos, sin = parts(device, *shape)
        matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
        full = RotaryTable.from_full_width(*(part.repeat_interleave(2, -1) for part in (cos, sin)))
        for axis in "bsh":
            compare(mesh, axis, q, k, (cos, sin))
            compare(mesh, axis, q, k, full, interleaved=True)
            compare(mesh, axis, q, k, RotaryTable.from_matrices(matrices), interleaved=True)


def check_others(mesh, device):
    table = parts(device, 64)
    x = torch.randn(2, 6, 4 * 64, device=device)
    wanted = apply_rotary(x, table, head_dim=64)
    for axis in "bsh":
        shard = distribute(x, mesh, axis, "bsh")
        assert torch.equal(apply_rotary(shard, table, head_dim=64).full_tensor(), wanted)
        assert apply_rotary(shard, table, head_dim=64, out=shard) is shard
        assert torch.equal(shard.full_tensor(), wanted)
    q = torch.randn(2, 6, 4, 64, device=device)
    replicated = tuple(distribute(part, mesh, "") for part in table)
    result = apply_rotary(distribute(q, mesh, "s"), replicated)
    assert torch.equal(result.full_tensor(), apply_rotary(q, table))

    for sizes in ((2, 1), (1, 2)):  # a mesh of two axes, and tokens that both of them cut
        plane = torch.distributed.init_device_mesh(device, sizes)
        for placements in ((Shard(0), Shard(1)), (Shard(1), Shard(1)), (Shard(2), Shard(1))):
            shard = distribute_tensor(q, plane, placements)
            result = apply_rotary(shard, table)
            assert result.placements == placements
            assert torch.equal(result.full_tensor(), apply_rotary(q, table))

    def refused(error, message, function, *arguments, **options):
        with pytest.raises(error, match=message):
            function(*arguments, **options)

    refused(ValueError, "sharded within a head", apply_rotary, distribute(q, mesh, "d"), table)
    odd = distribute(torch.randn(2, 6, 3 * 64, device=device), mesh, "h", "bsh")
    refused(ValueError, "sharded within a head", apply_rotary, odd, table, head_dim=64)
    partial = DTensor.from_local(q, mesh, [Partial()])
    refused(ValueError, "must be sharded or replicated", apply_rotary, partial, table)
    pair = distribute(q, mesh, "s"), distribute(q, mesh, "h")
    refused(ValueError, "q's mesh and placements", apply_rotary_qk, *pair, table)
    refused(TypeError, "k must be a DTensor", apply_rotary_qk, pair[0], q, table)
    shards = tuple(distribute(part, mesh, "b") for part in table)
    refused(ValueError, "plain tensor or replicated", apply_rotary, pair[0], shards)
    leaf = distribute(q, mesh, "s").requires_grad_()
    refused(ValueError, "out must be None", apply_rotary, leaf, table, out=leaf)


def check_compiled(mesh, device):
    table = RotaryTable(*parts(device, 64))
    q, k = (torch.randn(2, 6, heads, 64, device=device) for heads in (4, 2))
    compiled = torch.compile(
        lambda q, k: apply_rotary_qk(q, k, table), fullgraph=True, backend="aot_eager"
    )
    for axis in "bsh":
        shards = [distribute(x, mesh, axis).requires_grad_() for x in (q, k)]
        results = compiled(*shards)
        for result, wanted in zip(results, apply_rotary_qk(q, k, table), strict=True):
            assert torch.equal(result.full_tensor(), wanted)
            assert result.placements == shards[0].placements
        sum(result.to_local().sum() for result in results).backward()
        wanted = apply_rotary(torch.ones_like(q), table, conjugate=True)
        assert torch.equal(shards[0].grad.full_tensor(), wanted)


class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = (torch.nn.Linear(64, 4 * 64, bias=False) for _ in "qk")
        self.rotary = RotaryEmbedding(64, max_position=16)

    def forward(self, x):
        heads = (part(x).unflatten(-1, (4, 64)) for part in (self.q, self.k))
        q, k = self.rotary(*heads)
        return torch.einsum("bqhd, bkhd -> bhqk", q, k).tanh()


def check_fsdp(mesh, device):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole, x = Scores().to(device), torch.randn(WORLD, 9, 64, device=device)
    table = whole.rotary.cos, whole.rotary.sin
    whole(x).square().mean().backward()
    mine = x[mesh.get_local_rank() :][:1]
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(whole)
        model.zero_grad()
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        for module in (model.rotary, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        scores = model(mine)
        assert scores.dtype == dtype
        scores.float().square().mean().backward()
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.1, "atol": 1e-2}
        for part, exact in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(part.grad.full_tensor(), exact.grad, **tolerance)
        assert all(map(torch.equal, (model.rotary.cos, model.rotary.sin), table))
    with torch.device("meta"):
        model = Scores()
    fully_shard(model, mesh=mesh)
    assert model.rotary.cos.is_meta
    model.to_empty(device=device)
    assert all(map(torch.equal, (model.rotary.cos, model.rotary.sin), table))
