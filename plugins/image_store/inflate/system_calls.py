"""The system calls that inflating needs, as a filter for the kernel (seccomp(2)).

Thirty instructions of classic BPF instead of libseccomp: the list is short and never
changes, and a library would be one more that must be trusted, and found on every system.
Numbers: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h;
structures: include/uapi/linux/{filter,seccomp,audit}.h.
"""

from __future__ import annotations

import struct

_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
_KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS

# struct seccomp_data; little-endian, so an argument's low word comes first.
_NUMBER_AT = 0
_ARCHITECTURE_AT = 4
_ARGUMENTS_AT = 16

_PROT_EXEC = 4
_STDIN = 0
_STDOUT, _STDERR = 1, 2


class Calls:
    """One architecture's numbers. `others`: memory, waiting, the end, the way out of signals."""

    def __init__(
        self,
        *,
        audit_architecture: int,
        read: int,
        write: int,
        mmap: int,
        mprotect: int,
        others: tuple[int, ...],
    ) -> None:
        self.audit_architecture = audit_architecture
        self.read = read
        self.write = write
        self.mmap = mmap
        self.mprotect = mprotect
        self.others = others


# By `os.uname().machine`. Others: munmap, brk, rt_sigreturn, mremap, madvise, exit, futex,
# restart_syscall, exit_group.
CALLS = {
    "x86_64": Calls(
        audit_architecture=0xC000003E,
        read=0,
        write=1,
        mmap=9,
        mprotect=10,
        others=(11, 12, 15, 25, 28, 60, 202, 219, 231),
    ),
    "aarch64": Calls(
        audit_architecture=0xC00000B7,
        read=63,
        write=64,
        mmap=222,
        mprotect=226,
        others=(215, 214, 139, 216, 233, 93, 98, 128, 94),
    ),
}


def filter_program(calls: Calls) -> bytes:
    """An array of `struct sock_filter`, 8 bytes each: whatever it does not name kills.

    Reading is allowed from standard input alone, writing to standard output and error;
    no memory can become executable.
    """
    program = [
        _load(_ARCHITECTURE_AT),
        _instruction(_JUMP_EQUAL, calls.audit_architecture, if_true=1),
        _return(_KILL),
        _load(_NUMBER_AT),
    ]
    for number in calls.others:
        program += _only_for(number, [_return(_ALLOW)])
    for number, descriptors in ((calls.read, (_STDIN,)), (calls.write, (_STDOUT, _STDERR))):
        checks = [_load(_ARGUMENTS_AT)]
        for descriptor in descriptors:
            checks += _only_for(descriptor, [_return(_ALLOW)])
        program += _only_for(number, [*checks, _return(_KILL)])
    for number in (calls.mmap, calls.mprotect):
        program += _only_for(
            number,
            [
                _load(_ARGUMENTS_AT + 2 * 8),
                _instruction(_JUMP_ANY_BIT, _PROT_EXEC, if_true=1),
                _return(_ALLOW),
                _return(_KILL),
            ],
        )
    return b"".join([*program, _return(_KILL)])


def _only_for(value: int, block: list[bytes]) -> list[bytes]:
    return [_instruction(_JUMP_EQUAL, value, if_false=len(block)), *block]


def _load(offset: int) -> bytes:
    return _instruction(_LOAD_WORD, offset)


def _return(action: int) -> bytes:
    return _instruction(_RETURN, action)


def _instruction(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
