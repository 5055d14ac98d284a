"""Models of diffusers switched to rope_cupy by one call give what the models give."""

import importlib

import pytest
import torch
from tiny_diffusers import (
    CALLS,
    FLUX,
    HUNYUAN,
    LTX,
    QWEN,
    TINY,
    TOLERANCE,
    WAN,
    assert_switched,
    build,
    counted_calls,
    gradients,
    in_dtype,
    output_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

from rope_cupy.integrations import _diffusers_prologue as prologue
from rope_cupy.integrations import diffusers as integration
from rope_cupy.integrations._diffusers_stand_in import StandIn

# diffusers' own models import what it deprecates, and do what PyTorch warns of on the CPU.
pytestmark = pytest.mark.filterwarnings(
    *("ignore::FutureWarning", "ignore:Mismatch dtype", "ignore:In CPU autocast")
)


@pytest.fixture
def calls(monkeypatch):
    """The names of our functions that were called."""
    return counted_calls(monkeypatch)


IDS = [f"{i}-{tiny.name}" for i, tiny in enumerate(TINY)]
# Their attention has the stand-in of another model that is compiled: Flux, Wan, and so on.
ALIKE = "Chroma Bria LongCatImage OvisImage WanVACE ChronoEdit SkyReelsV2 HunyuanImage ConsisID"
COMPILED = [
    t for t in TINY if t.compiles and t.name.partition("Transformer")[0] not in ALIKE.split()
]


@pytest.mark.parametrize("tiny", TINY, ids=IDS)
def test_the_output_is_that_of_the_model(tiny, calls, monkeypatch):
    model, inputs = build(tiny)
    with torch.no_grad():
        expected = output_of(model, inputs)
        integration.enable(model)
        found = output_of(model, inputs)
        assert len(calls) == tiny.calls
        largest = expected.abs().max()
        assert torch.isfinite(expected).all() and largest > 0
        assert (found - expected).abs().max() <= TOLERANCE * largest
        for name in CALLS:
            function = getattr(prologue, name)
            monkeypatch.setattr(
                *(prologue, name),
                lambda *args, function=function, **options: function(
                    *args, **options, conjugate=True
                ),
            )
        assert (output_of(model, inputs) - expected).abs().max() > 2.0**-9 * largest
        integration.disable(model)
        assert torch.equal(output_of(model, inputs), expected)
    assert not any(isinstance(getattr(each, "processor", 0), StandIn) for each in model.modules())


@pytest.mark.parametrize("tiny", TINY, ids=IDS)
def test_training_gives_the_same_gradients(tiny, calls):
    model, inputs = build(tiny)
    expected = output_of(model, inputs)
    weights = torch.randn_like(expected)
    exact = gradients(model, expected, weights)
    integration.enable(model)
    found = output_of(model, inputs)
    assert len(calls) == tiny.calls * tiny.trains
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    largest = max(each.abs().max() for each in exact if each is not None)
    for ours, own in zip(gradients(model, found, weights), exact, strict=True):
        assert (ours is None) == (own is None)
        assert own is None or (ours - own).abs().max() <= 2.0**-18 * largest


@pytest.mark.parametrize("tiny", TINY, ids=IDS)
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_model(tiny, calls):
    model, inputs = build(tiny)
    exact = output_of(model, inputs)
    model, inputs = model.bfloat16(), in_dtype(inputs, torch.bfloat16)
    own = output_of(model, inputs).float()
    integration.enable(model)
    ours = output_of(model, inputs).float()
    assert len(calls) == tiny.calls
    error = (own - exact).norm()
    assert (ours - exact).norm() <= 1.1 * error and (ours - own).norm() <= 0.7 * error


@pytest.mark.parametrize("tiny", COMPILED, ids=lambda tiny: tiny.name)
@torch.no_grad()
def test_a_compiled_model_is_one_graph_with_our_operators(tiny):
    model, inputs = build(tiny)
    integration.enable(model)
    expected, operators = output_of(model, inputs), []

    def backend(graph, _):
        operators.extend(n for n in graph.graph.nodes if "rope_cupy" in str(n.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(output_of(compiled, inputs), expected)
    assert len(operators) == tiny.calls


@pytest.mark.parametrize("tiny", [t for t in TINY if not t.compiles], ids=lambda tiny: tiny.name)
@torch.no_grad()
def test_blocks_of_a_model_that_is_no_graph_are_compiled(tiny):
    model, inputs = build(tiny)
    integration.enable(model)
    expected = output_of(model, inputs)
    torch._dynamo.reset()
    for module in model.modules():
        if isinstance(getattr(module, "processor", None), StandIn):
            module.compile(fullgraph=True, backend="aot_eager")
    found = output_of(model, inputs)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("tiny", [FLUX, QWEN, WAN, LTX], ids=lambda tiny: tiny.name)
def test_a_compiled_model_trains(tiny):
    model, inputs = build(tiny)
    expected = output_of(model, inputs)
    weights = torch.randn_like(expected)
    exact = gradients(model, expected, weights)
    integration.enable(model)
    torch._dynamo.reset()
    found = output_of(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    largest = max(each.abs().max() for each in exact if each is not None)
    for ours, own in zip(gradients(model, found, weights), exact, strict=True):
        assert own is None or (ours - own).abs().max() <= 2.0**-18 * largest


@pytest.mark.parametrize("tiny", [FLUX, QWEN, HUNYUAN], ids=lambda tiny: tiny.name)
@torch.no_grad()
def test_q_and_k_of_text_and_image_are_written_where_they_are_joined(tiny):
    class Joined(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), options=None):
            result = function(*args, **options or {})
            if function is torch.ops.aten.cat.default and result.shape[2:].numel() == width:
                joined.append(result)
            return result

    model, inputs = build(tiny)
    attention = model.transformer_blocks[0].attn
    width, joined, counts = attention.to_q.out_features, [], []
    attention.register_forward_pre_hook(lambda *_: joined.clear())
    attention.register_forward_hook(lambda *_: counts.append(len(joined)))
    for switch in (lambda model: None, integration.enable):
        switch(model)
        with Joined():
            output_of(model, inputs)
    assert counts == [3, 0]  # q, k and v; none


@torch.no_grad()
def test_sequences_of_other_lengths_are_compiled_once():
    model, inputs = build(FLUX)
    integration.enable(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for length in (5, 6, 9):
        text = {"encoder_hidden_states": torch.randn(2, length, 12)}
        other = inputs | text | {"txt_ids": torch.zeros(length, 3)}
        assert torch.equal(output_of(compiled, other), output_of(model, other))
    assert len(graphs) == 1


@pytest.mark.parametrize("tiny", [FLUX, QWEN], ids=lambda tiny: tiny.name)
def test_training_recomputes_what_checkpoints_drop(tiny, calls):
    model, inputs = build(tiny)
    with torch.inference_mode():  # leaves no table that training could meet
        integration.enable(model)
        output_of(model, inputs)
    expected = output_of(model, inputs)
    weights = torch.randn_like(expected)
    exact = gradients(model, expected, weights)
    model.train().enable_gradient_checkpointing()
    del calls[:]
    found = output_of(model, inputs)
    again = gradients(model, found, weights)
    assert len(calls) == 2 * tiny.calls
    for ours, own in zip(again, exact, strict=True):
        assert own is None or torch.equal(ours, own)


def test_kandinsky_5_in_bfloat16(calls):
    # Its blocks need CUDA's autocast in bfloat16; its attention does not.
    module = importlib.import_module("diffusers.models.transformers.transformer_kandinsky")
    torch.manual_seed(7)
    attention = module.Kandinsky5Attention(32, 16)
    attention.query_norm.weight.data.uniform_(0.5, 1.5)
    positions = [torch.arange(n) for n in (3, 4, 5)]
    table = module.Kandinsky5RoPE3D((4, 4, 8))((1, 3, 4, 5), positions).flatten(1, 3)
    text_table = module.Kandinsky5RoPE1D(16)(torch.arange(60))[None]
    integration.enable(attention)
    x = torch.randn(1, 60, 32)
    attention(x, rotary_emb=table)
    assert calls == []  # the model rounds to bfloat16 on its way
    attention, x = attention.bfloat16(), x.bfloat16()
    for each in (table, text_table):
        found = attention(x, rotary_emb=each)
        own = attention.processor.original(attention, x, rotary_emb=each)
        assert (found - own).float().norm() <= 2.0**-8 * own.float().norm()
    assert len(calls) == 2


# Processors that models are given later, and attention that no small model has.


@torch.no_grad()
def test_flux_2_with_a_cache_is_switched_where_the_cache_is_not_used(calls):
    module = importlib.import_module("diffusers.models.transformers.transformer_flux2")
    tiny = next(tiny for tiny in TINY if tiny.name == "Flux2Transformer2DModel")
    model, inputs = build(tiny)
    model.transformer_blocks[0].attn.set_processor(module.Flux2KVAttnProcessor())
    single = model.single_transformer_blocks[0].attn
    single.set_processor(module.Flux2KVParallelSelfAttnProcessor())
    expected = output_of(model, inputs)
    integration.enable(model)
    found = output_of(model, inputs)
    assert len(calls) == tiny.calls
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    del calls[:]
    cached = inputs | {"kv_cache_mode": "extract", "num_ref_tokens": 4}
    found = model(**cached).sample
    assert calls == []
    integration.disable(model)
    assert torch.equal(model(**cached).sample, found)


def test_cogvideox_with_fused_projections(calls):
    tiny = next(tiny for tiny in TINY if tiny.name == "CogVideoXTransformer3DModel")
    model, inputs = build(tiny)
    model.fuse_qkv_projections()
    report = integration.enable(model)
    assert {each.processor for each in report.replaced} == {"FusedCogVideoXAttnProcessor2_0"}
    assert_switched(model, inputs, calls, tiny.calls)


@pytest.mark.parametrize("batches", [1, 2])
def test_wan_animate(calls, batches):
    module = importlib.import_module("diffusers.models.transformers.transformer_wan_animate")
    torch.manual_seed(3)
    attention = module.WanAttention(40, 2, 20, processor=module.WanAttnProcessor())
    torch.nn.init.uniform_(attention.norm_q.weight, 0.5, 1.5)
    x, angles = torch.randn(2, 9, 40), torch.randn(batches, 9, 1, 10).repeat_interleave(2, -1)
    expected = attention(x, rotary_emb=(angles.cos(), angles.sin()))
    integration.enable(attention)
    found = attention(x, rotary_emb=(angles.cos(), angles.sin()))
    assert len(calls) == 1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_control_net_of_z_image(calls):
    module = importlib.import_module("diffusers.models.controlnets.controlnet_z_image")
    torch.manual_seed(3)
    block = module.ZImageTransformerBlock(0, 32, 2, 2, 1e-5, True)
    table = torch.polar(torch.ones(2, 9, 8), torch.randn(2, 9, 8))
    inputs = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool), table, torch.randn(2, 32)
    expected = block(*inputs)
    integration.enable(block)
    found = block(*inputs)
    assert len(calls) == 1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
