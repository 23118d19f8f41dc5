"""What the simulated platform says it is: the values that quote, PCK certificate and
collateral must agree on.

None of them is Intel's: the measurements are hashes of sentences that say SIMULATION,
the FMSPC spells `SIM`. Only identifiers that verifiers insist on (the QE vendor, the
product id of the TD quoting enclave, a signer of zeros for the TDX module) are genuine.
"""

from __future__ import annotations

import hashlib

from supervisor.formats.digest import sha384

# --- platform: SGX extension of the PCK certificate, TCB info ------------------------------

FMSPC = b"SIM\0\0\0"  # 6 bytes
PCE_ID = bytes(2)
SGX_TCB_COMPONENTS = bytes([3, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0])  # 16 SVNs
PCE_SVN = 11
CPU_SVN = SGX_TCB_COMPONENTS  # as on real platforms, 16 bytes

# --- TDX module ----------------------------------------------------------------------------

TDX_MODULE_MAJOR = 1  # selects `TDX_01` among the module identities
TDX_MODULE_ISV_SVN = 5
TEE_TCB_SVN = bytes([TDX_MODULE_ISV_SVN, TDX_MODULE_MAJOR, 2, *bytes(13)])  # 16 bytes
MR_SEAM = sha384(b"SIMULATION: TDX module 1.5")
MR_SIGNER_SEAM = bytes(48)  # zeros are how Intel's own module is written
SEAM_ATTRIBUTES = bytes(8)

# --- TD ------------------------------------------------------------------------------------

SEPT_VE_DISABLE = 1 << 28  # an honest TD has no other attribute (tdx.md §1, TD attributes)
TD_ATTRIBUTES = SEPT_VE_DISABLE.to_bytes(8, "little")
XFAM = 0xE7.to_bytes(8, "little")  # x87, SSE, AVX, AVX-512: holds 0x3, within 0x6DBE7
# Chosen by the host on hardware. Not zero, so that nobody mistakes one field for another.
MR_CONFIG_ID = sha384(b"SIMULATION: MRCONFIGID")
MR_OWNER = sha384(b"SIMULATION: MROWNER")
MR_OWNER_CONFIG = sha384(b"SIMULATION: MROWNERCONFIG")

# --- quoting enclave: QE report, QE identity -----------------------------------------------

QE_MR_ENCLAVE = hashlib.sha256(b"SIMULATION: TD quoting enclave").digest()
QE_MR_SIGNER = hashlib.sha256(b"SIMULATION: signer of the TD quoting enclave").digest()
QE_MISC_SELECT = 0
QE_ATTRIBUTES = bytes([0x11, *bytes(7), 0xE7, *bytes(7)])  # INIT | PROVISION_KEY; XFRM, 16 bytes
QE_ISV_PROD_ID = 2  # the TD quoting enclave
QE_ISV_SVN = 4
