"""How much of an image is let in, and when a layer is let go."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import trio
import trio.testing
from cancel_sweep import Operation, sweep
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layer_machines import (
    LAYER,
    ONE,
    PYTHON,
    TAR,
    THREE,
    TWO,
    VENDOR,
    Delegation,
    SlowGate,
    admit,
    app,
    blob,
    deliver,
    machine_in,
    vendor_image,
)
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Allow,
    Conflict,
    ContainerStarting,
    DelegationUnresolved,
    Denied,
    Deny,
    ExitStatus,
    Rootfs,
    UnknownItem,
    Untrusted,
    hookimpl,
)
from supervisor.formats.delegation import resolve_layers
from supervisor.formats.digest import Digest, digest_of
from supervisor.service import Supervisor
from supervisor.testing import (
    InMemory,
    manifest,
    plugin,
    running,
)

# An ended container gives up its layers at once.
NOT_KEPT = "[containers]\nkeep_exited_s = 0\n"

# --- layers that nothing needs any more ----------------------------------------------------------


async def superseded_python(supervisor: Supervisor) -> str:
    """An image on a vendor's first python, both here."""
    image_id = await admit(supervisor, app(LAYER, PYTHON))
    await admit(supervisor, vendor_image(ONE, "python:1"))
    await deliver(supervisor, TAR)
    await deliver(supervisor, b"one")
    return image_id


async def test_a_layer_that_a_newer_one_supersedes_is_freed_and_missing(tmp_path: Path) -> None:
    store, plugins = machine_in(tmp_path)
    async with running(plugins, tmp_path) as supervisor:
        image_id = await superseded_python(supervisor)
        assert store.held_bytes == len(TAR) + len(b"one")
        await admit(supervisor, vendor_image(TWO, "python:2", "python:1"))
        assert store.held_bytes == len(TAR)
        assert not supervisor.has_layer(ONE)
        assert supervisor.images()[0].missing_layers == (str(TWO),)
        with pytest.raises(Conflict, match="before its layers are here"):
            await supervisor.start(image_id, [])
        await deliver(supervisor, b"two")
        await supervisor.start(image_id, [])
        # By its name it can come back, until images are admitted again.
        await deliver(supervisor, b"one")
        assert supervisor.has_layer(ONE)
        await admit(supervisor, vendor_image(THREE, "ruby:1"))
        assert not supervisor.has_layer(ONE)
        assert supervisor.has_layer(TWO)


async def test_what_another_image_pins_or_only_a_vendor_names_is_kept(tmp_path: Path) -> None:
    _, plugins = machine_in(tmp_path)
    async with running(plugins, tmp_path) as supervisor:
        # Vendors first, as operators may load them; nobody needs these layers yet.
        await admit(supervisor, vendor_image(ONE, "python:1"))
        await admit(supervisor, vendor_image(TWO, "python:2"))
        await deliver(supervisor, b"one")
        await deliver(supervisor, b"two")
        pinning = await admit(supervisor, app(ONE, name="pinning:1"))
        delegating = await admit(supervisor, app(PYTHON))
        await admit(supervisor, vendor_image(THREE, "python:3", "python:1"))
        assert supervisor.has_layer(ONE) and supervisor.has_layer(TWO)
        await supervisor.start(pinning, [])
        with pytest.raises(Conflict, match="before its layers are here"):
            await supervisor.start(delegating, [])


async def test_a_running_container_keeps_its_superseded_layer_until_it_ends(
    tmp_path: Path,
) -> None:
    store, plugins = machine_in(tmp_path)
    machine = plugins[0].plugin
    assert isinstance(machine, InMemory)
    async with running(plugins, tmp_path, NOT_KEPT) as supervisor:
        container_id = await supervisor.start(await superseded_python(supervisor), [])
        await admit(supervisor, vendor_image(TWO, "python:2", "python:1"))
        assert not supervisor.has_layer(ONE)
        assert store.held_bytes == len(TAR) + len(b"one")
        machine.runtime.running[container_id].end(ExitStatus(exit_code=0))
        await wait_all_tasks_blocked()
        assert store.held_bytes == len(TAR)


async def test_a_layer_superseded_between_measurement_and_mount_is_still_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says that it runs, and it was admitted later what supersedes it."""
    store, plugins = machine_in(tmp_path)
    machine = plugins[0].plugin
    assert isinstance(machine, InMemory)
    async with running(plugins, tmp_path, NOT_KEPT) as supervisor:
        image_id = await superseded_python(supervisor)
        genuine, reached, go_on = store.mount, trio.Event(), trio.Event()

        async def mount(*args: object, **fields: object) -> Rootfs:
            reached.set()
            await go_on.wait()
            return await genuine(*args, **fields)  # type: ignore[arg-type]  # passed on as it came

        monkeypatch.setattr(store, "mount", mount)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.start, image_id, [])
            await reached.wait()
            await admit(supervisor, vendor_image(TWO, "python:2", "python:1"))
            assert not supervisor.has_layer(ONE)
            go_on.set()
        (process,) = machine.runtime.running.values()
        assert process.receipt.event.layers == (str(LAYER), str(ONE))
        process.end(ExitStatus(exit_code=0))
        await wait_all_tasks_blocked()
        assert store.held_bytes == len(TAR)


class Changing(Delegation):
    """A gate during which `happens` happens, once."""

    happens: Callable[[], Awaitable[None]] | None = None

    @hookimpl
    async def judge_start(self, event: ContainerStarting) -> Allow:
        happens, self.happens = self.happens, None
        if happens is not None:
            await happens()
        return Allow()


async def test_a_layer_freed_and_brought_back_while_a_start_is_judged_is_the_new_one(
    tmp_path: Path,
) -> None:
    _, plugins = machine_in(tmp_path)
    gate = plugin(Changing, tmp_path)
    assert isinstance(gate.plugin, Changing)
    async with running([plugins[0], gate], tmp_path) as supervisor:
        image_id = await superseded_python(supervisor)

        async def back_and_forth() -> None:
            await admit(supervisor, vendor_image(TWO, "python:2", "python:1"))
            assert not supervisor.has_layer(ONE)
            await admit(supervisor, vendor_image(ONE, "python:1"))
            await deliver(supervisor, b"one")

        gate.plugin.happens = back_and_forth
        with pytest.raises(Conflict, match="before its layers are here"):
            await supervisor.start(image_id, [])
        await deliver(supervisor, b"two")
        await supervisor.start(image_id, [])

        async def newer_and_newest() -> None:
            await admit(supervisor, vendor_image(THREE, "python:3", "python:1"))
            assert not supervisor.has_layer(TWO)
            newest = manifest(
                name="w:1",
                entrypoint=[],
                aliases={"contents": {str(TWO): ["python:4", "python:1"]}},
            )
            await admit(supervisor, VENDOR.sign(newest))
            await deliver(supervisor, b"two")

        gate.plugin.happens = newer_and_newest
        # Resolved as when it was judged, but for the hop's version: judged again, and run.
        await supervisor.start(image_id, [])
        assert len(supervisor.containers()) == 2


def test_an_admission_cancelled_at_every_step_frees_what_it_superseded_or_nothing() -> None:
    async def one_round(cancelling: Callable[[Operation], Awaitable[bool]]) -> None:
        with tempfile.TemporaryDirectory() as name:
            store, plugins = machine_in(Path(name))
            async with running(plugins, Path(name)) as supervisor:
                await superseded_python(supervisor)

                async def operation() -> None:
                    await admit(supervisor, vendor_image(TWO, "python:2", "python:1"))

                await cancelling(operation)
                admitted = len(supervisor.images()) == 3
                assert supervisor.has_layer(ONE) != admitted
                assert store.held_bytes == len(TAR) + (0 if admitted else len(b"one"))

    assert sweep(one_round) >= 3


TARS = (b"one", b"two", b"three")
LAYERS = {tar: digest_of("sha384", tar) for tar in TARS}


class Step(msgspec.Struct, frozen=True):
    """An image on `tar`'s layer (or also on python), a vendor's python that it is with that
    SVN, the layer itself, or the start of some image."""

    what: Literal["app", "app on python", "vendor", "deliver", "start"]
    tar: bytes
    number: int


STEPS = st.builds(
    Step,
    what=st.sampled_from(["app", "app on python", "vendor", "deliver", "start"]),
    tar=st.sampled_from(TARS),
    number=st.integers(1, 4),
)


@example(
    # What is superseded before it comes goes as well, with the next image.
    steps=[
        Step("app on python", b"one", 1),
        Step("vendor", b"three", 1),
        Step("vendor", b"one", 1),
        Step("deliver", b"three", 1),
        Step("app", b"one", 1),
    ],
    _schedule=None,
)
@settings(max_examples=80, deadline=None)
@given(steps=st.lists(STEPS, min_size=4, max_size=14), _schedule=st.random_module())
def test_in_whatever_order_things_are_loaded_only_what_was_superseded_goes(
    steps: list[Step], _schedule: object
) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store, plugins = machine_in(Path(folder))
            async with running(plugins, Path(folder)) as supervisor:
                here = await walk(supervisor, steps)
                here_bytes = sum(len(tar) for tar in TARS if LAYERS[tar] in here)
                mounted = {key for keys in store.mounted.values() for key in keys}
                assert store.held_bytes == here_bytes or (mounted and store.held_bytes > here_bytes)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def walk(supervisor: Supervisor, steps: list[Step]) -> set[Digest]:
    """Do the steps, and after each compare what is here with what must be."""
    here: set[Digest] = set()
    was_needed: set[Digest] = set()
    for place, step in enumerate(steps):
        layer = LAYERS[step.tar]
        if step.what == "deliver":
            try:
                await deliver(supervisor, step.tar)
                here.add(layer)
            except Conflict:
                assert layer in here
            except UnknownItem:
                assert not is_named(supervisor, layer)
        elif step.what == "start":
            await try_start(supervisor, step.number)
        else:
            if step.what == "vendor":
                names = sorted({"python:1", f"python:{step.number}"})
                image = vendor_image(layer, *names, env=[f"N={place}"])  # another each time
            else:
                on_python = [PYTHON] if step.what == "app on python" else []
                image = app(layer, *on_python, name=f"app-{place}:1")
            await admit(supervisor, image)
            needed = needed_layers(supervisor)
            was_needed |= needed
            here -= was_needed - needed
        assert {each for each in LAYERS.values() if supervisor.has_layer(each)} == here
    return here


def is_named(supervisor: Supervisor, layer: Digest) -> bool:
    manifests = (supervisor.manifest(view.image_id).manifest for view in supervisor.images())
    return any(str(layer).encode() in raw for raw in manifests)


def needed_layers(supervisor: Supervisor) -> set[Digest]:
    """What executable images pin or resolve to, as a verifier would find it."""
    needed: set[Digest] = set()
    for image in supervisor._admission.images():
        for reference in (
            image.signed.manifest.layers if image.signed.manifest.is_executable else ()
        ):
            try:
                (one,) = resolve_layers([reference], supervisor._admission.statements)
            except DelegationUnresolved:
                continue
            needed.add(one.digest)
    return needed


async def try_start(supervisor: Supervisor, number: int) -> None:
    views = [view for view in supervisor.images() if view.executable]
    if not views:
        return
    view = views[number % len(views)]
    if view.missing_layers:
        with pytest.raises((Conflict, DelegationUnresolved)):
            await supervisor.start(view.image_id, [])
    else:
        await supervisor.start(view.image_id, [])


# --- how large one image may be ------------------------------------------------------------------

BIG, BIGGER = b"x" * 3000, b"y" * 2000
BIG_LAYER, BIGGER_LAYER = digest_of("sha384", BIG), digest_of("sha384", BIGGER)
LIMIT = "[layers]\nmax_image_bytes = 4096\n"
RULE = r"layers\.max_image_bytes"


async def test_an_announced_size_beyond_an_images_limit_is_refused_before_a_byte_moves(
    tmp_path: Path,
) -> None:
    store, plugins = machine_in(tmp_path, y=BIGGER)
    async with running(plugins, tmp_path, LIMIT) as supervisor:
        image_id = await admit(supervisor, app(BIG_LAYER, BIGGER_LAYER))
        with pytest.raises(Untrusted, match=RULE):
            await supervisor.upload_layer(BIG_LAYER, size_bytes=4097)
        await deliver(supervisor, BIG)
        with pytest.raises(Untrusted, match=RULE) as uploaded:
            await supervisor.upload_layer(BIGGER_LAYER, size_bytes=len(BIGGER))
        with pytest.raises(Untrusted, match=RULE) as fetched:
            await supervisor.fetch_layer(BIGGER_LAYER, blob("y", tar_size_bytes=len(BIGGER)))
        for error in (uploaded.value, fetched.value):
            assert error.item == image_id
            assert error.expected == "at most 4096 bytes"
            assert error.actual == f"5000 bytes with {BIGGER_LAYER}"
        assert (store.fetches, store.open_uploads, store.held_bytes) == (0, 0, len(BIG))
        # What is here already is neither counted twice nor refused.
        await supervisor.fetch_layer(BIG_LAYER, blob("x", tar_size_bytes=9999))
    ears = plugins[1].plugin
    assert isinstance(ears, Delegation) and len(ears.refused) == 3


@pytest.mark.parametrize("claimed_bytes", [None, 1])
async def test_a_size_that_is_not_or_wrongly_announced_is_refused_when_stored_and_freed(
    tmp_path: Path, claimed_bytes: int | None
) -> None:
    store, plugins = machine_in(tmp_path, y=BIGGER)
    async with running(plugins, tmp_path, LIMIT) as supervisor:
        await admit(supervisor, app(BIG_LAYER, BIGGER_LAYER))
        await deliver(supervisor, BIG, announced=False)
        with pytest.raises(Untrusted, match=RULE):
            await deliver(supervisor, BIGGER, announced=False)
        with pytest.raises(Untrusted, match=RULE):
            await supervisor.fetch_layer(BIGGER_LAYER, blob("y", tar_size_bytes=claimed_bytes))
        assert (store.fetches, store.open_uploads, store.held_bytes) == (1, 0, len(BIG))
        assert not supervisor.has_layer(BIGGER_LAYER)


async def test_two_layers_of_one_image_that_come_at_once_cannot_both_get_in(
    tmp_path: Path, autojump_clock: object
) -> None:
    store, plugins = machine_in(tmp_path, x=BIG, y=BIGGER)
    outcomes: list[str] = []
    async with running([plugins[0], plugin(SlowGate, tmp_path)], tmp_path, LIMIT) as supervisor:
        await admit(supervisor, app(BIG_LAYER, BIGGER_LAYER))

        async def fetch(layer: Digest, name: str) -> None:
            try:
                await supervisor.fetch_layer(layer, blob(name))
                outcomes.append("in")
            except Untrusted:
                outcomes.append("refused")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, BIG_LAYER, "x")
            nursery.start_soon(fetch, BIGGER_LAYER, "y")
        assert sorted(outcomes) == ["in", "refused"]
        assert store.held_bytes in (len(BIG), len(BIGGER))


class DenyingFirst(Delegation):
    """A gate that does not like the first layer that it sees."""

    seen = 0

    @hookimpl
    async def verify_layer(self) -> Allow | Deny:
        self.seen += 1
        return Deny("the first") if self.seen == 1 else Allow()


async def test_what_was_refused_in_the_end_takes_no_room(tmp_path: Path) -> None:
    store, plugins = machine_in(tmp_path)
    gate = plugin(DenyingFirst, tmp_path)
    async with running([plugins[0], gate], tmp_path, LIMIT) as supervisor:
        await admit(supervisor, app(BIG_LAYER, BIGGER_LAYER))
        with pytest.raises(Denied):
            await deliver(supervisor, BIG)
        assert store.held_bytes == 0
        await deliver(supervisor, BIGGER)
        assert store.held_bytes == len(BIGGER)


async def test_an_image_that_only_resolves_to_the_layer_counts_too(tmp_path: Path) -> None:
    store, plugins = machine_in(tmp_path)
    async with running(plugins, tmp_path, LIMIT) as supervisor:
        image_id = await admit(supervisor, app(BIG_LAYER, PYTHON))
        await admit(supervisor, vendor_image(BIGGER_LAYER, "python:1"))
        await deliver(supervisor, BIG)
        with pytest.raises(Untrusted, match=RULE) as caught:
            await deliver(supervisor, BIGGER)
        assert caught.value.item == image_id
        assert store.held_bytes == len(BIG)


async def test_layers_that_a_vendor_merely_lists_are_no_image_together(tmp_path: Path) -> None:
    store, plugins = machine_in(tmp_path)
    async with running(plugins, tmp_path, LIMIT) as supervisor:
        contents = {str(BIG_LAYER): ["a:1"], str(BIGGER_LAYER): ["b:1"]}
        lender = manifest(
            name="v:1", layers=[str(BIG_LAYER)], entrypoint=[], aliases={"contents": contents}
        )
        image_id = await admit(supervisor, VENDOR.sign(lender))
        await deliver(supervisor, BIG)
        await deliver(supervisor, BIGGER)
        assert store.held_bytes == len(BIG) + len(BIGGER)
        # But one that no image could ever be started from is refused.
        with pytest.raises(Conflict, match="already here"):
            await supervisor.upload_layer(BIG_LAYER, size_bytes=4097)
        await admit(supervisor, vendor_image(ONE, "c:1"))
        with pytest.raises(Untrusted, match=RULE) as caught:
            await supervisor.upload_layer(ONE, size_bytes=4097)
        assert caught.value.item != image_id


async def test_an_image_admitted_after_its_layers_came_is_refused_at_its_start(
    tmp_path: Path,
) -> None:
    _, plugins = machine_in(tmp_path)
    async with running(plugins, tmp_path, LIMIT) as supervisor:
        for number, tar in enumerate((BIG, BIGGER)):
            await admit(supervisor, app(digest_of("sha384", tar), name=f"small-{number}:1"))
            await deliver(supervisor, tar)
        both = await admit(supervisor, app(BIG_LAYER, BIGGER_LAYER, name="both:1"))
        twice = await admit(supervisor, app(BIG_LAYER, BIG_LAYER, name="twice:1"))
        with pytest.raises(Untrusted, match=RULE) as caught:
            await supervisor.start(both, [])
        assert caught.value.item == both
        assert caught.value.actual == "5000 bytes in all its layers"
        await supervisor.start(twice, [])  # the same bytes, once
