"""Our quote parser against dcap-qvl's, field by field: a field is only what both say it is."""

from __future__ import annotations

from collections.abc import Mapping

from supervisor.formats.quote import Quote
from verifier import dcap

_HEADER_FIELDS = ("version", "attestation_key_type", "tee_type", "qe_vendor_id", "user_data")
_BODY_FIELDS = (
    "tee_tcb_svn",
    "mr_seam",
    "mr_signer_seam",
    "seam_attributes",
    "td_attributes",
    "xfam",
    "mr_td",
    "mr_config_id",
    "mr_owner",
    "mr_owner_config",
    "report_data",
)
# TD 1.5 and its extension: our name, dcap-qvl's name.
_TD15_FIELDS = ("tee_tcb_svn2", "mr_service_td")
_EXTENDED_FIELDS = {
    "vm_id": "vmid",
    "td_id": "td_id",
    "dev_info": "dev_info",
    "init_servtd_hash": "init_service_td_hash",
    "init_servtd_attributes": "init_service_td_attributes",
    "init_cpu_svn": "init_cpu_svn",
    "init_tee_tcb_svn": "init_tee_tcb_svn",
    "init_tee_fmspc": "init_tee_fmspc",
    "current_servtd_hash": "cur_service_td_hash",
    "current_servtd_attributes": "cur_service_td_attributes",
}


def disagreements(
    stripped: bytes, quote: Quote, claimed: Mapping[str, Mapping[str, object]] | None
) -> tuple[str, ...]:
    """What the two parsers read differently, one sentence per field; empty when they agree.

    `claimed` is the report in dcap-qvl's verified claims, compared where it is there.
    """
    try:
        header, report = dcap.parsed_parts(stripped)
    except ValueError as error:
        return (f"dcap-qvl does not read it: {str(error)[:200]}",)
    differing = _compare(_our_fields(quote), _their_fields(header, report))
    if claimed is not None:
        verified = _flatten(claimed)
        ours = {name: _text(value) for name, value in _our_fields(quote).items()}
        for name, value in verified.items():
            if name in ours and ours[name] != value:
                differing += (f"{name}: {ours[name]} here, {value} as verified",)
        if missing := [name for name in _BODY_FIELDS if name not in verified]:
            differing += (f"not among what was verified: {', '.join(missing)}",)
    return differing


def _our_fields(quote: Quote) -> dict[str, object]:
    fields: dict[str, object] = {name: getattr(quote.header, name) for name in _HEADER_FIELDS}
    body = quote.body
    fields |= {name: getattr(body, name) for name in _BODY_FIELDS}
    fields |= {f"rt_mr{index}": rtmr for index, rtmr in enumerate(body.rtmrs)}
    if body.tee_tcb_svn2 is not None:
        fields |= {name: getattr(body, name) for name in _TD15_FIELDS}
    if body.extended is not None:
        fields |= {
            theirs: getattr(body.extended, ours) for ours, theirs in _EXTENDED_FIELDS.items()
        }
    return fields


def _their_fields(header: object, report: object) -> dict[str, object]:
    fields: dict[str, object] = {name: getattr(header, name) for name in _HEADER_FIELDS}
    names = [*_BODY_FIELDS, *(f"rt_mr{index}" for index in range(4))]
    # Their 1.5 reports carry the fields of 1.0 as well, so presence tells the body's kind.
    names += [*_TD15_FIELDS, *_EXTENDED_FIELDS.values()]
    return fields | {name: getattr(report, name) for name in names if hasattr(report, name)}


def _compare(ours: dict[str, object], theirs: dict[str, object]) -> tuple[str, ...]:
    return tuple(
        f"{name}: {_text(ours.get(name))} here, {_text(theirs.get(name))} in dcap-qvl"
        for name in sorted(ours.keys() | theirs.keys())
        if _text(ours.get(name)) != _text(theirs.get(name))
    )


def _flatten(claimed: Mapping[str, object]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in claimed.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value)
        else:
            flat[name] = str(value)
    return flat


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
