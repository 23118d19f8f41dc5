"""ACON's report: a TDREPORT or a quote that binds what the containers say of themselves.

Its text is ACON's JSON (intel/ACON: `AttestData` in acond/src/image.rs, read by
aconcli/attest): the asker's nonce and one of ours, and for every image its containers'
attestation data. REPORTDATA is the text's SHA-384, padded with zeros.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from supervisor.errors import Busy, Conflict
from supervisor.formats import canonical_json
from supervisor.formats.digest import sha384
from supervisor.formats.status import (
    AttestationData,
    ContainerStatus,
    Status,
    attestation_data_bytes,
)
from supervisor.measurement import Measurement
from supervisor.operations import AconReport
from supervisor.proven_quotes import ProvenQuotes

ACON_API_VERSION = "1.0.0"
NONCE_BYTES = 16
REPORT_DATA_BYTES = 64
MAX_TEXT_BYTES = 8 * 1024 * 1024
# The numbers that ACON's protocol has for the kinds of attestation data.
_TYPE_BY_KIND = {"binary": 1, "text": 2}


class AconReports:
    """Answers ACON's clients, outside (its REST API) and inside (its IPC protocol)."""

    def __init__(
        self, *, measurement: Measurement, quotes: ProvenQuotes, status: Callable[[], Status]
    ) -> None:
        self._measurement = measurement
        self._quotes = quotes
        self._status = status

    async def make(self, requestor_nonce: bytes, *, want_quote: bool) -> AconReport:
        """For an asker outside: every container with what it set.

        Raises `Busy`, `DeadlineExceeded`, `RuntimeFailed` or `MeasurementHalted`.
        """
        return await self._make(requestor_nonce, self._status(), want_quote=want_quote)

    async def make_for(
        self,
        container_id: int,
        requestor_nonce: bytes,
        data: AttestationData | None,
        *,
        want_quote: bool,
    ) -> AconReport:
        """For a container: `data` stands in its place, for this report alone; what the others
        set stands in theirs. Raises as `make`, and `FormatError`, and `Conflict` if it has ended.
        """
        if data is not None:
            attestation_data_bytes(data, item="attestation data")
        status = self._status()
        if not any(one.container_id == container_id for one in _alive(status)):
            raise Conflict(f"container {container_id}", "does not run")
        own = {container_id: data}
        return await self._make(requestor_nonce, status, own, want_quote=want_quote)

    async def _make(
        self,
        requestor_nonce: bytes,
        status: Status,
        own: dict[int, AttestationData | None] | None = None,
        *,
        want_quote: bool,
    ) -> AconReport:
        self._measurement.require_running()
        text = _text(requestor_nonce, status, own or {})
        report_data = sha384(text).ljust(REPORT_DATA_BYTES, b"\0")
        with self._quotes.asking(is_container=own is not None):
            ask = self._quotes.quote if want_quote else self._quotes.td_report
            proven = await ask(report_data)
        records = self._measurement.records[: len(proven.prefix)]
        return AconReport(
            data=proven.raw,
            attestation_data=text.decode(),
            rtmr_index=self._measurement.rtmr_index,
            log_lines=tuple(
                f"{record.domain} {record.operation} {record.content.decode()}"
                for record in records
            ),
        )


def _alive(status: Status) -> tuple[ContainerStatus, ...]:
    return tuple(one for one in status.containers if one.state != "exited")


def _text(requestor_nonce: bytes, status: Status, own: dict[int, AttestationData | None]) -> bytes:
    said: dict[str, dict[str, object]] = {image.image_id: {} for image in status.images}
    for one in _alive(status):
        data = own.get(one.container_id, one.attestation_data)
        said.setdefault(one.image_id, {})[str(one.container_id)] = _value(data)
    text = canonical_json.encode(
        {
            "api_version": ACON_API_VERSION,
            # Rust's serde writes bytes as an array of numbers, and Go reads that.
            "requestor_nonce": list(requestor_nonce),
            "acond_nonce": list(secrets.token_bytes(NONCE_BYTES)),
            "attestation_data": said,
        }
    )
    if len(text) > MAX_TEXT_BYTES:
        raise Busy(
            "ACON report",
            "images and attestation data are too much for one",
            expected=f"at most {MAX_TEXT_BYTES} bytes",
            actual=len(text),
        )
    return text


def _value(data: AttestationData | None) -> dict[str, object]:
    if data is None:
        return {}
    # JSON holds text only: what is binary stays in its base64.
    said = (
        attestation_data_bytes(data, item="attestation data").decode()
        if data.kind == "text"
        else data.data
    )
    return {"type": _TYPE_BY_KIND[data.kind], "data": said}
