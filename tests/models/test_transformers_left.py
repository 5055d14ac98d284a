"""What is left to a model of transformers, and named; all rotary functions of that library."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest
import torch
import transformers
from blocks import NUM_LAYERS
from switched_models import (
    ROTATE,
    Rotating,
    built,
    counted,
    random,
    rotated,
    state,
    switched,
    watched_calls,
)
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rope_cupy.integrations import (
    _transformers_classes,
    _transformers_forms,
    _transformers_norms,
)
from rope_cupy.integrations.transformers import Report, disable, enable


@pytest.fixture
def calls(monkeypatch):
    """The names of the calls that are made of rope_cupy."""
    return watched_calls(monkeypatch)


class Special(torch.Tensor):
    """Whose operations may mean something else."""


FITTING = {
    "by head": ((2, 4, 6, 8), (2, 2, 6, 8), (2, 6, 8), {}),
    "one table for all": ((2, 4, 6, 8), (2, 2, 6, 8), (1, 6, 8), {}),
    "one token": ((2, 4, 1, 8), (2, 2, 1, 8), (2, 1, 8), {}),
    "no token": ((2, 4, 0, 8), (2, 2, 0, 8), (2, 0, 8), {}),
    "by token": ((2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 8), {"unsqueeze_dim": 2}),
    "counted from the end": ((2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 8), {"unsqueeze_dim": -2}),
    "packed": ((6, 4, 8), (6, 2, 8), (6, 8), {}),
    "positions": ((2, 4, 6, 8), (2, 2, 6, 8), (6, 8), {"unsqueeze_dim": 0}),
}
UNUSUAL = {
    "broadcast tokens": ((2, 4, 6, 8), (2, 2, 6, 8), (2, 1, 8), {}),
    "broadcast q": ((1, 4, 6, 8), (1, 2, 6, 8), (2, 6, 8), {}),
    "broadcast angles": ((2, 4, 6, 8), (2, 2, 6, 8), (2, 6, 1), {}),
    "more angles than tokens": ((2, 4, 1, 8), (2, 2, 1, 8), (2, 6, 8), {}),
    "other batches": ((2, 4, 6, 8), (1, 2, 6, 8), (1, 6, 8), {}),
    "five axes": ((3, 2, 4, 6, 8), (3, 2, 2, 6, 8), (2, 6, 8), {}),
}


@pytest.mark.parametrize("case", [*FITTING, *UNUSUAL])
def test_arguments_that_the_probe_has_not_covered_go_to_the_function_itself(case, calls, caplog):
    caplog.set_level("DEBUG", "rope_cupy")
    q, k, angles, options = (FITTING | UNUSUAL)[case]
    module = Rotating()
    module.options.update(options)
    given = random(*q), random(*k), random(*angles), random(*angles).flip(-1)
    expected = rotated(module, *given)
    switched(module, calls)
    found = rotated(module, *given)
    assert counted(calls) == ({ROTATE: 1} if case in FITTING else {})
    said = [each.message.partition(":")[0] for each in caplog.records]
    assert said == ([] if case in FITTING else [f"left to {apply_rotary_pos_emb.__name__}"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_dtypes_and_kinds_go_to_the_function_itself(calls):
    module = Rotating()
    q, k, cos, sin = random(2, 4, 6, 8), random(2, 2, 6, 8), random(2, 6, 8), random(2, 6, 8)
    cases = [
        (q.bfloat16(), k.bfloat16(), cos, sin),  # which gives float32
        (q, k.bfloat16(), cos, sin),
        (q.int(), k.int(), cos, sin),
        (q, k, cos, sin.double()),
        (q.as_subclass(Special), k, cos, sin),
    ]
    expected = [module(*each) for each in cases]
    switched(module, calls)
    for given, wanted in zip(cases, expected, strict=True):
        for actual, each in zip(module(*given), wanted, strict=True):
            assert actual.dtype == each.dtype
            torch.testing.assert_close(actual, each, rtol=1e-5, atol=1e-5)
    assert not calls


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_gradients_of_the_angles_and_transforms_go_to_the_function_itself():
    q, k, cos, sin = random(2, 4, 6, 8), random(2, 2, 6, 8), random(2, 6, 8), random(2, 6, 8)
    module = Rotating()

    def results():
        angles = cos.clone().requires_grad_()
        module(q, k, angles, sin)[0].square().sum().backward()
        batched = torch.func.vmap(lambda x: module(x, k, cos, sin)[0])(torch.stack([q, 2 * q]))
        tangent = torch.func.jvp(lambda x: module(x, k, cos, sin)[0], (q,), (q.flip(0),))[1]
        return angles.grad, batched, tangent

    expected = results()
    enable(module)
    for actual, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def rotate_by_signs(q, k, cos, sin):
    """No rotation that anybody knows."""
    return q * cos + k * sin, k * cos


def apply_rotary_by_position(q, k, v, cos, sin, position_ids):
    return apply_rotary_pos_emb(q, k, cos[position_ids], sin[position_ids])


class Unknown(nn.Module):
    def forward(self, q, k, cos, sin):
        return rotate_by_signs(q, k, cos, sin)


class Both(nn.Module):
    def forward(self, q, k, cos, sin):
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        places = torch.arange(q.shape[2])[None]
        q, k = apply_rotary_by_position(q, k, None, cos[0], sin[0], places)
        return rotate_by_signs(q, q, cos[:, None], sin[:, None])


def test_a_function_that_is_not_recognised_is_left_and_named(calls):
    module = Both()
    given = random(2, 4, 6, 8), random(2, 2, 6, 8), random(2, 6, 8), random(2, 6, 8)
    expected = rotated(module, *given)
    report = switched(module, calls)
    assert {*report.left} == {
        f"{__name__}.rotate_by_signs",
        f"{__name__}.apply_rotary_by_position",
    }
    assert "Both.forward: switched in 1 modules" in str(report)
    assert "rotate_by_signs: left to the model, because" in str(report)
    torch.testing.assert_close(rotated(module, *given), expected, rtol=1e-5, atol=1e-5)
    assert counted(calls) == {ROTATE: 1}


def test_a_model_with_nothing_to_switch_is_refused_or_reported():
    for model, left in ((Unknown(), 1), (nn.Linear(2, 3), 0)):
        before = state(model)
        with pytest.raises(ValueError, match=r"must have a rotary function.*strict=False"):
            enable(model)
        report = enable(model, strict=False)
        assert isinstance(report, Report) and state(model) == before
        assert (len(report.functions), len(report.modules), len(report.left)) == (0, 0, left)
    assert str(report) == "no rotary function"


def test_layer_norms_are_named(calls):
    report = switched(built("Cohere, LayerNorms"), calls)
    assert report.left == {
        "CohereAttention.q_norm": "it is no RMSNorm",
        "CohereAttention.k_norm": "it is no RMSNorm",
    }


def test_the_report_says_what_was_switched():
    report = enable(built("Qwen3"))
    name = "transformers.models.qwen3.modeling_qwen3.apply_rotary_pos_emb"
    assert report == Report(
        functions={name: "pairs of halves; an angle for each element"},
        modules={"Qwen3Attention.forward": NUM_LAYERS},
        norms={"Qwen3Attention.q_norm": NUM_LAYERS, "Qwen3Attention.k_norm": NUM_LAYERS},
        left={},
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("model",), TypeError, "model must be a torch.nn.Module, got str"),
        ((Rotating(), 1), TypeError, "norm and strict must be True or False, got 1 and True"),
        ((Rotating(), True, "twice"), ValueError, 'rounding must be "once" or "eager"'),
        ((Rotating(), True, "once", None), TypeError, "norm and strict must be"),
    ],
)
def test_wrong_arguments_are_errors(given, error, message):
    with pytest.raises(error, match=message):
        enable(*given)


def test_disable_refuses_what_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        disable([])


# All of transformers.

REFUSED = {
    "clvp.apply_rotary_pos_emb",  # q, k and v by rows of a table
    "edgetam_video.apply_rotary_pos_emb_2d_cross_attn",  # q and k by tables of their own
    "gemma4.apply_multidimensional_rope",  # of vision: parts of a head, each by an axis
}
NOT_EAGER_FUNCTIONS = {
    *("deepseek_v2.apply_rotary_emb", "llama4.apply_rotary_emb"),  # complex numbers
    "llama4.vision_apply_rotary_emb",
    "musicflamingo.apply_rotary_time_emb",  # in float64
}
ROTARY = re.compile(r"apply.*(rotary|rope)|(rotary|rope).*apply")


def rotary_functions():
    """All rotary functions of transformers' models, by the model's package and the name."""
    found = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = transformers.models.__path__[0] + f"/{package.name}"
        for each in pkgutil.iter_modules([folder]):
            if not each.name.startswith("modeling_"):
                continue
            with open(f"{folder}/{each.name}.py", encoding="utf-8") as file:
                if not re.search(
                    r"^def .*(cos|sin|freqs_c|rotary|rope)", file.read(), re.MULTILINE
                ):
                    continue
            module = importlib.import_module(f"transformers.models.{package.name}.{each.name}")
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if function.__module__ != module.__name__:
                    continue
                if ROTARY.search(name) or _transformers_forms.parameters_of(function):
                    found[f"{package.name}.{name}"] = function
    return found


def test_every_rotary_function_of_transformers_is_recognised_or_refused_by_name():
    functions = rotary_functions()
    probed = {name: _transformers_forms.probe(each) for name, each in functions.items()}
    assert {name for name, each in probed.items() if each is None} == REFUSED
    known = {name: each for name, each in probed.items() if each is not None}
    assert {name for name, each in known.items() if each.float32_table is None} == (
        NOT_EAGER_FUNCTIONS
    )
    assert len(known) > 200  # or none would be found
    for name, each in known.items():
        assert any("s" in layout for layout, _, _ in each.layouts.values()), name


def test_every_class_that_calls_one_can_be_switched():
    modules = {function.__module__ for function in rotary_functions().values()}
    left, deferring, count = {}, {}, 0
    kind = _transformers_norms.NormKind(nn.RMSNorm, "eps", True, 0.0, True, True)
    for module in sorted(modules):
        for name, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass):
            if not issubclass(cls, nn.Module) or cls.__module__ != module:
                continue
            plan = _transformers_classes.plan_of(cls, "once")
            left |= plan.left
            norms = [norm for each in plan.methods.values() for norm in each.rewrite.norms]
            recipe = _transformers_classes.Recipe(
                cls, "once", tuple((each, kind) for each in norms)
            )
            made = _transformers_classes.switched_class(recipe)
            count += made is not cls
            assert (made is not cls) == bool(plan.methods)
            for method in plan.methods:
                own, new = getattr(cls, method), getattr(made, method)
                assert new is not own and inspect.signature(new) == inspect.signature(own)
            deferring[name] = {norm for norm in norms if "norm" in norm}
    assert {each.removeprefix("transformers.models.").partition(".")[0] for each in left} == {
        name.partition(".")[0] for name in REFUSED
    }
    assert count > 200
    for name in ("Qwen3Attention", "Gemma3Attention", "Olmo2Attention", "Glm4MoeAttention"):
        assert deferring[name] == {"q_norm", "k_norm"}, name
    assert not deferring["HunYuanDenseV1Attention"], "its norms are behind the rotation"


def test_the_probe_tells_forms_apart():
    of = {name: _transformers_forms.probe(each).form for name, each in some_functions().items()}
    assert of == {
        "llama": _transformers_forms.Form(False, "elementwise"),
        "cohere": _transformers_forms.Form(True, "elementwise"),
        "glm": _transformers_forms.Form(True, "first half"),
        "gpt_oss": _transformers_forms.Form(False, "half width"),
        "nanochat": _transformers_forms.Form(False, "elementwise", negated=True),
        "deepseek_v4": _transformers_forms.Form(True, "half width", at_the_end=True),
    }


def some_functions():
    names = "llama", "cohere", "glm", "gpt_oss", "nanochat", "deepseek_v4"
    return {
        name: importlib.import_module(
            f"transformers.models.{name}.modeling_{name}"
        ).apply_rotary_pos_emb
        for name in names
    }


def test_what_is_switched_by_class_is_bounded():
    for cached in (
        *(_transformers_forms.probe, _transformers_forms.parameters_of),
        *(_transformers_classes._plan_of, _transformers_classes._switched_class),
    ):
        assert cached.cache_info().maxsize <= 1024


@pytest.mark.parametrize("name", ["rope_cupy", "rope_cupy.integrations"])
def test_neither_library_is_imported_before_it_is_asked_for(name):
    program = f"import sys, {name}; print(sorted({{'torch', 'transformers'}} & {{*sys.modules}}))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
