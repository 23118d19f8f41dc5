"""Reaps what a runtime leaves to us beside the container: helpers whose parent did not wait.

crun 1.8 forks one for each run, in the session that becomes the container's, and ends
before it. We are the subreaper, so it would stay a zombie for as long as we live.
"""

from __future__ import annotations

import os
from contextlib import suppress

import trio

from plugins.oci_runtime.processes import adopted_children, is_dead

PERIOD_S = 10.0


async def reap_orphans_for_ever() -> None:
    """Now and then, until cancelled."""
    while True:
        await trio.sleep(PERIOD_S)
        await trio.to_thread.run_sync(reap_orphans)


def reap_orphans() -> set[int]:
    """Reap dead children that nobody waits for; returns who it was. Blocks.

    Whoever is waited for here leads a process group (runtimes, first processes, invoked
    commands), and what others in this process started is in our own session.
    """
    reaped = set()
    for pid in adopted_children():
        with suppress(OSError):
            if is_dead(pid) and os.getpgid(pid) != pid and os.getsid(pid) != os.getsid(0):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
                reaped.add(pid)
    return reaped
