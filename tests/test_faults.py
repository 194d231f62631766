"""Every system call may fail, be short, or be the last one: the promised outcome, and nothing lost. See ``faults``."""

from __future__ import annotations

import re

import pytest

from . import children, faults

pytestmark = pytest.mark.once


def injected(*arguments: str) -> int:
    """How many faults were, in a program of its own; nothing may have been broken."""
    result = children.run_script(f"import sys; from tests import faults; sys.exit(faults.main(*{arguments!r}))")
    assert (result.returncode, result.stderr) == (0, ""), result.stdout[-5000:] + result.stderr
    total = re.search(r"^(\d+) faults injected$", result.stdout, re.MULTILINE)
    assert total is not None, result.stdout
    return int(total[1])


@pytest.mark.parametrize("scenario", faults.SCENARIOS)
def test_a_call_that_fails_or_is_short_loses_nothing_and_what_it_was_for_works_at_the_next_try(scenario: str) -> None:
    assert injected("--few", scenario) > 50


@pytest.mark.parametrize("scenario", faults.LAST_SCENARIOS)
def test_a_process_may_end_at_any_call_and_the_others_learn_of_it_and_lose_nothing(scenario: str) -> None:
    assert injected("--few", scenario) > 50
