"""From a nonce to evidence: one self-contained file around a quote and its log."""

from __future__ import annotations

from collections.abc import Callable

import trio

from supervisor.errors import RuntimeFailed
from supervisor.events import EvidenceServed
from supervisor.formats.base64_text import to_base64
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
)
from supervisor.formats.merkle import inclusion_proof, root
from supervisor.journal import attachments_of
from supervisor.measurement import Measurement
from supervisor.plugin_host import PluginHost
from supervisor.proven_quotes import ProvenQuotes


class EvidenceMaker:
    """Answers requests, each with a quote of its own."""

    def __init__(
        self,
        *,
        measurement: Measurement,
        host: PluginHost,
        quotes: ProvenQuotes,
        boot_log: bytes | None,
        effective_config: str,
        status: Callable[[], bytes],
    ) -> None:
        self._measurement = measurement
        self._host = host
        self._quotes = quotes
        self._boot_log = boot_log
        self._effective_config = effective_config
        self._status = status

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
        with self._quotes.asking(is_container=container is not None):
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
        quote, prefix = await self._quotes.quote(report_data_for(root(leaves)))
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
