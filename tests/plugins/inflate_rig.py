"""Processes confined as the inflate worker is, and the children that a test may not leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from plugins.image_store.inflate import worker

STORE = Path(worker.__file__).parent.parent
# Prepares what the actions need, confines itself as told, tries, and says how it went.
PROBE = """
import sys, types
folder, how, action, uid = sys.argv[1:]
for name in ("plugins", "plugins.image_store"):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [folder]
import ctypes, errno, mmap, os, signal, socket, time
from plugins.image_store.inflate import confinement
parent, libc = os.getppid(), ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
inherited = os.open("/", os.O_RDONLY)
code = compile(action, "action", "exec")
if int(uid):
    os.setresuid(int(uid), int(uid), int(uid))
getattr(confinement, how)()
try:
    exec(code)
except OSError as error:
    os.write(1, errno.errorcode[error.errno].encode())
except MemoryError:
    os.write(1, b"MemoryError")
else:
    os.write(1, b"done")
os._exit(0)
"""


def attempt(action: str, *, how: str = "confine", uid: int = 0) -> tuple[int, str]:
    """Exit status (negative: a signal) and what came of `action` in a confined process."""
    python = [sys.executable, "-I", "-S", "-c", PROBE]
    ended = subprocess.run(
        [*python, str(STORE), how, action, str(uid)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        env={},
    )
    return ended.returncode, ended.stdout + ended.stderr


def children() -> set[int]:
    """This process's children, zombies too."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            found |= set(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
        except FileNotFoundError:
            continue
    return found


def pipes() -> int:
    """Ends of pipes that this process holds."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
        except FileNotFoundError:
            continue
    return count
