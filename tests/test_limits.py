"""Limits of the system, and systems that lack what channels need: an error that says so, and nothing lost."""

from __future__ import annotations

import os
import textwrap

import pytest

from . import children

PREAMBLE = """
    import errno, os, resource, sys, threading
    import mpchannel

    def limit(soft):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def fill(leave=0):
        files = []
        try:
            while True:
                files.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        for _ in range(leave):
            os.close(files.pop())
        return files

    def empty(files):
        while files:
            os.close(files.pop())

    def count():
        return len(os.listdir("/proc/self/fd")) - 1

    def refused(fn, limit, used=None):
        try:
            result = fn()
        except OSError as error:
            assert error.errno == errno.EMFILE, repr(error)
            for word in (str(limit), str(used or limit), "RLIMIT_NOFILE"):
                assert word in str(error), str(error)
        else:
            raise AssertionError(f"no error, but {result!r}")

    def works(near, far):
        near.post_message("does it work?")
        assert far.recv(5) == "does it work?"
        far.post_message("it does")
        assert near.recv(5) == "it does"
"""


def run(script: str) -> None:
    result = children.run_script(textwrap.dedent(PREAMBLE) + textwrap.dedent(script))
    assert (result.returncode, result.stderr) == (0, ""), result.stderr


LIMITS = pytest.mark.parametrize("limit", [64, 256])


# Open files (RLIMIT_NOFILE)


@LIMITS
@pytest.mark.parametrize("spare", [0, 1])
def test_no_channel_at_the_limit_and_one_again_when_there_is_room(limit: int, spare: int) -> None:
    run(
        f"""
        limit({limit})
        files = fill({spare})
        for _ in range(3):
            refused(mpchannel.MessageChannel, {limit}, {limit - spare})
        empty(files)
        before = count()
        a, b = mpchannel.MessageChannel()
        assert count() == before + 2, "the refused ones left something"
        works(a, b)
        """
    )


@LIMITS
def test_as_many_channels_as_the_limit_allows_and_all_of_them_work(limit: int) -> None:
    run(
        f"""
        limit({limit})
        before, channels = count(), []
        try:
            while True:
                channels.append(mpchannel.MessageChannel())
        except OSError as error:
            assert error.errno == errno.EMFILE
        assert len(channels) == ({limit} - before) // 2
        for channel in channels:
            works(*channel)
        """
    )


@LIMITS
def test_posting_and_receiving_small_messages_need_no_descriptor(limit: int) -> None:
    run(
        f"""
        limit({limit})
        a, b = mpchannel.MessageChannel()
        fill()
        works(a, b)
        for number in range(100):
            a.post_message(number)
        assert [b.recv(5) for _ in range(100)] == list(range(100))
        assert not b.poll()
        a.close()
        assert b.wait_closed(5).reason == "closed"
        """
    )


@LIMITS
def test_a_port_can_be_posted_at_the_limit(limit: int) -> None:
    run(
        f"""
        limit({limit})
        a, b = mpchannel.MessageChannel()
        c, d = mpchannel.MessageChannel()
        files = fill()
        assert a.post_message("a port", [d])  # its descriptor is free again now
        (arrived,) = b.receive(5).ports
        works(c, arrived)
        """
    )


@LIMITS
@pytest.mark.parametrize("way", ["receive", "receive with a timeout", "receive_message_on_port", "next", "areceive"])
def test_a_port_that_cannot_be_received_at_the_limit_stays_and_arrives_when_there_is_room(limit: int, way: str) -> None:
    run(
        f"""
        import asyncio
        limit({limit})
        a, b = mpchannel.MessageChannel()
        c, d = mpchannel.MessageChannel()
        a.post_message(("one", d), [d])
        a.post_message("two")
        c.post_message("queued")
        loop = asyncio.new_event_loop()
        take = {{
            "receive": b.receive,
            "receive with a timeout": lambda: b.receive(5),
            "receive_message_on_port": lambda: mpchannel.receive_message_on_port(b),
            "next": lambda: next(b),
            "areceive": lambda: loop.run_until_complete(b.areceive()),
        }}[{way!r}]
        files = fill()
        for _ in range(5):
            refused(take, {limit})
            assert b.poll()
        empty(files)
        event = b.receive(5)
        assert event.data == ("one", event.ports[0])
        assert b.recv(5) == "two"
        assert event.ports[0].recv(5) == "queued"
        works(c, event.ports[0])
        loop.close()
        """
    )


@LIMITS
def test_many_ports_of_which_some_find_no_room_stay_together_and_arrive_together(limit: int) -> None:
    run(
        f"""
        limit({limit})
        a, b = mpchannel.MessageChannel()
        pairs = [mpchannel.MessageChannel() for _ in range(10)]
        a.post_message("ports", [pair.port2 for pair in pairs])
        files = fill(leave=4)
        before = count()
        for _ in range(5):
            refused(b.receive, {limit}, {limit - 4})
            assert count() == before, "some of them were left here"
        empty(files)
        event = b.receive(5)
        for pair, arrived in zip(pairs, event.ports, strict=True):
            works(pair.port1, arrived)
        """
    )


@LIMITS
def test_a_listener_gets_the_port_when_there_is_room_and_the_trouble_is_reported_meanwhile(limit: int) -> None:
    run(
        f"""
        limit({limit})
        reported, heard = threading.Event(), threading.Event()
        texts, events = [], []
        threading.excepthook = lambda details: (texts.append(str(details.exc_value)), reported.set())
        a, b = mpchannel.MessageChannel()
        c, d = mpchannel.MessageChannel()
        def listen(event):
            events.append(event)
            heard.set()
        b.onmessage = listen
        a.post_message("first")
        assert heard.wait(5)
        heard.clear()
        b.onmessage = None
        a.post_message("a port", [d])
        files = fill()
        b.onmessage = listen
        assert reported.wait(5)
        assert "RLIMIT_NOFILE" in texts[0] and "{limit}" in texts[0], texts
        assert not heard.is_set()
        empty(files)
        assert heard.wait(5)
        assert [event.data for event in events] == ["first", "a port"]
        works(c, events[1].ports[0])
        """
    )


@LIMITS
def test_a_listener_that_finds_no_room_for_the_delivery_thread_can_be_added_again(limit: int) -> None:
    run(
        f"""
        limit({limit})
        a, b = mpchannel.MessageChannel()
        heard = threading.Event()
        def listen(event):
            heard.set()
        def assign():
            b.onmessage = listen
        files = fill()
        refused(assign, {limit})
        empty(files)
        b.onmessage = listen
        a.post_message("a message")
        assert heard.wait(5), "a deaf listener"
        """
    )


@LIMITS
def test_a_receive_that_waits_at_the_limit_gets_what_comes(limit: int) -> None:
    run(
        f"""
        limit({limit})
        a, b = mpchannel.MessageChannel()
        got = []
        def receive():
            got.append(b.receive().data)
            got.append(b.recv(20))
            try:
                b.recv()
            except mpchannel.PortClosedError as error:
                got.append(error.reason)
        thread = threading.Thread(target=receive)
        files = fill()
        thread.start()
        a.post_message(1)
        a.post_message(2)
        a.close()
        thread.join(20)
        assert got == [1, 2, "closed"], got
        """
    )


@LIMITS
@pytest.mark.parametrize("what", ["large body", "overflow", "overflow with a port", "254 ports"])
def test_what_cannot_be_posted_at_the_limit_is_refused_and_nothing_is_detached_or_lost(limit: int, what: str) -> None:
    run(
        f"""
        what = {what!r}
        a, b = mpchannel.MessageChannel()
        many = {{"overflow with a port": 1, "254 ports": 254}}.get(what, 0)
        pairs = [mpchannel.MessageChannel() for _ in range(many)]
        limit(count() + {limit} if pairs else {limit})
        message = bytes(1 << 20) if what == "large body" else "message"
        ports = [pair.port2 for pair in pairs]
        queued = 0
        files = fill()
        if "overflow" in what:
            try:
                while queued < 100_000:
                    a.post_message(queued)
                    queued += 1
            except OSError as error:
                assert error.errno == errno.EMFILE and "RLIMIT_NOFILE" in str(error), error
        for _ in range(3):
            refused(lambda: a.post_message(message, ports), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            assert not any(port.detached for port in ports)
        empty(files)
        for pair in pairs:
            works(*pair)
        a.post_message(message, ports)
        assert [b.recv(5) for _ in range(queued)] == list(range(queued))
        event = b.receive(5)
        assert event.data == message
        for pair, arrived in zip(pairs, event.ports, strict=True):
            works(pair.port1, arrived)
        assert not b.poll()
        """
    )


@LIMITS
@pytest.mark.parametrize("what", ["large body", "overflow", "overflow with ports", "300 ports"])
def test_what_cannot_be_received_at_the_limit_stays_and_arrives_when_there_is_room(limit: int, what: str) -> None:
    run(
        f"""
        what = {what!r}
        a, b = mpchannel.MessageChannel()
        many = {{"overflow with ports": 20, "300 ports": 300}}.get(what, 0)
        pairs = [mpchannel.MessageChannel() for _ in range(many)]
        ports = [pair.port2 for pair in pairs]
        queued = 2000 if "overflow" in what else 0
        for number in range(queued):
            a.post_message(number)
        a.post_message(bytes(3 << 20) if what == "large body" else "message", ports)
        soft = max(n for n in map(int, os.listdir("/proc/self/fd")) if n < 10_000) + 2
        limit(max(soft, {limit}))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = fill()
        got = []
        try:
            for _ in range(queued + 1):
                got.append(b.receive(5))
        except OSError as error:
            assert error.errno == errno.EMFILE and str(soft) in str(error) and "RLIMIT_NOFILE" in str(error), error
        for _ in range(3):
            if len(got) <= queued:
                refused(lambda: b.receive(5), soft)
        empty(files)
        limit(2000)
        while len(got) <= queued:
            got.append(b.receive(5))
        assert [event.data for event in got[:-1]] == list(range(queued))
        assert got[-1].data == (bytes(3 << 20) if what == "large body" else "message")
        for pair, arrived in zip(pairs, got[-1].ports, strict=True):
            works(pair.port1, arrived)
        assert not b.poll()
        """
    )


@pytest.mark.parametrize("count", [252, 253, 254, 506, 507, 600])
def test_more_ports_than_one_packet_holds_arrive_in_order_in_one_message(count: int) -> None:
    run(
        f"""
        limit(3000)
        a, b = mpchannel.MessageChannel()
        pairs = [mpchannel.MessageChannel() for _ in range({count})]
        a.post_message([pair.port2 for pair in pairs], [pair.port2 for pair in pairs])
        a.post_message("next")
        event = b.receive(5)
        assert event.data == list(event.ports)
        for number, (pair, arrived) in enumerate(zip(pairs, event.ports, strict=True)):
            pair.port1.post_message(number)
            assert arrived.recv(5) == number
        assert b.recv(5) == "next"
        """
    )


def test_ports_of_a_message_that_more_than_one_packet_carries_get_their_close_when_it_is_dropped() -> None:
    run(
        """
        limit(3000)
        a, b = mpchannel.MessageChannel()
        pairs = [mpchannel.MessageChannel() for _ in range(300)]
        a.post_message(None, [pair.port2 for pair in pairs])
        b.close()
        assert {pair.port1.wait_closed(5).reason for pair in pairs} == {"undeliverable"}
        """
    )


# Descriptors in flight (ETOOMANYREFS)


UNPRIVILEGED = """
    mpchannel.MessageChannel()  # imports all that is needed while it may be read
    os.setgid({gid})
    os.setuid({uid})
    limit(80)
    def too_many(fn):
        try:
            result = fn()
        except OSError as error:
            assert error.errno == errno.ETOOMANYREFS, repr(error)
            assert "80" in str(error) and "in flight" in str(error) and "RLIMIT_NOFILE" in str(error), error
            return True
        return False
"""


@pytest.fixture
def unprivileged() -> str:
    """Script text that gives up root: only other users have a limit of descriptors in flight."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become a user of whom nothing else is in flight")
    own = 61_000 + os.getpid() % 4000  # the count is per user, and tests run side by side
    return UNPRIVILEGED.format(uid=own, gid=own)


def test_too_many_descriptors_in_flight_are_refused_with_nothing_detached(unprivileged: str) -> None:
    run(
        unprivileged
        + """
    a, b = mpchannel.MessageChannel()
    posted = 0
    while True:
        mine, moving = mpchannel.MessageChannel()
        mine.post_message(posted)
        if too_many(lambda: a.post_message(posted, [moving])):
            break
        mine.close()
        posted += 1
        assert posted < 300, "there is no limit"
    assert not moving.detached
    assert moving.recv(5) == posted
    works(mine, moving)
    for number in range(posted):
        event = b.receive(5)
        assert event.data == number
        with event.ports[0] as arrived:
            assert list(arrived) == [number]
    assert not b.poll()
    assert a.post_message("again", [moving])
    works(mine, b.receive(5).ports[0])
    """
    )


def test_plain_data_never_uses_up_the_descriptors_in_flight(unprivileged: str) -> None:
    run(
        unprivileged
        + """
    a, b = mpchannel.MessageChannel()
    for number in range(1000):
        assert a.post_message((number, bytes(200_000)))
    for number in range(1000):
        assert b.recv(5)[0] == number
    """
    )


# Address space (RLIMIT_AS)


TIGHT = """
    import pickle

    def room(left):
        "May map *left* bytes more; None: as many as it likes."
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard if left is None else now + left, hard))

    refusals = 0

    def tightly(left, fn):
        "What *fn* gives, with little room or, if it is refused that, with plenty."
        global refusals
        room(left)
        try:
            return fn()
        except (MemoryError, OSError) as error:
            assert isinstance(error, MemoryError) or error.errno == errno.ENOMEM, repr(error)
            refusals += 1
        finally:
            room(None)
        return fn()
"""


@pytest.mark.parametrize("size", [300_000, 3_000_000])
@pytest.mark.parametrize("what", ["bytes", "buffer", "overflow"])
def test_without_address_space_a_message_is_refused_or_waits_and_nothing_is_lost(what: str, size: int) -> None:
    run(
        TIGHT
        + f"""
    a, b = mpchannel.MessageChannel()
    sent, got = [], []
    size = {size}
    for step in range(24):
        mine, moving = mpchannel.MessageChannel()
        body = bytes([step]) * size
        message = pickle.PickleBuffer(bytearray(body)) if {what!r} == "buffer" else body
        expected = []
        if {what!r} == "overflow":
            while a._link._outbox is None:
                a.post_message(len(expected))
                expected.append(len(expected))
        left = step * size // 8
        assert tightly(left, lambda: a.post_message(message, [moving]))
        assert moving.detached
        for number in expected:
            assert tightly(left, lambda: b.recv(5)) == number
        event = tightly(left, lambda: b.receive(5))
        assert event.data == body
        works(mine, event.ports[0])
        assert not b.poll()
        del event, message, body
    assert refusals > 3, "there was room all the time"
    """
    )


# Systems that lack something


LACKS = {
    "os.memfd_create": "os.memfd_create",
    "os.eventfd": "os.eventfd",
    "os.preadv": "os.preadv",
    "os.pwritev": "os.pwritev",
    "select.epoll": "select.epoll",
    "socket.AF_UNIX": "AF_UNIX",
    "socket.SOCK_SEQPACKET": "SOCK_SEQPACKET",
    "socket.SCM_RIGHTS": "SCM_RIGHTS",
    "socket.MSG_CMSG_CLOEXEC": "MSG_CMSG_CLOEXEC",
    "fcntl.F_ADD_SEALS": "F_ADD_SEALS",
}


@pytest.mark.parametrize(("lack", "named"), LACKS.items(), ids=LACKS)
def test_a_system_that_lacks_a_feature_can_import_and_is_told_which(lack: str, named: str) -> None:
    module, name = lack.split(".")
    refuses_channels(f"import {module}; del {module}.{name}", named)


@pytest.mark.parametrize("module", ["fcntl", "resource", "mmap"])
def test_a_system_without_a_unix_module_can_import_and_is_told_what_is_missing(module: str) -> None:
    refuses_channels(f"import sys; sys.modules[{module!r}] = None", "F_ADD_SEALS" if module == "fcntl" else module)


def test_a_system_with_none_of_it_can_import_and_is_told_of_everything() -> None:
    lacking = "import fcntl, os, select, socket, sys\n" + "\n".join(f"del {name}" for name in LACKS)
    lacking += "\nfor name in ('fcntl', 'mmap', 'resource'): sys.modules[name] = None"
    refuses_channels(lacking, *LACKS.values())


def test_a_system_without_fork_can_import() -> None:
    result = children.run_script("import os; del os.fork, os.register_at_fork; import mpchannel")
    assert (result.returncode, result.stderr) == (0, "")


def refuses_channels(lacking: str, *named: str) -> None:
    result = children.run_script(
        lacking
        + textwrap.dedent(
            """
            import mpchannel
            try:
                mpchannel.MessageChannel()
            except NotImplementedError as error:
                print(error)
            """
        )
    )
    assert (result.returncode, result.stderr) == (0, "")
    for name in named:
        assert name in result.stdout
