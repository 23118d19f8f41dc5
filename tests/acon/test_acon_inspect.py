"""`acon inspect` against the real HTTP server, of a container of a real signed image."""

from __future__ import annotations

import json

import msgspec
import pytest
from acon_daemon import Bundles, Daemon
from acon_helpers import MakeSigner
from http_fakes import START_DIGEST

from supervisor.formats.signature import SignedManifest

LAYERS = (f"sha384/{'1' * 96}", f"sha384/{'2' * 96}")


def admitted_app(daemon: Daemon) -> SignedManifest:
    (app,) = [one for one in daemon.operations.admitted if one.manifest.is_executable]
    return app


async def run_an_image(daemon: Daemon, bundles: Bundles, make_signer: MakeSigner) -> str:
    """Container 1 runs an image whose lower layer is delegated; returns the image's id."""
    csp = make_signer("csp")
    app = bundles.image(
        "app",
        make_signer("owner"),
        *("--signal", "15", "--signal=-10", "--max-instances", "3", "--writable"),
        to=f"{csp.certificate}:lib:2",
    )
    assert await daemon.acon("load", app, bundles.vendor("lib:2", csp)) == 0
    image_id = str(admitted_app(daemon).image_id)
    view = msgspec.structs.replace(
        daemon.operations.known[0],
        image_id=image_id,
        argv=("/app", "two words"),
        signals=(15, -10),
        layers=LAYERS,
    )
    daemon.operations.known = (view,)
    return image_id


async def test_everything_is_shown_whole(
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image_id = await run_an_image(daemon, bundles, make_signer)
    capsys.readouterr()
    assert await daemon.acon("inspect", "app") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    delegated_to = str(admitted_app(daemon).manifest.layers[0])
    for expected in (
        f"image        {image_id}",
        "names        app:1",
        f"signer       {image_id.rpartition('/')[0]}",
        "state        running",
        "memory       4 kB",
        "restart      possible",
        "command      /app 'two words'",
        "environment  A=1",
        "signals      SIGTERM (15)",
        "             SIGUSR1 (-10) to the process group",
        "log fds      1, 2",
        "root         can be written",
        "instances    at most 3",
        f"start event  sha384 {START_DIGEST}",
    ):
        assert expected in lines, expected
    assert delegated_to.startswith("signer/")
    assert f"layers       {LAYERS[0]}, left to {delegated_to}" in lines


async def test_json_has_the_same_and_what_the_manifest_says(
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image_id = await run_an_image(daemon, bundles, make_signer)
    capsys.readouterr()
    assert await daemon.acon("inspect", "1", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["image_id"] == image_id
    assert shown["image_names"] == ["app:1"]
    assert shown["memory_bytes"] == 4096
    assert shown["layers"] == list(LAYERS)
    assert shown["layer_references"][0].startswith("signer/sha384/")
    assert shown["signals"] == [15, -10]
    assert (shown["max_instances"], shown["writable_root"], shown["no_restart"]) == (3, True, False)


async def test_a_container_that_is_not_there_is_a_failure(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await daemon.acon("inspect", "77") == 1
    assert "container 77" in capsys.readouterr().err
