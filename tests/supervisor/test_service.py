"""The whole supervisor: order of start and shutdown, and what races inside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Allow,
    Busy,
    ConfigError,
    Conflict,
    ContainerExited,
    DeadlineExceeded,
    DigestMismatch,
    Event,
    LayerFetched,
    Operations,
    PluginContext,
    Refusal,
    RuntimeFailed,
    UnknownItem,
    hookimpl,
)
from supervisor.formats.digest import Digest, digest_of
from supervisor.formats.event_log import replay, split_log
from supervisor.formats.evidence import decode_evidence, from_base64
from supervisor.formats.quote import parse_quote
from supervisor.service import Supervisor
from supervisor.testing import (
    InMemory,
    InMemoryConfig,
    Owner,
    in_memory_plugin,
    manifest,
    plugin,
    running,
)

OWNER = Owner("owner")
TAR = b"bytes of a layer"
LAYER = digest_of("sha384", TAR)


class Recording:
    """Notes when its tasks begin and end."""

    Config = InMemoryConfig
    notes: list[str]

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.name = context.name
        self.notes = []

    def note(self, text: str) -> None:
        self.notes.append(f"{self.name} {text}")

    @hookimpl
    async def lifespan(self, task_status: trio.TaskStatus[None]) -> None:
        self.note("lifespan begins")
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self.note("lifespan ends")

    @hookimpl
    async def serve(self, operations: Operations, task_status: trio.TaskStatus[None]) -> None:
        self.note("serves")
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self.note(f"stops serving, {len(operations.containers())} containers")

    @hookimpl
    async def observe(self, event: Event) -> None:
        if isinstance(event, ContainerExited):
            self.note("saw an exit")


async def started(supervisor: Supervisor) -> int:
    image = OWNER.sign(manifest(name="app:1", layers=[str(LAYER)]))
    (image_id,) = (await supervisor.admit([image])).image_ids
    upload = await supervisor.upload_layer(LAYER, size_bytes=len(TAR))
    await upload.write(TAR)
    await supervisor.finish_layer(LAYER, upload)
    return await supervisor.start(image_id, [])


async def test_start_goes_inwards_and_shutdown_outwards(
    tmp_path: Path, autojump_clock: object
) -> None:
    first, second = (plugin(Recording, tmp_path, name=name) for name in ("first", "second"))
    notes: list[str] = []
    for each in (first, second):
        assert isinstance(each.plugin, Recording)
        each.plugin.notes = notes
    machine = in_memory_plugin(tmp_path)
    async with running([machine, first, second], tmp_path) as supervisor:
        await started(supervisor)
    assert notes[:4] == [
        "first lifespan begins",
        "second lifespan begins",
        "first serves",
        "second serves",
    ]
    assert notes[4:6] == [
        "second stops serving, 1 containers",
        "first stops serving, 1 containers",
    ]
    assert sorted(notes[6:8]) == ["first saw an exit", "second saw an exit"]
    assert notes[8:] == ["second lifespan ends", "first lifespan ends"]


async def test_a_server_that_fails_ends_the_supervisor_in_order(tmp_path: Path) -> None:
    class Failing(Recording):
        @hookimpl
        async def serve(self, operations: Operations, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            await wait_all_tasks_blocked()
            raise OSError("socket gone")

    failing = plugin(Failing, tmp_path)
    machine = in_memory_plugin(tmp_path)
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="socket gone"), flatten_subgroups=True):
        async with running([machine, failing], tmp_path) as supervisor:
            await started(supervisor)
            await trio.sleep_forever()
    assert isinstance(machine.plugin, InMemory) and machine.plugin.runtime.running == {}
    assert isinstance(failing.plugin, Recording)
    assert failing.plugin.notes[-1].endswith("lifespan ends")


async def test_a_server_that_never_gets_ready_fails_the_start(
    tmp_path: Path, autojump_clock: object
) -> None:
    class NeverReady(Recording):
        @hookimpl
        async def serve(self, operations: Operations, task_status: trio.TaskStatus[None]) -> None:
            await trio.sleep_forever()

    with pytest.RaisesGroup(
        pytest.RaisesExc(RuntimeFailed, match="must be ready in time"), flatten_subgroups=True
    ):
        async with running([in_memory_plugin(tmp_path), plugin(NeverReady, tmp_path)], tmp_path):
            raise AssertionError("must not be reached")


async def test_a_stop_asks_containers_and_kills_the_deaf_after_the_deadline(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = in_memory_plugin(tmp_path)
    asked = []

    async with running([machine], tmp_path, "[containers]\nstop_timeout_s = 7\n") as supervisor:
        await started(supervisor)
        assert isinstance(machine.plugin, InMemory)
        (process,) = machine.plugin.runtime.running.values()

        async def deaf(signum: int, *, whole_group: bool) -> None:
            asked.append((signum, whole_group))

        monkeypatch.setattr(process, "signal", deaf)
        before = trio.current_time()
    assert trio.current_time() - before == pytest.approx(7, abs=0.5)
    assert asked == [(15, False)]
    assert machine.plugin.runtime.running == {}


async def test_without_a_register_the_supervisor_does_not_start(tmp_path: Path) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigError, match="no configured plugin offers a register"),
        flatten_subgroups=True,
    ):
        async with running([plugin(Recording, tmp_path)], tmp_path):
            raise AssertionError("must not be reached")


# --- layers --------------------------------------------------------------------------------------


async def admitted(supervisor: Supervisor) -> str:
    image = OWNER.sign(manifest(name="app:1", layers=[str(LAYER)]))
    return (await supervisor.admit([image])).image_ids[0]


@pytest.mark.parametrize(
    "sent", [b"", TAR[:-1], TAR + b"x", b"other bytes alto"], ids=["none", "short", "long", "wrong"]
)
async def test_wrong_layer_bytes_are_refused_and_freed_and_the_right_ones_still_come(
    tmp_path: Path, sent: bytes
) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        image_id = await admitted(supervisor)
        upload = await supervisor.upload_layer(LAYER, size_bytes=None)
        await upload.write(sent)
        with pytest.raises(DigestMismatch) as caught:
            await supervisor.finish_layer(LAYER, upload)
        assert caught.value.item == str(LAYER)
        assert caught.value.expected == LAYER.hex
        assert caught.value.actual == digest_of("sha384", sent).hex
        assert isinstance(machine.plugin, InMemory) and machine.plugin.layers.held_bytes == 0
        (view,) = supervisor.images()
        assert view.missing_layers == (str(LAYER),)
        with pytest.raises(Conflict, match="before its layers are here"):
            await supervisor.start(image_id, [])
        again = await supervisor.upload_layer(LAYER, size_bytes=len(TAR))
        await again.write(TAR)
        await supervisor.finish_layer(LAYER, again)
        await supervisor.start(image_id, [])


async def test_a_layer_delivered_twice_is_kept_once(tmp_path: Path) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        await admitted(supervisor)
        uploads = [await supervisor.upload_layer(LAYER, size_bytes=None) for _ in range(2)]
        for upload in uploads:
            await upload.write(TAR)
        await supervisor.finish_layer(LAYER, uploads[0])
        with pytest.raises(Conflict, match="delivered twice"):
            await supervisor.finish_layer(LAYER, uploads[1])
        with pytest.raises(Conflict, match="already here"):
            await supervisor.upload_layer(LAYER, size_bytes=None)
        assert isinstance(machine.plugin, InMemory)
        assert machine.plugin.layers.held_bytes == len(TAR)
        assert machine.plugin.layers.open_uploads == 0


async def test_a_layer_that_no_image_names_is_not_let_in(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        with pytest.raises(UnknownItem, match="no admitted image names this layer"):
            await supervisor.upload_layer(LAYER, size_bytes=None)


class LayerGate:
    """Allows, denies or hangs, as its `mode` says."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.seen: list[str] = []

    @hookimpl
    async def verify_layer(self, event: LayerFetched) -> Allow:
        self.seen.append(event.computed["sha384"])
        raise RuntimeError("scanner crashed")


async def test_a_layer_gate_without_an_answer_frees_the_layer(tmp_path: Path) -> None:
    machine, gate = in_memory_plugin(tmp_path), plugin(LayerGate, tmp_path)
    async with running([machine, gate], tmp_path) as supervisor:
        await admitted(supervisor)
        upload = await supervisor.upload_layer(LAYER, size_bytes=None)
        await upload.write(TAR)
        with pytest.raises(Refusal, match="scanner crashed"):
            await supervisor.finish_layer(LAYER, upload)
        assert isinstance(machine.plugin, InMemory) and machine.plugin.layers.held_bytes == 0
        assert isinstance(gate.plugin, LayerGate) and gate.plugin.seen == [LAYER.hex]


async def test_a_store_that_answers_for_another_layer_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        await admitted(supervisor)
        assert isinstance(machine.plugin, InMemory)
        keep = machine.plugin.layers.keep
        lie = Digest("sha384", "0" * 96)
        monkeypatch.setattr(
            machine.plugin.layers, "keep", lambda expected, data, source: keep(lie, data, source)
        )
        upload = await supervisor.upload_layer(LAYER, size_bytes=None)
        await upload.write(TAR)
        with pytest.raises(RuntimeFailed, match="answered for another layer"):
            await supervisor.finish_layer(LAYER, upload)
        assert not supervisor.has_layer(LAYER)


# --- evidence ------------------------------------------------------------------------------------


async def test_evidence_always_replays_under_constant_starts(
    tmp_path: Path, autojump_clock: object
) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.quotes.delay_s = 0.01
    async with running([machine], tmp_path) as supervisor:

        async def load() -> None:
            for number in range(40):
                await supervisor.admit([OWNER.sign(manifest(name=f"app-{number}:1"))])
                await trio.sleep(0.001)

        async def ask(number: int) -> None:
            await trio.sleep(number * 0.002)
            evidence = decode_evidence(await supervisor.evidence(bytes([number]) * 16))
            body = parse_quote(from_base64(evidence.quote, item="quote")).body
            log = split_log(from_base64(evidence.cc_eventlog, item="log"))
            assert replay(record.digest_sha384 for record in log.records) == body.rtmrs[3]
            assert len(evidence.images) == sum(r.operation == "AdmitImages" for r in log.records)
            lengths.add(len(log.records))

        lengths: set[int] = set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            for number in range(20):
                nursery.start_soon(ask, number)
        assert len(lengths) > 3


async def test_a_quote_that_hangs_is_given_up_and_too_many_waiting_are_told_so(
    tmp_path: Path, autojump_clock: object
) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    async with running(
        [machine], tmp_path, "[evidence]\nmax_waiting = 2\nquote_timeout_s = 5\n"
    ) as supervisor:
        machine.plugin.quotes.delay_s = 1000
        outcomes: list[type[Exception]] = []

        async def ask() -> None:
            try:
                await supervisor.evidence(bytes(16))
            except Refusal as error:
                outcomes.append(type(error))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            # Nothing slow stands in the way of a measurement.
            with trio.fail_after(1):
                await supervisor.admit([OWNER.sign(manifest(name="app:1"))])
        assert sorted(each.__name__ for each in outcomes) == sorted(
            each.__name__ for each in (Busy, DeadlineExceeded, DeadlineExceeded)
        )


async def test_somebody_elses_quote_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    async with running([machine], tmp_path) as supervisor:
        genuine = machine.plugin.quotes.quote

        async def other(report_data: bytes) -> bytes:
            return await genuine(bytes(64))

        monkeypatch.setattr(machine.plugin.quotes, "quote", other)
        with pytest.raises(RuntimeFailed, match="REPORTDATA that was asked for"):
            await supervisor.evidence(bytes(16))
