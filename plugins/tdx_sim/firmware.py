"""A synthetic boot: what a TD's firmware and boot loader measure before any supervisor runs.

The base image is four sentences; MRTD and RTMR 0 to 2 follow from them and from nothing
else, so other sentences are another base image, and a verifier can pin one. The log is a
CCEL as firmware writes it: TCG2 crypto agile (TCG PC Client Platform Firmware Profile),
register indices of UEFI 2.10 §38.4.1, SHA-384 only.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from supervisor.formats.boot_log import ALGORITHM_SHA384, EV_EVENT_TAG, sha384_only_header
from supervisor.formats.digest import sha384

_EV_SEPARATOR = 0x4
_EV_IPL = 0xD
_EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
_EV_EFI_BOOT_SERVICES_APPLICATION = 0x80000003
_EV_EFI_ACTION = 0x80000007

_SEPARATOR = bytes(4)
_EFI_GLOBAL_VARIABLE = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
_END_OF_DEVICE_PATH = bytes.fromhex("7fff0400")
_LINUX_INITRD_TAG = 0x8F3B22EC  # Linux, drivers/firmware/efi/libstub/efistub.h

_Sentence = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class BaseImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is booted. Texts stand for the bytes of each part: other text, other digest."""

    firmware: _Sentence = "SIMULATION: firmware, version 1"
    kernel: _Sentence = "SIMULATION: kernel, version 1"
    initrd: _Sentence = "SIMULATION: initrd, version 1"
    command_line: _Sentence = "console=hvc0 ro"


class MeasuredEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the boot; `digest_sha384` (48 bytes) is what its RTMR is extended with."""

    rtmr_index: int
    event_type: int
    digest_sha384: bytes
    data: bytes


def mr_td(image: BaseImage) -> bytes:
    """MRTD, 48 bytes: the initial contents of the TD are its firmware."""
    return sha384(image.firmware.encode())


def boot_events(image: BaseImage) -> tuple[MeasuredEvent, ...]:
    """What is measured into RTMR 0 to 2, in order."""
    kernel = image.kernel.encode()
    return (
        _event(0, _EV_EFI_VARIABLE_DRIVER_CONFIG, _secure_boot_variable()),
        _event(0, _EV_SEPARATOR, _SEPARATOR),
        _event(
            1,
            _EV_EFI_BOOT_SERVICES_APPLICATION,
            struct.pack("<QQQQ", 0, len(kernel), 0, len(_END_OF_DEVICE_PATH)) + _END_OF_DEVICE_PATH,
            measured=kernel,
        ),
        _event(1, _EV_EFI_ACTION, b"Exit Boot Services Invocation"),
        _event(1, _EV_EFI_ACTION, b"Exit Boot Services Returned with Success"),
        _event(1, _EV_SEPARATOR, _SEPARATOR),
        _event(
            2,
            _EV_IPL,
            b"kernel_cmdline: " + image.command_line.encode() + b"\0",
            measured=image.command_line.encode(),
        ),
        _event(
            2,
            EV_EVENT_TAG,
            _tagged(_LINUX_INITRD_TAG, b"Linux initrd\0"),
            measured=image.initrd.encode(),
        ),
    )


def event_log(events: tuple[MeasuredEvent, ...]) -> bytes:
    """The CCEL of these events, without the filler that follows it in an ACPI table."""
    return sha384_only_header() + b"".join(
        struct.pack(
            "<IIIH48sI",
            event.rtmr_index + 1,
            event.event_type,
            1,
            ALGORITHM_SHA384,
            event.digest_sha384,
            len(event.data),
        )
        + event.data
        for event in events
    )


def _event(
    rtmr_index: int, event_type: int, data: bytes, *, measured: bytes | None = None
) -> MeasuredEvent:
    return MeasuredEvent(
        rtmr_index=rtmr_index,
        event_type=event_type,
        digest_sha384=sha384(data if measured is None else measured),
        data=data,
    )


def _secure_boot_variable() -> bytes:
    """UEFI_VARIABLE_DATA: GUID, lengths of name and value, name, value (off)."""
    name = "SecureBoot"
    header = _EFI_GLOBAL_VARIABLE + struct.pack("<QQ", len(name), 1)
    return header + name.encode("utf-16-le") + b"\0"


def _tagged(tag: int, data: bytes) -> bytes:
    return struct.pack("<II", tag, len(data)) + data
