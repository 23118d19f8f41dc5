"""`acon log show`: the measurement log of an evidence file, record by record."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from supervisor.formats.log_events import LogEvent, UnknownEvent

_DETAILS = """\
Shows what the log says and the register that it replays to. It verifies nothing:
`acon verify` does."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "show",
        summary="show the measurement log of an evidence file",
        details=_DETAILS,
        example="acon log show evidence.json",
        run=run,
    )
    parser.add_argument("file", metavar="FILE", type=Path)


def run(args: argparse.Namespace) -> int:
    from acon.files import read_bounded
    from acon.output import result
    from supervisor.formats.base64_text import from_base64
    from supervisor.formats.event_log import extend, split_log
    from supervisor.formats.evidence import MAX_EVIDENCE_BYTES, decode_evidence
    from supervisor.formats.log_events import StartEvent, decode_event

    evidence = decode_evidence(read_bounded(args.file, max_bytes=MAX_EVIDENCE_BYTES))
    log = split_log(
        from_base64(evidence.cc_eventlog, item="cc_eventlog"), rtmr_index=evidence.rtmr_index
    )
    register = bytes(48)
    records: list[object] = []
    lines = [
        f"{len(log.boot_events)} events of firmware and boot loader, then {len(log.records)} of "
        f"the supervisor in RTMR[{evidence.rtmr_index}]:"
    ]
    for number, record in enumerate(log.records):
        event = decode_event(record.operation, record.content)
        if number == 0 and isinstance(event, StartEvent) and event.register_at_start:
            register = bytes.fromhex(event.register_at_start)
        register = extend(register, record.digest_sha384)
        records.append(
            {
                "operation": record.operation,
                "content": record.content.decode(),
                "digest_sha384": record.digest_sha384.hex(),
                "register_after": register.hex(),
            }
        )
        lines.append(f"{number:4}  {record.operation}")
        lines += [f"        {line}" for line in _words(event)]
    lines.append(f"replays to {register.hex()} (not verified: `acon verify` does that)")
    facts = {
        "boot_events": len(log.boot_events),
        "rtmr_index": evidence.rtmr_index,
        "records": records,
        "register": register.hex(),
    }
    result(args, facts, "\n".join(lines))
    return 0


def _words(event: LogEvent | UnknownEvent) -> list[str]:
    from supervisor.formats import log_events

    match event:
        case log_events.StartEvent():
            found = [
                f"{one.role} {one.name} {one.version} sha384/{one.digest_sha384}"
                for one in event.components
            ]
            found.append(f"configuration sha384/{event.config_digest_sha384}")
            if event.register_at_start:
                found.append(f"the register was not zero before: {event.register_at_start}")
            return found
        case log_events.AdmitImagesEvent():
            return list(event.image_ids)
        case log_events.StartContainerEvent():
            found = [event.image_id, f"runs {' '.join(event.argv)}"]
            found += [f"env {one}" for one in event.environment]
            found += [f"layer {number} {one}" for number, one in enumerate(event.layers)]
            for delegation in event.delegations:
                found += [
                    f"layer {delegation.index} was left to {hop.signer}: {hop.reference}, "
                    f"is {hop.alias}"
                    for hop in delegation.hops
                ]
            return found
        case log_events.SealEvent():
            still_open = ", ".join(event.open_delegations) or "none"
            return [f"delegations that stay open: {still_open}"]
        case log_events.UnknownEvent():
            return ["critical: a verifier must know it" if event.critical else "informative"]
