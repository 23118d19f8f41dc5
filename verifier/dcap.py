"""The one place that calls dcap-qvl, which has no types: its few functions, typed.

dcap-qvl raises `ValueError` with free text and nothing else for bad bytes; so do these.
"""

from __future__ import annotations

from typing import Protocol, cast

import dcap_qvl


class QvlCollateral(Protocol):
    """`dcap_qvl.QuoteCollateralV3`, as far as it is read here."""

    @property
    def tcb_info(self) -> str: ...

    @property
    def qe_identity(self) -> str: ...

    @property
    def pck_crl(self) -> bytes: ...

    @property
    def root_ca_crl(self) -> bytes: ...


def read_collateral_json(text: str) -> QvlCollateral:
    """Read `QuoteCollateralV3` JSON; unknown fields are ignored. Raises `ValueError`."""
    return cast(QvlCollateral, dcap_qvl.QuoteCollateralV3.from_json(text))


def verified_claims_json(
    quote: bytes, collateral: QvlCollateral, *, root_der: bytes | None, now_s: int
) -> str:
    """Verify every link at `now_s` (Unix seconds) and return what was verified, as JSON.

    `root_der` None means Intel's root. No TCB status but Revoked, and no TD attribute but a
    few, is refused here: that is the caller's to do. Raises `ValueError`.
    """
    verifier = dcap_qvl.QuoteVerifier(root_der)
    policy = dcap_qvl.QuotePolicy.claims_only(now_s)
    try:
        claims = verifier.verify_with_policy(quote, collateral, now_s, policy)
    except OverflowError as error:
        raise ValueError(f"the time is out of range: {error}") from None
    return cast(str, claims.to_json())


def parsed_parts(quote: bytes) -> tuple[object, object]:
    """dcap-qvl's own reading: header and report, fields as attributes. Raises `ValueError`."""
    parsed = dcap_qvl.Quote.parse(quote)
    return parsed.header, parsed.report
