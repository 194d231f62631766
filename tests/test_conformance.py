"""CPython's own tests of connections, on mpchannel. (``python -m tests.conformance --compare`` runs all of them.)"""

from __future__ import annotations

import pytest

from . import conformance

NAMES = ["TestConnection", "TestPoll", "TestWait", "TestPicklingConnections", "TestListener", "TestInvalidHandle"]
NAMES += ["TestStartMethod"]


@pytest.mark.skipif(not conformance.available(), reason="this Python comes without its own tests")
def test_cpythons_tests_of_connections_pass(start_method: str) -> None:
    found = conformance.run(start_method, NAMES, timeout=110)
    assert found["bad"] == {}
    assert len(found["passed"]) > 30
