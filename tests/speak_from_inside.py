"""Says one thing to a socket from inside a container: `PID PATH`, the bytes on stdin.

Run as a program of its own by tests: it enters the namespaces of the container's first
process, and so sees its files and has its (lack of) rights, and prints what is answered.
Exit status 3 with the error's name on stderr when there is nobody to speak to.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys

CLONE_NEWUSER = 0x10000000
CLONE_NEWNS = 0x00020000


def main() -> int:
    pid, path = int(sys.argv[1]), sys.argv[2]
    said = sys.stdin.buffer.read()
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.pidfd_open(pid)
    if libc.setns(namespace, CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "setns")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(path)
        except OSError as error:
            sys.stderr.write(errno.errorcode[error.errno or 0])
            return 3
        connection.sendall(said)
        while chunk := connection.recv(65536):
            sys.stdout.buffer.write(chunk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
