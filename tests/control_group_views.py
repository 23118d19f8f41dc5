"""Other machines' control groups: what this kernel can show of them in a mount namespace.

A process of its own runs a Python program there, so that nothing of the test's own
process or of the machine is changed.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

TOP = Path("/sys/fs/cgroup")
HERE = Path(__file__).resolve().parent
PATIENCE_S = 120
# Each ends with the program in a mount namespace that shows no other control groups.
SHOW = {
    "v2": f"umount -l {TOP} && mount -t cgroup2 none {TOP}",
    "v1": f"if mountpoint -q {TOP}/unified; then umount -l {TOP}/unified; fi",
    "none": f"umount -l {TOP}",
}
CAP_SYS_RESOURCE = 24


def machine_is_hybrid() -> bool:
    return (TOP / "memory").is_dir() and (TOP / "unified" / "cgroup.procs").is_file()


def groups_called(prefix: str) -> list[Path]:
    """Every control group whose name begins so; not `Path.glob`, which fails if one ends."""
    return [
        Path(folder, name)
        for folder, names, _ in os.walk(TOP)
        for name in names
        if name.startswith(prefix)
    ]


def run_in_view(view: str, program: str, *arguments: object) -> Any:
    """Run a Python program where only these control groups are seen.

    Returns what it printed last, as JSON; fails with its words if it fails.
    """
    script = f'{SHOW[view]} && exec "$@"'
    code = "from control_group_views import pretend_memlock; pretend_memlock()\n"
    code += textwrap.dedent(program)
    shown = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*shown, sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE / 'plugins'}:{HERE}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pretend_memlock() -> None:
    """Let this process and its children believe that they raised RLIMIT_MEMLOCK.

    crun raises it before it loads the device filter of version 2, and gives up if it may
    not, as in a sandbox without CAP_SYS_RESOURCE. The kernel has not counted BPF programs
    on that limit since 5.11. By a seccomp filter: prlimit64(_, 8, not NULL, _) gives 0.
    """
    effective = next(
        line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("CapEff:")
    )
    if int(effective, 16) >> CAP_SYS_RESOURCE & 1:
        return
    prlimit64 = {"x86_64": 302, "aarch64": 261}[os.uname().machine]
    load, equal, ret = 0x20, 0x15, 0x06
    allow, succeed = 0x7FFF0000, 0x00050000
    # struct seccomp_data: nr at 0, args[1] at 24, args[2] at 32; little-endian.
    steps = (
        (load, 0, 0, 0),
        (equal, 0, 6, prlimit64),
        (load, 0, 0, 24),
        (equal, 0, 4, 8),
        (load, 0, 0, 32),
        (equal, 0, 1, 0),
        (ret, 0, 0, allow),
        (ret, 0, 0, succeed),
        (ret, 0, 0, allow),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = struct.pack("<HxxxxxxQ", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_seccomp, mode_filter = 22, 2
    if libc.prctl(pr_set_seccomp, ctypes.c_ulong(mode_filter), program, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")
