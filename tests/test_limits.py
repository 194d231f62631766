"""Limits of the system, and systems that lack what channels need: an error that says so, and nothing lost."""

from __future__ import annotations

import os
import resource
import textwrap
from pathlib import Path

import pytest

from . import children

pytestmark = pytest.mark.once

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
    if result.stdout.startswith("no "):  # what is to be tested cannot be made here
        pytest.skip(result.stdout.strip())


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
@pytest.mark.parametrize("way", ["on", "once", "add_event_listener", "onclose", "onclose again"])
def test_a_close_listener_that_is_refused_at_the_limit_is_not_there_and_can_be_added_again(
    way: str, limit: int
) -> None:
    run(
        f"""
        limit({limit})
        a, b = mpchannel.MessageChannel()
        heard = threading.Event()
        def listen(event):
            heard.set()
        def add(fn=listen):
            if {way!r} in ("onclose", "onclose again"):
                b.onclose = fn
            else:
                getattr(b, {way!r})("close", fn)
        files = fill()
        for _ in range(3):
            refused(add, {limit})
            assert b.onclose is None
        if {way!r} == "onclose again":
            refused(lambda: add(print), {limit})
        empty(files)
        add()
        a.close()
        assert heard.wait(5), "a deaf listener"
        """
    )


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_an_exit_listener_that_is_refused_at_the_limit_can_be_added_again(spare: int) -> None:
    run(
        f"""
        limit(64)
        def work():
            mpchannel.parent_port().recv()
        worker = mpchannel.Worker(work)
        heard = threading.Event()
        def listen(event):
            heard.set()
        files = fill({spare})
        refusals = 0
        try:
            worker.on("exit", listen)
        except OSError as error:
            assert error.errno == errno.EMFILE, error
            refusals += 1
        empty(files)
        if refusals:
            worker.on("exit", listen)
        worker.post_message("end")
        assert heard.wait(10), "a deaf listener"
        assert refusals == ({spare} < 3), refusals
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


# Threads (RLIMIT_NPROC, pids of a cgroup)


def test_a_listener_that_finds_no_thread_is_refused_and_can_be_added_again(unprivileged: str) -> None:
    run(
        unprivileged
        + """
    a, b = mpchannel.MessageChannel()
    heard = threading.Event()
    def listen(event):
        heard.set()
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
    def assign():
        b.onmessage = listen
    for add in (assign, assign, lambda: b.on("close", listen), lambda: b.on("close", listen)):
        try:
            add()
        except RuntimeError as error:
            assert "thread" in str(error), error
        else:
            raise AssertionError("there is a thread")
        assert b.onmessage is None
    works(a, b)
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    assign()
    a.post_message("a message")
    assert heard.wait(5), "a deaf listener"
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


# Places on disk, and memory with a name


PLACES = """
    import tempfile
    def uses_everything():
        a, b = mpchannel.MessageChannel()
        mine, moving = mpchannel.MessageChannel()
        a.post_message(bytes(1 << 20))
        a.post_message("a port", [moving])
        for number in range(1000):
            a.post_message(number)
        a.post_message(bytes(3 << 20))
        buffer = mpchannel.SharedBuffer(1 << 20)
        a.post_message(buffer, [buffer])
        assert b.recv(5) == bytes(1 << 20)
        works(mine, b.receive(5).ports[0])
        assert [b.recv(5) for _ in range(1000)] == list(range(1000))
        assert b.recv(5) == bytes(3 << 20)
        assert bytes(memoryview(b.recv(5))[:3]) == bytes(3)

    def child(port):
        port.post_message(port.recv(10) + bytes(1 << 20))

    def uses_a_process(method):
        port, theirs = mpchannel.MessageChannel()
        process = mpchannel.get_context(method).Process(target=child, args=(theirs,))
        process.start()
        port.post_message(b"there and back")
        assert port.recv(20) == b"there and back" + bytes(1 << 20)
        process.join()
        assert process.exitcode == 0
"""


@pytest.mark.parametrize("place", ["missing", "read-only", "200 characters"])
def test_the_folder_for_temporary_files_does_not_matter(place: str, tmp_path: Path) -> None:
    folder = tmp_path / ("t" * 200)
    if place != "missing":
        folder.mkdir()
    if place == "read-only":
        folder.chmod(0o555)
    run(
        PLACES
        + f"""
    os.environ["TMPDIR"] = tempfile.tempdir = {str(folder)!r}
    if {place == "read-only"} and os.getuid() == 0:
        mpchannel.MessageChannel()  # imports all that is needed while it may be read
        os.setuid(65_534)  # to root, nothing is read-only
    uses_everything()
    uses_a_process("fork")
    if {place == "read-only"}:
        sys.exit()
    port, theirs = mpchannel.MessageChannel()
    process = mpchannel.get_context("forkserver").Process(target=child, args=(theirs,))
    try:
        process.start()
    except OSError:  # multiprocessing has a socket there
        assert not theirs.detached
        works(port, theirs)
    else:
        assert sys.version_info > (3, 13)
        port.close()
        process.join()
    """
    )
    assert not folder.exists() or not any(folder.iterdir())


def test_a_full_dev_shm_does_not_matter(tmp_path: Path) -> None:
    run(
        PLACES
        + """
    import ctypes, errno
    libc = ctypes.CDLL(None, use_errno=True)
    NEWNS, NEWUSER, PRIVATE, REC = 0x20000, 0x10000000, 1 << 18, 1 << 14
    if libc.unshare(NEWNS) and libc.unshare(NEWNS | NEWUSER):
        print("no mount namespaces here")
        sys.exit()
    libc.mount(b"none", b"/", None, PRIVATE | REC, None)
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        print("no mounts here")
        sys.exit()
    with open("/dev/shm/all", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    uses_everything()
    for method in ("fork", "spawn", "forkserver"):
        uses_a_process(method)
    assert os.listdir("/dev/shm") == ["all"]
    """
    )


# Many ports, and much that is queued


def test_10_000_ports_are_open_at_once_and_each_hears() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 10_300:
        pytest.skip("this user may not have 10,300 open files (the hard RLIMIT_NOFILE)")
    run(
        """
        limit(10_300)
        channels = [mpchannel.MessageChannel() for _ in range(5000)]
        heard, all_heard = {}, threading.Event()
        def listen(number, event):
            heard[number] = event.data
            if len(heard) == len(channels):
                all_heard.set()
        for number, (near, far) in enumerate(channels):
            far.onmessage = lambda event, number=number: listen(number, event)
        for number, (near, far) in enumerate(channels):
            near.post_message(number)
        assert all_heard.wait(30), len(heard)
        assert heard == {number: number for number in range(5000)}
        for near, far in channels:
            near.close()
        assert all(far.wait_closed(10).reason == "closed" for near, far in channels)
        """
    )


def test_10_gib_are_not_queued_where_max_buffered_is_set() -> None:
    run(
        """
        import mmap, pickle

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        def held():
            "Bytes of memory that has no name, mapped or not, and that this process can see; a file counts once."
            found = {}
            for name in os.listdir("/proc/self/fd"):
                try:
                    status = os.stat(f"/proc/self/fd/{name}")
                    if "memfd" in os.readlink(f"/proc/self/fd/{name}"):
                        found[status.st_ino] = status.st_blocks * 512
                except OSError:
                    continue  # the one that lists
            return sum(found.values())

        a, b = mpchannel.MessageChannel()
        a.max_buffered = 64 << 20
        body = bytes(8 << 20)
        accepted = 0
        before = resident()
        for number in range(10 * 128):
            try:
                accepted += a.post_message(body)
            except mpchannel.BufferFull:
                assert a.buffered_amount <= 64 << 20
        assert 4 <= accepted <= 8, accepted
        assert resident() + held() < before + (160 << 20)
        # One of 10 GiB, whose pages are not there: it is refused before they are looked at.
        huge = mmap.mmap(-1, 10 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        try:
            a.post_message(pickle.PickleBuffer(huge))
        except mpchannel.BufferFull as error:
            assert str(64 << 20) in str(error)
        else:
            raise AssertionError("10 GiB are queued")
        assert resident() + held() < before + (160 << 20)
        for number in range(accepted):
            assert b.recv(5) == body
        assert not b.poll()
        assert a.post_message(body) and b.recv(5) == body
        """
    )


# Containers


SECCOMP = """
    import ctypes, platform, struct
    if platform.machine() != "x86_64":
        print("no numbers of system calls but those of x86-64")
        sys.exit()
    NUMBERS = {calls}
    def refuse_calls(answer=errno.EPERM):
        "As a container does: have the kernel refuse these calls, in this process and all that it starts."
        def instruction(code, true, false, k):
            return struct.pack("HBBI", code, true, false, k)
        program = instruction(0x20, 0, 0, 0)  # load the number of the call
        for number in NUMBERS:
            program += instruction(0x15, 0, 1, number) + instruction(0x06, 0, 0, 0x00050000 | answer)
        program += instruction(0x06, 0, 0, 0x7FFF0000)
        code = ctypes.create_string_buffer(program)
        filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
        if libc.prctl(22, 2, filter, 0, 0):  # PR_SET_SECCOMP
            print("no seccomp here")
            sys.exit()
"""
BLOCKED_IN_DOCKER = {
    "ptrace": 101,
    "personality": 135,
    "mount": 165,
    "umount2": 166,
    "quotactl": 179,
    "mbind": 237,
    "get_mempolicy": 239,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "unshare": 272,
    "move_pages": 279,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "pidfd_getfd": 438,
    "memfd_secret": 447,
}
"""What its default profile refuses to a process without capabilities (in some version of it), on x86-64."""


def test_what_containers_refuse_by_default_is_not_needed() -> None:
    run(
        PLACES
        + SECCOMP.format(calls=list(BLOCKED_IN_DOCKER.values()))
        + """
    refuse_calls()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(312, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM  # kcmp: it is on
    uses_everything()
    for method in ("fork", "spawn", "forkserver"):
        uses_a_process(method)
    """
    )


@pytest.mark.parametrize("refused", ["memfd_create", "eventfd2", "pidfd_open", "socketpair"])
def test_where_a_call_that_is_needed_is_refused_an_error_says_so_and_the_rest_works(refused: str) -> None:
    calls = {"memfd_create": [319], "eventfd2": [290], "pidfd_open": [434], "socketpair": [53]}[refused]
    run(
        PLACES
        + SECCOMP.format(calls=calls)
        + f"""
    a, b = mpchannel.MessageChannel()
    refuse_calls()
    works(a, b)
    def is_refused(fn):
        try:
            fn()
        except OSError as error:
            assert error.errno == errno.EPERM, repr(error)
            assert "cannot" in str(error), error
        else:
            raise AssertionError("it is not refused")
    if {refused!r} == "memfd_create":
        mine, moving = mpchannel.MessageChannel()
        is_refused(lambda: a.post_message(bytes(1 << 20), [moving]))
        assert not moving.detached
        assert a.post_message("a port", [moving])
        works(mine, b.receive(5).ports[0])
    elif {refused!r} == "eventfd2":
        a.post_message(bytes(1 << 20))
        assert b.recv(5) == bytes(1 << 20)
        def listen():
            b.onmessage = print
        is_refused(listen)
        is_refused(lambda: a.receive(0.05))
    elif {refused!r} == "pidfd_open":
        uses_everything()
        uses_a_process("fork")
    else:
        is_refused(mpchannel.MessageChannel)
    works(a, b)
    """
    )
