"""``inspect()``: what this process has of ports, workers and pending calls, as plain data.

House rules: looks, and changes nothing; imports no room that the program did not (who has no pool has no calls of one).
"""

from __future__ import annotations

import multiprocessing.process
import os
import sys
import time
from typing import Any

from . import ipc
from ._endpoint import Endpoint, State
from ._link import open_links
from ._sockdiag import alive
from ._status import Waiting, peer, status

__all__ = ["inspect"]


def inspect() -> dict[str, Any]:
    """What this process has, as plain data that ``json.dumps`` takes. Costs nothing when nobody calls it.

    ``ports``: each open port, the oldest first: ``id`` (its channel, and which end), ``kind``, ``state``, ``started``,
    ``listeners`` (how many of each event), ``peer`` (``pid`` of the process last known to hold the other end, whether
    that is ``here``, whether it is ``alive``), ``in`` and ``out`` (what was posted and not yet taken: ``messages``,
    whether that is ``exact`` or an upper bound, ``bytes``; ``None`` where the system does not tell), ``age`` in
    seconds.
    ``workers``: each running ``Worker``. ``pools``: each ``WorkerPool`` with its workers. ``calls``: each call that has
    no answer yet, with its ``kind``: ``pool``, ``remote`` or ``invoke``.
    """
    owners = [None if link.owner is None else link.owner() for link in open_links()]
    ports = [each for each in owners if isinstance(each, Endpoint) and each._state is State.OPEN]
    return {
        "pid": os.getpid(),
        "name": multiprocessing.process.current_process().name,
        "time": time.time(),
        "ports": [_port(each) for each in sorted(ports, key=lambda each: each._born)],
        "workers": _workers(),
        "pools": [_pool(each) for each in _pools()],
        "calls": [*_pool_calls(), *_remote_calls(), *_invocations()],
    }


def _port(port: Endpoint) -> dict[str, Any]:
    link = port._link
    try:
        found = status(link)
    except OSError:  # closed this very moment, or at a limit of the system
        found = None
    return {
        "id": port._identity,
        "kind": type(port).__name__,
        "state": port._state.value,
        "started": port.started,
        "listeners": {name: len(row) for name, row in port._listeners.copy().items() if row},
        "peer": peer(link),
        "in": None if found is None else _waiting(found.incoming),
        "out": None if found is None else _waiting(found.outgoing),
        "age": round(port.age, 6),
    }


def _waiting(waiting: Waiting | None) -> dict[str, Any] | None:
    return None if waiting is None else waiting._asdict()


def _workers() -> list[dict[str, Any]]:
    # (active_children() would reap them.)
    children = list(getattr(multiprocessing.process, "_children", ()))
    started = [worker for each in children if (worker := getattr(each, "_worker", None)) is not None]
    return [
        {"name": each.name, "pid": each.pid, "alive": alive(each.pid), "ref": each._ref, "port": each._port._identity}
        for each in sorted(started, key=lambda each: int(each.pid))
    ]


def _pools() -> list[Any]:
    room: Any = sys.modules.get("mpchannel.workerpool")
    return [] if room is None else sorted(room.pools, key=lambda pool: str(pool._name))


def _pool(pool: Any) -> dict[str, Any]:
    with pool._lock:
        return {
            "name": pool._name,
            "max_workers": pool._max_workers,
            "shut": pool._shut,
            "workers": [{"pid": seat.worker.pid, "ready": seat.ready, "given": seat.count} for seat in pool._seats],
        }


def _pool_calls() -> list[dict[str, Any]]:
    found = []
    for pool in _pools():
        with pool._lock:
            now = time.monotonic()
            for seat in pool._seats:
                for place, call in enumerate(seat.calls.values()):
                    running = place == 0 and seat.ready
                    seconds = round(now - seat._since, 6) if running else None
                    found.append(_call("pool", call._name, seat.worker.pid, running, seconds, pool._name))
            found += [_call("pool", call._name, None, False, None, pool._name) for call in pool._waiting]
    return found


def _remote_calls() -> list[dict[str, Any]]:
    room: Any = sys.modules.get("mpchannel.remote")
    callers = [] if room is None else [caller for each in list(room._wrapped.values()) if (caller := each())]
    found = []
    for caller in callers:
        calls = len(list(caller._busy))
        found += [_call("remote", None, caller.port._link.peer_pid, None, None, caller.port._identity)] * calls
    return found


def _invocations() -> list[dict[str, Any]]:
    waiting = [(port, channel) for port, channel in list(ipc.parent._asked.items()) if not port.closed]
    pid = os.getppid()
    return [_call("invoke", channel, pid, None, round(port.age, 6), None) for port, channel in waiting]


def _call(
    kind: str, name: str | None, pid: int | None, running: bool | None, seconds: float | None, through: str | None
) -> dict[str, Any]:
    """*pid*: whose answer is awaited. *running*: whether it has begun, if that is known; *seconds*: for how long."""
    return {"kind": kind, "name": name, "pid": pid, "running": running, "seconds": seconds, "through": through}
