"""One software TD: registers, reports and quotes, from one boot to the next. No I/O.

Its methods are synchronous and raise `OSError` with the errno that hardware or its driver
would give, so that between two requests it is always whole.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import secrets
from dataclasses import dataclass

import msgspec

from plugins.tdx_sim import firmware
from plugins.tdx_sim import platform_identity as identity
from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.pki import SimPki
from plugins.tdx_sim.quoting import QuotingEnclave
from plugins.tdx_sim.registers import RegisterFile
from plugins.tdx_sim.wire import Description, QuoteVersion
from supervisor.formats.td_report import TdReport, pack_td_report

REPORT_DATA_BYTES = 64
# TDREPORT's MAC covers REPORTMACSTRUCT up to the MAC itself (Intel TDX module ABI).
_REPORT_MACED_BYTES = 224
# TEE_TCB_INFO.VALID as TDX 1.5 modules give it: each field there is, TEE_TCB_SVN2 included.
_TCB_INFO_VALID = 0x301FF.to_bytes(8, "little")


@dataclass(frozen=True, kw_only=True)
class _Boot:
    """Everything that begins anew with a boot."""

    number: int
    base_image: BaseImage
    registers: RegisterFile
    boot_log: bytes
    quoting_enclave: QuotingEnclave
    report_key: bytes


@dataclass(frozen=True, kw_only=True)
class PendingQuote:
    """A quote whose contents are fixed and which is not signed yet."""

    boot_number: int
    version: QuoteVersion
    report: TdReport


class SoftwareTd:
    """A TD that boots when it is made."""

    def __init__(self, pki: SimPki, base_image: BaseImage) -> None:
        self._pki = pki
        self._boot = _boot(pki, base_image, number=1)

    def boot(self, base_image: BaseImage | None = None) -> None:
        """Registers begin at zero and firmware measures itself; a new attestation key.

        Without `base_image` the same one is booted again.
        """
        before = self._boot
        self._boot = _boot(self._pki, base_image or before.base_image, number=before.number + 1)

    @property
    def registers(self) -> RegisterFile:
        """Of the present boot: do not keep it."""
        return self._boot.registers

    @property
    def boot_log(self) -> bytes:
        """CCEL, without filler."""
        return self._boot.boot_log

    def describe(self) -> Description:
        """The present state, for people."""
        boot = self._boot
        first, second, third, fourth = (rtmr.hex() for rtmr in boot.registers.rtmrs)
        return Description(
            boots=boot.number,
            base_image=boot.base_image,
            mr_td=boot.registers.mr_td.hex(),
            rtmrs=(first, second, third, fourth),
            td_attributes=identity.TD_ATTRIBUTES.hex(),
            xfam=identity.XFAM.hex(),
            root_certificate_sha256=hashlib.sha256(self._pki.root_der).hexdigest(),
        )

    def td_report(self, report_data: bytes) -> bytes:
        """A TDREPORT, 1,024 bytes. Raises `OSError` (EINVAL) unless `report_data` has 64."""
        report = self._report(report_data)
        packed = pack_td_report(report)
        mac = hmac.digest(self._boot.report_key, packed[:_REPORT_MACED_BYTES], hashlib.sha256)
        return pack_td_report(msgspec.structs.replace(report, mac=mac))

    def begin_quote(self, report_data: bytes, version: QuoteVersion) -> PendingQuote:
        """Take what a quote will say. Raises `OSError` (EINVAL) unless there are 64 bytes."""
        report = self._report(report_data)
        return PendingQuote(boot_number=self._boot.number, version=version, report=report)

    def finish_quote(self, pending: PendingQuote) -> bytes:
        """Sign it: v4 with a TD 1.0 body, v5 with a TD 1.5 body.

        Raises `OSError` (EIO) if the TD was booted since: the old TD's quote died with it.
        """
        if pending.boot_number != self._boot.number:
            raise OSError(errno.EIO, "the TD was booted while the quote was made")
        return self._boot.quoting_enclave.quote(pending.report, version=pending.version)

    def _report(self, report_data: bytes) -> TdReport:
        if len(report_data) != REPORT_DATA_BYTES:
            raise OSError(errno.EINVAL, f"REPORTDATA has 64 bytes, not {len(report_data)}")
        registers = self._boot.registers
        return TdReport(
            version=1,
            cpu_svn=identity.CPU_SVN,
            report_data=report_data,
            mac=bytes(32),
            valid=_TCB_INFO_VALID,
            tee_tcb_svn=identity.TEE_TCB_SVN,
            mr_seam=identity.MR_SEAM,
            mr_signer_seam=identity.MR_SIGNER_SEAM,
            seam_attributes=identity.SEAM_ATTRIBUTES,
            # The module that was launched is the one that runs: it was never updated live.
            tee_tcb_svn2=identity.TEE_TCB_SVN,
            td_attributes=identity.TD_ATTRIBUTES,
            xfam=identity.XFAM,
            mr_td=registers.mr_td,
            mr_config_id=identity.MR_CONFIG_ID,
            mr_owner=identity.MR_OWNER,
            mr_owner_config=identity.MR_OWNER_CONFIG,
            rtmrs=registers.rtmrs,
            servtd_hash=bytes(48),
        )


def _boot(pki: SimPki, base_image: BaseImage, *, number: int) -> _Boot:
    registers = RegisterFile(mr_td=firmware.mr_td(base_image))
    events = firmware.boot_events(base_image)
    for event in events:
        registers.extend_at_boot(event.rtmr_index, event.digest_sha384)
    return _Boot(
        number=number,
        base_image=base_image,
        registers=registers,
        boot_log=firmware.event_log(events),
        quoting_enclave=QuotingEnclave(pki),
        report_key=secrets.token_bytes(32),
    )
