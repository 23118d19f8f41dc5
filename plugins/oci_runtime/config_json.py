"""A container as the supervisor specifies it -> `config.json` of the OCI runtime spec 1.0.2.

Pure. What holds for every container (ACON image spec 1.0, "The container's world"):
namespaces of its own but for the network, which is the TD's; umask 0077; a minimal
`/dev`; no `/sys` at all, because the registers can be written there by anyone who
sees them; masked `/proc`; writable `/tmp`, `/run`, `/shared`; nothing raised that
would need privileges in the TD (no rlimits, no OOM score).

The runtime itself adds `HOME` to the environment where the spec has none (runc and
crun both do, and cannot be told not to); its value comes from the image's
`/etc/passwd`, else `/`.
"""

from __future__ import annotations

import msgspec

from plugins.oci_runtime.gateway import Places
from supervisor import ContainerSpec

SOCKET_INSIDE = "/run/acon.sock"
UMASK = 0o077

# What containers/common (Podman) grants by default. They count inside the container's
# user namespace only; the network is not owned by it, so none of them reaches the TD's.
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

    def to_json(self) -> dict[str, object]:
        return {
            "destination": self.destination,
            "type": self.type,
            "source": self.source,
            "options": list(self.options),
        }


# `/dev` is a tmpfs into which the runtime binds null, zero, full, random, urandom and
# tty. No `gid=` for devpts: group 5 is not mapped.
KERNEL_MOUNTS = (
    Mount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "noexec", "strictatime", "mode=755", "size=1024k")),
    Mount(
        "/dev/pts",
        "devpts",
        "devpts",
        ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
    ),
    Mount("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
    Mount("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
)


def oci_config(
    spec: ContainerSpec,
    places: Places,
    *,
    seccomp: dict[str, object],
    cgroups_path: str,
) -> dict[str, object]:
    """The whole document, ready for a JSON encoder. `cgroups_path` is absolute."""
    id_mappings = [
        {"containerID": inside, "hostID": outside, "size": 1}
        for inside, outside in spec.id_map.pairs
    ]
    return {
        "ociVersion": "1.0.2",
        "hostname": f"acon-{spec.container_id}",
        "root": {"path": str(places.root), "readonly": not spec.writable_root},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "umask": UMASK},
            "args": list(spec.argv),
            "env": list(spec.environment),
            "cwd": spec.working_dir,
            "noNewPrivileges": spec.no_new_privileges,
            "capabilities": {
                kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")
            },
        },
        "mounts": [mount.to_json() for mount in (*KERNEL_MOUNTS, *_own_mounts(places))],
        "linux": {
            "namespaces": [{"type": name} for name in NAMESPACES],
            "uidMappings": id_mappings,
            "gidMappings": id_mappings,
            "cgroupsPath": cgroups_path,
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READONLY_PATHS),
            "seccomp": seccomp,
        },
    }


def _own_mounts(places: Places) -> tuple[Mount, ...]:
    # nosuid and nodev are repeated: a bind made in a user namespace must not drop them.
    scratch = ("rbind", "nosuid", "nodev")
    return (
        Mount("/tmp", "bind", str(places.tmp), scratch),
        Mount("/run", "bind", str(places.run), scratch),
        Mount("/shared", "bind", str(places.shared), scratch),
        Mount(SOCKET_INSIDE, "bind", str(places.socket), ("bind", "nosuid", "nodev", "noexec")),
    )
