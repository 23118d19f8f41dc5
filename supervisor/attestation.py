"""The room that all containers' attestation data together have in a status document."""

from __future__ import annotations

from supervisor.container import Container
from supervisor.errors import Busy
from supervisor.formats.status import MAX_STATUS_BYTES, AttestationData, attestation_data_bytes

# Of base64, as the document holds it. The other half is for images and containers, so that
# no container can keep the document from being written.
MAX_TOTAL_CHARACTERS = MAX_STATUS_BYTES // 2


class AttestationRoom:
    """Keeps what was set in the containers themselves, whose end makes them forget it."""

    def __init__(self, max_total_characters: int = MAX_TOTAL_CHARACTERS) -> None:
        self._max_total_characters = max_total_characters
        self._speakers: set[Container] = set()

    def set(self, container: Container, data: AttestationData | None) -> None:
        """What the status says for `container` from now on; None: nothing.

        Raises `FormatError` for data that no status could hold, `Busy` when there is no room.
        What was set before stays then.
        """
        others = {one for one in self._speakers - {container} if one.attestation_data is not None}
        if data is not None:
            attestation_data_bytes(data, item="attestation data")
            total = len(data.data) + sum(
                len(one.attestation_data.data) for one in others if one.attestation_data is not None
            )
            if total > self._max_total_characters:
                raise Busy(
                    "attestation data",
                    "all containers' together is bounded",
                    expected=f"at most {self._max_total_characters} characters of base64",
                    actual=total,
                )
            others.add(container)
        self._speakers = others
        container.attestation_data = data
