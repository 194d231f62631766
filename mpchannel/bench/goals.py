"""What each row is to reach, in one place, and whether it did."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from .kinds import OURS, PIPE

AT_MOST, AT_LEAST = "<=", ">="
_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {AT_MOST: operator.le, AT_LEAST: operator.ge}
_FLAT: Final = 1.25  # "the same", as far as runs can be told apart


class Goal(NamedTuple):
    """Our median is to be at most, or at least, *limit* times that of the kind *of*; in the row *row*, or this one.

    *of* ``None``: a figure in the row's unit.
    """

    direction: str
    limit: float
    of: str | None = PIPE.name
    row: str | None = None

    def __str__(self) -> str:
        limit = f"{self.limit / 1000:g}k" if self.limit >= 1000 else f"{self.limit:g}"
        return f"{self.direction}{limit}"

    @property
    def sentence(self) -> str:
        if self.of is None:
            return f"{self} of the row's unit"
        return f"{self} of {self.of}'s" + (f" in {self.row!r}" if self.row else "")


GOALS: Final[Mapping[str, Goal]] = {
    "round trip, small dict": Goal(AT_MOST, 0.22),
    "round trip, one core": Goal(AT_MOST, 0.6),
    "one way, small dict": Goal(AT_LEAST, 2.2),
    "one way, 1 KiB": Goal(AT_LEAST, 2.2),
    "one way, 64 KiB": Goal(AT_LEAST, 1.8),
    "one way, 1 MiB": Goal(AT_LEAST, 4),
    "burst of {times:,}, posted": Goal(AT_LEAST, 400_000, of=None),
    "burst of {times:,}, and read": Goal(AT_LEAST, 250_000, of=None),
    "hand over, one core": Goal(AT_LEAST, 7),
    "create and close": Goal(AT_MOST, 1.2),
    "reply streams, one core": Goal(AT_LEAST, 5),
    "{size:,} ends, one at a time": Goal(AT_LEAST, 55),
    "{size:,} ends, flood": Goal(AT_LEAST, 2),
    "SIGKILL noticed": Goal(AT_MOST, 1.2),
    "SIGKILL, with a bystander": Goal(AT_MOST, 1.2, row="SIGKILL noticed"),  # a Pipe's never is
    "echo, 1 in flight": Goal(AT_LEAST, 3),
    "echo, 64 in flight": Goal(AT_LEAST, 5),
    "import": Goal(AT_MOST, 15, of=None),
    "listener, {size:,} other ports": Goal(AT_MOST, _FLAT, of=OURS.name, row="listener, no other port"),
    "post, {size:,} queued": Goal(AT_MOST, _FLAT, of=OURS.name, row="post, none queued"),
}
"""By the name of a scenario, as it is in the table of scenarios."""


def typical(outcomes: Sequence[Any]) -> Any:
    """The median; or, if a run had no figure, what the first of these had instead: one of ``MISSES``. ``None`` if there
    was no run.
    """
    for each in outcomes:
        if isinstance(each, dict):
            return each
    return statistics.median(outcomes) if outcomes else None


def judge(rows: Sequence[dict[str, Any]]) -> None:
    """Put into each row how our median compares (``ratio``), its ``goal``, and whether it is ``met``."""
    by_key = {row["key"]: row for row in rows}
    for row in rows:
        goal = GOALS.get(row["key"])
        ours = typical(row["figures"][OURS.name])
        other = goal or Goal(AT_MOST, 1)
        theirs = None if other.of is None else typical(by_key[other.row or row["key"]]["figures"].get(other.of, ()))
        compared = ours / theirs if isinstance(theirs, float) and isinstance(ours, float) and theirs else None
        row["ratio"] = compared
        row["goal"] = None if goal is None else {**goal._asdict(), "text": goal.sentence}
        row["met"] = None
        if goal is not None:
            reached = ours if goal.of is None else compared
            if not isinstance(ours, float):
                row["met"] = False
            elif isinstance(reached, float):
                row["met"] = _COMPARE[goal.direction](reached, goal.limit)


def shown_goal(row: Mapping[str, Any]) -> tuple[str, str]:
    """The goal and whether it is met, for a table."""
    goal = GOALS.get(row["key"])
    met = row["met"]
    return (str(goal) if goal else "-"), "-" if met is None else "yes" if met else "NO"


def spread(outcomes: Sequence[Any]) -> float | None:
    """The noise: how far apart the middle half of the rounds is (interquartile range), as a part of the median."""
    if len(outcomes) < 2 or not all(isinstance(each, float) for each in outcomes):
        return None
    low, median, high = statistics.quantiles(outcomes, n=4, method="inclusive")
    return (high - low) / median if median else None


def count_met(rows: Sequence[Mapping[str, Any]]) -> str:
    judged = [row["met"] for row in rows if row["met"] is not None]
    return f"goals met: {sum(judged)} of {len(judged)}"
