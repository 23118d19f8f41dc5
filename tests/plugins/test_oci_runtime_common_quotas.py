"""What one container can take from the others, because the kernel counts it for all of them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from oci_runtime_rig import Rig, running_rig

from plugins.oci_runtime import OciRuntime, common_quotas, oom
from plugins.oci_runtime.common_quotas import MOST, RLIMITS, SYSCTLS, common_quotas_lifted
from plugins.oci_runtime.oom import SPARED, spared_by_the_oom_killer

# Each shell keeps one open, as long as it has one.
TERMINALS = """\
i=0
while [ $i -lt 80 ]; do
    (exec 8<>/dev/ptmx && : > /tmp/$i; exec sleep 60) 2> /dev/null & i=$((i + 1))
done
until [ "$(cat /proc/[0-9]*/comm | grep -c -x sleep)" -ge 64 ]; do sleep 0.1; done
sleep 0.3  # for those that must not come
ls /tmp | wc -l
"""


@pytest.fixture
def sysctls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in SYSCTLS:
        (tmp_path / name).write_text("128\n")
    monkeypatch.setattr(common_quotas, "INOTIFY", tmp_path)
    return tmp_path


def test_what_is_counted_for_all_containers_together_is_bounded_by_each_ones_memory_alone(
    sysctls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not the process's own: without CAP_SYS_RESOURCE they could not be lifted here.
    limits = dict.fromkeys(RLIMITS, (100, 200))
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    with common_quotas_lifted():
        assert {int((sysctls / name).read_text()) for name in SYSCTLS} == {MOST}
        assert set(limits.values()) == {(resource.RLIM_INFINITY, resource.RLIM_INFINITY)}
    assert {(sysctls / name).read_text() for name in SYSCTLS} == {"128\n"}
    assert set(limits.values()) == {(100, 200)}


def test_quotas_that_may_not_be_lifted_stay(sysctls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    for name in SYSCTLS:
        (sysctls / name).unlink()
    with common_quotas_lifted():
        assert os.listdir(sysctls) == []


@pytest.mark.parametrize(
    ("before", "during", "containers"), [(0, SPARED, 0), (300, SPARED, 300), (-950, -950, 0)]
)
def test_when_the_machine_is_out_of_memory_the_supervisor_is_spared_and_no_container_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, during: int, containers: int
) -> None:
    score = tmp_path / "oom_score_adj"
    score.write_text(f"{before}\n")
    monkeypatch.setattr(oom, "OWN_SCORE", score)
    with spared_by_the_oom_killer() as given:
        assert (int(score.read_text()), given) == (during, containers)
    assert int(score.read_text()) == before


@pytest.mark.root
async def test_a_container_has_a_share_of_the_terminals_and_of_files_in_shared(
    tmp_path: Path,
) -> None:
    async with running_rig(tmp_path, OciRuntime.Config(shared_size_mib=1)) as rig:
        assert await terminals_of(rig) == 64
        made = await rig.shell(
            "cd /shared; i=0; while [ $i -lt 2000 ] && (: > $i) 2> /dev/null; "
            "do i=$((i + 1)); done; echo $i"
        )
        assert 1000 < int(made) < 1024


async def terminals_of(rig: Rig) -> int:
    return int((await rig.shell(TERMINALS)).split()[-1])
