"""The narrow seams behind which plugins put hardware, storage and the OCI runtime.

The supervisor calls these; plugins hand out objects that have them. What every
method raises: `Refusal` subclasses only (anything else counts as `RuntimeFailed`).
All async methods are cancellable at every checkpoint unless they say otherwise,
and leave nothing behind when cancelled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Protocol, TypeAlias, runtime_checkable

import msgspec

from supervisor.formats.digest import Digest
from supervisor.proofs import StoredLayer, VerifiedLayer

# Bytes; what JSON's integers hold exactly.
Size = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
# Refusals repeat what a client said, so it is short: a path (PATH_MAX), and all other words.
PathText = Annotated[str, msgspec.Meta(max_length=4096)]
ShortText = Annotated[str, msgspec.Meta(max_length=512)]


@runtime_checkable
class Registers(Protocol):
    """One runtime measurement register of a TD. Synchronous: called in one worker thread."""

    def read(self) -> bytes:
        """The register's 48 bytes."""

    def extend(self, digest_sha384: bytes) -> None:
        """register = SHA384(register || digest). Not idempotent: never retried by anyone.

        Raises `RuntimeFailed`; afterwards whether it happened is unknown to the caller.
        """


@runtime_checkable
class QuoteSource(Protocol):
    """Makes quotes of this TD."""

    async def quote(self, report_data: bytes) -> bytes:
        """A quote whose REPORTDATA is these 64 bytes. May be called concurrently."""

    async def td_report(self, report_data: bytes) -> bytes:
        """A TDREPORT, 1,024 bytes, whose REPORTDATA is these 64 bytes."""

    async def boot_event_log(self) -> bytes | None:
        """The firmware's event log (CCEL, cut at its end), or None where there is none."""


# --- layers ---------------------------------------------------------------------------------


class FileBlob(msgspec.Struct, frozen=True, kw_only=True, tag="file", forbid_unknown_fields=True):
    """A layer in a file that the daemon may read, or in a part of one (an archive's member).

    Where bytes may be found, as a client says: trusted for nothing. `blob_digest` is of the
    `size_bytes` from `offset_bytes` on, compressed or not; formats that know none leave it
    out. `tar_size_bytes`, of the uncompressed tar, is reserved before a byte moves.
    """

    file: PathText  # absolute
    size_bytes: Size
    media_type: ShortText
    offset_bytes: Size = 0
    blob_digest: ShortText | None = None  # ALGORITHM:HEX
    tar_size_bytes: Size | None = None


class RegistryBlob(
    msgspec.Struct, frozen=True, kw_only=True, tag="registry", forbid_unknown_fields=True
):
    """A layer in a repository of a registry (OCI distribution specification 1.1).

    Trusted for nothing; `tar_size_bytes` as in `FileBlob`.
    """

    registry: ShortText  # HOST or HOST:PORT
    repository: ShortText
    blob_digest: ShortText  # ALGORITHM:HEX of the blob as it is stored, compressed or not
    media_type: ShortText
    size_bytes: Size
    tar_size_bytes: Size | None = None


LayerSource: TypeAlias = FileBlob | RegistryBlob


class LayerUpload(Protocol):
    """One layer coming in. Exactly one of `finish` and `abort` ends it."""

    @property
    def received_bytes(self) -> int: ...

    async def write(self, chunk: bytes) -> None:
        """Append bytes of the uncompressed tar. Raises `Untrusted` once they exceed the limit."""

    async def finish(self) -> StoredLayer:
        """All bytes are there: no byte can change any more; returns what was computed."""

    async def abort(self) -> None:
        """Free all bytes. Idempotent, never raises, shielded inside."""


class IdMap(msgspec.Struct, frozen=True, kw_only=True):
    """Ids of a container's user namespace: pairs (inside, outside), one id each, uid = gid."""

    pairs: tuple[tuple[int, int], ...]

    @property
    def root(self) -> int:
        """The outside id that 0 inside means."""
        return dict(self.pairs)[0]


@runtime_checkable
class Rootfs(Protocol):
    """A mounted root for one container."""

    def attach(self, target: Path) -> None:
        """Make it visible at `target`, an empty folder. Blocks (call it in a thread).

        For the moment of a start only: between starts it is visible nowhere, so that no
        mount of one container is in the way of another's start. Raises `OSError`.
        """

    def detach(self) -> None:
        """Take it away again; what was written in it stays. Blocks. Idempotent, never raises."""

    async def close(self) -> None:
        """Unmount and free. Idempotent, never raises, shielded inside."""


@runtime_checkable
class LayerStore(Protocol):
    """Keeps layers' bytes out of everybody's reach, and mounts them."""

    async def upload(self, expected: Digest, *, size_bytes: int | None) -> LayerUpload:
        """Begin to receive an uncompressed tar; refuses before a byte moves if it cannot fit."""

    async def fetch(self, expected: Digest, source: LayerSource) -> StoredLayer:
        """Read and decompress a blob; its own digest and sizes are checked against `source`.

        `computed` must be looked at by the caller: the store compares nothing with `expected`.
        """

    async def prepare(self, layer: VerifiedLayer) -> None:
        """Parse a verified layer (index or unpack it), so that it can be mounted.

        Raises `Untrusted` for a hostile tar; the layer's bytes are freed then.
        """

    async def discard(self, stored: StoredLayer) -> None:
        """Free the bytes of a layer that is not wanted. Idempotent, never raises.

        What is mounted stays until the last root of it is closed; it is not mounted again.
        """

    async def mount(
        self,
        layers: tuple[VerifiedLayer, ...],
        *,
        container_id: int,
        id_map: IdMap,
        writable: bool,
    ) -> Rootfs:
        """A root of its own for one container, lowest layer first, seen through `id_map`."""
