"""Ports handed around at random among processes that post all the while: order exact, nothing lost or doubled.

The first two tests are gentle; then ``tests.storm`` rages: among kills, stops, interrupts, forks. A long one is
``pytest -m soak tests/test_storm.py``, of an hour, or MPCHANNEL_SOAK_SECONDS.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

import mpchannel

from . import children, storm

pytestmark = pytest.mark.once

PROCESSES = 4
CHANNELS = 5
HANDOVERS = 200


class Juggling:
    """Four processes with a mesh of ports between them, and bystanders that may be killed."""

    def __init__(self, context: Any, seed: int, bystanders: int = 0) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.context = context
        self.controls: list[Any] = []
        self.bystanders: list[tuple[Any, Any]] = []
        self.count = bystanders

    @contextmanager
    def raging(self) -> Iterator[None]:
        with ExitStack() as started:
            watched: list[list[Any]] = [[] for _ in range(PROCESSES)]
            for _ in range(self.count):
                gate, far_gate = mpchannel.MessageChannel()
                pairs = [mpchannel.MessageChannel() for _ in range(PROCESSES)]
                arguments: tuple[Any, ...] = (far_gate, [pair.port2 for pair in pairs])
                process = self.context.Process(target=children.stand_by, args=arguments)
                started.enter_context(children.running(process, -9))
                self.bystanders.append((process, gate))
                for watch, pair in zip(watched, pairs, strict=True):
                    watch.append(pair.port1)
                assert gate.recv(20) == "ready"
            mesh: list[list[Any]] = [[] for _ in range(PROCESSES)]
            for one in range(PROCESSES):
                for other in range(one + 1, PROCESSES):
                    near, far = mpchannel.MessageChannel()
                    mesh[one].append(near)
                    mesh[other].append(far)
            for number in range(PROCESSES):
                ours, theirs = mpchannel.MessageChannel()
                arguments = (theirs, mesh[number], watched[number], self.seed + number)
                started.enter_context(children.running(self.context.Process(target=children.juggle, args=arguments)))
                self.controls.append(ours)
            for name in range(CHANNELS):
                for side, end in enumerate(mpchannel.MessageChannel()):
                    state = children.Juggled(name, side)
                    self.dice.choice(self.controls).post_message(("an end", state), [end])
            try:
                yield
            finally:
                for control in self.controls:
                    control.close()
                for process, gate in self.bystanders:
                    process.kill()
                    gate.close()

    def handovers(self, enough: int) -> None:
        """Let there be *enough* handovers."""
        done = 0
        until = time.monotonic() + 30
        while done < enough:
            for control in mpchannel.wait(self.controls, until - time.monotonic()):
                kind, what = control.recv(5)
                assert kind == "handed over", f"seed {self.seed}: {what}"
                done += what
            assert time.monotonic() < until, f"seed {self.seed}: {done} handovers"

    def stop(self) -> tuple[dict[tuple[int, int], tuple[Any, Any]], list[str]]:
        """All ends, back from the processes; and how the ports of bystanders closed."""
        for control in self.controls:
            control.post_message(("stop", None))
        ends: dict[tuple[int, int], tuple[Any, Any]] = {}
        closes: list[str] = []
        pending = list(self.controls)
        while len(ends) < 2 * CHANNELS or pending:
            ready = mpchannel.wait(pending or self.controls, 30)
            assert ready, f"seed {self.seed}: {len(ends)} ends came back"
            for control in ready:
                event = control.receive(5)
                kind, what = event.data
                assert kind != "failure", f"seed {self.seed}: {what}"
                if kind == "an end":
                    (ends[what.name, what.side],) = [(what, port) for port in event.ports]
                elif kind == "stopped":
                    closes += what
                    pending.remove(control)
        return ends, closes

    def check(self, ends: dict[tuple[int, int], tuple[Any, Any]]) -> int:
        """Both ways of every channel: what is still queued is exactly what was posted and not taken."""
        total = 0
        for (name, side), (state, end) in ends.items():
            other = ends[name, 1 - side][0]
            queued = []
            while (event := mpchannel.receive_message_on_port(end)) is not None:
                number, body = event.data
                assert body == children.body_of(number)
                queued.append(number)
            where = f"seed {self.seed}, channel {name}, side {side}"
            assert queued == list(range(state.taken, other.posted)), where
            total += other.posted
        for _, end in ends.values():
            end.close()
        return total


def test_200_handovers_among_four_processes_under_concurrent_posting_keep_every_order(context: Any) -> None:
    juggling = Juggling(context, random.randrange(1 << 32))
    with juggling.raging():
        juggling.handovers(HANDOVERS)
        ends, _ = juggling.stop()
        assert juggling.check(ends) > 1000


def test_handovers_among_kills_of_bystanders_collections_and_closes_keep_every_order(context: Any) -> None:
    juggling = Juggling(context, random.randrange(1 << 32), bystanders=3)
    with juggling.raging():
        for process, gate in juggling.bystanders:
            juggling.handovers(juggling.dice.randrange(20, 60))
            os.kill(process.pid, signal.SIGKILL)
            assert gate.wait_closed(5).reason == "died", f"seed {juggling.seed}"
        ends, closes = juggling.stop()
        juggling.check(ends)
        assert closes == ["died"] * 3 * PROCESSES, f"seed {juggling.seed}"


# Storms

SOAK_SECONDS = float(os.environ.get("MPCHANNEL_SOAK_SECONDS", "3600"))


def rage(seconds: float, processes: int, method: str) -> storm.Figures:
    seed = random.randrange(1 << 32)
    print(
        f"python -m tests.storm --seed {seed} --seconds {seconds:g} --processes {processes} --method {method}",
        flush=True,
    )
    figures = storm.rage(seed, seconds, processes, method)
    print(figures)
    return figures


@pytest.mark.parametrize(("processes", "method"), [(4, "fork"), (8, "fork"), (5, "spawn"), (5, "forkserver")])
def test_a_storm_of_kills_stops_interrupts_and_forks_loses_doubles_reorders_and_leaks_nothing(
    processes: int, method: str
) -> None:
    figures = rage(6, processes, method)
    figures.leaked_memory = 0  # other tests may have some of this system's memory now
    assert figures.bad == {}
    assert min(figures.kills, figures.stops, figures.interrupts, figures.handovers, figures.received) > 0


@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 600)
def test_soak() -> None:
    figures = rage(SOAK_SECONDS, 8, "fork")
    assert figures.bad == {}
