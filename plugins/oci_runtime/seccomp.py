"""Which system calls containers may make.

The base is a maintained profile: that of containers/common (Podman, Buildah), which
distributions install as `/usr/share/containers/seccomp.json` (Debian and Ubuntu:
`golang-github-containers-common`). It allows by list, everything else is ENOSYS. It
is written for containers whose programs may nest containers; ours may not, so on top
of it we refuse DENIED, new namespaces, and every socket family but Unix, IPv4, IPv6
and netlink (AF_VSOCK would reach the host's quoting service).

Where the file is absent a list of our own stands in: everything but DENIED, new
namespaces and the other socket families is allowed.

Only the machine's own system call table is admitted: 32-bit and x32 programs are
killed, since `socketcall` would walk around the rule for sockets.
"""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec

from plugins.oci_runtime.config_json import CAPABILITIES
from supervisor import ConfigError

COMMON_PROFILE = Path("/usr/share/containers/seccomp.json")
MAX_PROFILE_BYTES = 1024 * 1024
EPERM = 1
ENOSYS = 38
EAFNOSUPPORT = 97
ALLOW = "SCMP_ACT_ALLOW"
ERRNO = "SCMP_ACT_ERRNO"

# platform.machine() -> (libseccomp's name, the profile's name)
ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "amd64"),
    "aarch64": ("SCMP_ARCH_AARCH64", "arm64"),
}

# Nothing a confined program needs, and what most escapes of the past began with.
_DENIED_BY_PURPOSE: dict[str, tuple[str, ...]] = {
    "mounts": ("mount", "umount", "umount2", "pivot_root", "fsopen", "fsmount", "fsconfig"),
    "newer mounts": ("fspick", "mount_setattr", "move_mount", "open_tree", "open_tree_attr"),
    "namespaces": ("setns", "unshare"),
    "kernel keyrings": ("keyctl", "add_key", "request_key"),
    "kernel programs": ("bpf", "perf_event_open", "userfaultfd"),
    "rings around this filter": ("io_uring_setup", "io_uring_enter", "io_uring_register"),
    "other processes": ("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise"),
    "other processes' descriptors": ("kcmp", "pidfd_getfd"),
    "files without their path": ("open_by_handle_at", "name_to_handle_at"),
    "another kernel": ("kexec_load", "kexec_file_load", "reboot"),
    "modules": ("init_module", "finit_module", "delete_module", "create_module", "query_module"),
    "modules' symbols": ("get_kernel_syms", "uselib", "sysfs", "_sysctl", "nfsservctl"),
    "the machine's state": ("swapon", "swapoff", "syslog", "acct", "quotactl", "quotactl_fd"),
    "its files": ("fanotify_init", "lookup_dcookie", "ustat", "vhangup"),
    "its memory": ("vmsplice", "migrate_pages", "move_pages"),
    "its ports": ("iopl", "ioperm", "vm86", "vm86old"),
    "its clock": ("clock_settime", "clock_settime64", "settimeofday", "stime"),
    "its name": ("sethostname", "setdomainname"),
}
DENIED = frozenset(name for names in _DENIED_BY_PURPOSE.values() for name in names)
# clone3 hides its flags from a filter; ENOSYS makes C libraries use clone.
JUDGED_BY_ARGUMENTS = frozenset({"clone", "clone3", "socket", "socketcall"})

# CLONE_NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWNS (sched.h)
NAMESPACE_FLAGS = (
    0x02000000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
    0x00020000,
)
# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
SOCKET_FAMILIES = (1, 2, 10, 16)


class Argument(msgspec.Struct, frozen=True, omit_defaults=True):
    """A condition on one argument of a system call (runtime spec, "Seccomp")."""

    index: int
    value: int
    op: str
    valueTwo: int = 0

    def to_json(self) -> dict[str, object]:
        return {
            "index": self.index,
            "value": self.value,
            "valueTwo": self.valueTwo,
            "op": self.op,
        }


class Condition(msgspec.Struct, frozen=True):
    """For which machines and capabilities a rule of the profile holds."""

    arches: tuple[str, ...] = ()
    caps: tuple[str, ...] = ()


class ProfileRule(msgspec.Struct, frozen=True):
    names: tuple[str, ...]
    action: str
    args: tuple[Argument, ...] | None = None
    errnoRet: int | None = None
    includes: Condition = Condition()
    excludes: Condition = Condition()


class Profile(msgspec.Struct, frozen=True):
    """What we read of a containers/common profile. What else it holds is for builders."""

    defaultAction: str
    syscalls: tuple[ProfileRule, ...]
    defaultErrnoRet: int = EPERM


class Seccomp(msgspec.Struct, frozen=True):
    """`linux.seccomp` of config.json, and where it comes from."""

    source: str
    document: dict[str, object]


def load_seccomp(setting: str, machine: str | None = None) -> Seccomp:
    """`auto` (the common profile where it is installed, else our list), `builtin`, or a path.

    Raises `ConfigError` for a file that cannot be read or is no profile.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ConfigError(
            "seccomp",
            "knows this machine's system calls",
            expected=", ".join(ARCHITECTURES),
            actual=machine,
        )
    if setting == "builtin" or (setting == "auto" and not COMMON_PROFILE.exists()):
        return Seccomp(source="builtin", document=builtin(machine))
    path = COMMON_PROFILE if setting == "auto" else Path(setting)
    if not path.is_absolute():
        raise ConfigError(
            "$.plugin.oci_runtime.seccomp_profile",
            "must be auto, builtin or an absolute path",
            actual=setting,
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(str(path), "must be a readable file", actual=error) from error
    if len(raw) > MAX_PROFILE_BYTES:
        raise ConfigError(str(path), "is too large", expected=f"at most {MAX_PROFILE_BYTES} bytes")
    return Seccomp(source=str(path), document=tightened(raw, machine, item=str(path)))


def tightened(raw: bytes, machine: str, *, item: str) -> dict[str, object]:
    """A containers/common profile (JSON) without what we refuse. Raises `ConfigError`."""
    try:
        profile = msgspec.json.decode(raw, type=Profile)
    except msgspec.DecodeError as error:
        raise ConfigError(item, "must be a seccomp profile", actual=error) from error
    if profile.defaultAction != ERRNO:
        raise ConfigError(
            item, "must refuse what it does not list", expected=ERRNO, actual=profile.defaultAction
        )
    _, arch = ARCHITECTURES[machine]
    rules: list[dict[str, object]] = []
    for rule in profile.syscalls:
        if not _applies(rule, arch):
            continue
        # Not ALLOW alone lets a call through: LOG, for one, does so too.
        withheld = JUDGED_BY_ARGUMENTS | (frozenset() if rule.action == ERRNO else DENIED)
        names = [name for name in rule.names if name not in withheld]
        if names:
            rules.append(_rule(names, rule.action, rule.errnoRet, rule.args or ()))
    # Refusals that the profile makes by itself are left to it: no call in two lists.
    refused = {
        name
        for rule in profile.syscalls
        if rule.action == ERRNO and _applies(rule, arch)
        for name in rule.names
    }
    rules.append(_rule(sorted(DENIED - refused), ERRNO, EPERM))
    every_flag = sum(NAMESPACE_FLAGS)
    rules.append(_rule(["clone"], ALLOW, None, (Argument(0, every_flag, "SCMP_CMP_MASKED_EQ", 0),)))
    rules.extend(
        _rule(["socket"], ALLOW, None, (Argument(0, family, "SCMP_CMP_EQ"),))
        for family in SOCKET_FAMILIES
    )
    return _document(machine, ERRNO, rules, default_errno=ENOSYS)


def builtin(machine: str) -> dict[str, object]:
    """Everything is allowed but what we know to be dangerous."""
    rules = [_rule(sorted(DENIED), ERRNO, EPERM), _rule(["clone3"], ERRNO, ENOSYS)]
    rules.extend(
        _rule(["clone"], ERRNO, EPERM, (Argument(0, flag, "SCMP_CMP_MASKED_EQ", flag),))
        for flag in NAMESPACE_FLAGS
    )
    last = max(SOCKET_FAMILIES)
    others = [family for family in range(last) if family not in SOCKET_FAMILIES]
    rules.extend(
        _rule(["socket"], ERRNO, EAFNOSUPPORT, (Argument(0, family, "SCMP_CMP_EQ"),))
        for family in others
    )
    rules.append(_rule(["socket"], ERRNO, EAFNOSUPPORT, (Argument(0, last, "SCMP_CMP_GT"),)))
    return _document(machine, ALLOW, rules)


def _applies(rule: ProfileRule, arch: str) -> bool:
    if rule.includes.arches and arch not in rule.includes.arches:
        return False
    if arch in rule.excludes.arches:
        return False
    if any(name not in CAPABILITIES for name in rule.includes.caps):
        return False
    return not any(name in CAPABILITIES for name in rule.excludes.caps)


def _rule(
    names: list[str], action: str, errno: int | None, arguments: tuple[Argument, ...] = ()
) -> dict[str, object]:
    rule: dict[str, object] = {"names": names, "action": action}
    if errno is not None and action == ERRNO:
        rule["errnoRet"] = errno
    if arguments:
        rule["args"] = [argument.to_json() for argument in arguments]
    return rule


def _document(
    machine: str,
    default_action: str,
    rules: list[dict[str, object]],
    *,
    default_errno: int | None = None,
) -> dict[str, object]:
    document: dict[str, object] = {
        "defaultAction": default_action,
        "architectures": [ARCHITECTURES[machine][0]],
        "syscalls": rules,
    }
    if default_errno is not None:
        document["defaultErrnoRet"] = default_errno
    return document
