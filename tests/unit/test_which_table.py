"""Each row of docs/which-table-is-mine.md, against the model's own function on its own table.

A small model runs once. What it gives its rotary function, and what that returns, is kept; the
table and the options of the row, as they stand on the page, must give the same.
"""

import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from switched_models import MODELS, built_once, logits
from tiny_diffusers import TINY, build, output_of

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk

PAGE = Path(__file__).parents[2] / "docs/which-table-is-mine.md"
ROW = r"^\| (.+?) \| `(\w+)(?:\.(\w+))?` \| `(.+?)` \| (?:`(.*?)`)? ?\|$"
ROWS = re.findall(ROW, PAGE.read_text(encoding="utf-8"), re.M)
LARGEST_ERROR = 2.0**-20  # of float32: of the largest number, or of tables made in float32


class Call:
    """What a model gave its rotary function, and what it got."""

    def __init__(self, function, args, options, result):
        given = inspect.signature(function).bind(*args, **options).arguments
        self.function, self.xs, self.names = function.__name__, [], {}
        for name, value in given.items():
            if isinstance(value, tuple | list):
                self.names |= dict(zip(("cos", "sin"), value, strict=True))
            elif not isinstance(value, torch.Tensor) or not value.numel():
                continue
            elif name in ("cos", "sin"):
                self.names[name] = value
            elif value.is_complex() or value.ndim >= 6 or name == "table":
                self.names["freqs"] = value
            elif value.is_floating_point():
                self.xs.append(value.clone())
        results = result if isinstance(result, tuple | list) else (result,)
        self.results = [each.clone() for each in results]


def kept_calls(monkeypatch, modules):
    """The calls of the rotary functions that these modules have by name."""
    calls = []

    def keeping(function):
        def call(*args, **options):
            before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
            result = function(*args, **options)
            calls.append(Call(function, before, options, result))
            return result

        return call

    for module in modules:
        for name, value in [*vars(module).items()]:
            if re.match(r"apply_\w*(rotary|rope)|apply_rope", name) and inspect.isfunction(value):
                monkeypatch.setattr(module, name, keeping(value))
    return calls


@cache
def language_models():
    """The names of small models, by the package of transformers that they are of."""
    packages = {}
    for name, (fields, _) in MODELS.items():
        packages.setdefault(fields["model_type"].removesuffix("_text"), name)
    return packages


def calls_of_transformers(package, monkeypatch):
    model = built_once(language_models()[package])
    module = importlib.import_module(type(model).__module__)
    calls = kept_calls(monkeypatch, [module])
    logits(model)
    return calls


def calls_of_diffusers(name, monkeypatch):
    """The calls of functions, or of processors that rotate within their own code."""
    model, inputs = build(next(tiny for tiny in TINY if tiny.name == name))
    named = [type(model).__module__, "diffusers.models.embeddings"]
    modules = [importlib.import_module(each) for each in named]
    calls = kept_calls(monkeypatch, modules)
    with torch.no_grad():
        output_of(model, inputs)
        return calls or calls_within(model, inputs, modules[0], monkeypatch)


def calls_within(model, inputs, module, monkeypatch):
    """What the first attention that has a table makes of its normalised q."""
    own, seen = module.dispatch_attention_fn, {}
    attention = next(each for each in model.modules() if hasattr(each, "norm_q"))
    forward = attention.forward

    def rotary(*args, **options):
        bound = inspect.signature(forward).bind(*args, **options).arguments | options
        tables = ("rotary_emb", "freqs_cis", "image_rotary_emb")
        (seen["table"],) = (bound[each] for each in tables if each in bound)
        result = forward(*args, **options)
        seen["done"] = True
        return result

    def dispatch(query, *args, **options):
        if "done" not in seen:
            seen["after"] = query.clone()
        return own(query, *args, **options)

    def keep(norm, given, result):
        if "done" not in seen:
            seen["before"] = result.clone()

    monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    monkeypatch.setattr(attention, "forward", rotary)
    hook = attention.norm_q.register_forward_hook(keep)
    output_of(model, inputs)
    hook.remove()
    x = seen["before"].reshape(seen["after"].shape)

    def rotate(x, table):
        return seen["after"]

    return [Call(rotate, (x, seen["table"]), {}, seen["after"])]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_gives_what_the_models_own_function_gives(row, monkeypatch):
    _, owner, function, table, options = row
    get = calls_of_diffusers if owner[0].isupper() else calls_of_transformers
    calls = get(owner, monkeypatch)
    if function:
        calls = [call for call in calls if call.function == function]
    call = calls[0]
    x = call.xs[0]
    d = x.shape[-1]
    names = call.names | {"RotaryTable": RotaryTable, "d": d}
    if "cos" in call.names:
        names["n"] = call.names["cos"].shape[-1] // 2
    if function is not None and "head_dim=d" in options:
        names["d"] = 16  # of these small models
    options = eval(f"dict({options})", dict(names))
    rotate = apply_rotary_qk if len(call.xs) == 2 else apply_rotary
    found = rotate(*call.xs, eval(table, names), **options)
    found = found if isinstance(found, tuple) else (found,)
    for y, wanted, x in zip(found, call.results, call.xs, strict=True):
        if call.function.endswith("_interleave"):  # which gives pairs back as halves
            y = torch.cat([y[..., ::2], y[..., 1::2]], -1)
        largest = wanted.abs().max()
        assert (y - wanted).abs().max() <= LARGEST_ERROR * largest
        assert (y - x).abs().max() > 0.1 * largest, "something is rotated"


def test_the_page_has_forty_models_of_both_libraries():
    owners = {(owner, function) for _, owner, function, *_ in ROWS}
    assert len(owners) == len(ROWS) >= 40
    assert sum(owner[0].isupper() for owner, _ in owners) >= 15
