"""What is remembered between calls. Pure."""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def keep(memory: dict[Key, Value], key: Key, value: Value, most: int) -> Value:
    """Remember a value and return it; where there would be more than `most`, forget the others."""
    if len(memory) >= most:
        memory.clear()
    memory[key] = value
    return value
