"""Only what is signed, accepted by all others, allowed and measured is admitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import adversary
import msgspec
import pytest
import trio

from supervisor import (
    Allow,
    Conflict,
    Denied,
    Deny,
    Event,
    FormatError,
    ImageAdmitting,
    MeasurementHalted,
    PluginContext,
    PluginContractError,
    PolicyDenied,
    SignatureInvalid,
    UnknownItem,
    Untrusted,
    hookimpl,
)
from supervisor.admission import AdmittedImage
from supervisor.formats.delegation import AliasStatement
from supervisor.formats.digest import digest_of
from supervisor.formats.log_events import AdmitImagesEvent, decode_event
from supervisor.formats.signature import SignedManifest
from supervisor.journal import Attachment, Journal
from supervisor.operations import ManifestUpload
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

ALICE, BOB, EVE = Owner("alice"), Owner("bob"), Owner("eve")


def of(owner: Owner, name: str, *, accepts: list[Owner] | None = None) -> ManifestUpload:
    rules = [f"{each.signer}/*" for each in accepts or []]
    return owner.sign(manifest(name=name, accepts=rules))


def ids(supervisor: Supervisor) -> list[str]:
    return [view.image_id for view in supervisor.images()]


def logged(supervisor: Supervisor) -> list[tuple[str, ...]]:
    events = [
        decode_event(record.operation, record.content) for record in supervisor._measurement.records
    ]
    return [event.image_ids for event in events if isinstance(event, AdmitImagesEvent)]


async def test_an_image_is_in_the_log_as_soon_as_it_is_admitted(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        result = await supervisor.admit([of(ALICE, "app:1")])
        assert logged(supervisor) == [result.image_ids]
        assert result.already_admitted == ()
        assert len(result.missing_layers) == 1


async def test_admitting_twice_changes_nothing_and_says_so(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        first = await supervisor.admit([of(ALICE, "app:1")])
        image = of(ALICE, "app:1")  # signed again: another signature over the same manifest
        again = await supervisor.admit([image])
        assert again.already_admitted == first.image_ids == again.image_ids
        assert len(logged(supervisor)) == 1


async def test_images_that_need_each_other_are_admitted_as_a_group_only(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        left = ALICE.sign(manifest(name="left:1", accepts=[f"{BOB.signer}/right:1"]))
        right = BOB.sign(manifest(name="right:1", accepts=[f"{ALICE.signer}/left:1"]))
        stranger = of(EVE, "stranger:1")
        with pytest.raises(PolicyDenied):
            await supervisor.admit([left, stranger])
        assert ids(supervisor) == [] and logged(supervisor) == []
        await supervisor.admit([left, right])
        assert len(ids(supervisor)) == 2
        with pytest.raises(PolicyDenied) as caught:
            await supervisor.admit([stranger])
        assert str(EVE.signer) in str(caught.value)
        assert len(logged(supervisor)) == 1


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        (lambda good, bad: adversary.with_other_manifest(good, bad.manifest), SignatureInvalid),
        (lambda good, bad: adversary.with_signature_of(good, bad), SignatureInvalid),
        (
            lambda good, bad: adversary.with_other_manifest(
                good, adversary.reordered_json(good.manifest)
            ),
            Untrusted,
        ),
        (
            lambda good, bad: adversary.with_other_manifest(good, good.manifest[:-1] + b"\xff}"),
            Untrusted,
        ),
        (
            lambda good, bad: adversary.with_other_manifest(good, b"[" * 5000),
            Untrusted,
        ),
    ],
    ids=["other words", "other signature", "other bytes", "bad UTF-8", "too deep"],
)
async def test_a_forged_image_is_refused_and_leaves_nothing(
    tmp_path: Path,
    attack: Callable[[ManifestUpload, ManifestUpload], ManifestUpload],
    error: type[Exception],
) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        good, bad = of(ALICE, "app:1"), of(EVE, "evil:1")
        with pytest.raises(error):
            await supervisor.admit([attack(good, bad)])
        assert ids(supervisor) == [] and logged(supervisor) == []
        await supervisor.admit([good])


@pytest.mark.parametrize(
    ("text", "item"),
    [
        (b'{"aconSpecVersion":[1,0],"layers":[NaN]}', "manifest"),
        (b'{"aconSpecVersion":[1,0],"maxInstances":1e400}', "manifest"),
        (b"x" * (2 << 20), "manifest"),
    ],
    ids=["NaN", "infinite", "too large"],
)
async def test_a_signed_but_malformed_manifest_is_refused_with_its_path(
    tmp_path: Path, text: bytes, item: str
) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        with pytest.raises(FormatError):
            await supervisor.admit([ALICE.sign(text)])
        assert ids(supervisor) == []


async def test_a_group_with_one_bad_image_is_refused_as_a_whole(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        good = of(ALICE, "app:1")
        bad = adversary.with_signature_of(of(ALICE, "other:1"), good)
        with pytest.raises(SignatureInvalid):
            await supervisor.admit([good, bad])
        assert ids(supervisor) == []


async def test_nothing_is_admitted_after_the_seal(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        await supervisor.seal()
        with pytest.raises(Conflict, match="after the seal"):
            await supervisor.admit([of(ALICE, "app:1")])


async def test_when_seal_races_with_a_load_one_wins_and_the_log_says_which(
    tmp_path: Path,
) -> None:
    outcomes = set()
    for round_number in range(30):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        async with running([in_memory_plugin(folder)], folder) as supervisor:
            admitted: list[bool] = []

            async def load(to: Supervisor = supervisor, into: list[bool] = admitted) -> None:
                try:
                    await to.admit([of(ALICE, "app:1")])
                    into.append(True)
                except Conflict:
                    into.append(False)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(load)
                nursery.start_soon(supervisor.seal)
            operations = [record.operation for record in supervisor._measurement.records]
            assert operations in (["Start", "AdmitImages", "Seal"], ["Start", "Seal"])
            assert admitted == ["AdmitImages" in operations]
            outcomes.add(admitted[0])
    assert outcomes <= {True, False}


async def test_of_two_groups_that_exclude_each_other_exactly_one_is_admitted(
    tmp_path: Path,
) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        refused = []

        async def load(upload: ManifestUpload) -> None:
            try:
                await supervisor.admit([upload])
            except PolicyDenied:
                refused.append(upload)

        async with trio.open_nursery() as nursery:
            for owner in (ALICE, BOB, EVE):
                nursery.start_soon(load, of(owner, "app:1", accepts=[owner]))
        assert len(ids(supervisor)) == 1 and len(refused) == 2


async def test_halted_measurement_admits_nothing(tmp_path: Path) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        assert isinstance(machine.plugin, InMemory)
        machine.plugin.memory_registers.extend(bytes(48))
        with pytest.raises(MeasurementHalted):
            await supervisor.admit([of(ALICE, "app:1")])
        assert ids(supervisor) == []
        with pytest.raises(MeasurementHalted):
            await supervisor.admit([of(ALICE, "app:2")])
        with pytest.raises(MeasurementHalted):
            await supervisor.evidence(bytes(16))
        assert b"halted" in supervisor.status()


class OnlyAlice:
    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.judged = 0

    @hookimpl
    async def judge_image(self, event: ImageAdmitting) -> Allow | Deny:
        self.judged += 1
        return Allow() if event.signed.signer == ALICE.signer else Deny("only alice")


async def test_a_gate_plugin_is_asked_about_every_image(tmp_path: Path) -> None:
    gate = plugin(OnlyAlice, tmp_path)
    async with running([in_memory_plugin(tmp_path), gate], tmp_path) as supervisor:
        await supervisor.admit([of(ALICE, "app:1")])
        with pytest.raises(Denied) as caught:
            await supervisor.admit([of(BOB, "app:1")])
        assert caught.value.actual == "only alice"
        assert len(ids(supervisor)) == 1
        assert isinstance(gate.plugin, OnlyAlice) and gate.plugin.judged == 2


async def test_after_a_restart_the_admitted_images_are_there_without_loading(
    tmp_path: Path,
) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        await supervisor.admit([of(ALICE, "app:1")])
        await supervisor.admit([of(BOB, "app:1")])
        await supervisor.seal()
        before, log = ids(supervisor), logged(supervisor)
    async with running([machine], tmp_path) as again:
        assert ids(again) == before and logged(again) == log
        with pytest.raises(Conflict, match="after the seal"):
            await again.admit([of(ALICE, "app:2")])
        await again.evidence(bytes(16))


def test_nobody_else_can_make_an_admitted_image() -> None:
    with pytest.raises(TypeError, match="made by the stage"):
        AdmittedImage(None, (), None)  # type: ignore[arg-type]  # refused before it looks


async def test_too_many_images_and_too_large_groups_are_refused(tmp_path: Path) -> None:
    limits = "[admission]\nmax_images = 2\nmax_group = 2\n"
    async with running([in_memory_plugin(tmp_path)], tmp_path, limits) as supervisor:
        images = [of(ALICE, f"app:{number}") for number in range(3)]
        with pytest.raises(FormatError, match="bounded number"):
            await supervisor.admit(images)
        with pytest.raises(FormatError, match="bounded number"):
            await supervisor.admit([])
        with pytest.raises(Conflict, match="in the group once"):
            await supervisor.admit([images[0], images[0]])
        await supervisor.admit(images[:2])
        with pytest.raises(Conflict, match=r"admission\.max_images"):
            await supervisor.admit(images[2:])


async def test_a_journal_entry_that_holds_more_than_its_record_names_admits_nothing(
    tmp_path: Path,
) -> None:
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        await supervisor.admit([of(ALICE, "app:1")])
    journal = Journal.open(tmp_path / "journal")
    last = journal.entries[-1]
    evil = of(EVE, "evil:1")
    journal.drop_last()
    # The same record, so that the register still agrees, with one image more beside it.
    more = Attachment(evil.manifest, evil.signature, evil.certificate_der)
    journal.append(msgspec.structs.replace(last, attachments=(*last.attachments, more)))
    journal.close()
    async with running([machine], tmp_path) as again:
        assert ids(again) == []
        assert b"halted: journal: must hold exactly the images" in again.status()
        with pytest.raises(MeasurementHalted):
            await again.evidence(bytes(16))


class Forging:
    """Vouches in the name of a signer whose image it was not asked about."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        """Nothing to set up."""

    @hookimpl
    async def delegation_statements(self, signed: SignedManifest) -> tuple[AliasStatement, ...]:
        evil = digest_of("sha384", b"evil")
        return (AliasStatement(BOB.signer, "python:2", evil, signed.image_id, "0" * 96),)


class Misplacing(Forging):
    """Speaks for the right signer, of an image that was not asked about."""

    @hookimpl
    async def delegation_statements(self, signed: SignedManifest) -> tuple[AliasStatement, ...]:
        evil = digest_of("sha384", b"evil")
        other = msgspec.structs.replace(signed.image_id, manifest="0" * 96)
        return (AliasStatement(signed.signer, "python:2", evil, other, "0" * 96),)


class Confused(Forging):
    @hookimpl
    async def delegation_statements(  # type: ignore[override]  # the wrong type is what is refused
        self, signed: SignedManifest
    ) -> str:
        return "none"


@pytest.mark.parametrize("class_", [Forging, Misplacing, Confused])
async def test_a_provider_of_statements_that_lies_admits_nothing(
    tmp_path: Path, class_: type
) -> None:
    liar = plugin(class_, tmp_path)
    async with running([in_memory_plugin(tmp_path), liar], tmp_path) as supervisor:
        with pytest.raises(PluginContractError):
            await supervisor.admit([of(ALICE, "app:1")])
        assert ids(supervisor) == [] and logged(supervisor) == []


async def test_manifests_that_evidence_could_not_hold_are_not_admitted(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        with pytest.raises(Conflict, match="must fit into evidence"):
            for number in range(40):
                padding = [f"padding-{number}-{index}-{'x' * 200}=1" for index in range(900)]
                await supervisor.admit([ALICE.sign(manifest(name=f"a-{number}:1", env=padding))])
        assert len(ids(supervisor)) > 10
        await supervisor.evidence(bytes(16))


async def test_one_image_admitted_twice_at_once_is_in_the_log_once(tmp_path: Path) -> None:
    async with running([in_memory_plugin(tmp_path)], tmp_path) as supervisor:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(supervisor.admit, [of(ALICE, "app:1")])
        assert len(logged(supervisor)) == 1 and len(ids(supervisor)) == 1


async def test_a_journal_entry_whose_images_changed_places_admits_nothing(tmp_path: Path) -> None:
    """Evidence carries them in order of admission, and verifiers recompute it."""
    machine = in_memory_plugin(tmp_path)
    async with running([machine], tmp_path) as supervisor:
        await supervisor.admit([of(ALICE, "app:1"), of(BOB, "app:1")])
    journal = Journal.open(tmp_path / "journal")
    last = journal.entries[-1]
    journal.drop_last()
    journal.append(msgspec.structs.replace(last, attachments=last.attachments[::-1]))
    journal.close()
    async with running([machine], tmp_path) as again:
        assert ids(again) == []
        with pytest.raises(MeasurementHalted):
            await again.evidence(bytes(16))


class Listening:
    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.heard: list[str] = []

    @hookimpl
    async def observe(self, event: Event) -> None:
        self.heard.append(type(event).__name__)


async def test_observers_hear_of_refusals_of_the_seal_once_of_evidence_and_of_a_halt(
    tmp_path: Path,
) -> None:
    machine, ears = in_memory_plugin(tmp_path), plugin(Listening, tmp_path)
    async with running([machine, ears], tmp_path) as supervisor:
        await supervisor.admit([of(ALICE, "app:1")])
        with pytest.raises(UnknownItem):
            await supervisor.upload_layer(digest_of("sha384", b"other"), size_bytes=None)
        await supervisor.seal()
        await supervisor.seal()
        with pytest.raises(Conflict):
            await supervisor.admit([of(ALICE, "app:2")])
        await supervisor.evidence(bytes(16))
        supervisor._measurement.halt("for a test")
        made = machine.plugin.quotes.made if isinstance(machine.plugin, InMemory) else -1
        with pytest.raises(MeasurementHalted):
            await supervisor.evidence(bytes(16))
        # Refused before the hardware is troubled.
        assert isinstance(machine.plugin, InMemory) and machine.plugin.quotes.made == made
    assert isinstance(ears.plugin, Listening)
    assert ears.plugin.heard == [
        "ImageFetched",
        "ImageAdmitted",
        "LoadRefused",
        "Sealed",
        "ImageFetched",
        "LoadRefused",
        "EvidenceServed",
        "MeasurementStopped",
    ]
