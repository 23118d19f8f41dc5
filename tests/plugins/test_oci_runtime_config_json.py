"""The OCI document that a container's specification becomes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.oci_runtime.cgroups import hierarchies
from plugins.oci_runtime.config_json import oci_config
from plugins.oci_runtime.gateway import Gateway, Places, reachable_ancestor
from supervisor import ContainerSpec, IdMap

PLACES = Places(
    root=Path("/gate/7/root"),
    tmp=Path("/gate/7/tmp"),
    run=Path("/gate/7/run"),
    shared=Path("/gate/shared"),
    socket=Path("/gate/7/acon.sock"),
)
SPEC = ContainerSpec(
    container_id=7,
    image_id="sha384/a/b",
    root=Path("/elsewhere"),
    argv=("/bin/x", "one", "two words"),
    environment=("A=1",),
    working_dir="/work",
    id_map=IdMap(pairs=((0, 100_000), (1000, 100_001))),
    writable_root=False,
    no_new_privileges=True,
    log_fds=(),
    socket_path=Path("/sockets/7.sock"),
)


def document(spec: ContainerSpec) -> dict[str, object]:
    made = oci_config(spec, PLACES, seccomp={"defaultAction": "X"}, cgroups_path="/acond-0/7")
    decoded: dict[str, object] = json.loads(msgspec.json.encode(made))
    return decoded


def part(value: object, *path: str) -> object:
    for key in path:
        assert isinstance(value, dict)
        value = value[key]
    return value


def test_the_program_and_its_environment_are_those_of_the_spec() -> None:
    process = part(document(SPEC), "process")
    assert part(process, "args") == ["/bin/x", "one", "two words"]
    assert part(process, "env") == ["A=1"]
    assert part(process, "cwd") == "/work"
    assert part(process, "user") == {"uid": 0, "gid": 0, "umask": 0o077}
    assert part(process, "terminal") is False


@pytest.mark.parametrize("value", [True, False])
def test_new_privileges_and_a_writable_root_follow_the_spec(value: bool) -> None:
    spec = msgspec.structs.replace(SPEC, no_new_privileges=value, writable_root=value)
    assert part(document(spec), "process", "noNewPrivileges") is value
    assert part(document(spec), "root", "readonly") is not value


def test_the_root_is_reached_through_the_gateway() -> None:
    assert part(document(SPEC), "root", "path") == "/gate/7/root"


@given(st.dictionaries(st.integers(1, 2**32 - 2), st.integers(100_000, 2**32 - 2), max_size=20))
def test_users_and_groups_are_mapped_one_by_one_and_alike(pairs: dict[int, int]) -> None:
    id_map = IdMap(pairs=((0, 99_999), *pairs.items()))
    linux = part(document(msgspec.structs.replace(SPEC, id_map=id_map)), "linux")
    expected = [
        {"containerID": inside, "hostID": outside, "size": 1} for inside, outside in id_map.pairs
    ]
    assert part(linux, "uidMappings") == expected
    assert part(linux, "gidMappings") == expected


def test_no_namespace_is_missing_but_the_network_s() -> None:
    namespaces = part(document(SPEC), "linux", "namespaces")
    assert namespaces == [
        {"type": name} for name in ("user", "pid", "mount", "ipc", "uts", "cgroup")
    ]


def test_neither_sysfs_nor_a_control_group_file_system_is_mounted() -> None:
    mounts = part(document(SPEC), "mounts")
    assert isinstance(mounts, list)
    assert {mount["type"] for mount in mounts} == {"proc", "tmpfs", "devpts", "mqueue", "bind"}
    sources = {mount["source"] for mount in mounts if mount["type"] == "bind"}
    assert sources == {str(PLACES.tmp), str(PLACES.run), str(PLACES.shared), str(PLACES.socket)}


def test_nothing_that_needs_privileges_in_the_td_is_asked_for() -> None:
    process = part(document(SPEC), "process")
    assert isinstance(process, dict)
    assert not {"rlimits", "oomScoreAdj", "scheduler", "ioPriority"} & process.keys()
    capabilities = part(process, "capabilities")
    assert isinstance(capabilities, dict)
    assert set(capabilities) == {"bounding", "effective", "permitted"}
    for names in capabilities.values():
        assert not {"CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_SYS_PTRACE", "CAP_NET_ADMIN"} & set(names)


MOUNTINFO = r"""
25 30 0:23 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
30 25 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw
35 30 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:16 - cgroup cgroup rw,cpu,cpuacct
36 30 0:32 / /odd\040place rw - cgroup cgroup rw,pids
37 30 0:33 / /cgroup rw - tmpfs cgroup rw
""".strip()


def test_control_group_hierarchies_are_read_from_mountinfo() -> None:
    assert hierarchies(MOUNTINFO) == (
        Path("/sys/fs/cgroup/unified"),
        Path("/sys/fs/cgroup/cpu,cpuacct"),
        Path("/odd place"),
    )


def test_the_gateway_lies_where_everyone_can_pass() -> None:
    # Not in pytest's own folders: those are closed, and other runs see to it.
    with tempfile.TemporaryDirectory() as name:
        base = Path(name).resolve()
        closed = base / "closed"
        inner = closed / "inner"
        inner.mkdir(parents=True)
        base.chmod(0o711)
        inner.chmod(0o711)
        closed.chmod(0o700)
        assert reachable_ancestor(inner) == base
        gateway = Gateway(inner, scratch_size_mib=1, shared_size_mib=1)
        assert gateway.path.parent == base
        closed.chmod(0o711)
        assert reachable_ancestor(inner) == inner
        # Its name does not depend on where it lies, so that a successor finds it.
        again = Gateway(inner, scratch_size_mib=1, shared_size_mib=1)
        assert again.path.name == gateway.path.name
