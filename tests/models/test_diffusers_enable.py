"""What enable and disable do to models of diffusers: stand-ins, weights, tables, refusals."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny_diffusers import (
    FLUX,
    LTX,
    QWEN,
    TOLERANCE,
    WAN,
    assert_switched,
    build,
    counted_calls,
    output_of,
)

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


# Weights are read when a call is made.


class LoRA(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("tiny", [FLUX, QWEN, WAN], ids=lambda tiny: tiny.name)
def test_replaced_projections_and_weights_are_used(tiny, calls):
    model, inputs = build(tiny)
    before = output_of(model, inputs)
    integration.enable(model)
    for module in [*model.modules()]:
        if isinstance(getattr(module, "processor", None), StandIn):
            module.to_q, module.to_k = LoRA(module.to_q), LoRA(module.to_k)
            module.norm_q.weight = torch.nn.Parameter(torch.rand_like(module.norm_q.weight) + 1)
            module.norm_k.weight.data = torch.rand_like(module.norm_k.weight) + 1
    after = assert_switched(model, inputs, calls, tiny.calls)
    assert (after - before).abs().max() > 2.0**-9 * before.abs().max()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_switched_with_weights_of_its_own(copied, calls):
    model, inputs = build(FLUX)
    integration.enable(model)
    with torch.no_grad():
        expected = output_of(model, inputs)
        other = copied(model)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        assert torch.equal(output_of(model, inputs), expected)
    assert_switched(other, inputs, calls, FLUX.calls)
    assert isinstance(model.transformer_blocks[0].attn.processor, StandIn)


@pytest.mark.parametrize("tiny", [FLUX, WAN], ids=lambda tiny: tiny.name)
def test_fused_projections_are_used(tiny, calls):
    model, inputs = build(tiny)
    integration.enable(model)
    model.fuse_qkv_projections()
    for module in model.modules():
        if getattr(module, "fused_projections", False) and hasattr(module, "to_qkv"):
            module.to_q.weight.data.fill_(torch.nan)
    assert torch.isfinite(assert_switched(model, inputs, calls, tiny.calls)).all()


@torch.no_grad()
def test_tables_are_those_of_the_call():
    model, inputs = build(FLUX)
    integration.enable(model)
    first = output_of(model, inputs)
    other = inputs | {"img_ids": inputs["img_ids"] + 3}
    assert not torch.equal(output_of(model, other), first)
    assert torch.equal(output_of(model, inputs), first)


# Calls that are left to the original.


def refusals():
    """Ways to change an attention's norm or processor that its stand-in does not know."""

    def hook(attn):
        attn.norm_q.register_forward_hook(lambda *_: None)

    def own_forward(attn):
        attn.norm_k.forward = type(attn.norm_k).forward.__get__(attn.norm_k)

    def other_eps(attn):
        attn.norm_k.eps = 0.5

    def no_norm(attn):
        attn.norm_q = torch.nn.Identity()

    def other_dtype(attn):
        attn.norm_q.double()

    def subclass(attn):
        attn.norm_q.__class__ = type("Other", (type(attn.norm_q),), {})

    return [hook, own_forward, other_eps, no_norm, other_dtype, subclass]


@pytest.mark.parametrize("change", refusals(), ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_norm_that_is_not_known_is_left_to_the_original(change, calls):
    model, inputs = build(LTX)
    integration.enable(model)
    changed = [m for m in model.modules() if isinstance(getattr(m, "processor", 0), StandIn)]
    for attn in changed:
        change(attn)
    found = output_of(model, inputs)
    assert calls == []
    integration.disable(model)
    assert torch.equal(output_of(model, inputs), found)


@torch.no_grad()
def test_autocast_and_a_call_without_a_table_are_left_to_the_original(calls):
    model, inputs = build(WAN)
    integration.enable(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = output_of(model, inputs)
    assert calls == []
    attn = model.blocks[0].attn1
    x = torch.randn(1, 60, 40)
    without = attn(x)
    assert calls == []
    table = model.rope(torch.empty(1, 4, 3, 8, 10))
    attn(x, rotary_emb=table)
    assert len(calls) == 1
    with pytest.raises(TypeError, match=r"WanAttnProcessor.__call__\(\) .* 'temb'"):
        attn(x, rotary_emb=table, temb=x)
    integration.disable(model)
    assert torch.equal(attn(x), without)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output_of(model, inputs), found)


def test_attention_that_processes_share_is_left_to_the_original(calls, monkeypatch):
    model, inputs = build(WAN)
    integration.enable(model)
    own = model.blocks[0].attn1.processor.original
    seen = []

    def parallel(self, attn, hidden_states, *rest):
        seen.append(self._parallel_config)
        return hidden_states

    monkeypatch.setattr(type(own), "__call__", parallel)
    for block in model.blocks:
        block.attn1.processor._parallel_config = "ring"  # as enable_parallelism sets it
    output_of(model, inputs)
    assert calls == [] and seen == ["ring", None] * 2 and own._parallel_config == "ring"


def test_a_stand_in_behaves_as_the_processor_that_it_stands_for():
    model, _ = build(FLUX)
    own = dict(model.attn_processors)
    integration.enable(model)
    model.set_attention_backend("_native_math")
    assert {p._attention_backend for p in own.values()} == {"_native_math"}
    model.reset_attention_backend()
    for name, processor in model.attn_processors.items():
        assert processor.original is own[name] and processor._attention_backend is None
        assert inspect.signature(processor.__call__) == inspect.signature(own[name].__call__)
        assert type(type(processor)()) is type(processor)  # loaders of diffusers make new ones


@torch.no_grad()
def test_layers_are_skipped_by_the_hooks_of_diffusers():
    config = diffusers.LayerSkipConfig(
        indices=[0], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True
    )
    outputs = []
    for switched in (False, True):
        model, inputs = build(QWEN)
        if switched:
            integration.enable(model)
        whole = output_of(model, inputs)
        diffusers.hooks.apply_layer_skip(model, config)
        outputs.append(output_of(model, inputs))
        assert (outputs[-1] - whole).abs().max() > 2.0**-9 * whole.abs().max()
    assert (outputs[0] - outputs[1]).abs().max() <= TOLERANCE * outputs[0].abs().max()


# What is switched.


def test_the_report_says_what_was_replaced_and_what_was_left():
    model, _ = build(WAN)
    report = integration.enable(model)
    assert [each.path for each in report.replaced] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert {each.processor for each in report.replaced + report.left} == {"WanAttnProcessor"}
    assert [each.path for each in report.left] == ["blocks.0.attn2", "blocks.1.attn2"]
    reason = "it is cross-attention, which rotates nothing"
    assert {each.reason for each in report.left} == {reason}
    assert str(report) == f"replaced 2 WanAttnProcessor\nleft 2 WanAttnProcessor: {reason}"
    processors = [block.attn1.processor for block in model.blocks]
    assert integration.enable(model) == report
    assert [block.attn1.processor for block in model.blocks] == processors


def test_a_pipeline_is_switched_in_all_its_models():
    flux, _ = build(FLUX)
    wan, _ = build(WAN)
    pipeline = SimpleNamespace(transformer=flux, transformer_2=wan, scheduler=object())
    report = integration.enable(pipeline)
    assert {each.path.split(".")[0] for each in report.replaced} == {"transformer", "transformer_2"}
    integration.disable(pipeline)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "transformer": flux}
    parts |= {"text_encoder_2": None, "tokenizer_2": None}
    pipeline = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), **parts)
    assert len(integration.enable(pipeline).replaced) == 2
    assert isinstance(pipeline.transformer.transformer_blocks[0].attn.processor, StandIn)
    integration.disable(pipeline)
    assert not isinstance(flux.transformer_blocks[0].attn.processor, StandIn)


def test_what_has_no_attention_that_is_known_is_refused():
    with pytest.raises(TypeError, match=r"pipeline that has modules, got SimpleNamespace"):
        integration.enable(SimpleNamespace(transformer=None))
    with pytest.raises(TypeError, match=r"got str"):
        integration.disable("flux")
    with pytest.raises(ValueError, match=r"got: no attention"):
        integration.enable(torch.nn.Linear(2, 2))
    model, _ = build(WAN)
    for block in model.blocks:
        block.attn1.norm_q = torch.nn.LayerNorm(40)
    with pytest.raises(ValueError, match=r"left 2 WanAttnProcessor: its norm is of no class"):
        integration.enable(model)
    assert not any(isinstance(getattr(each, "processor", 0), StandIn) for each in model.modules())


def test_a_processor_whose_parameters_are_new_is_left(monkeypatch):
    model, _ = build(FLUX)
    processor = type(model.transformer_blocks[0].attn.processor)
    own = processor.__call__

    def newer(self, attn, hidden_states, *args, something=None, **options):
        return own(self, attn, hidden_states, *args, **options)

    monkeypatch.setattr(processor, "__call__", newer)
    with pytest.raises(ValueError, match=r"parameters are not those that are known"):
        integration.enable(model)
