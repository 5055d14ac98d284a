"""Models of transformers that one call switches to rope_cupy: the same results, and their own."""

import functools
import importlib

import pytest
import torch
from blocks import NUM_LAYERS, VISION, tokens, vision_model
from switched_models import (
    EACH,
    MODELS,
    NORM,
    NORMED,
    NOT_EAGER,
    ROTATE,
    TOLERANCE,
    assert_all_close,
    assert_close,
    built,
    counted,
    gradients,
    logits,
    state,
    switched,
    watched_calls,
)
from transformers import StaticCache

from rope_cupy.integrations import (
    _transformers_calls,
    _transformers_norms,
)
from rope_cupy.integrations.transformers import disable, enable


@pytest.fixture
def calls(monkeypatch):
    """The names of the calls that are made of rope_cupy."""
    return watched_calls(monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_by_one_call_a_layer_and_its_own_bits_afterwards(name, calls):
    model = built(name)
    expected, before = logits(model), state(model)
    report = switched(model, calls)
    assert_close(logits(model), expected)
    assert counted(calls) == MODELS[name][1]
    assert bool(report.norms) == any("norm" in each for each in MODELS[name][1])
    calls.spoiled = True
    assert (logits(model) - expected).abs().max() > 100 * TOLERANCE * expected.abs().max()
    calls.clear()
    disable(model)
    assert torch.equal(logits(model), expected)
    assert not calls
    assert state(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_all_weights_are_the_same(name, calls):
    model = built(name).train()
    expected = gradients(model)
    switched(model, calls)
    assert_all_close(gradients(model), expected, 10 * TOLERANCE)
    assert counted(calls) == MODELS[name][1]


WITH_BITS = [
    *((name, torch.bfloat16) for name in MODELS if name not in NOT_EAGER),
    *((name, torch.float16) for name in ("Llama, llama3", "Cohere", "ERNIE 4.5")),
    *((name, torch.float32) for name in ("Llama, llama3", "Helium", "DeepSeek-V3, YaRN")),
]


@pytest.mark.parametrize(("name", "dtype"), WITH_BITS)
def test_eager_rounding_gives_the_bits_of_the_model(name, dtype, calls):
    model = built(name).to(dtype)
    expected = logits(model)
    report = switched(model, calls, norm=False, rounding="eager")
    assert torch.equal(logits(model), expected)
    assert sum(counted(calls).values()) == sum(MODELS[name][1].values())
    assert not report.norms


@pytest.mark.parametrize("name", [name for name in MODELS if NORM in MODELS[name][1]])
def test_eager_rounding_of_norms_is_as_near_as_sums_are(name, calls):
    """One in a hundred elements of q and k may be one unit off, and no other is."""
    model = built(name).bfloat16()
    attention = next(
        each for each in model.modules() if hasattr(each, "k_norm") or hasattr(each, "k_layernorm")
    )
    norm = getattr(attention, "k_norm", None) or attention.k_layernorm
    kind = _transformers_norms.probe_norm(norm, "eager")
    width = norm.weight.shape[0]
    x = 3 * torch.randn(500, 1, width, generator=torch.Generator().manual_seed(4)).bfloat16()
    options = _transformers_norms.options_of(norm, kind, "head")
    table = torch.ones(500, width // 2).bfloat16(), torch.zeros(500, width // 2).bfloat16()
    found = _transformers_calls.apply_norm_rotary(
        x, norm.weight.detach(), table, layout="shd", rounding="eager", **options
    )
    with torch.no_grad():
        expected = norm(x)
    assert (found != expected).float().mean() < 0.01
    steps = found.view(torch.int16).int() - expected.view(torch.int16).int()
    assert steps.abs().max() <= 1
    assert any("norm" in name for name in enable(model, rounding="eager").norms)


def test_rounding_once_is_nearer_to_the_exact_model_than_its_own_operations():
    mask = torch.ones_like(tokens()["attention_mask"])
    exact = logits(built("Qwen3").double(), attention_mask=mask)
    model = built("Qwen3").bfloat16()
    own = (logits(model, attention_mask=mask) - exact).square().mean()
    enable(model)
    assert (logits(model, attention_mask=mask) - exact).square().mean() < own


def test_what_eager_rounding_has_no_bits_for_is_left_and_named():
    model = built("Llama 4, complex numbers")
    before = state(model)
    with pytest.raises(ValueError, match=r"got .*apply_rotary_emb.*does not give its bits"):
        enable(model, rounding="eager")
    assert state(model) == before
    report = enable(model, rounding="eager", strict=False)
    assert state(model) == before and not report.functions
    assert [*report.left] == ["transformers.models.llama4.modeling_llama4.apply_rotary_emb"]


# Models whose tokens have three positions, and encoders of images.


def seen(name):
    places = torch.randint(0, 40, (3, 2, 15), generator=torch.Generator().manual_seed(2))
    ids = torch.randint(1, 97, (2, 15), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "position_ids": places, "use_cache": False}


@pytest.mark.parametrize("name", VISION)
def test_the_text_of_a_model_that_sees_images_gives_the_same(name, calls):
    model = vision_model(name, 128)
    with torch.no_grad():
        expected = model(**seen(name)).last_hidden_state
        switched(model, calls)
        assert_close(model(**seen(name)).last_hidden_state, expected)
        assert counted(calls) == (EACH if name == "Qwen2-VL" else NORMED)
        disable(model)
        assert torch.equal(model(**seen(name)).last_hidden_state, expected)


def test_an_encoder_of_images_gives_the_same(calls):
    modeling = importlib.import_module("transformers.models.qwen2_vl.modeling_qwen2_vl")
    settings = importlib.import_module("transformers.models.qwen2_vl.configuration_qwen2_vl")
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2}
    torch.manual_seed(0)
    model = modeling.Qwen2VisionTransformerPretrainedModel(
        settings.Qwen2VLVisionConfig(**sizes, attn_implementation="eager")
    ).eval()
    grids = torch.tensor([[1, 4, 6], [1, 2, 4]])
    patches = torch.randn(32, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(patches, grid_thw=grids).last_hidden_state
        switched(model, calls)
        assert_close(model(patches, grid_thw=grids).last_hidden_state, expected)
    assert counted(calls) == {ROTATE: 2}


# What users do with a model.


def generated(model, **options):
    inputs = tokens()
    given = {"attention_mask": inputs["attention_mask"], "do_sample": False, "max_new_tokens": 12}
    return model.generate(inputs["input_ids"], **given, **options)


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama, llama3", "Qwen3", "Gemma 3", "DeepSeek-V3, YaRN"])
def test_generate_with_a_cache_gives_the_same_tokens(name, cache, calls):
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    model = built(name)
    expected = generated(model, **options)
    switched(model, calls)
    assert torch.equal(generated(model, **options), expected)
    assert sum(counted(calls).values()) == 12 * NUM_LAYERS


def test_a_cache_of_the_model_itself_goes_on_when_it_is_enabled(calls):
    """What a cache holds is the same: pairs are given back as the model gives them back."""
    for name in ("DeepSeek-V3, YaRN", "GLM, half of each head", "Qwen3"):
        model, inputs = built(name), tokens()["input_ids"]
        with torch.no_grad():
            expected = model(inputs).logits[:, 12:]
            cache = model(inputs[:, :12], use_cache=True).past_key_values
            switched(model, calls)
            assert_close(model(inputs[:, 12:], past_key_values=cache).logits, expected)
            assert counted(calls) == MODELS[name][1]


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 3", "GPT-OSS, YaRN without truncation"])
def test_gradient_checkpointing_gives_the_same(name, calls):
    model = built(name).train()
    switched(model, calls)
    expected = gradients(model)
    calls.clear()
    for reentrant in (False, True):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = functools.partial(
                    torch.utils.checkpoint.checkpoint, use_reentrant=reentrant
                )
        actual = gradients(model)
        assert_all_close(actual, expected, 1e-7)
        assert sum(counted(calls).values()) == 2 * NUM_LAYERS, "once more in the backward pass"


@pytest.mark.parametrize("name", ["Llama, llama3", "Qwen3", "OLMo 2, norms of all heads"])
def test_autocast_is_one_call_a_layer_too(name, calls):
    model = built(name).train()
    exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        own = gradients(model)
        switched(model, calls)
        found = gradients(model)
    assert counted(calls) == MODELS[name][1]
    assert found[0].dtype == own[0].dtype
    for weight, gradient in exact[1].items():
        largest = gradient.abs().max()
        assert found[1][weight].dtype == own[1][weight].dtype
        error = (found[1][weight] - gradient).abs().max()
        assert error <= 2 * (own[1][weight] - gradient).abs().max() + 1e-3 * largest


def compiled(model, ours=True):
    """A model in one graph, and its operators; one without ours is run as it was traced."""
    graphs = []

    def backend(graph, examples):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append([str(node.target) for node in graph.graph.nodes])
        return aot_eager(graph, examples) if ours else graph.forward

    return torch.compile(model, fullgraph=True, backend=backend), graphs


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = (
    *("Llama, llama3", "Qwen3", "Gemma 3", "OLMo 2, norms of all heads", "DeepSeek-V3, YaRN"),
    *("GPT-OSS, YaRN without truncation", "GLM, half of each head", "Llama 4, complex numbers"),
    *("EXAONE 4, a layer without a rotation", "HunYuan, norms after the rotation"),
)


def run_compiled(model, ours):
    """The logits of a compiled model, and the operators of its one graph."""
    torch._dynamo.reset()
    run, graphs = compiled(model, ours)
    result = logits(run)
    (graph,) = graphs
    return result, graph


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_one_graph_with_one_operator_a_layer(name):
    model = built(name)
    expected, graph = run_compiled(model, ours=False)
    roots = sum("rsqrt" in each for each in graph)
    enable(model)
    found, graph = run_compiled(model, ours=True)
    assert_close(found, expected)
    made = MODELS[name][1]
    assert sum("rope_cupy" in each for each in graph) == sum(made.values())
    assert sum("rsqrt" in each for each in graph) == roots - 2 * made.get(NORM, 0)


def guards_of(model, call=logits):
    """How many things a compiled model asks before it runs: all, and those of its modules."""
    counts = []

    def keep_all(guards):
        of_modules = ["self" in guard.name for guard in guards]
        counts.append((len(guards), sum(of_modules)))
        return [True] * len(guards)

    torch._dynamo.reset()
    options = {"guard_filter_fn": keep_all}
    run = torch.compile(model, fullgraph=True, dynamic=False, backend="eager", options=options)
    call(run)
    (count,) = counts
    return count


def step_of(model):
    """Run a model on one token."""
    with torch.no_grad():
        return model(tokens()["input_ids"][:, :1], use_cache=False)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["Llama, llama3", "Qwen3"])
def test_a_compiled_model_asks_little_more_before_it_runs(name):
    model = built(name)
    all_before, before = guards_of(model)
    enable(model)
    found, of_modules = guards_of(model)
    assert before > 50 * NUM_LAYERS  # or they have other names
    # Of each layer, its norms; all others are asked once.
    assert of_modules - before < 7 * NUM_LAYERS
    assert found - of_modules - (all_before - before) < 260


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["Llama, llama3", "Qwen3"])
def test_a_compiled_step_of_one_token_asks_next_to_nothing_more(name):
    model = built(name)
    before, _ = guards_of(model, step_of)
    enable(model)
    found, _ = guards_of(model, step_of)
    # What stands in for its functions; the number of layers counts for nothing.
    assert found - before <= 10


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["Llama, llama3", "Qwen3"])
def test_a_step_of_one_token_is_the_compilers_and_longer_ones_are_ours(name):
    model = built(name)
    inputs = tokens()["input_ids"]
    number = inputs.shape[1]
    outputs = {}
    for is_enabled in False, True:
        if is_enabled:
            enable(model)
        for length in 1, 3:
            cache = StaticCache(config=model.config, max_cache_len=number + 4)
            with torch.no_grad():
                model(inputs, past_key_values=cache)
                torch._dynamo.reset()
                run, graphs = compiled(model, ours=is_enabled)
                outputs[is_enabled, length] = run(inputs[:, :length], past_key_values=cache).logits
            (graph,) = graphs
            ours = sum("rope_cupy" in each for each in graph)
            assert ours == (NUM_LAYERS if is_enabled and length > 1 else 0)
    for length in 1, 3:
        assert_close(outputs[True, length], outputs[False, length])


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_trains():
    model = built("Qwen3").train()
    expected = gradients(model)
    enable(model)
    run, graphs = compiled(model)
    inputs = tokens()
    loss = run(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert_all_close((loss.detach(), found), expected, 10 * TOLERANCE)
    assert sum("rope_cupy" in each for each in graphs[0]) == NUM_LAYERS


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_may_be_compiled_before_it_is_enabled_and_disabled():
    model = built("Qwen3")
    run, graphs = compiled(model)
    expected = logits(run)
    enable(model)
    assert_close(logits(run), expected)
    disable(model)
    assert torch.equal(logits(run), expected)
    assert [any("rope_cupy" in each for each in graph) for graph in graphs][:2] == [False, True]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_operators(strict):
    model = built("Qwen3")
    enable(model)
    expected, inputs = logits(model), tokens()
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=strict)
    found = [str(node.target) for node in program.graph.nodes]
    assert sum(each.startswith("rope_cupy.") for each in found) == NUM_LAYERS
    with torch.no_grad():
        actual = program.module()(**inputs, use_cache=False).logits
    assert_close(actual[inputs["attention_mask"].bool()], expected)
