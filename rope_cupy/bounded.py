"""Dicts that hold a bounded number of values. Pure."""

from __future__ import annotations

from contextlib import suppress
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def put(cache: dict[Key, Value], key: Key, value: Value, most: int) -> Value:
    """Put a value into a cache of at most `most` values, and return it; the oldest make room."""
    while len(cache) >= most:
        with suppress(StopIteration, RuntimeError):  # other threads make room too
            cache.pop(next(iter(cache)), None)
    cache[key] = value
    return value
