"""The ways of a call that PyTorch adds, each of which hands a simpler call to a way below it."""

from collections.abc import Callable
from typing import Any

# What torch.compile must not trace where it runs it, because its graph has a break there.
UNTRACED: list[Callable[..., Any]] = []
