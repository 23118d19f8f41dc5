"""The program that is started: the first thing it does is to ask for the time.

It writes that time to its standard output and then waits for ever. A static ELF file made
of instructions, like the shim's: an interpreter or a dynamic loader would do a lot before
the first instruction that can ask. CLOCK_MONOTONIC is the machine's, whoever reads it.
"""

from __future__ import annotations

import platform
import struct

from benchmarks.figures import CannotMeasure
from supervisor.formats.elf import ELF_MACHINES, elf_file, instructions

X86_64 = """
bf 01 00 00 00                  mov   edi, 1                     # clock_gettime(MONOTONIC, sp)
48 83 ec 40                     sub   rsp, 64
48 89 e6                        mov   rsi, rsp
b8 e4 00 00 00                  mov   eax, 228
0f 05                           syscall
31 c9                           xor   ecx, ecx                   # its 16 bytes as letters
                        next:
0f b6 04 0c                     movzx eax, byte ptr [rsp + rcx]
89 c2                           mov   edx, eax
c1 e8 04                        shr   eax, 4
83 e2 0f                        and   edx, 15
83 c0 61                        add   eax, 97
83 c2 61                        add   edx, 97
88 44 4c 10                     mov   byte ptr [rsp + 2*rcx + 16], al
88 54 4c 11                     mov   byte ptr [rsp + 2*rcx + 17], dl
ff c1                           inc   ecx
83 f9 10                        cmp   ecx, 16
75 df                           jne   next
c6 44 24 30 0a                  mov   byte ptr [rsp + 48], 10    # and a newline
bf 01 00 00 00                  mov   edi, 1                     # write(1, letters, 33)
48 8d 74 24 10                  lea   rsi, [rsp + 16]
ba 21 00 00 00                  mov   edx, 33
b8 01 00 00 00                  mov   eax, 1
0f 05                           syscall
                        wait:
31 ff                           xor   edi, edi                   # ppoll(0, 0, 0, 0)
31 f6                           xor   esi, esi
31 d2                           xor   edx, edx
45 31 d2                        xor   r10d, r10d
b8 0f 01 00 00                  mov   eax, 271
0f 05                           syscall
eb ee                           jmp   wait
"""

AARCH64 = """
ff 03 01 d1                     sub   sp, sp, #64                // clock_gettime(MONOTONIC, sp)
20 00 80 52                     mov   w0, #1
e1 03 00 91                     mov   x1, sp
28 0e 80 52                     mov   w8, #113
01 00 00 d4                     svc   #0
f3 43 00 91                     add   x19, sp, #16               // its 16 bytes as letters
09 00 80 52                     mov   w9, #0
                        next:
ea 6b 69 38                     ldrb  w10, [sp, x9]
4b 7d 04 53                     lsr   w11, w10, #4
4a 0d 00 12                     and   w10, w10, #15
6b 85 01 11                     add   w11, w11, #97
4a 85 01 11                     add   w10, w10, #97
6b 16 00 38                     strb  w11, [x19], #1
6a 16 00 38                     strb  w10, [x19], #1
29 05 00 11                     add   w9, w9, #1
3f 41 00 71                     cmp   w9, #16
e1 fe ff 54                     b.ne  next
4a 01 80 52                     mov   w10, #10                   // and a newline
6a 02 00 39                     strb  w10, [x19]
20 00 80 52                     mov   w0, #1                     // write(1, letters, 33)
e1 43 00 91                     add   x1, sp, #16
22 04 80 52                     mov   w2, #33
08 08 80 52                     mov   w8, #64
01 00 00 d4                     svc   #0
                        wait:
00 00 80 d2                     mov   x0, #0                     // ppoll(0, 0, 0, 0)
01 00 80 d2                     mov   x1, #0
02 00 80 d2                     mov   x2, #0
03 00 80 d2                     mov   x3, #0
28 09 80 52                     mov   w8, #73
01 00 00 d4                     svc   #0
fa ff ff 17                     b     wait
"""

LISTINGS = {"x86_64": X86_64, "aarch64": AARCH64}
_TIMESPEC = struct.Struct("<qq")
_FIRST_LETTER = ord("a")


def clock_program() -> bytes:
    """The ELF file for this machine. Raises `CannotMeasure` where there is none."""
    machine = platform.machine()
    if machine not in LISTINGS:
        raise CannotMeasure(f"there is no program for {machine}")
    return elf_file(ELF_MACHINES[machine], instructions(LISTINGS[machine]))


def time_in(line: bytes) -> float:
    """What the program wrote -> seconds, as `time.monotonic()` counts them.

    Raises `CannotMeasure` for anything else.
    """
    letters = line.strip()
    digits = [letter - _FIRST_LETTER for letter in letters]
    if len(digits) != 2 * _TIMESPEC.size or not all(0 <= digit < 16 for digit in digits):
        raise CannotMeasure(f"the program wrote no time: {line[:200]!r}")
    raw = bytes(high << 4 | low for high, low in zip(digits[::2], digits[1::2], strict=True))
    seconds, nanoseconds = _TIMESPEC.unpack(raw)
    return float(seconds + nanoseconds / 1e9)
