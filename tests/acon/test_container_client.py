"""What the client asks of a daemon about containers, for how long, and what it believes."""

from __future__ import annotations

from pathlib import Path

import pytest
from http_fakes import FakeOperations, served

from acon.client import Client
from acon.connection import REQUEST_TIMEOUT_S, Connection
from supervisor import ExitStatus, FormatError, Invocation, InvocationResult


async def test_what_waits_for_a_container_is_waited_for_that_much_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, waited = Connection.call, []

    async def call(self: Connection, *words: object, **options: float) -> bytes:
        waited.append(options["timeout_s"])
        return await genuine(self, *words, **options)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(Connection, "call", call)
    operations = FakeOperations()
    invocation = Invocation(entry_point="Run", capture_bytes=1, timeout_s=1000.5)
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        await client.restart(1, timeout_s=1000)
        await client.invoke(1, invocation)
    assert waited == [1000 + REQUEST_TIMEOUT_S, 1000.5 + REQUEST_TIMEOUT_S]
    # The API takes whole seconds; a command gets no less than was asked for.
    [(_, made)] = operations.invocations
    assert made.timeout_s == 1001


@pytest.mark.parametrize("status", [ExitStatus(), ExitStatus(exit_code=0, signal=9)])
async def test_a_command_that_has_not_ended_in_one_way_is_not_believed(
    tmp_path: Path, status: ExitStatus
) -> None:
    operations = FakeOperations()
    operations.result = InvocationResult(
        status=status, stdout=b"", stderr=b"", stdout_cut=False, stderr_cut=False
    )
    invocation = Invocation(entry_point="Run", capture_bytes=1, timeout_s=1)
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        with pytest.raises(FormatError, match="exactly one"):
            await client.invoke(1, invocation)
