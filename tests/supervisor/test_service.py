"""The whole supervisor: order of start and shutdown, and what races inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Allow,
    Busy,
    ConfigError,
    Conflict,
    ContainerExited,
    ContainerOperations,
    ContainerSpec,
    DeadlineExceeded,
    DigestMismatch,
    Event,
    FileBlob,
    LayerFetched,
    LogSink,
    MeasurementHalted,
    Operations,
    PluginContext,
    PluginContractError,
    Refusal,
    RunningContainer,
    RuntimeFailed,
    StartReceipt,
    UnknownItem,
    hookimpl,
)
from supervisor.formats.base64_text import from_base64
from supervisor.formats.digest import Digest, digest_of
from supervisor.formats.event_log import replay, split_log
from supervisor.formats.evidence import decode_evidence
from supervisor.formats.quote import parse_quote
from supervisor.formats.status import decode_status
from supervisor.plugin_host import PluginHost, host_for
from supervisor.service import Supervisor, run_supervisor
from supervisor.testing import (
    InMemory,
    InMemoryConfig,
    MemoryRuntime,
    Owner,
    config_for,
    in_memory_plugin,
    manifest,
    plugin,
    run_at_once,
    running,
)

OWNER = Owner("owner")
TAR = b"bytes of a layer"
LAYER = digest_of("sha384", TAR)
T = TypeVar("T")


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
        self.seen.append(str(event.computed_hex("sha384")))
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


# --- liars ------------------------------------------------------------------------------------


async def test_a_register_that_only_pretends_to_extend_halts_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    async with running([machine], tmp_path) as supervisor:
        monkeypatch.setattr(machine.plugin.memory_registers, "extend", lambda digest: None)
        with pytest.raises(MeasurementHalted, match="must hold what was just extended"):
            await admitted(supervisor)
        assert supervisor.images() == ()
        with pytest.raises(MeasurementHalted):
            await supervisor.evidence(bytes(16))


async def test_a_server_that_returns_as_if_done_ends_the_supervisor(tmp_path: Path) -> None:
    class Leaving(Recording):
        @hookimpl
        async def serve(self, operations: Operations, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()

    with pytest.RaisesGroup(
        pytest.RaisesExc(RuntimeFailed, match="its task ended by itself"), flatten_subgroups=True
    ):
        async with running([in_memory_plugin(tmp_path), plugin(Leaving, tmp_path)], tmp_path):
            await trio.sleep_forever()


async def test_an_observer_that_hangs_is_given_up_event_by_event(
    tmp_path: Path, autojump_clock: object
) -> None:
    class Hanging(Recording):
        @hookimpl
        async def observe(self, event: Event) -> None:
            self.note(type(event).__name__)
            await trio.sleep_forever()

    hanging = plugin(Hanging, tmp_path)
    async with running([in_memory_plugin(tmp_path), hanging], tmp_path) as supervisor:
        with trio.fail_after(1):
            await admitted(supervisor)
        await trio.sleep(60)
        assert isinstance(hanging.plugin, Hanging)
        assert "hanging ImageAdmitted" in hanging.plugin.notes


async def test_a_socket_server_that_fails_takes_only_that_containers_socket(
    tmp_path: Path,
) -> None:
    class Failing(Recording):
        @hookimpl
        async def serve_container(
            self,
            listener: trio.SocketListener,
            operations: ContainerOperations,
            task_status: trio.TaskStatus[None],
        ) -> None:
            raise OSError("no socket today")

    machine = in_memory_plugin(tmp_path)
    async with running([machine, plugin(Failing, tmp_path)], tmp_path) as supervisor:
        await started(supervisor)
        await wait_all_tasks_blocked()
        (view,) = supervisor.containers()
        assert view.state == "running"


async def test_a_program_that_asks_at_once_is_in_the_status_of_its_evidence(
    tmp_path: Path,
) -> None:
    """Its first instruction runs before the runtime has told us that it runs."""

    class Asking(Recording):
        raw = b""

        @hookimpl
        async def serve_container(
            self,
            listener: trio.SocketListener,
            operations: ContainerOperations,
            task_status: trio.TaskStatus[None],
        ) -> None:
            self.raw = await operations.evidence(bytes(16), public_key_sha384=None, user_data=None)
            await trio.sleep_forever()

    class Slow(MemoryRuntime):
        async def start(
            self, spec: ContainerSpec, receipt: StartReceipt, log: LogSink
        ) -> RunningContainer:
            await wait_all_tasks_blocked()  # the question is asked by then
            return await super().start(spec, receipt, log)

    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.runtime = Slow()
    asking = plugin(Asking, tmp_path)
    async with running([machine, asking], tmp_path) as supervisor:
        container_id = await started(supervisor)
        await wait_all_tasks_blocked()
        assert isinstance(asking.plugin, Asking)
        status = decode_status(decode_evidence(asking.plugin.raw).status.encode())
        assert [(one.container_id, one.state) for one in status.containers] == [
            (container_id, "running")
        ]


async def test_a_container_that_speaks_speaks_for_itself(tmp_path: Path) -> None:
    class Keeping(Recording):
        voice: ContainerOperations

        @hookimpl
        async def serve_container(
            self,
            listener: trio.SocketListener,
            operations: ContainerOperations,
            task_status: trio.TaskStatus[None],
        ) -> None:
            self.voice = operations
            await trio.sleep_forever()

    keeping = plugin(Keeping, tmp_path)
    async with running([in_memory_plugin(tmp_path), keeping], tmp_path) as supervisor:
        container_id = await started(supervisor)
        await wait_all_tasks_blocked()
        assert isinstance(keeping.plugin, Keeping)
        raw = await keeping.plugin.voice.evidence(
            bytes(16), public_key_sha384="ab" * 48, user_data=b"hello"
        )
        request = decode_evidence(raw).request
        (view,) = supervisor.containers()
        assert request.container is not None
        assert request.container.container_id == container_id
        assert request.container.image_id == view.image_id
        assert request.container.start_event_digest_sha384 == view.start_event_digest_sha384
        assert request.public_key_sha384 == "ab" * 48
        outside = decode_evidence(await supervisor.evidence(bytes(16))).request
        assert outside.container is None and outside.public_key_sha384 is None


# --- objects behind the seams that break their contract --------------------------------------


@pytest.mark.parametrize("method", ["upload", "fetch", "prepare", "mount"])
async def test_a_store_whose_method_raises_anything_is_a_runtime_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.layers.blobs["sha256:x"] = TAR

    async def broken(*_args: object, **_kwargs: object) -> object:
        raise KeyError("a bug of the store")

    async with running([machine], tmp_path) as supervisor:
        image_id = await admitted(supervisor)
        monkeypatch.setattr(machine.plugin.layers, method, broken)
        blob = FileBlob(file="/", blob_digest="sha256:x", media_type="tar", size_bytes=1)
        with pytest.raises(RuntimeFailed, match="a bug of the store"):
            if method == "upload":
                await supervisor.upload_layer(LAYER, size_bytes=None)
            await supervisor.fetch_layer(LAYER, blob)
            await supervisor.start(image_id, [])
        monkeypatch.undo()
        await supervisor.fetch_layer(LAYER, blob)
        assert machine.plugin.layers.held_bytes == len(TAR)
        await supervisor.start(image_id, [])


async def test_a_store_that_hangs_is_given_up_and_the_next_fetch_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.layers.blobs["sha256:x"] = TAR
    blob = FileBlob(file="/", blob_digest="sha256:x", media_type="tar", size_bytes=1)

    async def hang(*_args: object, **_kwargs: object) -> object:
        await trio.sleep_forever()
        return None

    async with running([machine], tmp_path, "[layers]\ntimeout_s = 9\n") as supervisor:
        await admitted(supervisor)
        monkeypatch.setattr(machine.plugin.layers, "fetch", hang)
        with pytest.raises(DeadlineExceeded, match=r"layers\.timeout_s"):
            await supervisor.fetch_layer(LAYER, blob)
        monkeypatch.undo()
        await supervisor.fetch_layer(LAYER, blob)
        assert supervisor.has_layer(LAYER)


async def test_two_fetches_of_one_layer_share_it_and_outlive_the_first_caller(
    tmp_path: Path, autojump_clock: object
) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.layers.blobs["sha256:x"] = TAR
    blob = FileBlob(file="/", blob_digest="sha256:x", media_type="tar", size_bytes=1)
    async with running([machine], tmp_path) as supervisor:
        await admitted(supervisor)
        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()

            async def impatient() -> None:
                with first:
                    await supervisor.fetch_layer(LAYER, blob)

            nursery.start_soon(impatient)
            nursery.start_soon(supervisor.fetch_layer, LAYER, blob)
            nursery.start_soon(supervisor.fetch_layer, LAYER, blob)
            first.cancel()
        assert supervisor.has_layer(LAYER)
        assert machine.plugin.layers.held_bytes == len(TAR)


class NoStore:
    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        """Nothing to set up."""

    @hookimpl
    async def layer_store(self) -> None:
        return None


async def test_a_provider_whose_object_lacks_the_seams_methods_fails_the_start(
    tmp_path: Path,
) -> None:
    providers = '[providers]\nlayer_store = "nostore"\n'
    with pytest.RaisesGroup(
        pytest.RaisesExc(PluginContractError, match="seam's methods"), flatten_subgroups=True
    ):
        async with running(
            [in_memory_plugin(tmp_path), plugin(NoStore, tmp_path)], tmp_path, providers
        ):
            raise AssertionError("must not be reached")


async def test_evidence_asked_for_while_an_event_is_written_waits_for_its_entry(
    tmp_path: Path,
) -> None:
    """The register is extended in a thread a moment before memory knows of it."""
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    extended, go_on = trio.Event(), trio.Event()

    async def slow_to_answer(function: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        result = function()
        if "slow" in switch:
            extended.set()
            await go_on.wait()
        return result

    switch: set[str] = set()
    async with running([machine], tmp_path, run_blocking=slow_to_answer) as supervisor:
        switch.add("slow")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(admitted, supervisor)
            await extended.wait()
            nursery.start_soon(supervisor.evidence, bytes(16))
            await wait_all_tasks_blocked()
            switch.clear()
            go_on.set()
        assert machine.plugin.quotes.made == 1


async def test_acons_report_carries_the_log_that_its_quote_proves(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        await admitted(supervisor)
        for want_quote in (True, False):
            report = await supervisor.acon_report(bytes(16), want_quote=want_quote)
            assert [line.split(" ")[1] for line in report.log_lines] == ["Start", "AdmitImages"]
            assert report.rtmr_index == 3
        assert len(report.data) == 1024


async def test_a_td_report_of_another_request_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    async with running([machine], tmp_path) as supervisor:
        genuine = machine.plugin.quotes.td_report
        monkeypatch.setattr(machine.plugin.quotes, "td_report", lambda _data: genuine(bytes(64)))
        with pytest.raises(RuntimeFailed, match="REPORTDATA that was asked for"):
            await supervisor.acon_report(bytes(16), want_quote=False)


def test_only_one_plugin_may_serve_the_containers_sockets(tmp_path: Path) -> None:
    class Serving(Recording):
        @hookimpl
        async def serve_container(
            self,
            listener: trio.SocketListener,
            operations: ContainerOperations,
            task_status: trio.TaskStatus[None],
        ) -> None:
            await trio.sleep_forever()

    with pytest.raises(ConfigError, match="at most one plugin"):
        PluginHost([plugin(Serving, tmp_path, name=name) for name in ("one", "two")])


@pytest.mark.parametrize("ended_by", ["cancellation", "a plugin"])
async def test_whatever_ends_it_the_shutdown_is_announced_before_anything_stops(
    tmp_path: Path, ended_by: str
) -> None:
    class Ending(Recording):
        @hookimpl
        async def serve(self, operations: Operations, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            if ended_by == "a plugin":
                await wait_all_tasks_blocked()
                raise OSError("socket gone")
            await trio.sleep_forever()

    ending = plugin(Ending, tmp_path)
    plugins = [in_memory_plugin(tmp_path), ending]
    config = config_for(plugins, tmp_path)
    assert isinstance(ending.plugin, Recording)
    notes = ending.plugin.notes
    with (
        pytest.RaisesGroup(OSError, flatten_subgroups=True)
        if ended_by == "a plugin"
        else (contextlib.nullcontext())
    ):
        async with trio.open_nursery() as nursery:
            await nursery.start(
                run_supervisor,
                config,
                host_for(config, plugins),
                run_at_once,
                lambda: notes.append("stopping"),
            )
            if ended_by == "cancellation":
                nursery.cancel_scope.cancel()
    assert notes.index("stopping") < notes.index("ending lifespan ends")
