"""How `acon load` brings layers: several at once, by the daemon or from here, and what it says."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from acon_daemon import Bundles, Daemon, lines_of
from acon_helpers import Acon, MakeLayout, MakeSigner, Signer, tar_of
from hostile_registry import hostile_registry, stalled

from acon import load_report
from acon.arguments import RegistryAccess
from acon.bundle import Bundle
from acon.cli import build_parser
from acon.daemon import is_of_this_machine
from acon.transfers import Way
from supervisor import LayerProgress, Untrusted
from supervisor.formats.digest import Digest, digest_of
from supervisor.seams import FileBlob, LayerSource, RegistryBlob

DEADLINE_S = 30
TARS = [tar_of({f"file{number}": bytes([number]) * 5000}) for number in range(6)]
DIGESTS = [digest_of("sha384", tar) for tar in TARS]


@pytest.fixture
def owner(make_signer: MakeSigner) -> Signer:
    return make_signer("owner")


@pytest.fixture
def bundle(make_layout: MakeLayout, acon: Acon, owner: Signer, tmp_path: Path) -> Path:
    """A signed image of `TARS`."""
    layout = make_layout("six", TARS, config={"Entrypoint": ["/x"]})
    folder = tmp_path / "six"
    assert acon("image", "convert", f"oci:{layout}", "-o", folder) == 0
    keys = ("--key", owner.key, "--cert", owner.certificate)
    assert acon("image", "sign", folder, *keys) == 0
    return folder


def relocate(bundle: Path, changed: Callable[[FileBlob], FileBlob], at: int = 0) -> None:
    """Another source for the layer with this number."""
    one = Bundle(bundle)
    sources = one.sources()
    source = sources[str(DIGESTS[at])]
    assert isinstance(source, FileBlob)
    one.write_sources({**sources, str(DIGESTS[at]): changed(source)})


async def test_as_many_layers_as_allowed_are_under_way_at_one_time(
    daemon: Daemon, bundle: Path
) -> None:
    operations = daemon.operations
    operations.may_fetch = True
    operations.fetch_hold = hold = trio.Event()
    codes: list[int] = []

    async def load() -> None:
        codes.append(await daemon.acon("load", bundle, "--parallel", 3))

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await operations.wait_for_fetches(3)
            await trio.sleep(0.2)
            assert len(operations.fetched) == operations.fetching == 3
            hold.set()
    assert codes == [0]
    assert set(operations.layers) == set(DIGESTS)


async def test_by_default_four_layers_are_under_way(daemon: Daemon, bundle: Path) -> None:
    daemon.operations.may_fetch = True
    daemon.operations.fetch_hold = hold = trio.Event()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.acon, "load", bundle)
            await daemon.operations.wait_for_fetches(4)
            hold.set()


async def test_a_layer_that_fails_does_not_stop_the_others_and_the_exit_code_says_it(
    daemon: Daemon,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = DIGESTS[1]
    daemon.operations.may_fetch = True
    honest = daemon.operations.fetch_layer

    async def fetch(expected: Digest, source: LayerSource) -> None:
        if expected == bad:
            raise Untrusted(str(expected), "the tar is hostile")
        await honest(expected, source)

    monkeypatch.setattr(daemon.operations, "fetch_layer", fetch)
    capsys.readouterr()
    assert await daemon.acon("load", bundle, "--json", "--parallel", 1) == 1
    events = lines_of(capsys.readouterr().out)
    failed = [event for event in events if event.get("state") == "failed"]
    assert [event["digest"] for event in failed] == [str(bad)]
    error = failed[0]["error"]
    assert isinstance(error, dict)
    assert (error["kind"], error["rule"]) == ("untrusted", "the tar is hostile")
    assert set(daemon.operations.layers) == set(DIGESTS) - {bad}
    assert events[-1]["event"] == "incomplete"
    assert events[-1]["missing"] == [str(bad)]


async def test_each_layer_goes_the_way_that_the_daemon_lets_it(
    daemon: Daemon,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = daemon.operations.fetch_layer

    async def fetch(expected: Digest, source: LayerSource) -> None:
        daemon.operations.may_fetch = expected in DIGESTS[:2]
        await honest(expected, source)

    monkeypatch.setattr(daemon.operations, "fetch_layer", fetch)
    capsys.readouterr()
    assert await daemon.acon("load", bundle, "--json", "--parallel", 1) == 0
    events = lines_of(capsys.readouterr().out)
    ways = [(event["digest"], event["how"]) for event in events if event["event"] == "layer"]
    assert ways == [
        (str(digest), "fetched" if number < 2 else "sent") for number, digest in enumerate(DIGESTS)
    ]


async def test_with_upload_the_daemon_is_not_asked_to_fetch(daemon: Daemon, bundle: Path) -> None:
    daemon.operations.may_fetch = True
    assert await daemon.acon("load", bundle, "--upload") == 0
    assert daemon.operations.fetched == []
    assert [daemon.operations.layers[digest] for digest in DIGESTS] == TARS


def test_only_a_daemon_of_this_machine_is_told_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, variables, is_here in (
        ([], {}, True),
        (["--socket", "/s"], {"ACON_URL": "https://td.example:1"}, True),
        (["--url", "https://td.example:1"], {}, False),
        ([], {"ACON_URL": "https://td.example:1"}, False),
    ):
        with monkeypatch.context() as patch:
            for name in ("ACON_URL", "ACON_SOCKET"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            args = build_parser().parse_args(["load", "x", *words])
            assert is_of_this_machine(args) is is_here
    way = Way(access=RegistryAccess(), parallel=1, upload_files=True)
    file = FileBlob(file="/x", size_bytes=1, media_type="any")
    registry = RegistryBlob(
        registry="r.example", repository="x", blob_digest="x", media_type="x", size_bytes=1
    )
    assert (way.uploads(file), way.uploads(registry)) == (True, False)


async def test_what_is_told_to_the_daemon_names_files_by_absolute_paths(
    daemon: Daemon, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.operations.may_fetch = True
    monkeypatch.chdir(bundle.parent)
    assert await daemon.acon("load", bundle.name) == 0
    for source in daemon.operations.fetched:
        assert isinstance(source, FileBlob)
        assert Path(source.file).is_absolute() and Path(source.file).is_file()


async def test_a_layer_that_is_the_wrong_one_is_found_before_admission_if_it_is_sent_from_here(
    daemon: Daemon, bundle: Path
) -> None:
    other = Bundle(bundle).sources()[str(DIGESTS[1])]
    assert isinstance(other, FileBlob)
    relocate(bundle, lambda _source: other)
    assert await daemon.acon("load", bundle, "--upload") == 1
    assert daemon.operations.groups == []


async def test_a_layer_that_is_the_wrong_one_is_never_sent(daemon: Daemon, bundle: Path) -> None:
    other = Bundle(bundle).sources()[str(DIGESTS[1])]
    assert isinstance(other, FileBlob)
    relocate(bundle, lambda _source: other)
    # Its blob is whole, so that this is seen only once it is decompressed.
    assert await daemon.acon("load", bundle) == 1
    assert set(daemon.operations.layers) == set(DIGESTS[1:])
    assert len(daemon.operations.uploads) == 5


@pytest.mark.parametrize("named", [True, False])
async def test_a_changed_blob_is_found_before_admission_even_where_the_daemon_fetches(
    named: bool, daemon: Daemon, bundle: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"

    def change(source: FileBlob) -> FileBlob:
        raw = bytearray(Path(source.file).read_bytes())
        raw[len(raw) // 2] ^= 1
        changed.write_bytes(raw)
        digest = source.blob_digest if named else None
        return msgspec.structs.replace(source, file=str(changed), blob_digest=digest)

    daemon.operations.may_fetch = True
    relocate(bundle, change)
    assert await daemon.acon("load", bundle) in (1, 2)
    assert daemon.operations.groups == []


async def test_a_layer_that_one_source_has_not_is_taken_from_the_next(
    daemon: Daemon, bundle: Path, owner: Signer, acon: Acon, tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    layout = tmp_path / "layouts" / "six"
    assert acon("image", "convert", f"oci:{layout}", "-o", twin, "--name", "twin:1") == 0
    keys = ("--key", owner.key, "--cert", owner.certificate)
    assert acon("image", "sign", twin, *keys) == 0
    relocate(bundle, lambda one: msgspec.structs.replace(one, file=str(tmp_path / "absent")))
    assert await daemon.acon("load", bundle) == 2
    assert daemon.operations.groups == []
    assert await daemon.acon("load", bundle, twin) == 0
    assert set(daemon.operations.layers) == set(DIGESTS)


async def test_a_layer_of_which_nothing_says_where_it_is_is_refused_naming_it(
    daemon: Daemon, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "sources.json").unlink()
    capsys.readouterr()
    assert await daemon.acon("load", bundle, "--json") == 2
    # The failure too is a line among lines.
    *_others, last = lines_of(capsys.readouterr().out)
    error = last["error"]
    assert isinstance(error, dict)
    assert error["item"] == str(DIGESTS[0])
    assert daemon.operations.groups == []


# --- what it says ---------------------------------------------------------------------------------


async def test_programs_are_told_how_far_a_layer_is(
    daemon: Daemon,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_report, "_PAUSE_S", 0.0)
    capsys.readouterr()
    assert await daemon.acon("load", bundle, "--json", "--upload") == 0
    events = lines_of(capsys.readouterr().out)
    progress = [event for event in events if event["event"] == "progress"]
    assert {event["step"] for event in progress} == {"check", "send"}
    for digest, tar in zip(DIGESTS, TARS, strict=True):
        own = [one for one in progress if one["digest"] == str(digest) and one["step"] == "send"]
        assert (own[-1]["done_bytes"], own[-1]["total_bytes"]) == (len(tar), len(tar))


async def test_programs_are_not_told_more_than_once_a_second_of_each_layer(
    daemon: Daemon, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.may_fetch = True
    daemon.operations.fetch_hold = hold = trio.Event()
    capsys.readouterr()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.acon, "load", bundle, "--json", "--parallel", 1)
            await daemon.operations.wait_for_fetches(1)
            told_s = 0.0
            while told_s < 2.6:
                event = LayerProgress(
                    digest=str(DIGESTS[0]), received_bytes=int(told_s * 10), total_bytes=99
                )
                await daemon.operations.report(event)
                await trio.sleep(0.1)
                told_s += 0.1
            hold.set()
    events = lines_of(capsys.readouterr().out)
    progress = [event for event in events if event["event"] == "progress"]
    assert 1 <= len(progress) <= 4
    assert {event["step"] for event in progress} == {"fetch"}
    assert progress[0]["total_bytes"] == 99


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_people_see_a_bar_for_each_layer_on_a_terminal_only(
    daemon: Daemon, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal, output = Terminal(), io.StringIO()
    daemon.operations.may_fetch = True
    daemon.operations.fetch_hold = hold = trio.Event()
    with monkeypatch.context() as patch, trio.fail_after(DEADLINE_S):
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(sys, "stdout", output)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.acon, "load", bundle, "--parallel", 2)
            await daemon.operations.wait_for_fetches(2)
            await trio.sleep(0.5)
            hold.set()
    shown = terminal.getvalue()
    assert all(f"fetch {digest.hex[:12]}" in shown for digest in DIGESTS[:2])
    # A pipe gets the lines as they are, without a terminal's commands.
    assert output.getvalue().count(": verified\n") == len(DIGESTS)
    assert "\x1b" not in output.getvalue()


async def test_where_nobody_looks_there_are_no_bars(
    daemon: Daemon, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert await daemon.acon("load", bundle) == 0
    assert capsys.readouterr().err == ""


# --- interrupted ----------------------------------------------------------------------------------


async def interrupted(
    daemon: Daemon, temporary: Path, until: Callable[[], Awaitable[None]], *words: object
) -> tuple[int, str]:
    """A load in a process of its own that gets Ctrl-C once `until` is over: its exit code and
    what it said on standard error."""
    temporary.mkdir()
    with trio.fail_after(DEADLINE_S):
        process = await trio.lowlevel.open_process(
            [
                sys.executable,
                "-m",
                "acon.cli",
                "load",
                *map(str, words),
                "--socket",
                str(daemon.socket),
            ],
            env={**os.environ, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stderr is not None
        try:
            await until()
            process.send_signal(signal.SIGINT)
            said = b"".join([chunk async for chunk in process.stderr])
            return await process.wait(), said.decode()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_ctrl_c_makes_the_daemon_give_up_its_transfers(
    daemon: Daemon, bundle: Path, tmp_path: Path
) -> None:
    daemon.operations.may_fetch = True
    daemon.operations.fetch_hold = trio.Event()
    code, said = await interrupted(
        daemon, tmp_path / "tmp", lambda: daemon.operations.wait_for_fetches(4), bundle
    )
    assert (code, said) == (130, "")
    await daemon.operations.wait_for_fetches(0)
    assert daemon.operations.given_up == 4
    assert daemon.operations.layers == {}


async def test_ctrl_c_during_an_upload_leaves_no_temporary_file_and_no_half_of_a_layer(
    daemon: Daemon, bundles: Bundles, owner: Signer, acon: Acon, tmp_path: Path
) -> None:
    async with hostile_registry() as registry:
        reference = f"docker://{registry.name}/app:1"
        app = bundles.image("app", owner)
        publish = ("image", "publish", app, reference)
        assert await trio.to_thread.run_sync(lambda: acon(*publish)) == 0
        sources = Bundle(app).sources().values()
        for source in sources:
            registry.misbehave(stalled(20), on=str(source.blob_digest))
        temporary = tmp_path / "tmp"

        async def both_begun() -> None:
            # Both wait for the rest of a blob, of which the beginning lies in a file.
            while len(list(temporary.iterdir())) < len(sources):  # noqa: ASYNC110 - another process
                await trio.sleep(0.02)

        code, said = await interrupted(daemon, temporary, both_begun, reference)
        assert (code, said) == (130, "")
        assert list(temporary.iterdir()) == []
        assert daemon.operations.layers == {}
