"""What a container says of itself, for the evidence that others ask for, and for how long."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha384
from pathlib import Path

import pytest
import structlog.testing
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Busy,
    Conflict,
    ContainerOperations,
    ContainerSpec,
    ExitStatus,
    FormatError,
    LogSink,
    PluginContext,
    RunningContainer,
    StartReceipt,
    hookimpl,
)
from supervisor.attestation import MAX_TOTAL_CHARACTERS, AttestationRoom
from supervisor.formats.base64_text import to_base64
from supervisor.formats.digest import digest_of
from supervisor.formats.evidence import decode_evidence
from supervisor.formats.status import (
    MAX_ATTESTATION_DATA_BYTES,
    MAX_STATUS_BYTES,
    AttestationData,
    decode_status,
)
from supervisor.formats.td_report import parse_td_report
from supervisor.service import Supervisor
from supervisor.testing import (
    InMemory,
    InMemoryConfig,
    MemoryRuntime,
    Owner,
    in_memory_plugin,
    manifest,
    plugin,
    running,
)

TAR = b"bytes of a layer"
LAYER = digest_of("sha384", TAR)
SECRET = "nobody else's business"


def text(said: str) -> AttestationData:
    return AttestationData(kind="text", data=to_base64(said.encode()))


class Voices:
    """Serves containers' sockets by keeping their voices, one for each run."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.runs: list[ContainerOperations] = []

    @hookimpl
    async def serve_container(
        self,
        listener: trio.SocketListener,
        operations: ContainerOperations,
        task_status: trio.TaskStatus[None],
    ) -> None:
        self.runs.append(operations)
        await trio.sleep_forever()


class Rig:
    """A running supervisor with one image whose containers can be started and restarted."""

    def __init__(
        self, supervisor: Supervisor, machine: InMemory, voices: Voices, image_id: str
    ) -> None:
        self.supervisor = supervisor
        self.machine = machine
        self.voices = voices
        self.image_id = image_id

    async def start(self) -> ContainerOperations:
        await self.supervisor.start(self.image_id, [])
        await wait_all_tasks_blocked()
        return self.voices.runs[-1]

    def end(self, container_id: int) -> None:
        self.machine.runtime.running[container_id].end(ExitStatus(exit_code=0))

    async def said(self) -> dict[int, AttestationData | None]:
        """As evidence for somebody outside says it."""
        evidence = decode_evidence(await self.supervisor.evidence(bytes(16)))
        status = decode_status(evidence.status.encode())
        assert evidence.request.status_digest_sha384 == sha384(evidence.status.encode()).hexdigest()
        return {one.container_id: one.attestation_data for one in status.containers}


@asynccontextmanager
async def rig(tmp_path: Path, runtime: MemoryRuntime | None = None) -> AsyncIterator[Rig]:
    loaded, voices = in_memory_plugin(tmp_path), plugin(Voices, tmp_path)
    assert isinstance(loaded.plugin, InMemory)
    assert isinstance(voices.plugin, Voices)
    loaded.plugin.runtime = runtime or loaded.plugin.runtime
    async with running([loaded, voices], tmp_path) as supervisor:
        image = Owner("owner").sign(
            manifest(name="app:1", layers=[str(LAYER)], maxInstances=0, signals=[15])
        )
        image_id = (await supervisor.admit([image])).image_ids[0]
        upload = await supervisor.upload_layer(LAYER, size_bytes=len(TAR))
        await upload.write(TAR)
        await supervisor.finish_layer(LAYER, upload)
        yield Rig(supervisor, loaded.plugin, voices.plugin, image_id)


# --- how long it holds ---------------------------------------------------------------------------


async def test_later_evidence_says_what_a_container_set_last(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        first, second = await one.start(), await one.start()
        assert await one.said() == {1: None, 2: None}
        first.set_attestation_data(text("one"))
        second.set_attestation_data(AttestationData(kind="binary", data="/w=="))
        second.set_attestation_data(text("two"))
        assert await one.said() == {1: text("one"), 2: text("two")}
        first.set_attestation_data(None)
        assert await one.said() == {1: None, 2: text("two")}


async def test_what_a_program_said_ends_with_it_and_a_restart_begins_with_nothing(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path) as one:
        voice = await one.start()
        voice.set_attestation_data(text("first run"))
        one.end(1)
        await wait_all_tasks_blocked()
        assert await one.said() == {1: None}
        await one.supervisor.restart(1, timeout_s=5)
        assert await one.said() == {1: None}
        one.voices.runs[-1].set_attestation_data(text("second run"))
        await one.supervisor.restart(1, timeout_s=5)
        assert await one.said() == {1: None}


async def test_what_is_still_under_way_when_a_program_ends_sets_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        old = await one.start()
        one.end(1)
        await wait_all_tasks_blocked()
        with pytest.raises(Conflict, match="does not run"):
            old.set_attestation_data(text("too late"))
        await one.supervisor.restart(1, timeout_s=5)
        with pytest.raises(Conflict, match="does not run"):
            old.set_attestation_data(text("from the run before"))
        with pytest.raises(Conflict, match="does not run"):
            old.set_attestation_data(None)
        assert await one.said() == {1: None}


async def test_nothing_can_be_set_while_what_is_left_of_a_program_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as one:
        voice = await one.start()
        process, go_on = one.machine.runtime.running[1], trio.Event()
        genuine = process.destroy

        async def destroy() -> None:
            await go_on.wait()
            await genuine()

        monkeypatch.setattr(process, "destroy", destroy)
        one.end(1)
        await wait_all_tasks_blocked()
        with pytest.raises(Conflict, match="does not run"):
            voice.set_attestation_data(text("too late"))
        assert await one.said() == {1: None}
        go_on.set()


async def test_a_program_may_say_something_in_its_first_instruction(tmp_path: Path) -> None:
    """It runs before the runtime has told us that it runs."""

    class Slow(MemoryRuntime):
        voices: list[ContainerOperations]

        async def start(
            self, spec: ContainerSpec, receipt: StartReceipt, log: LogSink
        ) -> RunningContainer:
            await wait_all_tasks_blocked()
            self.voices[0].set_attestation_data(text("at once"))
            return await super().start(spec, receipt, log)

    slow = Slow()
    async with rig(tmp_path, slow) as one:
        slow.voices = one.voices.runs
        await one.start()
        assert await one.said() == {1: text("at once")}


async def test_evidence_for_a_program_that_is_not_shown_yet_waits_in_every_run(
    tmp_path: Path,
) -> None:
    """A status that lacked the asker, or called it not running, would help nobody."""

    class Gated(MemoryRuntime):
        gate: trio.Event

        async def start(
            self, spec: ContainerSpec, receipt: StartReceipt, log: LogSink
        ) -> RunningContainer:
            await self.gate.wait()
            return await super().start(spec, receipt, log)

    gated = Gated()
    states: list[str] = []

    async with rig(tmp_path, gated) as one:

        async def ask_for_evidence() -> None:
            voice = one.voices.runs[-1]
            raw = await voice.evidence(bytes(16), public_key_sha384=None, user_data=None)
            (status,) = decode_status(decode_evidence(raw).status.encode()).containers
            states.append(status.state)

        async def ask_for_report() -> None:
            report = await one.voices.runs[-1].acon_report(bytes(16), None, want_quote=False)
            said = json.loads(report.attestation_data)["attestation_data"]
            assert said[one.image_id] == {"1": {}}
            states.append("reported")

        async def run(begin: Callable[[], Awaitable[object]]) -> None:
            gated.gate = trio.Event()
            before = len(states)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(begin)
                await wait_all_tasks_blocked()
                nursery.start_soon(ask_for_evidence)
                nursery.start_soon(ask_for_report)
                await wait_all_tasks_blocked()
                assert len(states) == before
                gated.gate.set()

        await run(one.start)
        await run(lambda: one.supervisor.restart(1, timeout_s=5))
    assert sorted(states) == ["reported", "reported", "running", "running"]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        AttestationData(kind="json", data=""),
        AttestationData(kind="text", data=to_base64(b"\xff")),
        AttestationData(kind="text", data=to_base64(b"\0")),
        AttestationData(kind="binary", data="no base64"),
        AttestationData(kind="binary", data=to_base64(bytes(MAX_ATTESTATION_DATA_BYTES + 1))),
    ],
)
async def test_data_that_no_status_could_hold_is_refused_and_the_old_stays(
    tmp_path: Path, data: AttestationData
) -> None:
    async with rig(tmp_path) as one:
        voice = await one.start()
        voice.set_attestation_data(text("good"))
        with pytest.raises(FormatError, match="attestation data"):
            voice.set_attestation_data(data)
        with pytest.raises(FormatError, match="attestation data"):
            await voice.acon_report(bytes(16), data, want_quote=False)
        assert await one.said() == {1: text("good")}


async def test_all_containers_data_together_is_bounded_and_room_comes_back(tmp_path: Path) -> None:
    room = AttestationRoom(max_total_characters=16)
    async with rig(tmp_path) as one:
        for _ in range(3):
            await one.start()
        first, second, third = (one.supervisor._containers.require(n) for n in (1, 2, 3))
        room.set(first, text("123456"))
        room.set(second, text("123456"))
        with pytest.raises(Busy) as caught:
            room.set(third, text("1"))
        assert caught.value.actual == "20"
        with pytest.raises(Busy):
            room.set(second, text("123456789"))
        assert second.attestation_data == text("123456")
        room.set(second, text("654321"))  # in the room that it has
        room.set(second, None)
        room.set(third, text("123456"))
        with pytest.raises(Busy):
            room.set(second, text("1"))
        one.end(1)
        await wait_all_tasks_blocked()
        room.set(second, text("123456"))
        assert first not in room._speakers  # nothing is kept of whoever has spoken once


async def test_a_status_with_all_the_data_that_there_is_room_for_can_be_written(
    tmp_path: Path,
) -> None:
    longest = AttestationData(kind="binary", data=to_base64(bytes(MAX_ATTESTATION_DATA_BYTES)))
    full = 0
    async with rig(tmp_path) as one:
        for _ in range(MAX_TOTAL_CHARACTERS // len(longest.data) + 1):
            voice = await one.start()
            try:
                voice.set_attestation_data(longest)
                full += 1
            except Busy:
                break
        assert full == MAX_TOTAL_CHARACTERS // len(longest.data)
        raw = one.supervisor.status()
        assert len(raw) <= MAX_STATUS_BYTES
        assert [one.attestation_data for one in decode_status(raw).containers].count(
            longest
        ) == full


async def test_nothing_of_it_reaches_the_measurement_log_the_journal_or_the_daemons_log(
    tmp_path: Path,
) -> None:
    with structlog.testing.capture_logs() as logged:
        async with rig(tmp_path) as one:
            voice = await one.start()
            voice.set_attestation_data(text(SECRET))
            await voice.acon_report(bytes(16), text(SECRET), want_quote=True)
            assert await one.said() == {1: text(SECRET)}
            report = await one.supervisor.acon_report(bytes(16), want_quote=False)
    traces = [SECRET.encode(), to_base64(SECRET.encode()).encode()]
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"StartContainer" in content for content in kept)
    for trace in traces:
        assert not any(trace in content for content in kept)
        assert trace.decode() not in repr(logged)
        assert trace.decode() not in "".join(report.log_lines)


# --- ACON's report -------------------------------------------------------------------------------

NONCE = bytes(range(16))


async def test_acons_report_has_every_containers_data_in_its_own_place(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        first, second = await one.start(), await one.start()
        await one.start()
        first.set_attestation_data(text('one "\n'))
        second.set_attestation_data(AttestationData(kind="binary", data=to_base64(b"\xff")))
        ended = await one.start()
        ended.set_attestation_data(text("gone"))
        one.end(4)
        await wait_all_tasks_blocked()
        report = await one.supervisor.acon_report(NONCE, want_quote=False)
    said = json.loads(report.attestation_data)
    assert said["api_version"] == "1.0.0"
    assert bytes(said["requestor_nonce"]) == NONCE
    assert len(bytes(said["acond_nonce"])) == 16
    assert said["attestation_data"] == {
        one.image_id: {
            "1": {"type": 2, "data": 'one "\n'},
            "2": {"type": 1, "data": "/w=="},
            "3": {},
        }
    }
    digest = sha384(report.attestation_data.encode()).digest()
    assert parse_td_report(report.data).report_data == digest.ljust(64, b"\0")


async def test_a_containers_own_report_has_its_data_for_once_and_alters_no_others(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path) as one:
        first, second = await one.start(), await one.start()
        first.set_attestation_data(text("one"))
        second.set_attestation_data(text("two"))
        reports = [
            await first.acon_report(NONCE, text("now"), want_quote=False),
            await first.acon_report(NONCE, None, want_quote=True),
            await second.acon_report(NONCE, text("two"), want_quote=False),
        ]
        assert await one.said() == {1: text("one"), 2: text("two")}
    two = {"type": 2, "data": "two"}
    said = [json.loads(report.attestation_data) for report in reports]
    assert [each["attestation_data"][one.image_id] for each in said] == [
        {"1": {"type": 2, "data": "now"}, "2": two},
        {"1": {}, "2": two},
        {"1": {"type": 2, "data": "one"}, "2": two},
    ]
    assert len({bytes(each["acond_nonce"]) for each in said}) == 3


async def test_a_container_that_has_ended_gets_no_report(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        voice = await one.start()
        one.end(1)
        await wait_all_tasks_blocked()
        with pytest.raises(Conflict, match="does not run"):
            await voice.acon_report(NONCE, text("late"), want_quote=False)


async def test_nobody_speaks_for_a_run_that_has_ended(tmp_path: Path) -> None:
    """Its connections may be in the hands of others, who outlive it."""

    async def ask(voice: ContainerOperations) -> None:
        with pytest.raises(Conflict, match="does not run"):
            await voice.evidence(bytes(16), public_key_sha384=None, user_data=b"mine")
        with pytest.raises(Conflict, match="does not run"):
            await voice.acon_report(NONCE, None, want_quote=False)

    async with rig(tmp_path) as one:
        old = await one.start()
        one.end(1)
        await wait_all_tasks_blocked()
        await ask(old)
        await one.supervisor.restart(1, timeout_s=5)
        await ask(old)


async def test_a_report_that_grows_beyond_all_bounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.acon_report.MAX_TEXT_BYTES", 500)
    async with rig(tmp_path) as one:
        voice = await one.start()
        await voice.acon_report(NONCE, None, want_quote=False)
        with pytest.raises(Busy, match="ACON report"):
            await voice.acon_report(NONCE, text("x" * 200), want_quote=False)
