"""What the kernel counts for all containers as one user, and would bound for all together.

Some things are counted for a user namespace's owner as well, who is root for all containers
(user_namespaces(7), setrlimit(2): RLIMIT_MSGQUEUE, RLIMIT_SIGPENDING; inotify(7)). With the
usual bounds the first container that takes all of them leaves none for its neighbours, nor
for the machine's root. All of these live in memory that counts on the control group of who
took them (and of queues there are `fs.mqueue.queues_max` in a container's own namespace),
so a container's memory limit is the bound that is its own. The others are lifted.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# getrlimit's kinds, which Python has no names for (asm-generic/resource.h).
RLIMIT_SIGPENDING = 11
RLIMIT_MSGQUEUE = 12
RLIMITS = (RLIMIT_SIGPENDING, RLIMIT_MSGQUEUE)
INOTIFY = Path("/proc/sys/fs/inotify")
SYSCTLS = ("max_user_instances", "max_user_watches")
MOST = 2**31 - 1


@contextmanager
def common_quotas_lifted() -> Iterator[None]:
    """For as long as the block lasts: of this process (whose rlimits containers and their
    user namespaces inherit) and of the machine. What may not be lifted stays."""
    rlimits = {kind: resource.getrlimit(kind) for kind in RLIMITS}
    sysctls = {}
    with suppress(OSError):
        for name in SYSCTLS:
            before = (INOTIFY / name).read_text(encoding="ascii")
            if int(before) < MOST:
                (INOTIFY / name).write_text(str(MOST), encoding="ascii")
                sysctls[name] = before
    for kind in RLIMITS:
        # ValueError: only with CAP_SYS_RESOURCE.
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        for kind, limits in rlimits.items():
            with suppress(OSError, ValueError):
                resource.setrlimit(kind, limits)
        for name, before in sysctls.items():
            with suppress(OSError):
                (INOTIFY / name).write_text(before, encoding="ascii")
