"""A container starts only with verified layers and a receipt, and leaves nothing behind."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Allow,
    Busy,
    Conflict,
    ContainerRuntime,
    ContainerStarting,
    DeadlineExceeded,
    DelegationUnresolved,
    Denied,
    Deny,
    ExitStatus,
    PluginContext,
    PolicyDenied,
    PreparedContainer,
    RuntimeFailed,
    UnknownItem,
    admission,
    hookimpl,
)
from supervisor.formats.delegation import AliasStatement, Resolver, statements_of
from supervisor.formats.digest import Digest, digest_of
from supervisor.formats.log_events import StartContainerEvent, decode_event
from supervisor.formats.signature import SignedManifest
from supervisor.id_ranges import OVERFLOW_ID, IdRanges
from supervisor.operations import ManifestUpload
from supervisor.service import Supervisor
from supervisor.testing import (
    InMemory,
    InMemoryConfig,
    MemoryProcess,
    Owner,
    in_memory_plugin,
    manifest,
    plugin,
    running,
)

OWNER, VENDOR, EVE = Owner("owner"), Owner("vendor"), Owner("eve")
TAR = b"bytes of a layer"
LAYER = digest_of("sha384", TAR)


class Delegation:
    """Statements from manifests, as `csp_delegation` supplies them."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        """Nothing to set up."""

    @hookimpl
    async def delegation_statements(self, signed: SignedManifest) -> tuple[AliasStatement, ...]:
        return statements_of(signed)


async def deliver(supervisor: Supervisor, tar: bytes) -> Digest:
    digest = digest_of("sha384", tar)
    upload = await supervisor.upload_layer(digest, size_bytes=len(tar))
    await upload.write(tar)
    await supervisor.finish_layer(digest, upload)
    return digest


async def load(supervisor: Supervisor, **fields: object) -> str:
    name = str(fields.pop("name", "app:1"))
    image = OWNER.sign(manifest(name=name, layers=[str(LAYER)], **fields))  # type: ignore[arg-type]  # any JSON
    image_id = (await supervisor.admit([image])).image_ids[0]
    if not supervisor.has_layer(LAYER):
        await deliver(supervisor, TAR)
    return image_id


def vendor_image(tar: bytes, *names: str, signer: Owner = VENDOR) -> ManifestUpload:
    digest = str(digest_of("sha384", tar))
    return signer.sign(
        manifest(
            name="unused:1",
            layers=[digest],
            entrypoint=[],
            aliases={"contents": {digest: list(names)}},
        )
    )


def starts(supervisor: Supervisor) -> list[StartContainerEvent]:
    events = [
        decode_event(record.operation, record.content) for record in supervisor._measurement.records
    ]
    return [event for event in events if isinstance(event, StartContainerEvent)]


def machine_of(loaded: object) -> InMemory:
    assert isinstance(loaded, InMemory)
    return loaded


async def test_a_started_container_runs_what_the_log_says(tmp_path: Path) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        image_id = await load(supervisor, entrypoint=["/app", "x"], env=["A=1", "B"], uids=[7])
        container_id = await supervisor.start(image_id, ["B=two"])
        process = machine_of(machine.plugin).runtime.running[container_id]
        (event,) = starts(supervisor)
        assert event.argv == process.spec.argv == ("/app", "x")
        assert event.environment == process.spec.environment == ("A=1", "B=two")
        assert event.layers == (str(LAYER),)
        assert process.receipt.event == event
        assert [inside for inside, _ in process.spec.id_map.pairs] == [0, 7]
        assert process.spec.no_new_privileges is False
        assert process.spec.socket_path.is_socket()


def test_a_runtime_cannot_be_asked_to_start_without_a_receipt() -> None:
    receipt = inspect.signature(PreparedContainer.start).parameters["receipt"]
    assert receipt.default is inspect.Parameter.empty
    assert not hasattr(ContainerRuntime, "start")


async def test_what_cannot_start_says_why_and_is_not_measured(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        with pytest.raises(UnknownItem, match="no such image"):
            await supervisor.start("sha384/none", [])
        missing = OWNER.sign(manifest(name="app:9"))
        (missing_id,) = (await supervisor.admit([missing])).image_ids
        with pytest.raises(Conflict, match="before its layers are here"):
            await supervisor.start(missing_id, [])
        (view,) = supervisor.images()
        assert view.missing_layers == (str(digest_of("sha384", b"app:9")),)
        lender = vendor_image(TAR, "python:2")
        (lender_id,) = (await supervisor.admit([lender])).image_ids
        with pytest.raises(PolicyDenied, match="only lends layers"):
            await supervisor.start(lender_id, [])
        empty = OWNER.sign(manifest(name="empty:1", layers=[]))
        (empty_id,) = (await supervisor.admit([empty])).image_ids
        with pytest.raises(PolicyDenied, match="no layer to run it from"):
            await supervisor.start(empty_id, [])
        image_id = await load(supervisor, env=["A=1"])
        with pytest.raises(PolicyDenied):
            await supervisor.start(image_id, ["A=2"])
        with pytest.raises(PolicyDenied):
            await supervisor.start(image_id, ["LD_PRELOAD=/evil.so"])
        assert starts(supervisor) == []


async def test_max_instances_holds_also_for_starts_at_once(tmp_path: Path) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        image_id = await load(supervisor, maxInstances=2)
        refused = 0

        async def start() -> None:
            nonlocal refused
            try:
                await supervisor.start(image_id, [])
            except Conflict:
                refused += 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(start)
        assert refused == 3
        processes = machine_of(machine.plugin).runtime.running
        next(iter(processes.values())).end(ExitStatus(exit_code=0))
        await wait_all_tasks_blocked()
        await supervisor.start(image_id, [])


async def test_a_start_that_is_cancelled_while_it_is_judged_gives_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        image_id = await load(supervisor, maxInstances=1)

        async def judge(*_: object) -> None:
            await trio.sleep_forever()

        starting = supervisor._containers._starting
        with monkeypatch.context() as patch:
            patch.setattr(starting, "measure", judge)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.start, image_id, [])
                await wait_all_tasks_blocked()
                with pytest.raises(Conflict, match="maxInstances"):
                    await supervisor.start(image_id, [])
                nursery.cancel_scope.cancel()
        await supervisor.start(image_id, [])


async def test_exit_is_shown_and_cleaned_up_after(tmp_path: Path) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path, "[containers]\nkeep_exited_s = 0\n") as supervisor:
        container_id = await supervisor.start(await load(supervisor), [])
        process = machine_of(machine.plugin).runtime.running[container_id]
        process.end(ExitStatus(exit_code=3))
        await wait_all_tasks_blocked()
        (view,) = supervisor.containers()
        assert (view.state, view.exit_code, view.signal, view.pid) == ("exited", 3, None, None)
        assert machine_of(machine.plugin).layers.mounted == {}
        assert machine_of(machine.plugin).runtime.prepared == {}
        assert not process.spec.socket_path.exists()


async def test_only_listed_signals_are_sent(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        container_id = await supervisor.start(await load(supervisor, signals=[-15, 10]), [])
        for forbidden in (15, -10, 9, 0):
            with pytest.raises(PolicyDenied, match="does not list this signal"):
                await supervisor.signal(container_id, forbidden)
        await supervisor.signal(container_id, -15)
        await wait_all_tasks_blocked()
        with pytest.raises(Conflict, match="does not run"):
            await supervisor.signal(container_id, -15)
        with pytest.raises(UnknownItem):
            await supervisor.signal(99, -15)


async def test_a_runtime_that_fails_leaves_nothing_and_the_next_start_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = in_memory_plugin(tmp_path)
    runtime = machine_of(machine.plugin).runtime
    async with running([machine], tmp_path) as supervisor:
        image_id = await load(supervisor)

        async def fail(*_: object) -> MemoryProcess:
            raise RuntimeFailed("runc", "said no")

        monkeypatch.setattr(runtime, "start", fail)
        with pytest.raises(RuntimeFailed, match="said no"):
            await supervisor.start(image_id, [])
        assert machine_of(machine.plugin).layers.mounted == {}
        assert supervisor.containers() == ()
        monkeypatch.undo()
        await supervisor.start(image_id, [])
        assert len(starts(supervisor)) == 1


async def test_a_runtime_that_hangs_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    machine = in_memory_plugin(tmp_path)
    runtime = machine_of(machine.plugin).runtime
    async with running([machine], tmp_path) as supervisor:
        image_id = await load(supervisor)

        async def hang(*_: object) -> MemoryProcess:
            await trio.sleep_forever()
            raise AssertionError("unreachable")

        monkeypatch.setattr(runtime, "start", hang)
        with pytest.raises(DeadlineExceeded, match="must start in time"):
            await supervisor.start(image_id, [])
        assert machine_of(machine.plugin).layers.mounted == {}
        monkeypatch.undo()
        await supervisor.start(image_id, [])


# --- delegation --------------------------------------------------------------------------------


async def delegating(supervisor: Supervisor, reference: str) -> str:
    image = OWNER.sign(manifest(name="app:1", layers=[reference, str(LAYER)]))
    (image_id,) = (await supervisor.admit([image])).image_ids
    await deliver(supervisor, TAR)
    return image_id


async def test_a_delegated_layer_resolves_to_the_vendors_newest_and_is_measured(
    tmp_path: Path,
) -> None:
    plugins = [in_memory_plugin(tmp_path), plugin(Delegation, tmp_path)]
    async with running(plugins, tmp_path) as supervisor:
        image_id = await delegating(supervisor, f"signer/{VENDOR.signer}/python:2")
        with pytest.raises(DelegationUnresolved):
            await supervisor.start(image_id, [])
        await supervisor.admit([vendor_image(b"two", "python:2")])
        await supervisor.admit([vendor_image(b"three", "python:3", "python:2")])
        with pytest.raises(Conflict, match="before its layers are here"):
            await supervisor.start(image_id, [])
        await deliver(supervisor, b"three")
        await supervisor.start(image_id, [])
        (event,) = starts(supervisor)
        assert event.layers[0] == str(digest_of("sha384", b"three"))
        (hop,) = event.delegations[0].hops
        assert (hop.alias, hop.svn, hop.signer) == ("python:3", 3, str(VENDOR.signer))


async def test_an_older_layer_or_another_signers_alias_resolves_nothing(tmp_path: Path) -> None:
    plugins = [in_memory_plugin(tmp_path), plugin(Delegation, tmp_path)]
    async with running(plugins, tmp_path) as supervisor:
        image_id = await delegating(supervisor, f"signer/{VENDOR.signer}/python:2")
        await supervisor.admit([vendor_image(b"one", "python:1")])
        await supervisor.admit([vendor_image(b"evil", "python:2", signer=EVE)])
        await deliver(supervisor, b"one")
        await deliver(supervisor, b"evil")
        with pytest.raises(DelegationUnresolved):
            await supervisor.start(image_id, [])
        assert starts(supervisor) == []


async def test_the_status_costs_no_walk_over_all_statements_for_each_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image's owner could make every other container's evidence wait."""
    indexed: list[int] = []

    class Counting(Resolver):
        def __init__(self, statements: Sequence[AliasStatement]) -> None:
            indexed.append(len(statements))
            super().__init__(statements)

    monkeypatch.setattr(admission, "Resolver", Counting)
    async with running([in_memory_plugin(tmp_path), plugin(Delegation, tmp_path)], tmp_path) as it:
        references = [f"signer/{VENDOR.signer}/python:{svn}" for svn in (2, 3)]
        await it.admit([OWNER.sign(manifest(name="app:1", layers=references))])
        assert it.images()[0].missing_layers == tuple(references)
        await it.admit([vendor_image(b"two", "python:2")])
        for _ in range(3):
            assert it.images()[0].missing_layers == (
                str(digest_of("sha384", b"two")),
                references[1],
            )
        assert indexed == [0, 1]


async def test_without_a_delegation_plugin_no_delegated_layer_resolves(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        image_id = await delegating(supervisor, f"signer/{VENDOR.signer}/python:2")
        await supervisor.admit([vendor_image(b"two", "python:2")])
        await deliver(supervisor, b"two")
        with pytest.raises(DelegationUnresolved):
            await supervisor.start(image_id, [])


class NewerVendorArrives:
    """A gate during which the vendor's newer image is admitted: what it judged is stale."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.supervisor: Supervisor | None = None
        self.judged: list[str] = []

    @hookimpl
    async def judge_start(self, event: ContainerStarting) -> Allow:
        self.judged.append(str(event.layers[0].digest))
        if self.supervisor is not None and len(self.judged) == 1:
            await self.supervisor.admit([vendor_image(b"three", "python:3", "python:2")])
            await deliver(self.supervisor, b"three")
        return Allow()


async def test_a_start_measures_what_the_log_resolves_to_at_its_place(tmp_path: Path) -> None:
    gate = plugin(NewerVendorArrives, tmp_path)
    plugins = [in_memory_plugin(tmp_path), plugin(Delegation, tmp_path), gate]
    async with running(plugins, tmp_path) as supervisor:
        image_id = await delegating(supervisor, f"signer/{VENDOR.signer}/python:2")
        await supervisor.admit([vendor_image(b"two", "python:2")])
        await deliver(supervisor, b"two")
        assert isinstance(gate.plugin, NewerVendorArrives)
        gate.plugin.supervisor = supervisor
        await supervisor.start(image_id, [])
        newest = str(digest_of("sha384", b"three"))
        assert gate.plugin.judged == [str(digest_of("sha384", b"two")), newest]
        assert starts(supervisor)[0].layers[0] == newest


class NoStarts:
    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        """Nothing to set up."""

    @hookimpl
    async def judge_start(self) -> Deny:
        return Deny("closed")


async def test_a_denied_start_is_not_measured(tmp_path: Path) -> None:
    plugins = [in_memory_plugin(tmp_path), plugin(NoStarts, tmp_path)]
    async with running(plugins, tmp_path) as supervisor:
        image_id = await load(supervisor)
        with pytest.raises(Denied, match="closed"):
            await supervisor.start(image_id, [])
        assert starts(supervisor) == []


# --- ids and many at once ---------------------------------------------------------------------


def test_ids_are_never_shared_never_reused_and_never_the_overflow_id() -> None:
    ranges = IdRanges(OVERFLOW_ID - 2)
    drawn = [outside for _ in range(4) for _, outside in ranges.draw((5, 9)).pairs]
    assert len(set(drawn)) == 12
    assert OVERFLOW_ID not in drawn


async def test_fifty_images_loaded_and_fifty_containers_started_at_once(tmp_path: Path) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        await load(supervisor, name="zero:1")

        async def one(number: int) -> None:
            image_id = await load(supervisor, name=f"app-{number}:1")
            await supervisor.start(image_id, [])

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
        assert len(supervisor.images()) == 51
        assert len(machine_of(machine.plugin).runtime.running) == 50
        ids = [
            outside
            for process in machine_of(machine.plugin).runtime.running.values()
            for _, outside in process.spec.id_map.pairs
        ]
        assert len(set(ids)) == 50
        evidence = await supervisor.evidence(bytes(16))
        assert len(evidence) > 10_000
    assert machine_of(machine.plugin).runtime.running == {}


# --- what the manifest and the configuration bound ---------------------------------------------


async def test_more_containers_than_configured_are_refused_as_busy(tmp_path: Path) -> None:
    limits = "[containers]\nmax_running = 2\n"
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path, limits) as supervisor:
        image_id = await load(supervisor, maxInstances=0)
        for _ in range(2):
            await supervisor.start(image_id, [])
        with pytest.raises(Busy, match=r"containers\.max_running"):
            await supervisor.start(image_id, [])
        next(iter(machine_of(machine.plugin).runtime.running.values())).end(ExitStatus(exit_code=0))
        await wait_all_tasks_blocked()
        await supervisor.start(image_id, [])


@pytest.mark.parametrize("writable", [True, False])
async def test_the_manifest_alone_says_what_a_container_may_write_and_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    machine = in_memory_plugin(tmp_path)
    asked: list[object] = []
    genuine = machine_of(machine.plugin).layers.mount

    async def mount(*args: Any, **kwargs: Any) -> object:
        asked.append(kwargs["writable"])
        return await genuine(*args, **kwargs)

    monkeypatch.setattr(machine_of(machine.plugin).layers, "mount", mount)
    async with running([machine], tmp_path) as supervisor:
        container_id = await supervisor.start(await load(supervisor, writableFS=writable), [])
        spec = machine_of(machine.plugin).runtime.running[container_id].spec
        assert asked == [writable] and spec.writable_root is writable
        assert spec.no_new_privileges is True


async def test_a_stop_sends_the_signal_that_the_manifest_lists_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = in_memory_plugin(tmp_path)
    sent: list[tuple[int, bool]] = []
    async with running([machine], tmp_path) as supervisor:
        container_id = await supervisor.start(await load(supervisor, signals=[-10, 15]), [])
        process = machine_of(machine.plugin).runtime.running[container_id]

        async def signal(signum: int, *, whole_group: bool) -> None:
            sent.append((signum, whole_group))
            process.end(ExitStatus(signal=signum))

        monkeypatch.setattr(process, "signal", signal)
    assert sent == [(10, True)]


async def test_ended_containers_are_remembered_up_to_a_bound(tmp_path: Path) -> None:
    machine = in_memory_plugin(tmp_path)
    limits = "[containers]\nmax_remembered = 2\n"
    async with running([machine], tmp_path, limits) as supervisor:
        image_id = await load(supervisor, maxInstances=0)
        for _ in range(5):
            container_id = await supervisor.start(image_id, [])
            machine_of(machine.plugin).runtime.running[container_id].end(ExitStatus(exit_code=0))
            await wait_all_tasks_blocked()
        last = await supervisor.start(image_id, [])
        assert [view.container_id for view in supervisor.containers()] == [4, 5, last]


async def test_after_a_restart_delegated_layers_mean_what_they_meant(tmp_path: Path) -> None:
    plugins = [in_memory_plugin(tmp_path), plugin(Delegation, tmp_path)]
    async with running(plugins, tmp_path) as supervisor:
        await delegating(supervisor, f"signer/{VENDOR.signer}/python:2")
        await supervisor.admit([vendor_image(b"two", "python:2")])
    async with running(plugins, tmp_path) as again:
        assert again.images()[0].missing_layers[0] == str(digest_of("sha384", b"two"))


async def test_a_layer_that_only_an_alias_names_is_let_in(tmp_path: Path) -> None:
    digest = digest_of("sha384", b"two")
    lent = VENDOR.sign(
        manifest(
            name="unused:1",
            layers=[],
            entrypoint=[],
            aliases={"contents": {str(digest): ["python:2"]}},
        )
    )
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        await supervisor.admit([lent])
        await deliver(supervisor, b"two")
        assert supervisor.has_layer(digest)


async def test_more_ids_than_a_user_namespace_maps_are_refused_before_they_are_measured(
    tmp_path: Path,
) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        image_id = await load(supervisor, uids=list(range(1, 341)))
        with pytest.raises(PolicyDenied, match="more ids than a user namespace maps"):
            await supervisor.start(image_id, [])
        assert starts(supervisor) == []


async def test_signal_zero_is_never_sent_though_a_manifest_may_list_it(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        container_id = await supervisor.start(await load(supervisor, signals=[0, 15]), [])
        with pytest.raises(PolicyDenied, match="does not list this signal"):
            await supervisor.signal(container_id, 0)
