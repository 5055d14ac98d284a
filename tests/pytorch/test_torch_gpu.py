"""PyTorch on GPUs: CUDA graphs of gradients, streams, and devices that are not the current one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from streams import Stream
from test_compile import in_a_process

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk
from rope_cupy.torch import RotaryEmbedding

pytestmark = pytest.mark.gpu

TOKENS, PAIRS = 64, 32


def parts(device="cuda"):
    angles = torch.rand(TOKENS, PAIRS, device=device) * 6
    return angles.cos(), angles.sin()


def randn(heads=4, device="cuda", grad=False):
    return torch.randn(2, TOKENS, heads, 2 * PAIRS, device=device).requires_grad_(grad)


def step(q, k, weights, table):
    """Rotate forward and backward: the results and the gradients."""
    results = apply_rotary_qk(q, k, table)
    return *results, *torch.autograd.grad(results, (q, k), weights)


def assert_step(outcome, q, k, weights, table):
    with torch.no_grad():
        wanted = *apply_rotary_qk(q, k, table), *apply_rotary_qk(*weights, table, conjugate=True)
    assert all(map(torch.equal, outcome, wanted))


@pytest.mark.undisturbed
def test_a_graph_repeats_a_forward_and_a_backward_pass_on_new_numbers():
    table, q, k = RotaryTable(*parts()), randn(4, grad=True), randn(2, grad=True)
    weights, stream = (randn(4), randn(2)), Stream("torch-cuda")
    with stream.current():
        step(q, k, weights, table)
    stream.stream.synchronize()
    replay, outcome = stream.capture(lambda: step(q, k, weights, table))
    for _ in range(2):
        with stream.current(), torch.no_grad():
            for x in (q, k, *weights):
                x.normal_()
            replay()
        stream.stream.synchronize()
        assert_step(outcome, q, k, weights, table)


@pytest.mark.undisturbed
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # of PyTorch's own samples
def test_a_module_is_made_a_graph_with_gradients():
    module, q, k = (
        RotaryEmbedding(2 * PAIRS, max_position=TOKENS, device="cuda"),
        *map(randn, (4, 2)),
    )
    samples = tuple(x.clone().requires_grad_() for x in (q, k))
    graphed = torch.cuda.make_graphed_callables(module, samples)
    leaves = q.requires_grad_(), k.requires_grad_()
    weights = randn(4), randn(2)
    results = graphed(*leaves)
    gradients = torch.autograd.grad(results, leaves, weights)
    assert_step((*results, *gradients), q, k, weights, (module.cos, module.sin))


def compiled_with_graphs(grad):
    """Compare what is compiled with CUDA graphs, which must have been made, with eager calls."""
    from torch._dynamo.utils import counters

    table = RotaryTable(*parts())
    compiled = torch.compile(
        lambda q, k: apply_rotary_qk(q + 1, k * 2, table), mode="reduce-overhead", fullgraph=True
    )
    for _ in range(5):  # warmed up, captured, replayed
        q, k, weights = randn(4, grad=grad), randn(2, grad=grad), (randn(4), randn(2))
        torch.compiler.cudagraph_mark_step_begin()
        results = compiled(q, k)
        wanted = apply_rotary_qk(q + 1, k * 2, table)
        for mine, other in zip(results, wanted, strict=True):
            torch.testing.assert_close(mine, other)
        if grad:
            gradients = torch.autograd.grad(results, (q, k), weights)
            exact = torch.autograd.grad(wanted, (q, k), weights)
            for mine, other in zip(gradients, exact, strict=True):
                torch.testing.assert_close(mine, other)
    assert not counters["inductor"]["cudagraph_skips"], counters["inductor"]
    from torch._inductor.cudagraph_trees import get_container

    manager = get_container(0).tree_manager
    assert manager is not None and manager.new_graph_id().id > 0, "no graph has been captured"


@pytest.mark.undisturbed
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_code_is_captured_in_cuda_graphs(grad):
    in_a_process(f"import test_torch_gpu; test_torch_gpu.compiled_with_graphs({grad})")


@pytest.mark.undisturbed
def test_a_result_lies_in_memory_of_the_stream_that_writes_it():
    table, x, stream = RotaryTable(*parts()), randn(), Stream("torch-cuda")
    apply_rotary(x, table)
    with stream.current():
        stream.keep_busy()
        y = apply_rotary(x, table)
        pointer = y.data_ptr()
        del y  # while it is yet to be written
    others = [torch.empty_like(x) for _ in range(64)]
    assert stream.is_busy(), "the work is done, so this shows nothing"
    assert pointer not in [other.data_ptr() for other in others]
    stream.stream.synchronize()


@pytest.mark.undisturbed
def test_a_backward_pass_is_on_the_stream_of_its_forward_pass():
    table, stream = RotaryTable(*parts()), Stream("torch-cuda")
    x, weight, later = randn(grad=True), randn(), randn()
    torch.autograd.grad(apply_rotary(x, table), x, weight)  # its kernels are loaded
    torch.cuda.synchronize()
    with stream.current():
        y = apply_rotary(x, table)
        stream.keep_busy()
        weight.copy_(later)
        (grad,) = torch.autograd.grad(y, x, weight)
        assert stream.is_busy(), "the backward pass has waited"
    stream.stream.synchronize()
    assert torch.equal(grad, apply_rotary(later, table, conjugate=True))


def test_arrays_of_cupy_serve_beside_tensors_with_gradients():
    cupy = pytest.importorskip("cupy")
    cos, sin = parts()
    positions = torch.randint(TOKENS, (2, TOKENS), device="cuda")
    x, weight = randn(grad=True), randn()
    table = RotaryTable(cupy.asarray(cos), cupy.asarray(sin))
    y = apply_rotary(x, table, positions=cupy.asarray(positions))
    (grad,) = torch.autograd.grad(y, x, weight)
    assert torch.equal(y, apply_rotary(x, (cos, sin), positions=positions))
    exact = apply_rotary(weight, (cos, sin), positions=positions, conjugate=True)
    assert torch.equal(grad, exact)
    out = cupy.empty(x.shape, cupy.float32)
    assert apply_rotary(x.detach(), table, positions=positions, out=out) is out
    assert torch.equal(torch.from_dlpack(out), y)


# Several GPUs.

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
def test_a_gpu_that_is_not_the_current_one_turns_its_tensors_and_their_gradients():
    with torch.cuda.device(0):
        table = RotaryTable(*parts("cuda:1"))
        q, k = randn(4, "cuda:1", True), randn(2, "cuda:1", True)
        weights = randn(4, "cuda:1"), randn(2, "cuda:1")
        outcome = step(q, k, weights, table)
        assert torch.cuda.current_device() == 0
    assert {str(part.device) for part in outcome} == {"cuda:1"}
    with torch.cuda.device(1):
        assert_step(outcome, q, k, weights, table)


@two_gpus
def test_a_side_stream_of_another_gpu_is_the_one_that_is_current_there():
    with torch.cuda.device(1):
        table, x, later = RotaryTable(*parts("cuda:1")), randn(4, "cuda:1"), randn(4, "cuda:1")
        apply_rotary(x, table)
        stream = Stream("torch-cuda")
    with torch.cuda.stream(stream.stream), torch.cuda.device(0):
        with torch.cuda.device(1):
            stream.keep_busy()
            x.copy_(later)
        y = apply_rotary(x, table)
        assert stream.is_busy(), "the call has waited for the work before it"
    stream.stream.synchronize()
    assert torch.equal(y, apply_rotary(later, table))


@two_gpus
@pytest.mark.parametrize("capture", [False, True])
def test_compiled_code_runs_on_another_gpu(capture):
    torch.compiler.reset()
    table, q, k = RotaryTable(*parts("cuda:1")), randn(4, "cuda:1"), randn(2, "cuda:1")
    compiled = torch.compile(
        lambda q, k: apply_rotary_qk(q, k, table), fullgraph=True, backend="aot_eager"
    )
    wanted = apply_rotary_qk(q, k, table)
    if not capture:
        assert all(map(torch.equal, compiled(q, k), wanted))
        return
    compiled(q, k)
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        # By default all captures use one stream, which lies on the device of the first.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            results = compiled(q, k)
        graph.replay()
    assert all(map(torch.equal, results, wanted))


@two_gpus
@pytest.mark.parametrize("argument", ["k", "table", "positions", "out"])
def test_tensors_of_different_gpus_are_refused(argument):
    on = dict.fromkeys(("k", "table", "positions", "out"), "cuda:0") | {argument: "cuda:1"}
    q, k = randn(4, "cuda:0"), randn(2, on["k"])
    out = torch.zeros_like(q, device=on["out"]), torch.zeros_like(k)
    positions = torch.arange(TOKENS, device=on["positions"])
    with pytest.raises(ValueError, match=rf"{argument} must .*, got .*"):
        apply_rotary_qk(q, k, parts(on["table"]), positions=positions, out=out)
    assert not out[0].any() and not out[1].any()


@two_gpus
@pytest.mark.parametrize("set_device", [False, True])
def test_two_threads_turn_what_is_on_two_gpus(set_device):
    def work(number):
        device = f"cuda:{number}"
        if set_device:
            torch.cuda.set_device(number)
        generator = torch.Generator(device).manual_seed(number)
        table = RotaryTable(*parts(device))
        for tokens in range(1, TOKENS + 1):
            q, k = (
                torch.randn(2, tokens, heads, 2 * PAIRS, device=device, generator=generator)
                for heads in (4, 2)
            )
            weights = torch.randn_like(q), torch.randn_like(k)
            leaves = q.requires_grad_(), k.requires_grad_()
            for _ in range(3):
                outcome = step(*leaves, weights, table)
                assert_step(outcome, *leaves, weights, table)
        return [str(part.device) for part in outcome]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(work, range(2))) == [["cuda:0"] * 4, ["cuda:1"] * 4]


@two_gpus
def test_cupy_and_torch_meet_on_another_gpu():
    cupy = pytest.importorskip("cupy")
    cos, sin = parts("cuda:1")
    q, k = randn(4, "cuda:1"), randn(2, "cuda:1")
    wanted = apply_rotary_qk(q, k, (cos, sin))
    torch.cuda.synchronize(1)
    with cupy.cuda.Device(1):
        table = RotaryTable(cupy.asarray(cos), cupy.asarray(sin))
        k_out = cupy.empty(k.shape, cupy.float32)
        mine = cupy.asarray(k)
    q_out = torch.empty_like(q)
    assert cupy.cuda.runtime.getDevice() == 0
    apply_rotary_qk(q, mine, table, out=(q_out, k_out))
    torch.cuda.synchronize(1)
    assert torch.equal(q_out, wanted[0]) and torch.equal(torch.from_dlpack(k_out), wanted[1])
