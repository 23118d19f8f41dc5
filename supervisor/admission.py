"""From signed bytes to an admitted image: verified, judged, measured, and only then here.

A group is admitted as a whole or not at all: images that reject each other until all
are there could never be loaded one by one. Admission comes before the layers do
(ACON's order): an image whose layers never come stays admitted and cannot start.
"""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.config import AdmissionConfig
from supervisor.errors import (
    Conflict,
    FormatError,
    MeasurementHalted,
    PluginContractError,
    Refusal,
    UnknownItem,
)
from supervisor.events import (
    ImageAdmitted,
    ImageAdmitting,
    ImageFetched,
    LoadRefused,
    Sealed,
)
from supervisor.formats.delegation import AliasStatement, Resolver
from supervisor.formats.launch_policy import require_admissible
from supervisor.formats.log_events import AdmitImagesEvent, SealEvent, decode_event
from supervisor.formats.signature import SignedManifest, verify_signed_manifest
from supervisor.journal import Attachment, JournalEntry
from supervisor.measurement import Measurement
from supervisor.operations import ManifestUpload
from supervisor.plugin_host import PluginHost
from supervisor.proofs import AdmissionReceipt
from supervisor.sealed_type import SealedType

# Evidence and status carry what manifests say, and verifiers read both within bounds
# (formats.evidence, formats.status): what could never be proven is not admitted.
MAX_IMAGES_BYTES = 6 * 1024 * 1024


class AdmittedImage(metaclass=SealedType):
    """An image that is in the log. Made by `Admission` only."""

    def __init__(
        self,
        signed: SignedManifest,
        statements: tuple[AliasStatement, ...],
        receipt: AdmissionReceipt | None,
    ) -> None:
        self.signed = signed
        self.statements = statements
        self.receipt = receipt  # none where a journal of this boot already held it

    @property
    def image_id(self) -> str:
        """`HASH/SIGNER/MANIFEST`."""
        return str(self.signed.image_id)


class Admission:
    """The images of this boot. `restore` replays what the journal already admitted."""

    def __init__(self, measurement: Measurement, host: PluginHost, config: AdmissionConfig) -> None:
        self._measurement = measurement
        self._host = host
        self._config = config
        self._images: dict[str, AdmittedImage] = {}
        self._statements: tuple[AliasStatement, ...] = ()
        self._resolver: Resolver | None = None
        self.sealed = False

    async def restore(self, entries: Sequence[JournalEntry]) -> None:
        """Take over what the log of this boot says, verifying every signature again.

        Raises `Refusal` when the journal holds what could not have been admitted.
        """
        for entry, record in zip(entries, self._measurement.records, strict=True):
            restored = []
            for attachment in entry.attachments:
                signed = self._verify(
                    attachment.manifest, attachment.signature, attachment.certificate_der
                )
                restored.append((signed, await self._statements_of(signed)))
            # The register proves the record alone: what lies beside it must be what it names.
            event = decode_event(record.operation, record.content)
            named = event.image_ids if isinstance(event, AdmitImagesEvent) else ()
            if tuple(str(signed.image_id) for signed, _ in restored) != named:
                raise MeasurementHalted(
                    "journal",
                    "must hold exactly the images that its record admits",
                    expected=", ".join(named) or "none",
                    actual=", ".join(str(signed.image_id) for signed, _ in restored) or "none",
                )
            for signed, statements in restored:
                self._add(AdmittedImage._create(signed, statements, None))
            if record.operation == "Seal":
                self.sealed = True

    async def admit(self, group: Sequence[ManifestUpload]) -> tuple[AdmittedImage, ...]:
        """Admit a group as a whole; returns its images in order, those known before included.

        Raises `Untrusted`, `PolicyDenied`, `Denied`, `Conflict` (sealed, too many) or
        `MeasurementHalted`; nothing was changed then, and nothing of it is kept.
        """
        try:
            return await self._admit(group)
        except Refusal as error:
            self._host.emit(LoadRefused(item=error.item, rule=error.rule, message=str(error)))
            raise

    async def _admit(self, group: Sequence[ManifestUpload]) -> tuple[AdmittedImage, ...]:
        if not 1 <= len(group) <= self._config.max_group:
            raise FormatError(
                "group",
                "must have a bounded number of images",
                expected=f"1 to {self._config.max_group}",
                actual=len(group),
            )
        self._measurement.require_running()
        wanted: dict[str, SignedManifest] = {}
        for upload in group:
            signed = self._verify(upload.manifest, upload.signature, upload.certificate_der)
            if str(signed.image_id) in wanted:
                raise Conflict(str(signed.image_id), "must be in the group once")
            wanted[str(signed.image_id)] = signed
            self._host.emit(ImageFetched(image_id=str(signed.image_id)))
        new = {key: signed for key, signed in wanted.items() if key not in self._images}
        if new:
            self._require_open(new)
            self._require_admissible(new)
            judged_beside = len(self._images)
            statements = {}
            for key, signed in new.items():
                statements[key] = await self._statements_of(signed)
                await self._host.judge("judge_image", ImageAdmitting(signed=signed), item=key)
            await self._measure(new, statements, judged_beside)
        return tuple(self._images[key] for key in wanted)

    async def _measure(
        self,
        new: dict[str, SignedManifest],
        statements: dict[str, tuple[AliasStatement, ...]],
        judged_beside: int,
    ) -> None:
        async with self._measurement.writing() as log:
            # Others were admitted, or sealed, while the gates judged: check again, locked.
            new = {key: signed for key, signed in new.items() if key not in self._images}
            if not new:
                return
            self._require_open(new)
            # Images are only ever added: beside as many as before, they are the same.
            if len(self._images) != judged_beside:
                self._require_admissible(new)
            receipt = await log.record_admission(
                AdmitImagesEvent(image_ids=tuple(new)),
                [
                    Attachment(signed.manifest_bytes, signed.signature, signed.certificate_der)
                    for signed in new.values()
                ],
            )
            # No checkpoint from here on: register, log and memory change together.
            for key, signed in new.items():
                self._add(AdmittedImage._create(signed, statements[key], receipt))
        self._host.emit(ImageAdmitted(image_ids=tuple(new)))

    def _require_open(self, new: dict[str, SignedManifest]) -> None:
        if self.sealed:
            raise Conflict(next(iter(new)), "no image can be admitted after the seal")
        if len(self._images) + len(new) > self._config.max_images:
            raise Conflict(
                next(iter(new)),
                "too many images (admission.max_images)",
                expected=f"at most {self._config.max_images}",
                actual=len(self._images) + len(new),
            )
        size_bytes = sum(map(_size_bytes, [*self.signed_images(), *new.values()]))
        if size_bytes > MAX_IMAGES_BYTES:
            raise Conflict(
                next(iter(new)),
                "all signed manifests together must fit into evidence",
                expected=f"at most {MAX_IMAGES_BYTES} bytes",
                actual=size_bytes,
            )

    def _require_admissible(self, new: dict[str, SignedManifest]) -> None:
        require_admissible([*self.signed_images(), *new.values()])

    def _add(self, image: AdmittedImage) -> None:
        self._images[image.image_id] = image
        if image.statements:
            self._statements += image.statements
            self._resolver = None

    def _verify(self, manifest: bytes, signature: bytes, certificate_der: bytes) -> SignedManifest:
        return verify_signed_manifest(
            manifest,
            signature,
            certificate_der,
            unsafe_allow_sha256=self._config.unsafe_allow_sha256,
        )

    async def _statements_of(self, signed: SignedManifest) -> tuple[AliasStatement, ...]:
        if self._host.provider("delegation_statements") is None:
            return ()
        statements = await self._host.provide("delegation_statements", signed)
        if not isinstance(statements, tuple) or not all(
            isinstance(statement, AliasStatement) for statement in statements
        ):
            raise PluginContractError(
                "delegation_statements", "must answer a tuple of AliasStatement", actual=statements
            )
        for statement in statements:
            if (statement.signer, statement.image_id) != (signed.signer, signed.image_id):
                raise PluginContractError(
                    "delegation_statements",
                    "may speak for the image's own signer only",
                    expected=str(signed.image_id),
                    actual=str(statement.image_id),
                )
        return statements

    async def seal(self) -> None:
        """End admission for good. Idempotent. Raises `MeasurementHalted`."""
        async with self._measurement.writing() as log:
            if self.sealed:
                return
            await log.record_seal(SealEvent())
            self.sealed = True
        self._host.emit(Sealed())

    # --- reading --------------------------------------------------------------------------

    def require(self, image_id: str) -> AdmittedImage:
        """Raises `UnknownItem` for an image that was not admitted."""
        image = self._images.get(image_id)
        if image is None:
            raise UnknownItem(image_id, "no such image was admitted")
        return image

    def images(self) -> tuple[AdmittedImage, ...]:
        """In the order of admission."""
        return tuple(self._images.values())

    def signed_images(self) -> tuple[SignedManifest, ...]:
        """In the order of admission."""
        return tuple(image.signed for image in self._images.values())

    @property
    def statements(self) -> tuple[AliasStatement, ...]:
        """Everything that signers of admitted images vouch for."""
        return self._statements

    @property
    def resolver(self) -> Resolver:
        """What delegated layers mean by these statements. Asked for every status, so kept."""
        if self._resolver is None:
            self._resolver = Resolver(self._statements)
        return self._resolver


def _size_bytes(signed: SignedManifest) -> int:
    return len(signed.manifest_bytes) + len(signed.signature) + len(signed.certificate_der)
