"""The operator's commands against the real HTTP server over a supervisor that remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from acon_daemon import Bundles, Daemon, lines_of
from acon_helpers import Acon, MakeSigner, tar_of
from http_fakes import IMAGE_ID

from supervisor import PolicyDenied, UnknownItem
from supervisor.formats.digest import Digest, digest_of

NONCE = "ab" * 32


def ring(bundles: Bundles, make_signer: MakeSigner) -> list[Path]:
    """Three images that reject the unaccepted; each accepts the next one only."""
    owners = [make_signer(name) for name in ("one", "two", "three")]
    return [
        bundles.image(f"app{at}", owners[at], "--accept", following, "--reject-unaccepted")
        for at, following in enumerate(owners[(at + 1) % 3].certificate for at in range(3))
    ]


async def test_load_admits_as_a_group_what_could_not_be_admitted_one_by_one(
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = ring(bundles, make_signer)
    capsys.readouterr()
    assert await daemon.acon("load", *images, "--json") == 0
    # The first is alone with itself; the second is not accepted back before the third is there.
    assert [len(group) for group in daemon.operations.groups] == [1, 2]
    assert all(not view.missing_layers for view in daemon.operations.images())
    events = lines_of(capsys.readouterr().out)
    assert [event["event"] for event in events] == ["admitted"] * 2 + ["layer"] * 4


async def test_together_makes_one_group_in_the_order_given(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    images = ring(bundles, make_signer)
    assert await daemon.acon("load", *images, "--together") == 0
    (group,) = daemon.operations.groups
    expected = [(image / "manifest.json").read_bytes() for image in images]
    assert [upload.manifest for upload in group] == expected


async def test_a_layer_that_several_images_share_is_sent_once(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    owner = make_signer("owner")
    assert await daemon.acon("load", *(bundles.image(name, owner) for name in "ab")) == 0
    assert len(daemon.operations.uploads) == 3


async def test_what_is_sent_is_the_uncompressed_tar(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    bundle = bundles.image("app", make_signer("owner"))
    assert await daemon.acon("load", bundle) == 0
    expected = digest_of("sha384", tar_of({"app": b"app"}))
    assert daemon.operations.layers[expected] == tar_of({"app": b"app"})


async def test_load_finds_the_vendors_layer_that_an_image_delegates(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    csp = make_signer("csp")
    vendor = bundles.vendor("lib:2", csp)
    app = bundles.image("app", make_signer("owner"), to=f"{csp.certificate}:lib:2")
    assert await daemon.acon("load", app, vendor) == 0
    assert all(not view.missing_layers for view in daemon.operations.images())


async def test_an_image_whose_delegated_layer_nobody_gave_is_loaded_and_said_to_be_incomplete(
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    capsys: pytest.CaptureFixture[str],
) -> None:
    csp = make_signer("csp")
    app = bundles.image("app", make_signer("owner"), to=f"{csp.certificate}:lib:2")
    capsys.readouterr()
    assert await daemon.acon("load", app, "--json") == 0
    (last,) = lines_of(capsys.readouterr().out)[-1:]
    assert last["missing"] == [f"signer/{csp.signer_id}/lib:2"]


async def test_images_that_reject_each_other_are_refused_before_the_daemon_is_asked(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    one, two = make_signer("one"), make_signer("two")
    first = bundles.image("first", one, "--reject-unaccepted")
    second = bundles.image("second", two)
    assert await daemon.acon("load", first, second) == 1
    assert daemon.operations.groups == []
    assert daemon.operations.uploads == []


async def test_what_is_loaded_already_counts_for_who_accepts_whom(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    one, two = make_signer("one"), make_signer("two")
    first = bundles.image("first", one, "--reject-unaccepted")
    second = bundles.image("second", two)
    assert await daemon.acon("load", first) == 0
    assert await daemon.acon("load", second) == 1
    # Asked for the manifests that it has, and for nothing else.
    assert len(daemon.operations.nonces) == 1
    assert len(daemon.operations.groups) == 1


async def test_one_changed_byte_in_a_layer_is_found_before_admission(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner, tmp_path: Path
) -> None:
    bundle = bundles.image("app", make_signer("owner"))
    for blob in (tmp_path / "layouts" / "app" / "blobs" / "sha256").iterdir():
        raw = bytearray(blob.read_bytes())
        if raw.startswith(b"\x1f\x8b"):
            raw[len(raw) // 2] ^= 1
            blob.write_bytes(raw)
    assert await daemon.acon("load", bundle) in (1, 2)
    assert daemon.operations.groups == []


async def test_loading_twice_sends_no_layer_again(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    bundle = bundles.image("app", make_signer("owner"))
    assert await daemon.acon("load", bundle) == 0
    sent = len(daemon.operations.uploads)
    assert await daemon.acon("load", bundle) == 0
    assert len(daemon.operations.uploads) == sent
    assert len(daemon.operations.groups) == 1


async def test_seal_reaches_the_daemon(daemon: Daemon) -> None:
    assert await daemon.acon("seal") == 0
    assert daemon.operations.sealed


async def test_an_image_is_started_by_name_by_name_with_version_by_digest_and_by_id(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    assert await daemon.acon("load", bundles.image("app", make_signer("owner"))) == 0
    image_id = str(daemon.operations.admitted[0].image_id)
    manifest = image_id.rpartition("/")[2]
    for text in ("app", "app:1", manifest[:8], image_id):
        assert await daemon.acon("start", text, "--env", "A=1", "--env", "B=") == 0
    assert daemon.operations.starts == [(image_id, ("A=1", "B="))] * 4
    assert await daemon.acon("start", "other") == 1
    assert len(daemon.operations.starts) == 4


async def test_an_image_is_started_by_its_id_as_tables_cut_it_short(
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert await daemon.acon("load", bundles.image("app", make_signer("owner"))) == 0
    image_id = str(daemon.operations.admitted[0].image_id)
    capsys.readouterr()
    assert await daemon.acon("status") == 0
    algorithm, signer, manifest = image_id.split("/")
    short = f"{algorithm}/{signer[:12]}../{manifest[:12]}.."
    out = capsys.readouterr().out
    # The status knows another image than those that were loaded: it is a fake.
    assert f"sha384/{'a' * 12}../{'b' * 12}.." in out
    assert "a" * 13 not in out
    assert await daemon.acon("status", "--no-trunc") == 0
    assert "a" * 96 in capsys.readouterr().out
    for text in (short, f"{manifest[:12]}..", f"{algorithm}/{signer}"):
        assert await daemon.acon("start", text) == 0
    assert {started for started, _ in daemon.operations.starts} == {image_id}
    assert await daemon.acon("start", f"{algorithm}/{signer[:12]}../{'0' * 12}..") == 1
    assert await daemon.acon("start", algorithm + "/") == 1


async def test_errors_show_ids_cut_short_and_json_shows_them_whole(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.refusal = UnknownItem(IMAGE_ID, "is not here")
    assert await daemon.acon("seal", "--anyway") == 1
    assert f"sha384/{'a' * 12}../{'b' * 12}..: is not here" in capsys.readouterr().err
    assert await daemon.acon("seal", "--anyway", "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"]["item"] == IMAGE_ID


async def test_a_rule_that_would_mend_a_refusal_is_shown_whole(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.refusal = PolicyDenied(IMAGE_ID, f"add {IMAGE_ID} to policy.accepts")
    assert await daemon.acon("seal", "--anyway") == 1
    assert f"add {IMAGE_ID} to" in capsys.readouterr().err


async def test_a_beginning_that_two_images_share_starts_neither(
    daemon: Daemon, bundles: Bundles, make_signer: MakeSigner
) -> None:
    owner = make_signer("owner")
    both = (bundles.image("first", owner), bundles.image("second", owner))
    assert await daemon.acon("load", *both) == 0
    assert await daemon.acon("start", owner.signer_id) == 2
    assert daemon.operations.starts == []


async def test_a_refusal_by_the_daemon_is_exit_code_1_with_its_reason(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.refusal = PolicyDenied("item", "rule", expected="this", actual="that")
    assert await daemon.acon("seal", "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["item"], error["expected"]) == ("policy", "item", "this")


async def test_signals_go_by_number_by_name_and_to_groups(daemon: Daemon) -> None:
    for word in ("10", "TERM", "sigusr1", "-9"):
        assert await daemon.acon("signal", "3", word) == 0
    assert daemon.operations.signals == [(3, 10), (3, 15), (3, 10), (3, -9)]
    assert await daemon.acon("signal", "3", "NONSENSE") == 2


async def test_status_is_shown(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert await daemon.acon("status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sealed"] is False


async def test_evidence_is_written_as_it_came_for_the_nonce_that_was_given(
    daemon: Daemon, tmp_path: Path
) -> None:
    output = tmp_path / "evidence.json"
    assert await daemon.acon("evidence", "--nonce", NONCE, "-o", output) == 0
    assert daemon.operations.nonces == [bytes.fromhex(NONCE)]
    assert json.loads(output.read_bytes())["request"]["nonce"] == NONCE


@pytest.mark.parametrize("nonce", ["", "ab" * 15, "ab" * 65, "xyz", "ab" * 16 + "a"])
async def test_a_nonce_that_is_none_is_wrong_usage(
    nonce: str, daemon: Daemon, tmp_path: Path
) -> None:
    command = ("evidence", "--nonce", nonce, "-o", tmp_path / "evidence.json")
    assert await daemon.acon(*command) == 2
    assert daemon.operations.nonces == []


def test_a_daemon_that_is_not_there_is_a_failure(acon: Acon, tmp_path: Path) -> None:
    assert acon("status", "--socket", tmp_path / "absent.sock") == 1


def test_the_socket_may_come_from_the_environment(
    acon: Acon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACON_SOCKET", str(tmp_path / "named-by-environment.sock"))
    assert acon("status") == 1
    assert "named-by-environment.sock" in capsys.readouterr().err
    monkeypatch.setenv("ACON_URL", "https://td.example:1025")
    assert acon("status") == 2


def test_a_layer_that_is_asked_for_from_an_offset_gives_exactly_the_rest(
    tmp_path: Path,
) -> None:
    import gzip

    from acon.local_layer import LocalLayer
    from supervisor.seams import FileBlob

    data = bytes(range(256)) * 10_000
    (tmp_path / "blob").write_bytes(gzip.compress(data))
    source = FileBlob(
        file=str(tmp_path / "blob"),
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        size_bytes=(tmp_path / "blob").stat().st_size,
    )
    layer = LocalLayer(Digest("sha384", "00"), source, len(data))
    for offset in (0, 1, 1024 * 1024, 1024 * 1024 + 7, len(data) - 1, len(data)):
        assert b"".join(layer.chunks(offset)) == data[offset:]
