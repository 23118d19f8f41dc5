"""From a nonce to evidence: a quote, and the part of the log that replays to it.

No lock is held while a quote is made: the quote carries the register, and the log sent
is the prefix that replays to that value. Without such a prefix there is no evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from supervisor.config import EvidenceConfig
from supervisor.errors import Busy, MeasurementHalted, RuntimeFailed
from supervisor.events import EvidenceServed
from supervisor.formats import canonical_json
from supervisor.formats.digest import sha384
from supervisor.formats.errors import FormatError
from supervisor.formats.event_log import assemble_log
from supervisor.formats.evidence import (
    Evidence,
    EvidenceImage,
    EvidenceRequest,
    Proof,
    RequestContainer,
    encode_evidence,
    report_data_for,
    request_leaf,
    to_base64,
)
from supervisor.formats.merkle import inclusion_proof, root
from supervisor.formats.quote import parse_quote
from supervisor.formats.td_body import TdBody
from supervisor.formats.td_report import body_of_report, parse_td_report
from supervisor.journal import JournalEntry, attachments_of
from supervisor.measurement import Measurement
from supervisor.operations import AconReport
from supervisor.plugin_host import PluginHost
from supervisor.seam_guard import deadline, require_type, seam
from supervisor.seams import QuoteSource

REPORT_DATA_BYTES = 64
ACON_API_VERSION = 1


class EvidenceMaker:
    """Answers requests, each with a quote of its own, at most `max_waiting` at a time."""

    def __init__(
        self,
        *,
        measurement: Measurement,
        host: PluginHost,
        quotes: QuoteSource,
        boot_log: bytes | None,
        effective_config: str,
        status: Callable[[], bytes],
        config: EvidenceConfig,
    ) -> None:
        self._measurement = measurement
        self._host = host
        self._quotes = quotes
        self._boot_log = boot_log
        self._effective_config = effective_config
        self._status = status
        self._config = config
        self._waiting = 0

    async def make(
        self,
        nonce: bytes,
        *,
        container: RequestContainer | None = None,
        public_key_sha384: str | None = None,
        user_data: bytes | None = None,
    ) -> bytes:
        """An evidence file for one request.

        Raises `FormatError` for a bad request, `Busy`, `DeadlineExceeded`, `RuntimeFailed`
        when the hardware fails, `MeasurementHalted` when the log cannot be proven.
        """
        self._measurement.require_running()
        with self._bounded():
            encoded, quote_s = await self._make(nonce, container, public_key_sha384, user_data)
        self._host.emit(
            EvidenceServed(
                container_id=None if container is None else container.container_id,
                quote_ms=round(quote_s * 1000),
            )
        )
        return encoded

    async def _make(
        self,
        nonce: bytes,
        container: RequestContainer | None,
        public_key_sha384: str | None,
        user_data: bytes | None,
    ) -> tuple[bytes, float]:
        status = self._status()
        request = EvidenceRequest(
            nonce=nonce.hex(),
            status_digest_sha384=sha384(status).hex(),
            container=container,
            public_key_sha384=public_key_sha384,
            user_data=None if user_data is None else to_base64(user_data),
        )
        leaves = [request_leaf(request)]
        started = trio.current_time()
        quote, prefix = await self._quote(report_data_for(root(leaves)))
        quote_s = trio.current_time() - started
        evidence = Evidence(
            request=request,
            proof=Proof(
                index=0,
                size=len(leaves),
                path=tuple(node.hex() for node in inclusion_proof(leaves, 0)),
            ),
            quote=to_base64(quote),
            cc_eventlog=to_base64(assemble_log(self._boot_log, [entry.record for entry in prefix])),
            rtmr_index=self._measurement.rtmr_index,
            config=self._effective_config,
            images=tuple(
                EvidenceImage(
                    manifest=to_base64(image.manifest),
                    signature=to_base64(image.signature),
                    certificate=to_base64(image.certificate_der),
                )
                for image in attachments_of(prefix)
            ),
            status=status.decode(),
        )
        try:
            return encode_evidence(evidence), quote_s
        except FormatError as error:
            # Ours, not the asker's: a verifier could not read it.
            raise RuntimeFailed("evidence", "cannot be written", actual=error) from error

    async def acon_report(self, requestor_nonce: bytes, *, want_quote: bool) -> AconReport:
        """ACON's v1 report (`formats.md` of ACON's REST API): see `Operations.acon_report`."""
        self._measurement.require_running()
        text = canonical_json.encode(
            {
                "api_version": ACON_API_VERSION,
                "requestor_nonce": requestor_nonce.hex(),
                "acond_nonce": "",
                "attestation_data": "",
            }
        ).decode()
        report_data = sha384(text.encode()).ljust(REPORT_DATA_BYTES, b"\0")
        with self._bounded():
            made = await (self._quote if want_quote else self._td_report)(report_data)
        data, prefix = made
        records = self._measurement.records[: len(prefix)]
        return AconReport(
            data=data,
            attestation_data=text,
            rtmr_index=self._measurement.rtmr_index,
            log_lines=tuple(
                f"{record.domain} {record.operation} {record.content.decode()}"
                for record in records
            ),
        )

    async def _quote(self, report_data: bytes) -> tuple[bytes, tuple[JournalEntry, ...]]:
        with self._deadline(), seam("quote", "the quote source"):
            raw = await self._quotes.quote(report_data)
        require_type(raw, bytes, item="quote")
        try:
            body = parse_quote(raw).body
        except FormatError as error:
            raise RuntimeFailed("quote", "must be a TDX quote", actual=error) from error
        return raw, await self._prefix_of(body, report_data)

    async def _td_report(self, report_data: bytes) -> tuple[bytes, tuple[JournalEntry, ...]]:
        with self._deadline(), seam("TDREPORT", "the quote source"):
            raw = await self._quotes.td_report(report_data)
        require_type(raw, bytes, item="TDREPORT")
        try:
            body = body_of_report(parse_td_report(raw), td15=False)
        except FormatError as error:
            raise RuntimeFailed("TDREPORT", "must be one", actual=error) from error
        return raw, await self._prefix_of(body, report_data)

    async def _prefix_of(self, body: TdBody, report_data: bytes) -> tuple[JournalEntry, ...]:
        """The log that replays to this body's register; refuses another request's body."""
        if body.report_data != report_data:
            raise RuntimeFailed(
                "quote",
                "must carry the REPORTDATA that was asked for",
                expected=report_data.hex(),
                actual=body.report_data.hex(),
            )
        register = body.rtmrs[self._measurement.rtmr_index]
        prefix = self._measurement.prefix_for(register)
        if prefix is None:
            # Taken between an extension and its entry in memory: that entry is on its way.
            await self._measurement.settled()
            prefix = self._measurement.prefix_for(register)
        self._measurement.require_running()
        if prefix is None:
            raise MeasurementHalted(
                f"RTMR[{self._measurement.rtmr_index}]",
                "the log has no prefix that replays to the quoted register",
                expected=self._measurement.register.hex(),
                actual=register.hex(),
            )
        return prefix

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        with deadline("quote", "must arrive in time", self._config.quote_timeout_s):
            yield

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        if self._waiting >= self._config.max_waiting:
            raise Busy(
                "evidence",
                "too many requests wait for a quote (evidence.max_waiting)",
                expected=f"at most {self._config.max_waiting}",
            )
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
