"""Objects behind the seams that raise, lie or fail while they are cancelled: named, survived."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Allow,
    Busy,
    Conflict,
    ContainerOperations,
    DeadlineExceeded,
    Denied,
    DigestMismatch,
    Event,
    FileBlob,
    MeasurementHalted,
    PluginContext,
    RuntimeFailed,
    UnknownItem,
    hookimpl,
)
from supervisor.formats.digest import digest_of
from supervisor.plugin_host import LoadedPlugin
from supervisor.proofs import StoredLayer
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
BLOB = FileBlob(file="/", blob_digest="sha256:x", media_type="tar", size_bytes=len(TAR))


async def admitted(supervisor: Supervisor) -> str:
    image = OWNER.sign(manifest(name="app:1", layers=[str(LAYER)]))
    return (await supervisor.admit([image])).image_ids[0]


def machine_with_blob(folder: Path, blob: bytes = TAR) -> tuple[InMemory, list[LoadedPlugin]]:
    loaded = in_memory_plugin(folder)
    assert isinstance(loaded.plugin, InMemory)
    loaded.plugin.layers.blobs[str(BLOB.blob_digest)] = blob
    return loaded.plugin, [loaded]


async def fail_when_cancelled(*_args: object, **_kwargs: object) -> None:
    """Leaves a group of a `Cancelled` and an error of its own: neither is an `Exception`."""

    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("failed while it was cancelled")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)
        nursery.start_soon(trio.sleep_forever)


async def nothing(*_args: object, **_kwargs: object) -> None:
    """The wrong answer of every seam."""


async def hang(*_args: object, **_kwargs: object) -> None:
    await trio.sleep_forever()


async def bug(*_args: object, **_kwargs: object) -> None:
    raise KeyError("a bug behind the seam")


class Failing:
    """All its hooks hang, and fail once they are given up."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        """Nothing to set up."""


class FailingGate(Failing):
    @hookimpl
    async def judge_image(self) -> Allow:
        await fail_when_cancelled()
        return Allow()


class FailingObserver(Failing):
    @hookimpl
    async def observe(self, event: Event) -> None:
        await fail_when_cancelled()


class FailingVoice(Failing):
    @hookimpl
    async def serve_container(
        self,
        listener: trio.SocketListener,
        operations: ContainerOperations,
        task_status: trio.TaskStatus[None],
    ) -> None:
        await fail_when_cancelled()


async def test_a_gate_that_fails_at_its_deadline_denies(
    tmp_path: Path, autojump_clock: object
) -> None:
    plugins = [in_memory_plugin(tmp_path), plugin(FailingGate, tmp_path)]
    async with running(plugins, tmp_path) as supervisor:
        with pytest.raises(Denied):
            await admitted(supervisor)
        assert supervisor.images() == ()


async def test_an_observer_that_fails_at_its_deadline_does_not_end_the_supervisor(
    tmp_path: Path, autojump_clock: object
) -> None:
    plugins = [in_memory_plugin(tmp_path), plugin(FailingObserver, tmp_path)]
    async with running(plugins, tmp_path) as supervisor:
        await admitted(supervisor)
        await trio.sleep(60)
        await supervisor.evidence(bytes(16))
        await trio.sleep(60)


async def test_a_quote_source_that_fails_at_its_deadline_was_too_slow(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, plugins = machine_with_blob(tmp_path)
    async with running(plugins, tmp_path) as supervisor:
        monkeypatch.setattr(machine.quotes, "quote", fail_when_cancelled)
        with pytest.raises(DeadlineExceeded, match="must arrive in time"):
            await supervisor.evidence(bytes(16))


async def test_a_socket_server_that_fails_when_cancelled_hides_no_word_of_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, plugins = machine_with_blob(tmp_path)

    async def refuse(*_: object) -> None:
        await wait_all_tasks_blocked()
        raise RuntimeFailed("runc", "said no")

    monkeypatch.setattr(machine.runtime, "start", refuse)
    async with running([*plugins, plugin(FailingVoice, tmp_path)], tmp_path) as supervisor:
        image_id = await admitted(supervisor)
        await supervisor.fetch_layer(LAYER, BLOB)
        with pytest.raises(RuntimeFailed, match="said no"):
            await supervisor.start(image_id, [])


@pytest.mark.parametrize(
    ("of", "method"),
    [
        (lambda machine: machine.layers, "fetch"),
        (lambda machine: machine.layers, "mount"),
        (lambda machine: machine.runtime, "start"),
        (lambda machine: machine.quotes, "quote"),
    ],
    ids=["fetch", "mount", "start", "quote"],
)
async def test_an_answer_of_the_wrong_type_is_a_runtime_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of: Callable[[InMemory], object],
    method: str,
) -> None:
    machine, plugins = machine_with_blob(tmp_path)
    monkeypatch.setattr(of(machine), method, nothing)
    async with running(plugins, tmp_path) as supervisor:
        image_id = await admitted(supervisor)
        with pytest.raises(RuntimeFailed, match="one type"):
            await supervisor.fetch_layer(LAYER, BLOB)
            await supervisor.start(image_id, [])
            await supervisor.evidence(bytes(16))
        assert len(supervisor.containers()) == len(machine.runtime.running) == (method == "quote")


@pytest.mark.parametrize("wrong", [b"no log of any firmware", "text"])
async def test_a_boot_log_that_no_evidence_could_carry_fails_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: object
) -> None:
    machine, plugins = machine_with_blob(tmp_path)

    async def answer() -> object:
        return wrong

    monkeypatch.setattr(machine.quotes, "boot_event_log", answer)
    with pytest.RaisesGroup(
        pytest.RaisesExc(RuntimeFailed, match="boot event log"), flatten_subgroups=True
    ):
        async with running(plugins, tmp_path):
            raise AssertionError("must not be reached")


async def test_a_folder_among_the_sockets_fails_the_start_by_name(tmp_path: Path) -> None:
    (tmp_path / "sockets" / "folder").mkdir(parents=True)
    with pytest.RaisesGroup(
        pytest.RaisesExc(RuntimeFailed, match="our sockets only"), flatten_subgroups=True
    ):
        async with running([in_memory_plugin(tmp_path)], tmp_path):
            raise AssertionError("must not be reached")


async def test_a_clean_up_that_fails_does_not_hide_why_it_was_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, plugins = machine_with_blob(tmp_path, b"other bytes")
    monkeypatch.setattr(machine.layers, "discard", bug)
    async with running(plugins, tmp_path) as supervisor:
        await admitted(supervisor)
        with pytest.raises(DigestMismatch):
            await supervisor.fetch_layer(LAYER, BLOB)


async def test_a_clean_up_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    machine, plugins = machine_with_blob(tmp_path, b"other bytes")
    monkeypatch.setattr(machine.layers, "discard", hang)
    async with running(plugins, tmp_path) as supervisor:
        await admitted(supervisor)
        with trio.fail_after(1000), pytest.raises(DigestMismatch):
            await supervisor.fetch_layer(LAYER, BLOB)


async def test_a_runtime_that_cannot_signal_does_not_keep_the_supervisor_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    machine, plugins = machine_with_blob(tmp_path)
    async with running(plugins, tmp_path) as supervisor:
        image_id = await admitted(supervisor)
        await supervisor.fetch_layer(LAYER, BLOB)
        await supervisor.start(image_id, [])
        (process,) = machine.runtime.running.values()
        monkeypatch.setattr(process, "signal", bug)
    assert machine.runtime.running == {} and machine.layers.mounted == {}


# --- layers: bounds and rivals ----------------------------------------------------------------


async def test_nothing_is_fetched_that_no_image_names(tmp_path: Path) -> None:
    _, plugins = machine_with_blob(tmp_path)
    async with running(plugins, tmp_path) as supervisor:
        with pytest.raises(UnknownItem, match="no admitted image names this layer"):
            await supervisor.fetch_layer(LAYER, BLOB)


async def test_an_upload_that_hangs_at_its_begin_or_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    machine, plugins = machine_with_blob(tmp_path)
    async with running(plugins, tmp_path, "[layers]\ntimeout_s = 9\n") as supervisor:
        await admitted(supervisor)
        upload = await supervisor.upload_layer(LAYER, size_bytes=None)
        monkeypatch.setattr(upload, "finish", trio.sleep_forever)
        with trio.fail_after(1000), pytest.raises(DeadlineExceeded, match=r"layers\.timeout_s"):
            await supervisor.finish_layer(LAYER, upload)
        assert machine.layers.open_uploads == 0
        monkeypatch.setattr(machine.layers, "upload", hang)
        with trio.fail_after(1000), pytest.raises(DeadlineExceeded, match=r"layers\.timeout_s"):
            await supervisor.upload_layer(LAYER, size_bytes=None)


async def test_an_upload_that_ends_while_its_layer_is_fetched_is_refused_and_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, plugins = machine_with_blob(tmp_path)
    genuine, go_on = machine.layers.prepare, trio.Event()

    async def slow(layer: object) -> None:
        await go_on.wait()
        await genuine(layer)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(machine.layers, "prepare", slow)
    async with running(plugins, tmp_path) as supervisor:
        await admitted(supervisor)
        upload = await supervisor.upload_layer(LAYER, size_bytes=None)
        await upload.write(TAR)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.fetch_layer, LAYER, BLOB)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.deadline = trio.current_time() + 20
            with pytest.raises(Conflict, match="delivered by somebody else"):
                await supervisor.finish_layer(LAYER, upload)
            go_on.set()
        assert supervisor.has_layer(LAYER) and machine.layers.held_bytes == len(TAR)
        assert machine.layers.open_uploads == 0


async def test_a_quote_of_a_register_that_no_part_of_the_log_replays_to_is_not_served(
    tmp_path: Path,
) -> None:
    """Somebody else extended it, and nothing was measured since that would have told."""
    machine, plugins = machine_with_blob(tmp_path)
    async with running(plugins, tmp_path) as supervisor:
        await admitted(supervisor)
        machine.memory_registers.extend(bytes(48))
        with pytest.raises(MeasurementHalted, match="no prefix that replays"):
            await supervisor.evidence(bytes(16))
        with pytest.raises(MeasurementHalted, match="no prefix that replays"):
            await supervisor.acon_report(bytes(16), want_quote=False)


async def test_bad_answers_of_the_quote_source_use_up_no_place_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, plugins = machine_with_blob(tmp_path)

    async def garbage(report_data: bytes) -> bytes:
        return b"no quote"

    async with running(plugins, tmp_path, "[evidence]\nmax_waiting = 1\n") as supervisor:
        for method in ("quote", "td_report"):
            monkeypatch.setattr(machine.quotes, method, garbage)
        for _ in range(3):
            with pytest.raises(RuntimeFailed, match="must be a TDX quote"):
                await supervisor.evidence(bytes(16))
            with pytest.raises(RuntimeFailed, match="must be one"):
                await supervisor.acon_report(bytes(16), want_quote=False)
        monkeypatch.undo()
        await supervisor.evidence(bytes(16))


async def test_acons_reports_wait_in_the_same_bounded_queue(
    tmp_path: Path, autojump_clock: object
) -> None:
    machine, plugins = machine_with_blob(tmp_path)
    machine.quotes.delay_s = 1
    async with (
        running(plugins, tmp_path, "[evidence]\nmax_waiting = 1\n") as supervisor,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(supervisor.evidence, bytes(16))
        await wait_all_tasks_blocked()
        with pytest.raises(Busy):
            await supervisor.acon_report(bytes(16), want_quote=True)


async def test_measurement_that_halts_while_the_quote_is_made_gives_no_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, plugins = machine_with_blob(tmp_path)
    genuine = machine.quotes.quote
    async with running(plugins, tmp_path) as supervisor:

        async def halting(report_data: bytes) -> bytes:
            supervisor._measurement.halt("for a test")
            return await genuine(report_data)

        monkeypatch.setattr(machine.quotes, "quote", halting)
        with pytest.raises(MeasurementHalted, match="for a test"):
            await supervisor.evidence(bytes(16))


async def test_a_clean_up_that_waits_is_done_though_its_caller_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, plugins = machine_with_blob(tmp_path)
    genuine = machine.layers.discard

    async def slow(stored: StoredLayer) -> None:
        await trio.lowlevel.checkpoint()
        await genuine(stored)

    monkeypatch.setattr(machine.layers, "discard", slow)
    monkeypatch.setattr(machine.layers, "prepare", hang)
    async with running(plugins, tmp_path) as supervisor:
        await admitted(supervisor)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.fetch_layer, LAYER, BLOB)
            await wait_all_tasks_blocked()
            assert machine.layers.held_bytes == len(TAR)
            nursery.cancel_scope.cancel()
        assert machine.layers.held_bytes == 0
