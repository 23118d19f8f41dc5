"""How much of the machine one container may take, in the words of an OCI configuration.

Protection of neighbours, not policy: nothing here is a promise to anyone who verifies.
Names and meanings: OCI runtime specification 1.1, "Control groups" (config-linux.md).
"""

from __future__ import annotations

import os

import msgspec

MEBIBYTE = 1024 * 1024
CPU_PERIOD_US = 100_000
# The kernel's own default, said so that no runtime's can differ: neighbours weigh the same.
CPU_SHARES = 1024
# Not a controller but a part of one that kernels can be built or booted without.
SWAP_ACCOUNTING = "memory.swap"

_PROTECTS = {
    "cpu": "the processor time",
    "memory": "the memory",
    "pids": "the number of processes",
    SWAP_ACCOUNTING: "what is swapped out (to zram)",
}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one container. `cpu_percent`: 100 is one core; None: as much as neighbours leave."""

    memory_bytes: int
    cpu_percent: int | None
    pids: int


def limits_for(
    *,
    memory_limit_mib: int | None,
    cpu_limit_percent: int | None,
    pids_limit: int,
    machine_memory_bytes: int,
) -> Limits:
    """The limits that the configuration means; no `memory_limit_mib`: half of the machine's."""
    if memory_limit_mib is None:
        memory_bytes = machine_memory_bytes // 2
    else:
        memory_bytes = memory_limit_mib * MEBIBYTE
    return Limits(memory_bytes=memory_bytes, cpu_percent=cpu_limit_percent, pids=pids_limit)


def machine_memory_bytes() -> int:
    """What sysinfo(2) calls totalram; does not block."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resources(limits: Limits, controllers: frozenset[str]) -> dict[str, object]:
    """Members for `linux.resources` (not its `devices`), for the controllers that exist.

    A runtime refuses a container with a limit that it cannot set. `controllers` is
    `ControlGroups.controllers`.
    """
    found: dict[str, object] = {}
    if "memory" in controllers:
        memory = {"limit": limits.memory_bytes}
        if SWAP_ACCOUNTING in controllers:
            # Memory and swap together: what does not fit is not moved to zram, which is
            # the neighbours' memory as well.
            memory["swap"] = limits.memory_bytes
        found["memory"] = memory
    if "cpu" in controllers:
        cpu = {"shares": CPU_SHARES}
        if limits.cpu_percent is not None:
            cpu["period"] = CPU_PERIOD_US
            cpu["quota"] = CPU_PERIOD_US * limits.cpu_percent // 100
        found["cpu"] = cpu
    if "pids" in controllers:
        found["pids"] = {"limit": limits.pids}
    return found


def missing_controllers(controllers: frozenset[str]) -> tuple[str, ...]:
    """What this machine lacks for the limits to hold, sorted."""
    missing = _PROTECTS.keys() - controllers
    if "memory" in missing:
        missing.discard(SWAP_ACCOUNTING)
    return tuple(sorted(missing))


def missing_notes(controllers: frozenset[str]) -> tuple[str, ...]:
    """One sentence for each of `missing_controllers`, for people."""
    return tuple(
        f"no control group limits {_PROTECTS[name]} of a container: this machine has no {name}"
        for name in missing_controllers(controllers)
    )
