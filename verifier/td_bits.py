"""The bits of TDATTRIBUTES and XFAM, one by one.

Source: Intel 348551-008US (TD attributes), as Linux' `asm/shared/tdx.h` names them; the
bounds of XFAM are those of Intel's TDX module (fixed-1 and fixed-0 bits).
"""

from __future__ import annotations

# Name and why it must not be set. Bits that are not named anywhere here are reserved.
FORBIDDEN_ATTRIBUTES = {
    0: ("DEBUG", "the host can read and change everything in a debug TD"),
    4: ("HGS_PLUS_PROF", "the host can profile the TD"),
    5: ("PERF_PROF", "the host can profile the TD"),
    6: ("PMT_PROF", "the host can profile the TD"),
    16: ("ICSSD", "not known to be harmless to a workload"),
    17: ("SERVTD_EXT", "service TDs may act on this TD, and none is accepted"),
    29: ("MIGRATABLE", "the TD can be moved with all its secrets"),
    62: ("TPA", "not known to be harmless to a workload"),
}
ALLOWED_ATTRIBUTES = {27: "LASS", 30: "PKS", 31: "KL", 63: "PERFMON"}
REQUIRED_ATTRIBUTES = {
    28: ("SEPT_VE_DISABLE", "without it the host can inject faults into the guest kernel"),
}
XFAM_REQUIRED = 0x3
XFAM_ALLOWED = 0x6DBE7


def attribute_problems(attributes: bytes) -> tuple[str, ...]:
    """What is wrong with these 8 bytes (little-endian), one sentence per offending bit."""
    value = int.from_bytes(attributes, "little")
    problems = []
    for bit in range(64):
        is_set = bool(value >> bit & 1)
        if bit in REQUIRED_ATTRIBUTES:
            name, why = REQUIRED_ATTRIBUTES[bit]
            if not is_set:
                problems.append(f"bit {bit} ({name}) must be set: {why}")
        elif is_set and bit in FORBIDDEN_ATTRIBUTES:
            name, why = FORBIDDEN_ATTRIBUTES[bit]
            problems.append(f"bit {bit} ({name}) must not be set: {why}")
        elif is_set and bit not in ALLOWED_ATTRIBUTES:
            problems.append(f"bit {bit} is reserved and must not be set")
    return tuple(problems)


def attribute_names(attributes: bytes) -> str:
    """The set bits by name, for people."""
    value = int.from_bytes(attributes, "little")
    named = {bit: name for bit, (name, _) in FORBIDDEN_ATTRIBUTES.items()}
    named |= ALLOWED_ATTRIBUTES | {bit: name for bit, (name, _) in REQUIRED_ATTRIBUTES.items()}
    return ", ".join(named.get(bit, f"bit {bit}") for bit in range(64) if value >> bit & 1)


def xfam_problems(xfam: bytes) -> tuple[str, ...]:
    """What is wrong with these 8 bytes (little-endian)."""
    value = int.from_bytes(xfam, "little")
    problems = []
    if value & XFAM_REQUIRED != XFAM_REQUIRED:
        problems.append(f"XFAM must contain {XFAM_REQUIRED:#x}")
    if value & ~XFAM_ALLOWED:
        problems.append(f"XFAM must not exceed {XFAM_ALLOWED:#x}")
    return tuple(problems)
