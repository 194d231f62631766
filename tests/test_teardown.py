"""The end of things, in any order: ports, threads, loops and interpreters, closed from wherever code runs."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

import mpchannel

from . import children

pytestmark = pytest.mark.once

# Interpreters


TEARDOWNS = """
import asyncio, atexit, gc, os, random, signal, sys, threading, weakref
import mpchannel

class Closes:
    "Closes its port when it is finalised, wherever that comes."
    def __init__(self, port):
        self.port = port
    def __del__(self):
        self.port.close()

class Posts(Closes):
    def __del__(self):
        self.port.post_message("the last word")

class Receives(Closes):
    def __del__(self):
        mpchannel.receive_message_on_port(self.port)

def in_cycle(thing):
    cycle = [thing]
    cycle.append(cycle)

def flooded(port):
    for number in range(500):
        port.post_message(number)

def large(port):
    for number in range(3):
        port.post_message(bytes(300_000))

def middling(port):
    for number in range(8):
        port.post_message(bytes(60_000))

def carrying(port):
    for pair in [mpchannel.MessageChannel() for _ in range(3)]:
        flooded(pair.port1)
        port.post_message("a port", [pair.port2])
        kept.append(pair.port1)

def listening(port):
    port.onmessage = port.onclose = lambda event: None

def listening_and_closing(port):
    port.onmessage = lambda event: port.close()

def waiting(port):
    def wait():
        try:
            while True:
                port.recv()
        except mpchannel.PortClosedError:
            pass
    threading.Thread(target=wait, daemon=True).start()

def posting(port):
    def post():
        while port.post_message("on and on"):
            if port.buffered_amount > 1 << 20:
                return
    threading.Thread(target=post, daemon=True).start()

def looping(port):
    async def main():
        port.onmessage = lambda event: None
        await asyncio.sleep(0)
    asyncio.run(main())

def buffering(port):
    buffer = mpchannel.SharedBuffer(10_000)
    port.post_message(buffer, [buffer])

def keep(thing):
    kept.append(thing)

def keep_in_module(thing):
    setattr(random.choice((os, sys, mpchannel, threading)), f"_teardown_{len(kept)}", thing)

def close_at_exit(port):
    atexit.register(port.close)

def finalize(port):
    kept.append(weakref.finalize(Closes(port), port.close))

STATES = (flooded, large, middling, carrying, listening, listening_and_closing, waiting, posting, looping, buffering)
HOLDERS = (keep, in_cycle, keep_in_module, close_at_exit, finalize,
    lambda port: keep(Closes(port)), lambda port: in_cycle(Closes(port)), lambda port: keep(Posts(port)),
    lambda port: in_cycle(Receives(port)), lambda port: keep_in_module(Closes(port)), lambda port: port.close())

def build(dice):
    for _ in range(dice.randrange(1, 5)):
        ends = list(mpchannel.MessageChannel())
        dice.shuffle(ends)
        states = dice.sample(STATES, dice.randrange(0, 3))
        for state in states:
            state(dice.choice(ends))
        for end in ends:
            dice.choice(HOLDERS)(end)
        if dice.random() < 0.2:
            gc.collect()
    dice.shuffle(kept)
    del kept[: dice.randrange(0, len(kept) + 1)]

kept = []
children = []
for seed in range(first, first + count):
    pid = os.fork()
    if not pid:
        dice = random.Random(seed)
        random.seed(seed)
        signal.alarm(30)
        build(dice)
        break  # off the end, with all that is still there
    children.append(pid)
    if len(children) == 4 or seed == first + count - 1:
        for pid in children:
            _, status = os.waitpid(pid, 0)
            if status:
                sys.exit(f"{pid} ended with {status}, one of the seeds {seed - len(children) + 1} to {seed}")
        children = []
"""


@pytest.mark.parametrize("part", range(5))
def test_100_interpreters_that_end_in_random_order_are_silent(part: int, record_property: Any) -> None:
    first = random.randrange(1 << 30)
    record_property("first seed", first)
    result = children.run_script(f"first, count = {first}, 20\n{TEARDOWNS}", "-W", "always", timeout=120)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", ""), f"first seed {first}\n{result.stderr}"


# Threads


def test_8_threads_post_and_receive_on_one_port_and_nothing_is_lost_or_doubled() -> None:
    near, far = mpchannel.MessageChannel[Any, Any]()
    each = 500
    got: list[list[Any]] = [[] for _ in range(8)]

    def echo() -> None:
        for message in far:
            far.post_message(message)

    def work(name: int) -> None:
        for number in range(each):
            near.post_message((name, number))
            got[name].append(near.recv(30))

    echoing = threading.Thread(target=echo)
    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in (echoing, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    near.close()
    echoing.join(20)
    taken = [message for some in got for message in some]
    assert len(taken) == 8 * each
    assert set(taken) == {(name, number) for name in range(8) for number in range(each)}
    for some in got:
        last = dict[int, int]()
        for name, number in some:
            assert last.get(name, -1) < number, "out of order"
            last[name] = number


# Whoever is stuck


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("b.receive()", "in receive"),
        ("b.recv()", "in recv"),
        ("b.poll(None)", "in poll"),
        ("b.wait_closed()", "in wait_closed"),
        ("mpchannel.wait([b])", "in wait"),
        ("(a.post_message(1), a.drain())", "in drain"),
    ],
)
def test_a_dump_of_a_stuck_program_says_who_waits_on_what(call: str, named: str) -> None:
    result = children.run_script(
        f"""
import faulthandler, mpchannel, tempfile, threading, time
a, b = mpchannel.MessageChannel()
def stuck_here():
    {call}
threading.Thread(target=stuck_here, daemon=True).start()
deadline = time.monotonic() + 20
with tempfile.TemporaryFile("w+") as file:
    while time.monotonic() < deadline:
        file.seek(0)
        file.truncate()
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
        frames = text.split("Thread 0x")[1]
        if "in stuck_here" in frames and {named!r} in frames:
            assert "mpchannel" in frames
            break
    else:
        print(text)
"""
    )
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "")
