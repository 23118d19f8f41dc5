"""What servers may ask of the supervisor: the whole of it for the management API,
and the little that a container may ask through its own socket.

Every method raises `Refusal` subclasses only. Every one may be cancelled at any
checkpoint; what was measured by then happened, what was not did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from supervisor.container_seams import Invocation, InvocationResult
from supervisor.formats.digest import Digest
from supervisor.formats.status import AttestationData
from supervisor.seams import LayerSource, LayerUpload


class ManifestUpload(msgspec.Struct, frozen=True, kw_only=True):
    """One image as its owner signed it. All three are verified here."""

    manifest: bytes
    signature: bytes
    certificate_der: bytes


class AdmissionResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a group admission did. `missing_layers` are references, delegated ones as written."""

    image_ids: tuple[str, ...]
    missing_layers: tuple[str, ...]
    already_admitted: tuple[str, ...]


class ImageView(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted image; `missing_layers` non-empty means that it cannot start."""

    image_id: str
    names: tuple[str, ...]
    executable: bool
    missing_layers: tuple[str, ...]


class ContainerView(msgspec.Struct, frozen=True, kw_only=True):
    """A container, running or ended. `state` is "starting", "running" or "exited".

    `since`: when the state began, RFC 3339 in UTC by the TD's clock, which proves nothing.
    `restartable`: a restart would be tried; an ended container is so only while what it
    wrote is kept. `signals` and `log_fds` are the manifest's; `layers` the digests that its
    layers were resolved to, lowest first.
    """

    container_id: int
    image_id: str
    state: str
    since: str
    restarts: int
    restartable: bool
    pid: int | None
    exit_code: int | None
    signal: int | None
    out_of_memory: bool
    argv: tuple[str, ...]
    environment: tuple[str, ...]
    signals: tuple[int, ...]
    log_fds: tuple[int, ...]
    layers: tuple[str, ...] = ()
    start_event_digest_sha384: str


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line that a container wrote to a descriptor in its manifest's `logFDs`.

    `number` counts from 1, over restarts too. `text` is without its newline; `cut`: the line
    goes on in the next one of this descriptor.
    """

    number: int
    time_ns: int  # Unix time by the TD's clock
    fd: int
    text: bytes
    cut: bool


class LogPage(msgspec.Struct, frozen=True, kw_only=True):
    """Lines after a number, oldest first. `lost_lines`: they are no longer kept.

    `last_number` is that of the latest line there ever was, 0 before the first. `ended`:
    nothing will follow these unless the container is restarted.
    """

    lines: tuple[LogLine, ...]
    lost_lines: int
    last_number: int
    ended: bool


class AconReport(msgspec.Struct, frozen=True, kw_only=True):
    """`data` is a TDREPORT (1,024 bytes) or a quote; `log_lines` our log's texts, in order."""

    data: bytes
    attestation_data: str
    rtmr_index: int
    log_lines: tuple[str, ...]


class Operations(Protocol):
    """The management API's view. Its callers are not trusted."""

    async def admit(self, group: Sequence[ManifestUpload]) -> AdmissionResult:
        """Verify, judge, measure and admit a group as a whole, or nothing of it."""

    async def upload_layer(self, expected: Digest, *, size_bytes: int | None) -> LayerUpload:
        """Begin an upload of an uncompressed tar. `finish_layer` or `abort` must follow."""

    async def finish_layer(self, expected: Digest, upload: LayerUpload) -> None:
        """Verify the uploaded bytes and make the layer usable; frees them if they are wrong."""

    async def fetch_layer(self, expected: Digest, source: LayerSource) -> None:
        """Fetch, verify and make usable. Returns at once if the layer is already here.

        Calls for one layer share one transfer. Cancelling one gives up its share: the transfer
        ends with the last, and leaves nothing behind.
        """

    def has_layer(self, digest: Digest) -> bool:
        """Whether the layer is verified and usable."""

    async def seal(self) -> None:
        """No image can be admitted after this. Idempotent."""

    async def start(self, image_id: str, requested_environment: Sequence[str]) -> int:
        """Measure and start a container; returns its id once its process runs."""

    async def signal(self, container_id: int, signum: int) -> None:
        """Send a signal that the manifest lists (negative: to the process group)."""

    async def restart(self, container_id: int, *, timeout_s: float) -> None:
        """Start it again with what it had; a running one is sent the manifest's first signal.

        Returns once the new program runs. `DeadlineExceeded` if the old one is not gone in
        time: nothing was killed then.
        """

    async def invoke(self, container_id: int, invocation: Invocation) -> InvocationResult:
        """Run an additional entry point; only names that begin with A to Z can be asked for."""

    def log_page(self, container_id: int, *, after: int, max_lines: int) -> LogPage:
        """Kept lines with numbers above `after`; raises `UnknownItem`."""

    async def wait_for_log(self, container_id: int, *, after: int) -> None:
        """Until there is a line above `after`, or the log is at its end."""

    async def memory_bytes(self) -> dict[int, int]:
        """Memory that each running container uses now."""

    def images(self) -> tuple[ImageView, ...]: ...

    def manifest(self, image_id: str) -> ManifestUpload:
        """The signed bytes of an admitted image."""

    def containers(self) -> tuple[ContainerView, ...]: ...

    def status(self) -> bytes:
        """The status document, canonical JSON (`supervisor.formats.status`)."""

    async def evidence(self, nonce: bytes) -> bytes:
        """An evidence file (JSON) for an outside nonce of 16 to 64 bytes."""

    async def acon_report(self, requestor_nonce: bytes, *, want_quote: bool) -> AconReport:
        """ACON's v1 report for a 16-byte nonce: TDREPORT, or a quote.

        REPORTDATA is SHA-384 of the attestation data text, zero-padded to 64 bytes; the
        text is made here, so that no client chooses REPORTDATA.
        """


class ContainerOperations(Protocol):
    """What a container may ask through its own socket. It speaks for itself alone."""

    @property
    def container_id(self) -> int: ...

    @property
    def image_id(self) -> str: ...

    async def evidence(
        self, nonce: bytes, *, public_key_sha384: str | None, user_data: bytes | None
    ) -> bytes:
        """An evidence file bound to this container, its key's hash and its user data."""

    def set_attestation_data(self, data: AttestationData | None) -> None:
        """What later outside evidence says for this container, until it ends or sets another.

        Raises `FormatError` for what breaks a rule of `AttestationData`, `Busy` when all
        containers' together are too much for a status document, `Conflict` once it has ended.
        """

    async def acon_report(
        self, requestor_nonce: bytes, data: AttestationData | None, *, want_quote: bool
    ) -> AconReport:
        """ACON's report (its IPC protocol, command 0), with `data` in this container's place."""
