"""The measurement registers of one TD, from one boot to the next. Pure.

They refuse what a guest's kernel refuses, with the same errno, so that what runs on the
simulator finds no door that hardware does not have.
"""

from __future__ import annotations

import errno

from supervisor.formats.event_log import ZERO_REGISTER, extend

RTMR_COUNT = 4
REGISTER_BYTES = 48
# RTMR 0 and 1 belong to firmware and boot loader; drivers answer EPERM to a guest's extend.
GUEST_RTMRS = (2, 3)


class RegisterFile:
    """MRTD, given at creation, and RTMR 0 to 3, which begin at zero and can only be extended."""

    def __init__(self, *, mr_td: bytes) -> None:
        self._mr_td = mr_td
        self._rtmrs = [ZERO_REGISTER] * RTMR_COUNT

    @property
    def mr_td(self) -> bytes:
        """48 bytes."""
        return self._mr_td

    @property
    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        """RTMR 0 to 3, 48 bytes each."""
        first, second, third, fourth = self._rtmrs
        return first, second, third, fourth

    def read(self, rtmr_index: int) -> bytes:
        """48 bytes. Raises `OSError` (ENOENT) for a register that is not there."""
        if not 0 <= rtmr_index < RTMR_COUNT:
            raise OSError(errno.ENOENT, f"there is no RTMR {rtmr_index}")
        return self._rtmrs[rtmr_index]

    def extend(self, rtmr_index: int, digest_sha384: bytes) -> None:
        """What the guest may do: extend RTMR 2 or 3 with exactly 48 bytes.

        Raises `OSError`: ENOENT for an unknown register, EPERM for RTMR 0 and 1, EINVAL for
        another length. A refused extend changes nothing.
        """
        self.read(rtmr_index)
        if rtmr_index not in GUEST_RTMRS:
            raise OSError(errno.EPERM, f"RTMR {rtmr_index} is extended at boot only")
        self.extend_at_boot(rtmr_index, digest_sha384)

    def extend_at_boot(self, rtmr_index: int, digest_sha384: bytes) -> None:
        """What firmware and boot loader may do: extend any RTMR. Raises as `extend`."""
        if len(digest_sha384) != REGISTER_BYTES:
            raise OSError(
                errno.EINVAL, f"a register is extended with 48 bytes, not {len(digest_sha384)}"
            )
        self._rtmrs[rtmr_index] = extend(self.read(rtmr_index), digest_sha384)
