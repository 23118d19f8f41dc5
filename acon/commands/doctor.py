"""`acon doctor`: whether this machine has what the daemon needs, and what to do if not."""

from __future__ import annotations

import argparse

from acon.arguments import SubParsers, add_command

_DETAILS = """\
Tries things where trying is possible (as root) rather than reading version numbers: each
runtime has to run a container as the daemon would, with its control groups, limits, user
namespace and seccomp profile; of those that cannot it tells why.
Exit code 1 if something is missing that containers need; what only real hardware
offers, and what the daemon can do without, is reported and does not count."""


def add_parser(sub: SubParsers) -> None:
    add_command(
        sub,
        "doctor",
        summary="check what this machine offers",
        details=_DETAILS,
        example="sudo acon doctor",
        run=run,
    )


def run(args: argparse.Namespace) -> int:
    import msgspec

    from acon.machine import examine
    from acon.output import result

    findings = examine()
    failed = any(one.state == "missing" for one in findings)
    lines = []
    for one in findings:
        lines.append(f"{one.state:8} {one.subject}: {one.found}")
        if one.remedy and one.state != "ok":
            lines.append(f"         {one.remedy}")
    result(
        args,
        {"passed": not failed, "findings": [msgspec.to_builtins(one) for one in findings]},
        "\n".join(lines),
    )
    return 1 if failed else 0
