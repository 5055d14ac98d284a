"""The ways of a call that PyTorch and JAX add: each hands a simpler call to a way below it."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..options import Options
from ..problem import OF_WEIGHTS

# What torch.compile must not trace where it runs it, because its graph has a break there.
UNTRACED: list[Callable[..., Any]] = []


def weights_of(name: str, named: dict[str, Any]) -> dict[str, Any]:
    """Return the weights and biases of a tensor, among named arrays."""
    own = {
        "x": ("weight", "bias"),
        "q": ("q_weight", "q_bias"),
        "k": ("k_weight", "k_bias", "weight", "bias"),
    }
    own_names = own.get(name, OF_WEIGHTS)
    return {each: named[each] for each in own_names if each in named}


@lru_cache(maxsize=256)
def without_norm(options: Options, conjugate: bool) -> Options:
    """Return the options of the rotation alone, or of the rotation back."""
    return options._replace(conjugate=options.conjugate != conjugate, norm=None)
