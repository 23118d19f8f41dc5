"""A program that means ill: what it tries, a line `WAY<tab>OUTCOME` each on standard output.

Its arguments are sockets of the machine to reach out for. It is no part of a layer: eve's
manifest has it as the argument of the interpreter, so the measurement log shows all of it.
"""

from __future__ import annotations

import ctypes
import errno
import http.client
import os
import socket
import stat
import sys
import time
from collections.abc import Callable
from functools import partial

REGISTER = "/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384"
OWN_SOCKET = "/run/acon.sock"


def tell(way: str, attempt: Callable[[], object]) -> None:
    try:
        outcome = str(attempt() or "reached")
    except OSError as error:
        outcome = errno.errorcode.get(error.errno or 0, "unknown")
    print(f"{way}\t{outcome}", flush=True)


def write(path: str) -> None:
    # Not made if it is missing: that would be a file of its own in a tmpfs of its own.
    os.write(os.open(path, os.O_WRONLY), bytes(48))


def mount(kind: str) -> None:
    c = ctypes.CDLL(None, use_errno=True)
    if c.mount(b"none", b"/tmp", kind.encode(), 0, None):
        raise OSError(ctypes.get_errno(), kind)


def connect(path: str) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(30)
    connected.connect(path)
    return connected


def order(path: str) -> str:
    """A call of the management API, on the one socket that there is. Returns its status."""
    connection = http.client.HTTPConnection("supervisor")
    connection.sock = connect(OWN_SOCKET)
    connection.request("POST", path, "{}")
    return str(connection.getresponse().status)


def main(sockets: list[str]) -> None:
    for path in (REGISTER, f"/proc/1/root/{REGISTER}", "/dev/tdx_guest", "/dev/mem"):
        tell("register", partial(write, path))
    for kind in ("sysfs", "configfs"):
        tell("register", partial(mount, kind))
    tell("register", partial(os.mknod, "/tmp/mem", stat.S_IFCHR, os.makedev(1, 1)))
    for path in sockets:
        tell("management", partial(connect, path))
    for path in ("/api/v2/seal", "/api/v2/images", "/api/v2/containers"):
        tell("management", partial(order, path))
    print("that is all", flush=True)
    time.sleep(3600)


main(sys.argv[1:])
