"""The OCI document that a container's specification becomes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oci_runtime_rig import BoundRoot

from plugins.oci_runtime.config_json import Common, oci_config
from plugins.oci_runtime.gateway import Gateway, Places, reachable_ancestor
from plugins.oci_runtime.spawn import SEARCH_PATH
from supervisor import ContainerSpec, IdMap

PLACES = Places(
    root=Path("/gate/7/root"),
    tmp=Path("/gate/7/scratch/tmp"),
    run=Path("/gate/7/scratch/run"),
    shared=Path("/gate/shared"),
    socket=Path("/gate/7/acon.sock"),
)
SPEC = ContainerSpec(
    container_id=7,
    image_id="sha384/a/b",
    root=BoundRoot(Path("/elsewhere")),
    argv=("/bin/x", "one", "two words"),
    environment=("A=1",),
    working_dir="/place",
    id_map=IdMap(pairs=((0, 100_000), (1000, 100_001))),
    writable_root=False,
    no_new_privileges=True,
    log_fds=(),
    socket_path=Path("/sockets/7.sock"),
)


COMMON = Common(
    seccomp=msgspec.Raw(b'{"defaultAction":"X"}'),
    resources={"pids": {"limit": 7}},
    own_network=False,
    unprivileged_port_start=None,
    oom_score_adj=250,
)


def document(spec: ContainerSpec, common: Common = COMMON) -> dict[str, object]:
    made = oci_config(spec, PLACES, common, program=("/proc/self/fd/3",), cgroups_path="/acond-0/7")
    decoded: dict[str, object] = json.loads(msgspec.json.encode(made))
    return decoded


def part(value: object, *path: str) -> object:
    for key in path:
        assert isinstance(value, dict)
        value = value[key]
    return value


def test_what_the_runtime_runs_is_the_shim_alone() -> None:
    process = part(document(SPEC), "process")
    assert part(process, "args") == ["/proc/self/fd/3"]
    assert part(process, "env") == []
    assert part(process, "cwd") == "/"
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


def test_a_network_of_its_own_has_a_namespace_and_its_own_first_port() -> None:
    common = msgspec.structs.replace(COMMON, own_network=True, unprivileged_port_start=80)
    linux = part(document(SPEC, common), "linux")
    namespaces = part(linux, "namespaces")
    assert isinstance(namespaces, list)
    assert {"type": "network"} in namespaces
    assert part(linux, "sysctl") == {"net.ipv4.ip_unprivileged_port_start": "80"}
    shared = part(document(SPEC), "linux")
    assert isinstance(shared, dict)
    assert "sysctl" not in shared


def test_limits_stand_beside_the_refusal_of_all_devices() -> None:
    assert part(document(SPEC), "linux", "resources") == {
        "devices": [{"allow": False, "access": "rwm"}],
        "pids": {"limit": 7},
    }


def test_the_seccomp_document_is_taken_over_as_it_is() -> None:
    assert part(document(SPEC), "linux", "seccomp") == {"defaultAction": "X"}


def test_the_socket_is_in_both_places_where_it_is_looked_for() -> None:
    mounts = part(document(SPEC), "mounts")
    assert isinstance(mounts, list)
    places = [mount["destination"] for mount in mounts if mount["source"] == str(PLACES.socket)]
    assert places == ["/run/acon.sock", "/shared/acon.sock"]


def test_neither_sysfs_nor_a_control_group_file_system_is_mounted() -> None:
    mounts = part(document(SPEC), "mounts")
    assert isinstance(mounts, list)
    assert {mount["type"] for mount in mounts} == {"proc", "tmpfs", "devpts", "mqueue", "bind"}
    sources = {mount["source"] for mount in mounts if mount["type"] == "bind"}
    assert sources == {str(PLACES.tmp), str(PLACES.run), str(PLACES.shared), str(PLACES.socket)}


def test_nothing_that_needs_privileges_in_the_td_is_asked_for() -> None:
    process = part(document(SPEC), "process")
    assert isinstance(process, dict)
    assert not {"rlimits", "scheduler", "ioPriority"} & process.keys()
    assert process["oomScoreAdj"] == 250
    capabilities = part(process, "capabilities")
    assert isinstance(capabilities, dict)
    assert set(capabilities) == {"bounding", "effective", "permitted"}
    for names in capabilities.values():
        assert not {"CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_SYS_PTRACE", "CAP_NET_ADMIN"} & set(names)


def test_whatever_of_proc_runtimes_hide_by_themselves_is_hidden(tmp_path: Path) -> None:
    runc = shutil.which("runc", path=SEARCH_PATH)
    if runc is None:
        pytest.skip("runc, which writes such a configuration, is not installed")
    subprocess.run([runc, "spec"], cwd=tmp_path, check=True)
    usual = json.loads((tmp_path / "config.json").read_bytes())["linux"]
    linux = document(SPEC)["linux"]
    assert isinstance(linux, dict)
    for name in ("maskedPaths", "readonlyPaths"):
        # There is no /sys in our containers.
        wanted = {path for path in usual[name] if path.startswith("/proc/")}
        assert wanted
        assert wanted <= set(linux[name]), name


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
        gateway = Gateway(inner, shared_size_mib=1)
        assert gateway.path.parent == base
        closed.chmod(0o711)
        assert reachable_ancestor(inner) == inner
        # Its name does not depend on where it lies, so that a successor finds it.
        again = Gateway(inner, shared_size_mib=1)
        assert again.path.name == gateway.path.name
