"""What an enabled model of transformers is to others, to its copies, hooks and decorators."""

import copy
import functools
import importlib
import inspect
import io
import linecache
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import NUM_LAYERS, tokens
from switched_models import (
    EACH,
    MODELS,
    NORM,
    NORMED,
    ROTATE,
    Rotating,
    assert_close,
    built,
    built_once,
    counted,
    logits,
    random,
    rotated,
    state,
    switched,
    watched_calls,
)
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rope_cupy.integrations.transformers import disable, enable


@pytest.fixture
def calls(monkeypatch):
    """The names of the calls that are made of rope_cupy."""
    return watched_calls(monkeypatch)


# What the library `kernels` makes of a rotary function where it is installed.


def module_of(function):
    """A module whose forward is a function, and has its signature."""

    class Func(nn.Module):
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(function)
    parameters = [own, *signature.parameters.values()]
    Func.forward.__signature__ = signature.replace(parameters=parameters)
    return Func()


@pytest.mark.parametrize("name", ["Qwen3", "Llama, llama3"])
def test_a_rotary_function_that_is_a_module_is_switched(name, calls, monkeypatch):
    model = built(name)
    expected = logits(model)
    attention = next(each for each in model.modules() if type(each).__name__.endswith("Attention"))
    module = importlib.import_module(type(attention).__module__)
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", module_of(module.apply_rotary_pos_emb), raising=True
    )
    report = enable(model)
    assert f"{module.__name__}.apply_rotary_pos_emb" in report.functions
    calls.clear()
    assert_close(logits(model), expected)
    assert counted(calls) == (NORMED if name == "Qwen3" else EACH)
    disable(model)
    calls.clear()
    assert torch.equal(logits(model), expected) and not calls


# One model and others.


def test_of_two_models_of_a_class_only_one_is_enabled(calls):
    one, other = built("Qwen3"), built("Qwen3")
    expected = logits(other)
    switched(one, calls, rounding="once")
    assert torch.equal(logits(other), expected) and not calls
    assert_close(logits(one), expected)
    assert counted(calls) == NORMED
    switched(other, calls, norm=False, rounding="eager")
    assert torch.equal(logits(other), expected)
    assert counted(calls) == EACH
    assert_close(logits(one), expected)
    assert counted(calls) == NORMED
    disable(one)
    assert torch.equal(logits(other), expected)
    assert counted(calls) == EACH
    assert torch.equal(logits(one), expected) and not calls


def parted(names):
    """The names that `enable` adds to a module, and all others."""
    added = {name: each for name, each in names.items() if name.startswith("_rope_cupy_")}
    return added, {name: each for name, each in names.items() if name not in added}


def test_nothing_of_transformers_is_changed_for_all():
    """A module gets names for what stands in for its functions, and keeps all of its own."""
    module = importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    before = dict(vars(module))
    members = dict(vars(module.Qwen3Attention))
    model = built("Qwen3")
    enable(model)
    logits(model)
    added, own = parted(vars(module))
    assert added and own == parted(before)[1]
    enable(model, rounding="eager")
    added, _ = parted(vars(module))
    enable(model)
    enable(model, rounding="eager")
    assert parted(vars(module))[0] == added
    assert dict(vars(module.Qwen3Attention)) == members
    assert isinstance(model.model.layers[0].self_attn, module.Qwen3Attention)
    assert repr(model) == repr(built_once("Qwen3"))


def test_a_method_sees_what_is_changed_in_its_module(monkeypatch):
    """As the model's own does: an attention that is registered or patched later, say."""
    model = built("Qwen3")
    enable(model)
    seen = []
    module = importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    attend = module.eager_attention_forward
    monkeypatch.setattr(
        module, "eager_attention_forward", lambda *a, **k: seen.append(1) or attend(*a, **k)
    )
    logits(model)
    assert len(seen) == NUM_LAYERS


def test_a_part_of_a_model_can_be_enabled(calls):
    model = built("Qwen3")
    expected = logits(model)
    report = switched(model.model.layers[1], calls)
    assert report.modules == {"Qwen3Attention.forward": 1}
    assert_close(logits(model), expected)
    assert counted(calls) == {NORM: 1}
    disable(model)
    assert torch.equal(logits(model), expected)


def test_enabling_again_takes_the_new_options(calls):
    model = built("Qwen3")
    first = state(model)
    expected = logits(model)
    switched(model, calls)
    switched(model, calls, norm=False, rounding="eager")
    assert torch.equal(logits(model), expected)
    assert counted(calls) == EACH
    disable(model)
    disable(model)
    assert state(model) == first


# Copies.


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copied, pickled, saved])
@pytest.mark.parametrize("name", ["Qwen3", "Llama, llama3"])
def test_a_copy_of_an_enabled_model_is_enabled_and_its_own(name, make, calls):
    model = built(name)
    own = logits(model)
    switched(model, calls)
    expected, other = logits(model), make(model)
    calls.clear()
    assert torch.equal(logits(other), expected)
    assert counted(calls) == MODELS[name][1]
    disable(other)
    assert torch.equal(logits(other), own) and not calls
    assert torch.equal(logits(model), expected)
    assert counted(calls) == MODELS[name][1]


def test_another_process_loads_an_enabled_model(tmp_path):
    model = built("Qwen3")
    enable(model, rounding="eager")
    expected = logits(model)
    torch.save((model, tokens(), expected), tmp_path / "model.pt")
    program = """
import sys, torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    found = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
assert torch.equal(found, expected)
assert type(model.model.layers[0].self_attn)._rope_cupy.rounding == "eager"
print("the same")
"""
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout == "the same\n"
    )


def test_weights_are_saved_and_loaded_as_before():
    model, other = built("Qwen3"), built("Qwen3")
    enable(model)
    assert model.state_dict().keys() == other.state_dict().keys()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    expected = logits(other)
    model.load_state_dict(other.state_dict())
    assert_close(logits(model), expected)


# What is read, and asked, when a call is made.


class LowRank(nn.Module):
    """A layer with two small matrices beside its own, as LoRA has it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_replaced_weights_and_layers_are_used(calls):
    model = built("Qwen3")
    switched(model, calls)
    before = logits(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj = LowRank(attention.q_proj)
        attention.q_norm.weight = nn.Parameter(attention.q_norm.weight.detach() * 1.5 + 0.25)
        attention.q_norm.variance_epsilon = attention.k_norm.variance_epsilon = 0.5
    found = logits(model)
    assert counted(calls)[NORM] == 2 * NUM_LAYERS
    disable(model)
    assert_close(found, logits(model))
    assert (found - before).abs().max() > 0.01


def test_a_replaced_norm_is_called(calls):
    model = built("Qwen3")
    switched(model, calls)
    model.model.layers[0].self_attn.q_norm = nn.Identity()
    found = logits(model)
    assert counted(calls) == {ROTATE: 1, NORM: 1}
    disable(model)
    assert_close(found, logits(model))


def test_hooks_of_a_norm_get_its_value(calls):
    model, seen = built("Qwen3"), []
    switched(model, calls)
    norm = model.model.layers[1].self_attn.k_norm
    handle = norm.register_forward_hook(lambda module, args, result: seen.append(result))
    found = logits(model)
    assert counted(calls) == {NORM: 1, ROTATE: 1}
    assert type(seen[0]) is torch.Tensor
    handle.remove()
    logits(model)
    assert counted(calls) == NORMED and len(seen) == 1
    disable(model)
    assert_close(found, logits(model))


def test_a_norm_that_is_called_by_others_gives_a_tensor():
    model = built("Qwen3")
    enable(model)
    norm, x = model.model.layers[0].self_attn.q_norm, torch.randn(2, 3, 4, 32)
    assert type(norm) is type(built_once("Qwen3").model.layers[0].self_attn.q_norm)
    assert type(norm(x)) is torch.Tensor


class Misnamed(nn.Module):
    """An RMSNorm with another eps than it says."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Grouped(nn.Module):
    """An RMSNorm of each half of a head."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, x):
        halves = x.unflatten(-1, (2, -1))
        return nn.functional.rms_norm(halves, halves.shape[-1:], self.weight, self.eps).flatten(-2)


OTHER_NORMS = {
    "it is no RMSNorm": [
        nn.LayerNorm(32),
        nn.LayerNorm(32, bias=False),
        nn.GroupNorm(4, 32),
        Misnamed(),
        Grouped(),
    ],
    "its eps is no float": [nn.RMSNorm(32)],
}


@pytest.mark.parametrize("why", OTHER_NORMS)
def test_norms_of_other_kinds_are_left_and_named(why, calls):
    for norm in OTHER_NORMS[why]:
        model = built("Qwen3")
        model.model.layers[1].self_attn.q_norm = norm
        report = switched(model, calls)
        assert report.left == {"Qwen3Attention.q_norm": why}
        assert report.norms == {"Qwen3Attention.q_norm": 1, "Qwen3Attention.k_norm": 2}


@pytest.mark.parametrize("affine", [True, False])
def test_norms_of_pytorch_are_one_call_with_the_rotation(affine, calls):
    model = built("Qwen3")
    for layer in model.model.layers:
        for name in ("q_norm", "k_norm"):
            norm = nn.RMSNorm(32, eps=1e-5, elementwise_affine=affine)
            setattr(layer.self_attn, name, norm)
    expected = logits(model)
    switched(model, calls)
    assert_close(logits(model), expected)
    assert counted(calls) == NORMED


class Asking(nn.Module):
    """Norms whose values are asked for in many ways before the rotation, and after it."""

    def __init__(self, ask):
        super().__init__()
        make = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRMSNorm
        self.q_norm, self.k_norm, self.ask = make(16), make(16), ask

    def forward(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        asked = self.ask(q)
        if cos is None:
            return q, k, asked
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, asked


ASKED = {
    "shape": lambda q: torch.tensor(q.shape),
    "size": lambda q: torch.tensor([q.size(1), q.dim(), q.ndim, len(q)]),
    "dtype": lambda q: torch.zeros(1, dtype=q.dtype, device=q.device),
    "method": lambda q: q.mean(-1).float(),
    "product": lambda q: 2 * q - (q @ q.mT) @ q / (q + 3) ** 2,
    "negative": lambda q: -q,
    "index": lambda q: q[0, ..., 1:],
    "function": lambda q: nn.functional.scaled_dot_product_attention(q, q, q),
    "list": lambda q: torch.cat([q, torch.ones(2, 1, 5, 16), q], dim=1),
    "written": lambda q: torch.zeros(q.shape).copy_(q),
    "other view": lambda q: q.transpose(-1, -2).reshape(2, -1),
    "flat view": lambda q: q.transpose(2, 1).reshape(2, 5, 64),
    "iterated": lambda q: torch.stack([each.sum() for each in q]),
    "in place": lambda q: q.mul_(2),
    "a part in place": lambda q: q[:, 0].zero_(),
}


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("rotates", [True, False])
def test_whoever_asks_for_a_deferred_value_gets_that_of_the_norm(ask, rotates, calls):
    torch.manual_seed(0)
    module = Asking(ASKED[ask])
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    angles = torch.randn(2, 2, 5, 16).unbind() if rotates else (None, None)
    expected = module(q, k, *angles)
    report = switched(module, calls)
    assert report.norms == {"Asking.q_norm": 1, "Asking.k_norm": 1}
    found = module(q, k, *angles)
    # What is written into a value that was asked for is rotated, so the norm is not computed again.
    assert counted(calls) == ({ROTATE: 1} if rotates else {})
    for actual, wanted in zip(found, expected, strict=True):
        assert type(actual) is torch.Tensor
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


class Naming(Asking):
    """Views by keyword arguments, norms of what changes, and norms in a block of other rules."""

    def __init__(self, how):
        super().__init__(None)
        self.how = how

    def forward(self, q, k, cos, sin):
        if self.how == "keywords":
            q = self.q_norm(q).reshape(shape=(2, 5, 4, 16)).transpose(dim0=1, dim1=2)
            k = self.k_norm(k).view(2, 5, 2, 16).transpose(1, dim1=2)
            if (q.size(dim=1), q.size(2), [*q.size()]) != (4, 5, [2, 4, 5, 16]):
                raise ValueError("other sizes")
        elif self.how in WRITES:
            x, k = q + 0, self.k_norm(k).transpose(1, 2)
            q = self.q_norm(x).transpose(1, 2)
            if self.how == "added":
                x += 1
            elif self.how == "set":
                x[0] = 0
            else:
                x[..., 1:].mul_(3)
        else:
            with torch.set_grad_enabled(self.how == "gradients"):
                q = self.q_norm(q).transpose(1, 2)
                k = self.k_norm(k).transpose(1, 2)
        return apply_rotary_pos_emb(q, k, cos, sin)


WRITES = "added", "set", "multiplied"


@pytest.mark.parametrize("how", ["keywords", "gradients", "no gradients", *WRITES])
def test_what_surrounds_a_norm_means_what_it_means_in_the_model(how):
    module, angles = Naming(how), random(2, 2, 5, 16).unbind()
    given = random(2, 5, 4, 16), random(1, 2, 5, 2, 16)[0]
    given[0].requires_grad_(how not in WRITES)
    outcomes = []
    for is_enabled in False, True:
        if is_enabled:
            enable(module)
        q, k = module(*given, *angles)
        assert q.requires_grad == (how != "no gradients")  # of the weights, too
        outcomes.append(torch.cat([q.flatten(), k.flatten()]))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)


class OfTokens(nn.Module):
    """Norms of all heads, where as many tokens as heads stand on the axis of the heads."""

    def __init__(self):
        super().__init__()
        make = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRMSNorm
        self.q_norm, self.k_norm = make(32), make(32)

    def forward(self, q, k, cos, sin):
        q = self.q_norm(q).view(2, 4, 4, 8)
        k = self.k_norm(k).view(2, 4, 4, 8)
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_a_norm_of_all_heads_is_not_one_of_all_tokens(calls):
    module, given = OfTokens(), (random(2, 4, 32), 3 * random(2, 4, 32), *random(2, 2, 4, 8))
    expected = rotated(module, *given)
    switched(module, calls)
    torch.testing.assert_close(rotated(module, *given), expected, rtol=1e-5, atol=1e-5)
    assert counted(calls) == {ROTATE: 1}


# Methods in unusual forms.

GIVEN = random(2, 4, 6, 8), random(2, 2, 6, 8), random(2, 6, 8), random(2, 6, 8)


class Scaling(nn.Module):
    def forward(self, q, k):
        return 2 * q, 3 * k


def doubled(method):
    @functools.wraps(method)
    def run(self, *given, **options):
        return tuple(2 * each for each in method(self, *given, **options))

    return run


class Decorated(Scaling):
    """A method with decorators, defaults, a super() and a line that fails."""

    @doubled
    @torch.no_grad()
    def forward(self, q, k, cos, sin, *, fails: bool = False):
        """Rotate, and scale."""
        if fails:
            raise RuntimeError("here")
        return super().forward(*apply_rotary_pos_emb(q, k, cos, sin))


class Overriding(Decorated):
    def forward(self, q, k, cos, sin):
        return super().forward(q, k, cos, sin)


def test_decorators_defaults_and_super_are_kept(calls):
    module, original, given = Decorated(), Decorated.forward, GIVEN
    expected = rotated(module, *given)
    switched(module, calls)
    assert not module(*(each.requires_grad_() for each in map(torch.clone, given)))[0].requires_grad
    torch.testing.assert_close(rotated(module, *given), expected, rtol=1e-5, atol=1e-5)
    assert counted(calls) == {ROTATE: 2}
    assert inspect.signature(module.forward) == inspect.signature(Decorated().forward)
    assert module.forward.__doc__ == "Rotate, and scale."
    assert Decorated.forward is original
    with pytest.raises(RuntimeError) as raised:
        module(*given, fails=True)
    last = raised.traceback[-1]
    assert last.path.name == "test_transformers_switching.py"
    assert 'raise RuntimeError("here")' in str(last.statement)


class Renaming(nn.Module):
    """A method that keeps its rotary function, and uses it by another name."""

    def forward(self, q, k, cos, sin):
        rotate = apply_rotary_pos_emb
        return [each for each in rotate(q, k, cos=cos, sin=sin)]


class Shadowing(nn.Module):
    """A method in which the name of the rotary function is that of something else too."""

    def forward(self, q, k, cos, sin):
        def scaled(apply_rotary_pos_emb):
            return 2 * apply_rotary_pos_emb

        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return scaled(apply_rotary_pos_emb=q), k


def test_a_method_with_other_names_is_switched_and_one_with_the_same_for_others_left(calls):
    module = Renaming()
    expected = rotated(module, *GIVEN)
    switched(module, calls)
    torch.testing.assert_close(rotated(module, *GIVEN), expected, rtol=1e-5, atol=1e-5)
    assert counted(calls) == {ROTATE: 1}
    module = Shadowing()
    report = enable(module, strict=False)
    why = "it has another use for the name of its rotary function"
    assert report.left == {f"{__name__}.Shadowing.forward": why}


WRITTEN = '''
from __future__ import annotations
import functools
from typing import TYPE_CHECKING
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
if TYPE_CHECKING:
    from somewhere import Cache

swapped = functools.partial(apply_rotary_pos_emb, unsqueeze_dim=1)


def in_place_rotary(q, k, cos, sin):
    for each, new in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin)):
        each.copy_(new)
    return q, k


class Annotated(nn.Module):
    def forward(self, q, k, cos, sin):
        def inner(x: Cache) -> Cache:
            return x
        return [inner(x) for x in apply_rotary_pos_emb(q, k, cos, sin)]


class Telling(nn.Module):
    def forward(self, q, k, cos, sin):
        told = """
            two
        words"""
        return [len(told) * x for x in apply_rotary_pos_emb(q, k, cos, sin)]


class Writing(nn.Module):
    def forward(self, q, k, cos, sin):
        q, k = q.clone(), k.clone()
        in_place_rotary(q, k, cos, sin)
        return q, k


class Partial(nn.Module):
    def forward(self, q, k, cos, sin):
        return swapped(q.double(), k.float(), cos, sin)


class Catching(nn.Module):
    def forward(self, q, k, cos, sin):
        def refused():
            try:
                raise ValueError("here")
            except ValueError as apply_rotary_pos_emb:
                return apply_rotary_pos_emb.args[0]
        return [len(refused()) * x for x in apply_rotary_pos_emb(q, k, cos, sin)]


class Matching(nn.Module):
    def forward(self, q, k, cos, sin):
        def first(pair):
            match pair:
                case (apply_rotary_pos_emb, _):
                    return apply_rotary_pos_emb
        return [x + first((1, 2)) for x in apply_rotary_pos_emb(q, k, cos, sin)]


class Alias(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)
    run = forward


def scaled(q, k):
    return 2 * q, 3 * k


class OneName(nn.Module):
    def forward(self, *given):
        return self.scaled(*given)

    def scaled(self, q, k, cos, sin):
        return scaled(*apply_rotary_pos_emb(q, k, cos, sin))
'''


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A module of models in a file of its own."""
    (tmp_path / "written_models.py").write_text(WRITTEN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("written_models")
    del sys.modules["written_models"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("Annotated", 1), ("Telling", 1), ("Alias", 1), ("OneName", 1)),
        *(("Writing", 0), ("Partial", 0), ("Catching", 0), ("Matching", 0)),
    ],
)
def test_a_method_of_any_form_gives_its_own_results(name, count, written, calls):
    module = getattr(written, name)()
    expected = rotated(module, *GIVEN)
    enable(module, strict=False)
    calls.clear()
    torch.testing.assert_close(rotated(module, *GIVEN), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == count
    if name == "Alias":
        module.run(*GIVEN)
        assert counted(calls) == {ROTATE: 2}


def test_a_file_that_has_been_edited_is_not_what_was_imported(written):
    Path(written.__file__).write_text(WRITTEN.replace("len(told) * x", "len(told) * 3 * x"))
    linecache.checkcache(written.__file__)
    why = "its source is not that which was imported"
    report = enable(written.Telling(), strict=False)
    assert report.left == {"written_models.Telling.forward": why}


def test_a_method_shares_the_variables_of_what_encloses_it(calls):
    count, factor = 0, 2

    class Counting(nn.Module):
        def forward(self, q, k, cos, sin):
            nonlocal count
            count += 1
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            return factor * q, late * k

    module = Counting()
    switched(module, calls)  # with a variable that is not there yet
    late = 1
    before = rotated(module, *GIVEN)
    factor, late = 4, 2
    torch.testing.assert_close(rotated(module, *GIVEN), 2 * before)
    assert count == 2 and counted(calls) == {ROTATE: 2}


class NeedsKey(nn.Module):
    def __init_subclass__(cls, *, key, **options):
        super().__init_subclass__(**options)


class Keyed(NeedsKey, key=1):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_a_model_that_cannot_be_switched_as_a_whole_is_not_changed():
    model = nn.Sequential(Renaming(), Keyed())
    with pytest.raises(TypeError, match="key"):
        enable(model)
    assert [type(each) for each in model] == [Renaming, Keyed]


def test_a_method_that_only_super_reaches_is_left_and_named():
    report = enable(Overriding(), strict=False)
    assert report.left == {f"{__name__}.Decorated.forward": "a subclass overrides it"}
    assert not report.modules


def test_a_method_without_source_is_left_and_named():
    namespace = {"nn": nn, "apply_rotary_pos_emb": apply_rotary_pos_emb, "__name__": "nowhere"}
    exec(
        "class Hidden(nn.Module):\n"
        "  def forward(self, q, k, cos, sin): return apply_rotary_pos_emb(q, k, cos, sin)",
        namespace,
    )
    report = enable(namespace["Hidden"](), strict=False)
    assert report.left == {"nowhere.Hidden.forward": "its source cannot be read"}


def hooked(module):
    """Replace a module's forward as accelerate does, to move weights around a call."""
    module._old_forward, seen = module.forward, []

    def forward(*given, **options):
        seen.append("before")
        return module._old_forward(*given, **options)

    module.forward = forward
    return seen


def test_a_hook_that_keeps_the_forward_calls_the_one_that_is_switched(calls):
    given = random(2, 4, 6, 8), random(2, 2, 6, 8), random(2, 6, 8), random(2, 6, 8)
    for enabled_before in (False, True):
        module = Rotating()
        if enabled_before:
            switched(module, calls)
        seen = hooked(module)
        if not enabled_before:
            switched(module, calls)
        rotated(module, *given)
        assert (counted(calls), len(seen)) == ({ROTATE: 1}, 1)
        disable(module)
        rotated(module, *given)
        assert (counted(calls), len(seen)) == ({}, 2)


def test_a_forward_of_a_module_s_own_is_left_and_named():
    module = Rotating()
    module.forward = lambda *given: given
    report = enable(module, strict=False)
    assert report.left == {"Rotating.forward": "a module has a method of its own in its place"}
    assert type(module) is Rotating


def test_disable_refuses_a_class_that_was_made_of_an_enabled_one():
    module = Rotating()
    enable(module)
    enabled = type(module)
    module.__class__ = type("Sharded", (enabled,), {})
    with pytest.raises(ValueError, match=r"got a subclass of one, Sharded"):
        disable(module)
    module.__class__ = enabled
    disable(module)
    assert type(module) is Rotating


def test_weights_that_are_not_there_yet_are_not_read():
    model = built("Qwen3").to("meta")
    with torch.device("meta"):
        report = enable(model)
    assert report.norms and logits_shape(model) == (2, 24, 97)


def logits_shape(model):
    inputs = {name: each.to("meta") for name, each in tokens().items()}
    return tuple(model(**inputs, use_cache=False).logits.shape)
