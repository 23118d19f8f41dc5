"""Firmware, kernel and boot: the registers that were set before the supervisor ran."""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.formats.boot_log import BootEvent, replay_rtmrs
from supervisor.formats.errors import FormatError
from supervisor.formats.td_body import TdBody
from verifier.pinning import pinned
from verifier.policy import Policy
from verifier.verdict import Check, equal, group, judge, unmade

# TCG PC Client Platform Firmware Profile: the event types whose digest is that of their data
# (EV_SEPARATOR; EFI variables, GPT, actions, authorities). Of all others only the digest is
# authenticated, whatever their text says, so none of that text is ever shown.
_SELF_DESCRIBING = frozenset({0x4, 0x80000001, 0x80000006, 0x80000007, 0x800000E0})
_TITLES = {
    "mr_td": "Firmware as loaded (MRTD) is the one expected",
    "rtmr0": "Firmware's configuration (RTMR0) is the one expected",
    "rtmr1": "Boot loader and kernel (RTMR1) are those expected",
    "rtmr2": "Command line and initial file system (RTMR2) are those expected",
    "mr_config_id": "What the host wrote into MRCONFIGID is as expected",
    "mr_owner": "What the host wrote into MROWNER is as expected",
    "mr_owner_config": "What the host wrote into MROWNERCONFIG is as expected",
}


def check_base(body: TdBody, policy: Policy, anchor: str) -> Check:
    """MRTD, RTMR0-2 and the host's fields against the policy."""
    values = {
        "mr_td": body.mr_td,
        "rtmr0": body.rtmrs[0],
        "rtmr1": body.rtmrs[1],
        "rtmr2": body.rtmrs[2],
        "mr_config_id": body.mr_config_id,
        "mr_owner": body.mr_owner,
        "mr_owner_config": body.mr_owner_config,
    }
    if policy.log.register_index == 2:
        # Then RTMR2 holds the supervisor's log, whose start the policy pins (`log_check`).
        del values["rtmr2"]
    checks = [
        pinned(
            f"base.{name}",
            _TITLES[name],
            actual=value.hex(),
            expected=getattr(policy.base, name),
            anchor=anchor,
            policy_rule=f"base.{name}",
        )
        for name, value in values.items()
    ]
    if policy.log.register_index == 2:
        checks.append(
            equal(
                "base.rtmr3",
                "Nothing was measured into the register that nobody accounts for (RTMR3)",
                expected=bytes(48).hex(),
                actual=body.rtmrs[3].hex(),
                anchor=anchor,
            )
        )
    return group("base", "What brought the supervisor: firmware, kernel, boot", checks)


def check_boot_log(
    events: Sequence[BootEvent], body: TdBody, *, rtmr_index: int, at_start: bytes, anchor: str
) -> Check:
    """The firmware's event log against the registers, those without an event included.

    `at_start` is what the supervisor found in its own register (`rtmr_index`); boot events
    of that register, if there are any, must account for it. (Firmware's log does not record
    what is extended at run time, so none need be there: the policy pins `at_start`.)
    """
    id, title = "boot_log", "The boot log explains the registers of the base"
    if not events:
        return unmade(
            id,
            title,
            why="the evidence brings no boot log; the registers stand for themselves",
            actual="no events",
            left_open=True,
        )
    try:
        replayed = replay_rtmrs(events)
    except FormatError as error:
        return judge(
            id,
            title,
            holds=False,
            expected=error.rule,
            actual=error.item,
            anchor=anchor,
        )
    checks = [_texts(events)]
    for index in range(4):
        is_log = index == rtmr_index
        if index == 3 and not is_log:
            continue  # `check_base` demands zero of it
        if is_log and not any(event.mr_index == index + 1 for event in events):
            continue
        checks.append(
            equal(
                f"boot_log.rtmr{index}",
                f"The boot log's events for RTMR{index} replay to what "
                + ("the supervisor found there" if is_log else "the quote holds"),
                expected=(at_start if is_log else body.rtmrs[index]).hex(),
                actual=replayed[index].hex(),
                anchor="the log's Start event" if is_log else anchor,
            )
        )
    return group(id, title, checks)


def _texts(events: Sequence[BootEvent]) -> Check:
    wrong = [
        f"event at {event.offset}, type {event.event_type:#x}"
        for event in events
        if event.event_type in _SELF_DESCRIBING and not event.data_matches_digest
    ]
    return judge(
        "boot_log.texts",
        "Boot events whose digest covers their text say what was measured",
        holds=not wrong,
        expected="the digest of its data, for each event of such a type",
        actual="; ".join(wrong) or "as it must be",
        anchor="the boot log's own bytes",
    )
