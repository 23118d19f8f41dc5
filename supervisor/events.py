"""What happens to images and containers, as frozen facts that plugins see.

Past tense names a fact; `-ing` names what is about to be measured and what gates
judge. Digests and ids are the texts that manifests and logs use.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from supervisor.formats.delegation import ResolvedLayer
from supervisor.formats.signature import SignedManifest


class ImageFetched(msgspec.Struct, frozen=True, kw_only=True, tag="image.fetched"):
    """A manifest came in and its signature is right; nothing was decided yet."""

    image_id: str


class ImageAdmitting(msgspec.Struct, frozen=True, kw_only=True, tag="image.admitting"):
    """An image is judged by the gates, after the supervisor's own checks."""

    signed: SignedManifest


class ImageAdmitted(msgspec.Struct, frozen=True, kw_only=True, tag="image.admitted"):
    """A group was measured; its images may be started once their layers are here."""

    image_ids: tuple[str, ...]


class LoadRefused(msgspec.Struct, frozen=True, kw_only=True, tag="load.refused"):
    """A manifest, group or layer was refused."""

    item: str
    rule: str
    message: str


class LayerFetched(msgspec.Struct, frozen=True, kw_only=True, tag="layer.fetched"):
    """A layer's bytes are stored and hashed; gates judge it before anything parses it.

    `computed` are pairs of hash algorithm and lower-case hex, of the bytes as stored.
    """

    expected: str
    computed: tuple[tuple[str, str], ...]
    size_bytes: int
    source: str

    def computed_hex(self, algorithm: str) -> str | None:
        """The digest that was computed under `algorithm`, if any was."""
        return dict(self.computed).get(algorithm)


class LayerVerified(msgspec.Struct, frozen=True, kw_only=True, tag="layer.verified"):
    """A layer has the digest it was asked for and every gate allowed it."""

    digest: str
    size_bytes: int


class LayerMounted(msgspec.Struct, frozen=True, kw_only=True, tag="layer.mounted"):
    """A verified layer can be seen by containers from now on.

    `how` is "erofs" (an index over the tar itself) or "unpack"; `memory_bytes` is what that
    takes: tar and index, or the unpacked tree.
    """

    digest: str
    how: str
    memory_bytes: int


class LayerFreed(msgspec.Struct, frozen=True, kw_only=True, tag="layer.freed"):
    """A layer's bytes are gone."""

    digest: str
    size_bytes: int


class LayerProgress(msgspec.Struct, frozen=True, kw_only=True, tag="layer.progress"):
    """How far a transfer is; lossy. Bytes of the blob as it is stored, compressed or not."""

    digest: str
    received_bytes: int
    total_bytes: int | None


class ContainerStarting(msgspec.Struct, frozen=True, kw_only=True, tag="container.starting"):
    """A start is judged by the gates; what it says is what will be measured."""

    image_id: str
    layers: tuple[ResolvedLayer, ...]
    argv: tuple[str, ...]
    environment: tuple[str, ...]


class ContainerStarted(msgspec.Struct, frozen=True, kw_only=True, tag="container.started"):
    """A program runs; `restarts` counts how often this container was started again."""

    container_id: int
    image_id: str
    pid: int
    restarts: int


class ContainerExited(msgspec.Struct, frozen=True, kw_only=True, tag="container.exited"):
    """The container's first process ended: exit status, or the signal that killed it.

    `out_of_memory`: the kernel killed something in it for its memory limit.
    """

    container_id: int
    image_id: str
    exit_code: int | None
    signal: int | None
    out_of_memory: bool


class ContainerSignalled(msgspec.Struct, frozen=True, kw_only=True, tag="container.signalled"):
    """A client had a signal sent that the manifest lists; negative: to the process group."""

    container_id: int
    image_id: str
    signal: int


class ContainerInvoked(msgspec.Struct, frozen=True, kw_only=True, tag="container.invoked"):
    """A client's call of an additional entry point has ended; neither: it had to be killed."""

    container_id: int
    image_id: str
    entry_point: str
    exit_code: int | None
    signal: int | None


class PredecessorEnded(msgspec.Struct, frozen=True, kw_only=True, tag="predecessor.ended"):
    """A supervisor that was killed had left containers behind; they were ended at this start.

    `containers` are ids of the predecessor's counting.
    """

    containers: tuple[str, ...]
    processes: int


class Sealed(msgspec.Struct, frozen=True, kw_only=True, tag="sealed"):
    """No image can be admitted any more."""


class EvidenceServed(msgspec.Struct, frozen=True, kw_only=True, tag="evidence.served"):
    """`container_id` is that of the asking container, or none for the outside API."""

    container_id: int | None
    quote_ms: int


class MeasurementStopped(msgspec.Struct, frozen=True, kw_only=True, tag="measurement.stopped"):
    """Measurement halted for good; no evidence is served from here on."""

    reason: str


class HookFailed(msgspec.Struct, frozen=True, kw_only=True, tag="hook.failed"):
    """A plugin raised, hung or answered wrongly."""

    plugin: str
    hook: str
    reason: str


Event: TypeAlias = (
    ImageFetched
    | ImageAdmitted
    | LoadRefused
    | LayerFetched
    | LayerVerified
    | LayerMounted
    | LayerFreed
    | LayerProgress
    | ContainerStarted
    | ContainerExited
    | ContainerSignalled
    | ContainerInvoked
    | PredecessorEnded
    | Sealed
    | EvidenceServed
    | MeasurementStopped
    | HookFailed
)
