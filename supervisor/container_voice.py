"""What one container may ask of the supervisor, through its own socket."""

from __future__ import annotations

from supervisor.acon_report import AconReports
from supervisor.attestation import AttestationRoom
from supervisor.container import Container
from supervisor.errors import Conflict
from supervisor.evidence import EvidenceMaker
from supervisor.formats.evidence import RequestContainer
from supervisor.formats.status import AttestationData
from supervisor.operations import AconReport


class ContainerVoice:
    """One run's voice; implements `operations.ContainerOperations`.

    `close` it when its socket is served no more: what is still under way then was asked by
    a program that has ended.
    """

    def __init__(
        self,
        container: Container,
        *,
        evidence: EvidenceMaker,
        acon_reports: AconReports,
        room: AttestationRoom,
    ) -> None:
        self._container = container
        self._evidence = evidence
        self._acon_reports = acon_reports
        self._room = room
        self._closed = False

    @property
    def container_id(self) -> int:
        return self._container.container_id

    @property
    def image_id(self) -> str:
        return self._container.image_id

    async def evidence(
        self, nonce: bytes, *, public_key_sha384: str | None, user_data: bytes | None
    ) -> bytes:
        # A program may ask before the runtime has reported it: evidence whose status lacked
        # the asker would never verify. If the start fails its socket closes, and this with it.
        await self._container.listed.wait()
        # Nor would evidence for one that has ended.
        self._require_alive()
        return await self._evidence.make(
            nonce,
            container=RequestContainer(
                container_id=self._container.container_id,
                image_id=self._container.image_id,
                start_event_digest_sha384=self._container.start.receipt.digest_sha384,
            ),
            public_key_sha384=public_key_sha384,
            user_data=user_data,
        )

    def set_attestation_data(self, data: AttestationData | None) -> None:
        self._require_alive()
        self._room.set(self._container, data)

    async def acon_report(
        self, requestor_nonce: bytes, data: AttestationData | None, *, want_quote: bool
    ) -> AconReport:
        await self._container.listed.wait()
        self._require_alive()
        return await self._acon_reports.make_for(
            self.container_id, requestor_nonce, data, want_quote=want_quote
        )

    def close(self) -> None:
        """Nobody speaks through it any more. Idempotent."""
        self._closed = True

    def _require_alive(self) -> None:
        # Requests outlive their program for a moment. The next run must not be made to say
        # what the one before sent.
        if self._closed or self._container.state == "exited":
            raise Conflict(self._container.item, "does not run", actual=self._container.state)
