"""What the tests of ``expose`` and ``wrap`` serve in workers. Imports nothing but the package, as ``children``."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import mpchannel


class NotLoadable:
    """Pickles, and fails when it is loaded."""

    def __reduce__(self) -> Any:
        return _fail_to_load, ()


def _fail_to_load() -> None:
    raise LookupError("it cannot be loaded here")


class Store:
    def __init__(self) -> None:
        self.items: dict[Any, Any] = {}
        self.count = 0
        self._secret = 1
        self.kept: Any = None

    def put(self, key: Any, value: Any) -> int:
        self.items[key] = value
        self.count += 1
        return self.count

    def get(self, key: Any, default: Any = None) -> Any:
        return self.items.get(key, default)

    def same(self, thing: Any) -> Any:
        return thing

    def append(self, number: int) -> None:
        self.items.setdefault("order", []).append(number)

    def fail(self) -> None:
        error = LookupError("no such thing")
        error.add_note("a note")
        raise ExceptionGroup("several", [error])

    def unsendable(self) -> Any:
        return threading.Lock()

    def not_loadable(self) -> Any:
        return NotLoadable()

    def own_pid(self) -> int:
        return os.getpid()

    def thread(self) -> str:
        return threading.current_thread().name

    def each(self, count: int) -> Iterator[int]:
        try:
            for number in range(count):
                self.count = number
                yield number
        finally:
            self.items["finally"] = True

    def each_and_fail(self, count: int) -> Iterator[int]:
        yield from range(count)
        raise LookupError("behind the last")

    def work(self, count: int, progress: Callable[[int, int], Any]) -> list[Any]:
        return [progress(number, count) for number in range(count)]

    def keep(self, callback: Any) -> None:
        self.kept = callback

    def call_kept(self, *args: Any) -> Any:
        return self.kept(*args)

    def call_with_unloadable(self, callback: Any) -> Any:
        return callback(NotLoadable())

    def release_kept(self) -> None:
        mpchannel.release(self.kept)

    def drop_kept(self) -> None:
        self.kept = None

    def through_port(self, port: Any, value: Any) -> None:
        with port:
            port.post_message(value)

    def hold(self, port: Any, answer: Any = None) -> Any:
        """Tell that it runs, and go on when told."""
        port.post_message("begun")
        port.recv()
        return answer

    def exit(self, code: int) -> None:
        os._exit(code)


class AsyncStore(Store):
    async def later(self, value: Any) -> Any:
        await asyncio.sleep(0)
        return value

    async def wait_for(self, port: Any) -> Any:
        """Tell that it runs, and how it ended."""
        port.post_message("begun")
        try:
            return await port.arecv()
        except asyncio.CancelledError:
            port.post_message("cancelled")
            raise

    async def aeach(self, count: int, port: Any = None) -> AsyncIterator[int]:
        try:
            for number in range(count):
                self.count = number
                yield number
                await asyncio.sleep(0)
            if port is not None:
                await port.arecv()
        finally:
            if port is not None:
                port.post_message("finally")

    async def awork(self, count: int, progress: Any) -> list[Any]:
        return [await progress(number) for number in range(count)]


def serve() -> None:
    port = mpchannel.parent_port()
    assert port is not None
    mpchannel.expose(Store(), port)


async def serve_on_loop() -> None:
    port = mpchannel.parent_port()
    assert port is not None
    mpchannel.expose(AsyncStore(), port)


def serve_port(port: Any) -> None:
    """Several ports may be served in one worker."""
    mpchannel.expose(Store(), port)


def serve_and_close_when_told(control: Any) -> None:
    port = mpchannel.parent_port()
    assert port is not None
    mpchannel.expose(AsyncStore(), port)
    control.recv()
    port.close()
    control.recv()


def chain(far: Any) -> None:
    """Serve an object that uses another one, which lives in another process."""

    class Middle:
        def __init__(self, behind: Any) -> None:
            self.behind = behind

        def work(self, count: int, progress: Any) -> Any:
            return self.behind.work(count, progress)

    port = mpchannel.parent_port()
    assert port is not None
    mpchannel.expose(Middle(mpchannel.wrap(far)), port)


def use(proxy: Any, port: Any) -> None:
    port.post_message(proxy.own_pid())
