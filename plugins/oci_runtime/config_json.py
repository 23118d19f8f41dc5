"""A container as the supervisor specifies it -> `config.json` of the OCI runtime spec 1.0.2.

Pure. What holds for every container (ACON image spec 1.0, "The container's world"):
namespaces of its own (the network's too, if so configured); umask 0077; a minimal
`/dev`; no `/sys` at all, because the registers can be written there by anyone who
sees them; masked `/proc`; writable `/tmp`, `/run`, `/shared`; nothing raised that
would need privileges in the TD (no rlimits, an OOM score of 0 at least).

The program, its environment, working directory and limit on open files are not in it: what
the runtime runs is our shim, and the shim has them (`shim_program`).
"""

from __future__ import annotations

import msgspec

from plugins.oci_runtime.gateway import Places
from plugins.oci_runtime.scratch import SOCKET_NAME
from supervisor import ContainerSpec

# The same socket in two places: ours, and where ACON's own clients look.
SOCKETS_INSIDE = (f"/run/{SOCKET_NAME}", f"/shared/{SOCKET_NAME}")
UMASK = 0o077
PORTS_SYSCTL = "net.ipv4.ip_unprivileged_port_start"

# What containers/common (Podman) grants by default. They count inside the container's
# user namespace only, which owns no network but one of the container's own: none of them
# reaches the TD's.
CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
NAMESPACES = ("user", "pid", "mount", "ipc", "uts", "cgroup")
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
)
READONLY_PATHS = (
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
)


class Mount(msgspec.Struct, frozen=True):
    """One entry of `mounts`."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...]


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same in all containers of one supervisor.

    `seccomp` is `linux.seccomp`, encoded once since it is long; `resources` is
    `linux.resources` without devices. `unprivileged_port_start` is only set for a network
    of the container's own; `oom_score_adj` is 0 or more.
    """

    seccomp: msgspec.Raw
    resources: dict[str, object]
    own_network: bool
    unprivileged_port_start: int | None
    oom_score_adj: int


# `/dev` is a tmpfs into which the runtime binds null, zero, full, random, urandom and
# tty. No `gid=` for devpts: group 5 is not mapped. Its `max`: all containers together have
# 3,072 terminals (kernel.pty), and no other limit counts them.
KERNEL_MOUNTS = (
    Mount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "noexec", "strictatime", "mode=755", "size=1024k")),
    Mount(
        "/dev/pts",
        "devpts",
        "devpts",
        ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "max=64"),
    ),
    Mount("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
    Mount("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
)


def oci_config(
    spec: ContainerSpec,
    places: Places,
    common: Common,
    *,
    program: tuple[str, ...],
    cgroups_path: str,
) -> dict[str, object]:
    """The whole document, ready for msgspec's JSON encoder.

    `program` is what the runtime runs; `cgroups_path` is absolute.
    """
    id_mappings = [
        {"containerID": inside, "hostID": outside, "size": 1}
        for inside, outside in spec.id_map.pairs
    ]
    namespaces = (*NAMESPACES, "network") if common.own_network else NAMESPACES
    linux: dict[str, object] = {
        "namespaces": [{"type": name} for name in namespaces],
        "uidMappings": id_mappings,
        "gidMappings": id_mappings,
        "cgroupsPath": cgroups_path,
        "resources": {"devices": [{"allow": False, "access": "rwm"}], **common.resources},
        "maskedPaths": MASKED_PATHS,
        "readonlyPaths": READONLY_PATHS,
        "seccomp": common.seccomp,
    }
    if common.unprivileged_port_start is not None:
        linux["sysctl"] = {PORTS_SYSCTL: str(common.unprivileged_port_start)}
    return {
        "ociVersion": "1.0.2",
        "hostname": f"acon-{spec.container_id}",
        "root": {"path": str(places.root), "readonly": not spec.writable_root},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "umask": UMASK},
            "args": program,
            "env": [],
            "cwd": "/",
            "oomScoreAdj": common.oom_score_adj,
            "noNewPrivileges": spec.no_new_privileges,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        },
        "mounts": (*KERNEL_MOUNTS, *_own_mounts(places)),
        "linux": linux,
    }


def _own_mounts(places: Places) -> tuple[Mount, ...]:
    # nosuid and nodev are repeated: a bind made in a user namespace must not drop them.
    scratch = ("rbind", "nosuid", "nodev")
    return (
        Mount("/tmp", "bind", str(places.tmp), scratch),
        Mount("/run", "bind", str(places.run), scratch),
        Mount("/shared", "bind", str(places.shared), scratch),
        *(
            Mount(place, "bind", str(places.socket), ("bind", "nosuid", "nodev", "noexec"))
            for place in SOCKETS_INSIDE
        ),
    )
