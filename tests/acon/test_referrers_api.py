"""Publishing to and loading from a registry of others that has the referrers API: that of
go-containerregistry, built here with Go; skipped where that cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from acon_daemon import Bundles, Daemon
from acon_helpers import Acon, MakeSigner
from local_registry import LocalRegistry
from peers import Skopeo

from supervisor.seams import RegistryBlob

pytestmark = pytest.mark.full

MODULE = "github.com/google/go-containerregistry@v0.22.1"
PROGRAM = """\
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr())
	quiet := registry.Logger(log.New(io.Discard, "", 0))
	log.Fatal(http.Serve(listener, registry.New(quiet, registry.WithReferrersSupport(true))))
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    go = shutil.which("go")
    if go is None:
        pytest.skip("go is not installed")
    folder = tmp_path_factory.mktemp("go")
    environment = {
        **os.environ,
        "GOPATH": str(folder / "path"),
        "GOCACHE": str(folder / "cache"),
        # Read-only folders in the module cache could not be removed with the test's own.
        "GOFLAGS": "-modcacherw",
    }
    source = folder / "source"
    source.mkdir()
    (source / "main.go").write_text(PROGRAM)
    for words in (
        ["mod", "init", "example.org/registry"],
        ["get", MODULE],
        ["build", "-o", str(folder / "registry"), "."],
    ):
        try:
            done = subprocess.run(
                [go, *words],
                cwd=source,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{MODULE} was not built in 300 s")
        if done.returncode != 0:
            pytest.skip(f"{MODULE} cannot be built here: {done.stderr.strip()[-300:]}")
    return folder / "registry"


@pytest.fixture
def listing_registry(program: Path, tmp_path: Path) -> Iterator[LocalRegistry]:
    process = subprocess.Popen([program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert name.startswith("127.0.0.1:")
        yield LocalRegistry(name, tmp_path)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def test_what_is_published_is_listed_by_the_registry_and_loaded_from_there(
    listing_registry: LocalRegistry,
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    acon: Acon,
    skopeo: Skopeo,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = listing_registry.reference("team/app")
    bundle = bundles.image("app", make_signer("owner"))
    capsys.readouterr()
    assert acon("image", "publish", bundle, reference, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    image, artifact = (str(done[name]).rpartition("@")[2] for name in ("image", "artifact"))
    # As a registry that says so would do it: the tag is not needed.
    base = f"{listing_registry.url}/v2/team/app"
    async with httpx.AsyncClient(trust_env=False) as http:
        gone = await http.delete(f"{base}/manifests/{done['fallback_tag']}")
        assert gone.status_code < 300
        listed = await http.get(f"{base}/referrers/{image}")
    assert [one["digest"] for one in listed.json()["manifests"]] == [artifact]

    daemon.operations.may_fetch = True
    assert await daemon.acon("load", reference) == 0
    assert len(daemon.operations.fetched) == 2

    # A copy of both needs no list: the registry makes its own.
    for source, target in (
        (reference, listing_registry.reference("copied")),
        (done["artifact"], f"docker://{listing_registry.name}/copied@{artifact}"),
    ):
        skopeo.copy(
            source, target, source_registry=listing_registry, target_registry=listing_registry
        )
    daemon.operations.layers.clear()
    assert await daemon.acon("load", listing_registry.reference("copied")) == 0
    (*_others, last) = daemon.operations.fetched
    assert isinstance(last, RegistryBlob)
    assert last.repository == "copied"
