"""The system call filter: what it is made from, and what it must refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plugins.oci_runtime.seccomp import (
    COMMON_PROFILE,
    DENIED,
    builtin,
    load_seccomp,
    tightened,
)
from supervisor import ConfigError

PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
    "syscalls": [
        {"names": ["uselib", "nice"], "action": "SCMP_ACT_ERRNO", "args": [], "errnoRet": 1},
        {
            "names": ["read", "mount", "keyctl", "clone", "clone3", "socketcall"],
            "action": "SCMP_ACT_ALLOW",
            "args": [],
        },
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        },
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64"]}},
        {"names": ["set_tls"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
        {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
        {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {
            "names": ["bpf"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 1,
            "excludes": {"caps": ["CAP_SYS_ADMIN"]},
        },
        {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": None},
    ],
}


def rules_of(document: dict[str, object]) -> list[dict[str, object]]:
    rules = document["syscalls"]
    assert isinstance(rules, list)
    return rules


def names_with(document: dict[str, object], action: str) -> list[str]:
    found: list[str] = []
    for rule in rules_of(document):
        names = rule["names"]
        assert isinstance(names, list)
        if rule["action"] == action:
            found += names
    return found


def tight(profile: object = PROFILE, machine: str = "x86_64") -> dict[str, object]:
    return tightened(json.dumps(profile).encode(), machine, item="profile")


def test_what_the_profile_allows_stays_allowed_but_for_what_is_denied() -> None:
    document = tight()
    allowed = names_with(document, "SCMP_ACT_ALLOW")
    assert {"read", "personality", "arch_prctl", "chroot", "clone", "socket"} == set(allowed)
    assert not DENIED & set(allowed)
    assert document["defaultAction"] == "SCMP_ACT_ERRNO"
    assert document["defaultErrnoRet"] == 38


@pytest.mark.parametrize("action", ["SCMP_ACT_LOG", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE"])
def test_what_is_denied_is_let_through_under_no_other_name_either(action: str) -> None:
    lenient = {"names": ["mount", "clone", "socket", "read"], "action": action}
    document = tight({**PROFILE, "syscalls": [lenient]})
    assert names_with(document, action) == ["read"]
    assert set(names_with(document, "SCMP_ACT_ERRNO")) >= DENIED


def test_rules_for_other_machines_are_left_out() -> None:
    allowed = names_with(tight(machine="aarch64"), "SCMP_ACT_ALLOW")
    assert "set_tls" in allowed
    assert "arch_prctl" not in allowed


def test_every_denied_call_is_refused_exactly_once() -> None:
    refused = names_with(tight(), "SCMP_ACT_ERRNO")
    assert set(refused) >= DENIED
    assert len(refused) == len(set(refused))


def test_clone_is_allowed_without_new_namespaces_only() -> None:
    (rule,) = (rule for rule in rules_of(tight()) if rule["names"] == ["clone"])
    # The mask of Moby's default profile: every CLONE_NEW* flag that fits clone(2).
    assert rule["args"] == [
        {"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    ]


def test_sockets_are_unix_internet_and_netlink_only() -> None:
    families = []
    for rule in rules_of(tight()):
        if rule["names"] == ["socket"]:
            arguments = rule["args"]
            assert isinstance(arguments, list)
            families.append((arguments[0]["op"], arguments[0]["value"]))
    assert families == [("SCMP_CMP_EQ", family) for family in (1, 2, 10, 16)]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b'{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": "read"}]}',
        b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}',
        b"\xff",
    ],
)
def test_what_is_no_profile_that_refuses_by_default_is_refused(raw: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        tightened(raw, "x86_64", item="profile.json")
    assert caught.value.item == "profile.json"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_only_the_machine_s_own_call_table_is_admitted(machine: str) -> None:
    expected = [f"SCMP_ARCH_{machine.upper()}"]
    assert tight(machine=machine)["architectures"] == expected
    assert builtin(machine)["architectures"] == expected


def test_the_list_of_our_own_refuses_what_is_denied_and_allows_the_rest() -> None:
    document = builtin("x86_64")
    assert document["defaultAction"] == "SCMP_ACT_ALLOW"
    refused = set(names_with(document, "SCMP_ACT_ERRNO"))
    assert refused == DENIED | {"clone", "clone3", "socket"}


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(ConfigError):
        load_seccomp("builtin", machine="pdp11")


def test_the_setting_chooses_the_source(tmp_path: Path) -> None:
    assert load_seccomp("builtin", machine="x86_64").source == "builtin"
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    assert load_seccomp(str(path), machine="x86_64").document == tight()
    automatic = load_seccomp("auto", machine="x86_64").source
    assert automatic == (str(COMMON_PROFILE) if COMMON_PROFILE.exists() else "builtin")


@pytest.mark.parametrize("setting", ["unconfined", "relative/profile.json", "/nonexistent"])
def test_a_setting_that_names_no_file_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError):
        load_seccomp(setting, machine="x86_64")


def test_a_profile_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(json.dumps(PROFILE).encode() + b" " * 1024 * 1024)
    with pytest.raises(ConfigError) as caught:
        load_seccomp(str(path), machine="x86_64")
    assert caught.value.rule == "is too large"
