"""Memory that was given back only once nobody uses it any more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from image_store_rig import entry, make_tar, running

from plugins.image_store.mount.memory_files import MemoryFiles
from supervisor import LayerFreed

pytestmark = pytest.mark.root


def test_a_file_is_gone_when_nobody_has_it_open() -> None:
    files = MemoryFiles()
    one, two = files.make(), files.make()
    held = os.dup(one.fd)
    one.close()
    two.close()
    assert two.wait_gone(timeout_s=5)
    assert not one.wait_gone(timeout_s=0)
    os.close(held)
    assert one.wait_gone(timeout_s=5)
    files.close()


@pytest.mark.parametrize("next_end", ["a layer's", "a root's"])
async def test_a_layer_that_somebody_reads_stays_on_the_account_until_he_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, next_end: str
) -> None:
    monkeypatch.setattr("plugins.image_store.mount.removal.UNMOUNT_TIMEOUT_S", 0)
    async with running(tmp_path, mount="erofs") as rig:
        layer = await rig.add(make_tar(entry("f", b"still read" * 1000)))
        used_bytes = rig.store.budget.used_bytes
        (shown,) = (rig.runtime_dir / "store" / "layers").iterdir()
        other = await rig.add(make_tar(entry("g")))
        other_bytes = rig.store.budget.used_bytes - used_bytes
        with (shown / "f").open("rb") as held:
            await rig.store.discard(layer.stored)
            assert rig.mounts() == ["layers/2"]
            assert rig.store.budget.used_bytes == used_bytes + other_bytes
            assert not [event for event in rig.events if isinstance(event, LayerFreed)]
            assert held.read() == b"still read" * 1000
        with trio.fail_after(10):
            while rig.store.budget.used_bytes != other_bytes:
                # Whatever ends next looks after it, once the kernel has let go of it.
                if next_end == "a root's":
                    await (await rig.mount(other)).close()
                else:
                    await rig.store.discard((await rig.add(make_tar(entry("h")))).stored)
        freed = [event.digest for event in rig.events if isinstance(event, LayerFreed)]
        assert freed.count(str(layer.digest)) == 1
