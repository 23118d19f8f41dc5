"""The program that stands between an OCI runtime and a container's own: its instructions.

A runtime adds to the environment (`HOME`), drops what is doubled in it, and searches the
program; it makes a working directory that is missing (runc), or is led out of the container
by one (CVE-2024-21626); it can hand down descriptors only without gaps; it leaves a command
that it runs in a container the umask of its caller (runc 1.1) and the limit on open files
that it raised for itself (Go 1.19); and it is done before the program runs.
So what it is asked to run is a program of ours that has everything else in it: one static
ELF file, made anew for each start, which

1. sets the umask 0077 and the limit on open files (where that is refused it stays);
2. tells its status descriptor that it runs (four bytes of 0; the kernel adds its pid);
3. closes what the container's program must not have;
4. has the kernel close the status descriptor when the program begins;
5. goes to the working directory;
6. calls execve(2) with exactly the given path, arguments and environment: no search;
7. if that returns: tells the errno (four bytes; below zero: of 5), and exits with 127.

There is no compiler where the supervisor runs, so these are instructions. Each listing has
the bytes on the left and, on the right, the assembly that `llvm-mc` makes them of; a test
does that again wherever it is installed. Calls: syscall(2); x86-64 takes number and
arguments in rax, rdi, rsi, rdx; aarch64 in x8, x0, x1, x2.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from supervisor import ConfigError
from supervisor.formats.elf import CODE_ADDRESS, ELF_MACHINES, elf_file, instructions

# One bit for each descriptor that is kept: 63 is the last that can be.
MAX_KEPT_FD = 63
FIRST_FREE_FD = 3

X86_64 = """
48 8d 1d b4 00 00 00            lea   rbx, [rip + params]
44 8b 63 08                     mov   r12d, dword ptr [rbx + 8]  # the status descriptor
bf 3f 00 00 00                  mov   edi, 63                    # 1. umask(0077)
b8 5f 00 00 00                  mov   eax, 95
0f 05                           syscall
bf 07 00 00 00                  mov   edi, 7                     #    setrlimit(RLIMIT_NOFILE,
48 8d 73 30                     lea   rsi, [rbx + 48]            #              limits)
b8 a0 00 00 00                  mov   eax, 160
0f 05                           syscall
6a 00                           push  0                          # 2. write(status, 0, 4)
44 89 e7                        mov   edi, r12d
48 89 e6                        mov   rsi, rsp
ba 04 00 00 00                  mov   edx, 4
b8 01 00 00 00                  mov   eax, 1
0f 05                           syscall
83 f8 04                        cmp   eax, 4                     # nobody waits any more
75 6f                           jne   exit
4c 8b 2b                        mov   r13, qword ptr [rbx]       # 3. from 3 up to the status:
bd 03 00 00 00                  mov   ebp, 3
                        next:
44 39 e5                        cmp   ebp, r12d
73 13                           jae   mark
49 0f a3 ed                     bt    r13, rbp                   # its bit says "kept", or
72 09                           jb    kept
89 ef                           mov   edi, ebp                   # close(descriptor)
b8 03 00 00 00                  mov   eax, 3
0f 05                           syscall
                        kept:
ff c5                           inc   ebp
eb e8                           jmp   next
                        mark:
44 89 e7                        mov   edi, r12d                  # 4. fcntl(status, F_SETFD,
be 02 00 00 00                  mov   esi, 2                     #          FD_CLOEXEC)
ba 01 00 00 00                  mov   edx, 1
b8 48 00 00 00                  mov   eax, 72
0f 05                           syscall
85 c0                           test  eax, eax
75 22                           jne   report
48 8b 7b 28                     mov   rdi, qword ptr [rbx + 40]  # 5. chdir(working directory)
b8 50 00 00 00                  mov   eax, 80
0f 05                           syscall
85 c0                           test  eax, eax
75 15                           jne   tell
48 8b 7b 10                     mov   rdi, qword ptr [rbx + 16]  # 6. execve(path, argv,
48 8b 73 18                     mov   rsi, qword ptr [rbx + 24]  #           environment)
48 8b 53 20                     mov   rdx, qword ptr [rbx + 32]
b8 3b 00 00 00                  mov   eax, 59
0f 05                           syscall
                        report:
f7 d8                           neg   eax                        # 7. write(status, errno, 4)
                        tell:
50                              push  rax
44 89 e7                        mov   edi, r12d
48 89 e6                        mov   rsi, rsp
ba 04 00 00 00                  mov   edx, 4
b8 01 00 00 00                  mov   eax, 1
0f 05                           syscall
                        exit:
bf 7f 00 00 00                  mov   edi, 127                   # exit_group(127)
b8 e7 00 00 00                  mov   eax, 231
0f 05                           syscall
                        params:
"""

AARCH64 = """
93 06 00 10                     adr   x19, params
74 0a 40 b9                     ldr   w20, [x19, #8]             // the status descriptor
e0 07 80 52                     mov   w0, #63                    // 1. umask(0077)
c8 14 80 52                     mov   w8, #166
01 00 00 d4                     svc   #0
e0 00 80 52                     mov   w0, #7                     //    setrlimit(RLIMIT_NOFILE,
61 c2 00 91                     add   x1, x19, #48               //              limits)
88 14 80 52                     mov   w8, #164
01 00 00 d4                     svc   #0
ff 0f 1f f8                     str   xzr, [sp, #-16]!           // 2. write(status, 0, 4)
e0 03 14 2a                     mov   w0, w20
e1 03 00 91                     mov   x1, sp
82 00 80 52                     mov   w2, #4
08 08 80 52                     mov   w8, #64
01 00 00 d4                     svc   #0
1f 10 00 f1                     cmp   x0, #4                     // nobody waits any more
21 04 00 54                     b.ne  exit
75 02 40 f9                     ldr   x21, [x19]                 // 3. from 3 up to the status:
76 00 80 52                     mov   w22, #3
                        next:
df 02 14 6b                     cmp   w22, w20
02 01 00 54                     b.hs  mark
a0 26 d6 9a                     lsr   x0, x21, x22               // its bit says "kept", or
80 00 00 37                     tbnz  w0, #0, kept
e0 03 16 2a                     mov   w0, w22                    // close(descriptor)
28 07 80 52                     mov   w8, #57
01 00 00 d4                     svc   #0
                        kept:
d6 06 00 11                     add   w22, w22, #1
f8 ff ff 17                     b     next
                        mark:
e0 03 14 2a                     mov   w0, w20                    // 4. fcntl(status, F_SETFD,
41 00 80 52                     mov   w1, #2                     //          FD_CLOEXEC)
22 00 80 52                     mov   w2, #1
28 03 80 52                     mov   w8, #25
01 00 00 d4                     svc   #0
20 01 00 35                     cbnz  w0, report
60 16 40 f9                     ldr   x0, [x19, #40]             // 5. chdir(working directory)
28 06 80 52                     mov   w8, #49
01 00 00 d4                     svc   #0
c0 00 00 35                     cbnz  w0, tell
60 06 41 a9                     ldp   x0, x1, [x19, #16]         // 6. execve(path, argv,
62 12 40 f9                     ldr   x2, [x19, #32]             //           environment)
a8 1b 80 52                     mov   w8, #221
01 00 00 d4                     svc   #0
                        report:
e0 03 00 4b                     neg   w0, w0                     // 7. write(status, errno, 4)
                        tell:
e0 03 00 b9                     str   w0, [sp]
e0 03 14 2a                     mov   w0, w20
e1 03 00 91                     mov   x1, sp
82 00 80 52                     mov   w2, #4
08 08 80 52                     mov   w8, #64
01 00 00 d4                     svc   #0
                        exit:
e0 0f 80 52                     mov   w0, #127                   // exit_group(127)
c8 0b 80 52                     mov   w8, #94
01 00 00 d4                     svc   #0
                        params:
"""

LISTINGS = {"x86_64": X86_64, "aarch64": AARCH64}
# What the instructions find at `params`: a bit for each descriptor to keep, the status
# descriptor, the addresses of path, arguments, environment and working directory, and the
# soft and hard limit on open files.
_PARAMS = struct.Struct("<QQQQQQQQ")
_POINTER = struct.Struct("<Q")


def shim_program(
    machine: str,
    *,
    argv: Sequence[str],
    environment: Sequence[str],
    working_dir: str,
    open_files: tuple[int, int],
    kept_fds: frozenset[int],
    status_fd: int,
) -> bytes:
    """The ELF file; `argv[0]` is the path, `kept_fds` are between 3 and MAX_KEPT_FD,
    `open_files` is the soft and the hard limit.

    Every descriptor from 3 to `status_fd` that is not kept is closed. Raises `ConfigError`
    for another machine, `ValueError` for what no execve(2) can be given.
    """
    if machine not in LISTINGS:
        raise ConfigError(
            "container runtime",
            "can be used on this machine",
            expected=", ".join(LISTINGS),
            actual=machine,
        )
    if not argv:
        raise ValueError("a program without arguments has no path")
    if kept_fds and not FIRST_FREE_FD <= min(kept_fds) <= max(kept_fds) <= MAX_KEPT_FD:
        raise ValueError(f"descriptors outside {FIRST_FREE_FD} to {MAX_KEPT_FD} cannot be kept")
    code = instructions(LISTINGS[machine])
    params_at = CODE_ADDRESS + len(code)
    argv_at = params_at + _PARAMS.size
    environment_at = argv_at + _POINTER.size * (len(argv) + 1)
    text_at = environment_at + _POINTER.size * (len(environment) + 1)
    pointers, text = bytearray(), bytearray()
    for words in (argv, environment):
        for word in words:
            pointers += _POINTER.pack(text_at + len(text))
            text += _terminated(word)
        pointers += _POINTER.pack(0)
    working_dir_at = text_at + len(text)
    text += _terminated(working_dir)
    mask = sum(1 << fd for fd in kept_fds)
    params = _PARAMS.pack(
        mask, status_fd, text_at, argv_at, environment_at, working_dir_at, *open_files
    )
    return elf_file(ELF_MACHINES[machine], code + params + bytes(pointers + text))


def _terminated(word: str) -> bytes:
    encoded = word.encode()
    if b"\0" in encoded:
        raise ValueError("a word with a NUL in it would be cut there")
    return encoded + b"\0"
