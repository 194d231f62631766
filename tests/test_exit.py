"""The end of a program with live ports: no hang, no traceback, exit code 0, and the other side hears of it."""

from __future__ import annotations

import random
import textwrap

import pytest

import mpchannel

from . import children

PREAMBLE = """
import asyncio, atexit, multiprocessing, os, sys, threading, time
import mpchannel
from tests import children
"""


def ends_quietly(script: str, *options: str, code: int = 0, stdout: str = "") -> None:
    result = children.run_script(PREAMBLE + textwrap.dedent(script), *options, timeout=60)
    assert (result.returncode, result.stderr) == (code, ""), result.stderr
    assert result.stdout == stdout


# Live ports


@pytest.mark.row("X36")
@pytest.mark.parametrize("kept", ["a global", "a cycle", "a closure", "a thread's frame"])
def test_a_program_with_live_ports_ends(kept: str) -> None:
    ends_quietly(
        f"""
        a, b = mpchannel.MessageChannel()
        a.post_message("unread")
        a.post_message(bytes(1 << 20))
        for number in range(2000):
            b.post_message(number)
        c, d = mpchannel.MessageChannel()
        a.post_message("a port in flight", [d])
        if {kept!r} == "a cycle":
            cycle = [a, b]
            cycle.append(cycle)
            del a, b, cycle
        elif {kept!r} == "a closure":
            keep = lambda a=a, b=b: (a, b)
            del a, b
        elif {kept!r} == "a thread's frame":
            threading.Thread(target=lambda a, b: time.sleep(1000), args=(a, b), daemon=True).start()
            del a, b
        """
    )


@pytest.mark.row("N48")
@pytest.mark.parametrize("way", ["onmessage", "onclose", "start", "once"])
def test_a_program_with_live_listeners_ends(way: str) -> None:
    ends_quietly(
        f"""
        a, b = mpchannel.MessageChannel()
        heard = threading.Event()
        a.post_message("a message")
        if {way!r} == "onmessage":
            b.onmessage = lambda event: heard.set()
            assert heard.wait(10)
        elif {way!r} == "onclose":
            b.onclose = print
        elif {way!r} == "once":
            b.once("message", lambda event: heard.set()).start()
            assert heard.wait(10)
        else:
            b.start()
        """
    )


@pytest.mark.parametrize("way", ["receive()", "receive(1000)", "recv_bytes()", "poll(None)", "wait_closed()"])
@pytest.mark.parametrize("asleep", [False, True], ids=("on their way into it", "asleep"))
def test_a_program_with_threads_that_wait_on_ports_ends(way: str, asleep: bool) -> None:
    ends_quietly(
        f"""
        def wait(port):
            waiting.release()
            port.{way}
        waiting = threading.Semaphore(0)
        channels = [mpchannel.MessageChannel() for _ in range(8)]
        threads = [threading.Thread(target=wait, args=(each.port2,), daemon=True) for each in channels]
        for thread in threads:
            thread.start()
        for thread in threads:
            waiting.acquire()
        if {asleep}:
            channels[0].port2.poll(0.05)
        """
    )


def test_a_program_with_threads_that_post_receive_and_move_ports_all_the_while_ends() -> None:
    ends_quietly(
        """
        def talk():
            try:
                while True:
                    a, b = mpchannel.MessageChannel()
                    c, d = mpchannel.MessageChannel()
                    for number in range(400):
                        a.post_message(number)
                    a.post_message(None, [d])
                    for number in range(400):
                        b.recv()
                    b.receive().ports[0].close()
                    c.wait_closed()
                    going.set()
            except (mpchannel.PortClosedError, mpchannel.DataCloneError):
                pass  # the end of the program closes what it finds
        going = threading.Event()
        for _ in range(4):
            threading.Thread(target=talk, daemon=True).start()
        going.wait(20)
        """
    )


@pytest.mark.parametrize("busy", ["a flood", "a long listener", "ping-pong"])
def test_a_program_whose_delivery_thread_is_busy_ends(busy: str) -> None:
    ends_quietly(
        f"""
        a, b = mpchannel.MessageChannel()
        going = threading.Event()
        if {busy!r} == "a flood":
            def flood():
                while True:
                    a.post_message("more")
            b.onmessage = lambda event: going.set()
            threading.Thread(target=flood, daemon=True).start()
        elif {busy!r} == "ping-pong":
            a.onmessage = lambda event: a.post_message(event.data + 1)
            def answer(event):
                going.set()
                b.post_message(event.data + 1)
            b.onmessage = answer
            a.post_message(0)
        else:
            def listen(event):
                going.set()
                time.sleep(1000)
            b.onmessage = listen
            a.post_message("go")
        assert going.wait(20)
        """
    )


@pytest.mark.parametrize("end", ["return", "cancelled", "a pending task", "no asyncio.run"])
def test_a_program_with_ports_on_an_asyncio_loop_ends(end: str) -> None:
    ends_quietly(
        f"""
        a, b = mpchannel.MessageChannel()
        c, d = mpchannel.MessageChannel()
        async def main():
            b.onmessage = lambda event: heard.set_result(event.data)
            b.onclose = print
            heard = asyncio.get_running_loop().create_future()
            a.post_message("a message")
            assert await heard == "a message"
            task = asyncio.ensure_future(d.areceive())
            await asyncio.sleep(0)
            if {end!r} == "cancelled":
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            elif {end!r} != "a pending task":
                c.post_message("for the task")
                assert (await task).data == "for the task"
        if {end!r} == "no asyncio.run":
            loop = asyncio.new_event_loop()
            loop.run_until_complete(main())
            loop.close()
        else:
            asyncio.run(main())
        """
    )


def test_listeners_no_longer_run_once_the_program_ends() -> None:
    ends_quietly(
        """
        a, b = mpchannel.MessageChannel()
        heard = threading.Event()
        b.onmessage = lambda event: (print(event.data), heard.set())
        a.post_message("before the end")
        assert heard.wait(10)
        sys.stdout.flush()
        multiprocessing.util  # whose own atexit handler is there already
        class Late:
            def __del__(self):
                a.post_message("in the midst of the end")
        sys.late = Late()
        """,
        stdout="before the end\n",
    )


# Handlers at exit


@pytest.mark.row("W15")
@pytest.mark.parametrize("when", ["before the package's own", "after the package's own"])
def test_an_exit_handler_may_create_channels_and_post_and_receive(when: str) -> None:
    # Handlers run last in, first out.
    handler = """
def handler():
    c, d = mpchannel.MessageChannel()
    c.post_message("in the handler")
    assert d.recv(5) == "in the handler"
    for number in range(2000):
        c.post_message(number)
    e, f = mpchannel.MessageChannel()
    c.post_message("a port", [f])
    assert [d.recv(5) for _ in range(2000)] == list(range(2000))
    f, = d.receive(5).ports
    f.post_message("through it")
    assert e.recv(5) == "through it"
    f.close()
    d.onmessage = d.onclose = lambda event: None
    a.post_message("on an old port")
    a.close()
    print("done")
atexit.register(handler)
"""
    body = """
a, b = mpchannel.MessageChannel()
heard = threading.Event()
b.onmessage = lambda event: heard.set()
a.post_message("starts the delivery thread")
assert heard.wait(10)
"""
    script = f"import atexit\n{handler}{PREAMBLE}{body}" if when.startswith("after") else PREAMBLE + handler + body
    result = children.run_script(script)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "done\n"), result.stderr


@pytest.mark.row("W15")
def test_a_finally_after_sys_exit_may_create_channels_and_post() -> None:
    ends_quietly(
        """
        try:
            sys.exit(3)
        finally:
            a, b = mpchannel.MessageChannel()
            a.post_message("a message")
            assert b.recv(5) == "a message"
        """,
        code=3,
    )


def test_a_finaliser_in_the_midst_of_the_interpreters_end_may_use_its_port() -> None:
    ends_quietly(
        """
        class Holder:
            def __init__(self):
                self.ports = mpchannel.MessageChannel()
            def __del__(self, str=str):
                near, far = self.ports
                near.post_message("late")
                near.close()
        holder = Holder()
        sys.holder = Holder()
        """
    )


# Children


@pytest.mark.parametrize("module", ["mpchannel", "multiprocessing"])
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_children_that_wait_for_the_parents_port_end_with_it(module: str, start_method: str) -> None:
    # Not a daemon: multiprocessing joins it at exit, and it ends only when its port closes.
    ends_quietly(
        f"""
        if __name__ == "__main__":
            context = {module}.get_context({start_method!r})
            ours, theirs = mpchannel.MessageChannel()
            context.Process(target=children.echo, args=(theirs,)).start()
            ours.post_message("a message")
            assert ours.recv(20) == "a message"
        """
    )


@pytest.mark.row("W48")
@pytest.mark.parametrize("waiting", ["a listener", "a thread in receive", "nothing"])
def test_the_end_of_a_process_is_told_as_exited_behind_its_last_message(context: object, waiting: str) -> None:
    ours, theirs = mpchannel.MessageChannel()
    process = context.Process(target=children.post_and_end, args=(theirs, waiting))  # type: ignore[attr-defined]
    with children.running(process):
        assert ours.recv(20) == "the last message"
        event = ours.wait_closed(20)
        assert event is not None
        assert (event.reason, event.was_clean, event.pid) == ("exited", True, process.pid)
        assert event.exitcode == 0


TEARDOWN = """
if __name__ == "__main__":
    order, held = {order!r}, {held!r}
    context = mpchannel.get_context("fork")
    ours, theirs = mpchannel.MessageChannel()
    process = context.Process(target=children.teardown, args=(theirs, order, held), daemon={daemon})
    process.start()
    assert ours.recv(20) == "ready"
    if held == "overflow":
        for number in range(1000):
            ours.post_message(number)
    elif held == "ports":
        kept = [mpchannel.MessageChannel() for _ in range(3)]
        ours.post_message(None, [pair.port2 for pair in kept])
    elif held == "listeners":
        ours.onmessage = ours.onclose = lambda event: None
    if order == "the child first":
        ours.post_message("end")
        process.join()
    elif order == "both at once":
        ours.post_message("end")
    elif order == "during a transfer":
        near, far = mpchannel.MessageChannel()
        ours.post_message("end", [far])
        for number in range(100):
            near.post_message(number)
    elif order == "close and end":
        ours.close()
"""


def test_60_teardowns_in_random_order_are_silent() -> None:
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    for _ in range(60):
        order = dice.choice(
            ("the parent first", "the child first", "both at once", "during a transfer", "close and end")
        )
        held = dice.choice(("nothing", "overflow", "ports", "listeners"))
        script = TEARDOWN.format(order=order, held=held, daemon=dice.random() < 0.3)
        result = children.run_script(PREAMBLE + script, "-W", "always", timeout=60)
        assert (result.returncode, result.stderr, result.stdout) == (0, "", ""), f"seed {seed}\n{script}"


# Names


def test_no_name_appears_anywhere_while_channels_are_in_use() -> None:
    ends_quietly(
        """
        import tempfile
        folder = tempfile.mkdtemp()
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        def named():
            with open("/proc/net/unix") as file:
                inodes = {line.split()[6] for line in list(file)[1:] if len(line.split()) > 7}
            mine = set()
            for name in os.listdir("/proc/self/fd"):
                try:
                    mine.add(os.readlink(f"/proc/self/fd/{name}"))
                except OSError:
                    pass
            sockets = {each for each in mine if each.removeprefix("socket:[").rstrip("]") in inodes}
            files = {each for each in mine if each.startswith("/") and not each.startswith(("/dev/null", "/memfd:"))}
            return sockets, files, set(os.listdir(folder))
        def listening():
            found = set()
            for kind in ("unix", "tcp", "tcp6"):
                try:
                    with open(f"/proc/net/{kind}") as file:
                        rows = [line.split() for line in list(file)[1:]]
                except OSError:
                    continue
                found |= {row[6] for row in rows if kind == "unix" and row[3] == "00010000"}
                found |= {row[9] for row in rows if kind != "unix" and row[3] == "0A"}
            mine = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                    if os.path.lexists(f"/proc/self/fd/{name}")}
            return {inode for inode in found if f"socket:[{inode}]" in mine}
        shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
        files_before = named()
        a, b = mpchannel.MessageChannel()
        c, d = mpchannel.MessageChannel()
        heard = threading.Event()
        d.onclose = lambda event: heard.set()
        for number in range(2000):
            a.post_message(number)
        a.post_message(bytes(5 << 20))
        a.post_message("a port", [c])
        process = mpchannel.get_context("fork").Process(target=children.echo, args=(b,))
        process.start()
        assert a.recv(20) == 0
        assert named() == files_before, named()
        assert listening() == set()
        new = set(os.listdir("/dev/shm")) - shared if os.path.isdir("/dev/shm") else set()
        assert not [name for name in new if "mpchannel" in name or f"{os.getpid()}" in name], new
        a.close()
        process.join()
        os.rmdir(folder)
        """
    )
