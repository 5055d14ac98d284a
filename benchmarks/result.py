"""The result of a provider: its times, or the reason why there are none."""

from __future__ import annotations

from typing import NamedTuple


class AbsentError(Exception):
    """The provider is not installed."""


class UnsupportedError(Exception):
    """The provider cannot do this task."""


class WrongError(Exception):
    """A result is not the exact one but for a few roundings."""

    def __init__(self, reason: str, error: float) -> None:
        super().__init__(reason)
        self.error = error


class Result(NamedTuple):
    """status: "ok", "absent", "unsupported", "wrong" or "failed"; the reason for all but "ok".

    What is not known is None: microseconds of a call, and its relative error. `beside` holds the
    microseconds that other clocks gave.
    """

    status: str
    reason: str = ""
    microseconds: float | None = None
    error: float | None = None
    beside: dict[str, float] = {}  # noqa: RUF012


STATUS = {AbsentError: "absent", UnsupportedError: "unsupported", WrongError: "wrong"}


def result_of(failure: Exception) -> Result:
    """Return the result of a provider that raised.

    >>> result_of(UnsupportedError("takes no positions")).status
    'unsupported'
    >>> result_of(RuntimeError("no memory")).reason
    'RuntimeError: no memory'
    """
    status = STATUS.get(type(failure))
    if status:
        return Result(status, str(failure), error=getattr(failure, "error", None))
    first_line = (str(failure).splitlines() or [""])[0]
    return Result("failed", f"{type(failure).__name__}: {first_line}"[:200])
