"""What one container may ask of the supervisor, through its own socket."""

from __future__ import annotations

from supervisor.container import Container
from supervisor.evidence import EvidenceMaker
from supervisor.formats.evidence import RequestContainer


class ContainerVoice:
    """What one container may ask; implements `operations.ContainerOperations`."""

    def __init__(self, container: Container, evidence: EvidenceMaker) -> None:
        self._container = container
        self._evidence = evidence

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
