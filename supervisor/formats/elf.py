"""The smallest executable files that Linux runs, for the programs that we bring along."""

from __future__ import annotations

import struct

BASE_ADDRESS = 0x400000
BYTES_COLUMN = 24
HEADER_BYTES = 64
SEGMENT_BYTES = 56
# Where the code lies once the program is loaded.
CODE_ADDRESS = BASE_ADDRESS + HEADER_BYTES + SEGMENT_BYTES

# platform.machine() -> ELF's own number for it
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def elf_file(elf_machine: int, code: bytes) -> bytes:
    """An ELF64 executable (object file format 1.5) of one segment: header, then `code`.

    It is loaded at CODE_ADDRESS, readable and executable, and begins with its first byte.
    """
    file_size = HEADER_BYTES + SEGMENT_BYTES + len(code)
    identification = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identification + struct.pack(
        "<HHIQQQIHHHHHH",
        *(2, elf_machine, 1, CODE_ADDRESS, HEADER_BYTES, 0, 0),
        *(HEADER_BYTES, SEGMENT_BYTES, 1, 0, 0, 0),
    )
    readable_and_executable = 5
    segment = struct.pack(
        "<IIQQQQQQ",
        *(1, readable_and_executable, 0, BASE_ADDRESS, BASE_ADDRESS),
        *(file_size, file_size, 0x1000),
    )
    return header + segment + code


def instructions(listing: str) -> bytes:
    """The bytes of a listing: hex in its first 24 columns, what an assembler reads after them."""
    return b"".join(bytes.fromhex(line[:BYTES_COLUMN]) for line in listing.splitlines())
