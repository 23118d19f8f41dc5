"""What the evidence says, as established by the objects that the checks judged.

Each fact here is built from the very object that a check compared: there is no second
parse, and nothing that is shown was not also judged. Whether the facts can be believed
is the verdict's business; `Facts.authentic` says whether the quote's signatures held.
"""

from __future__ import annotations

import msgspec


class HopFact(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a delegation: who was trusted to say what this layer is, and what they said."""

    reference: str
    signer: str
    alias: str
    svn: int | None
    statement_digest_sha384: str


class LayerFact(msgspec.Struct, frozen=True, kw_only=True):
    """A layer of a started container. No hops: its owner pinned it by digest."""

    index: int
    digest: str
    delegation: tuple[HopFact, ...] = ()


class AttestationDataFact(msgspec.Struct, frozen=True, kw_only=True):
    """What a running program lets evidence say of itself. Its words: nobody checked them, but
    no other container could have said them. `data` of kind "text" is UTF-8."""

    container_id: int
    kind: str
    data: bytes


class StartFact(msgspec.Struct, frozen=True, kw_only=True):
    """A measured permission to run: this image, with these layers, arguments, environment."""

    position: int  # of its record in the log, from 0
    digest_sha384: str
    image_id: str
    argv: tuple[str, ...]
    environment: tuple[str, ...]
    layers: tuple[LayerFact, ...]
    container_ids: tuple[int, ...]  # of the containers running now under this permission
    attestation_data: tuple[AttestationDataFact, ...]  # of those that say something


class ImageFact(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted image. `signer_subject` is what the signer calls itself, proved by nobody."""

    position: int
    image_id: str
    signer: str
    signer_subject: str
    names: tuple[str, ...]
    executable: bool
    layers: tuple[str, ...]  # references, as its manifest writes them


class ComponentFact(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution inside the TD, as measured before anything else happened."""

    role: str
    name: str
    version: str
    distribution: str
    digest_sha384: str


class SupervisorFact(msgspec.Struct, frozen=True, kw_only=True):
    """One `Start` of the log: a supervisor that restarted unchanged has only one."""

    position: int
    components: tuple[ComponentFact, ...]
    config_digest_sha384: str


class UnknownEventFact(msgspec.Struct, frozen=True, kw_only=True):
    """An event that this verifier does not know. `critical` ones fail the verdict."""

    position: int
    operation: str
    critical: bool


class SpeakerFact(msgspec.Struct, frozen=True, kw_only=True):
    """The container that asked for this evidence through its own socket."""

    container_id: int
    image_id: str
    start_event_digest_sha384: str


class BaseFact(msgspec.Struct, frozen=True, kw_only=True):
    """Firmware, kernel and hardware registers, hex, read from the quote's signed bytes."""

    mr_td: str
    rtmrs: tuple[str, str, str, str]
    mr_seam: str
    td_attributes: str
    xfam: str
    tee_tcb_svn: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the report shows besides the checks themselves."""

    authentic: bool
    tcb_status: str | None
    advisory_ids: tuple[str, ...]
    base: BaseFact | None  # None: the quote could not be read
    supervisors: tuple[SupervisorFact, ...]
    config: str
    unsafe_settings: tuple[str, ...]
    images: tuple[ImageFact, ...]
    layer_only_images: tuple[ImageFact, ...]
    starts: tuple[StartFact, ...]
    sealed: bool
    unknown_events: tuple[UnknownEventFact, ...]
    speaker: SpeakerFact | None
    public_key_sha384: str | None
    user_data: bytes | None
