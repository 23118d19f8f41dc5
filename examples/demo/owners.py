"""The owners and the CSP: their keys, their manifests, and what they sign."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from registry import Registry
from stage import Argument, Stage

# Two owners whose images accept each other and nobody else: these, and the lab with the rest.
CLINIC = ("gateway", "intake", "audit")
PROGRAMS = ("gateway", "intake", "features", "model", "audit")
# In these the interpreter's layer is the CSP's to maintain; everything else is pinned.
DELEGATING = ("intake", "model")
INTERPRETER_LAYER = "1"
SIGNERS = ("clinic", "lab", "csp", "eve")
SIGTERM = "-15"


class Owners:
    """Keys and bundles of everybody on the stage."""

    def __init__(self, stage: Stage, registry: Registry, cache: Path) -> None:
        self.stage = stage
        self._registry = registry
        self._keys = stage.out / "keys"
        self.layouts = stage.out / "layouts"
        self._bundles = stage.out / "bundles"
        self._cache = cache

    def key(self, signer: str) -> Path:
        return self._keys / f"{signer}.pem"

    def certificate(self, signer: str) -> Path:
        return self._keys / f"{signer}.der"

    def bundle(self, name: str) -> Path:
        return self._bundles / name

    def all_bundles(self) -> list[Path]:
        return [self.bundle(name) for name in PROGRAMS]

    def published(self, name: str) -> str:
        """Where the owner of an image, or the CSP, offers it."""
        return self._registry.reference(f"{self.owner_of(name)}/{name}")

    def all_items(self) -> list[Argument]:
        """What an operator loads: the clinic's images from the registry, the lab's from disk."""
        return [self.published(name) if name in CLINIC else self.bundle(name) for name in PROGRAMS]

    def owner_of(self, program: str) -> str:
        if program in PROGRAMS:
            return "clinic" if program in CLINIC else "lab"
        return "csp"

    def make_keys(self) -> None:
        """With openssl, as owners have it: P-384, certificates signed with SHA-384."""
        self._keys.mkdir(parents=True, exist_ok=True)
        for signer in SIGNERS:
            command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-sha384"]
            command += ["-pkeyopt", "ec_paramgen_curve:P-384", "-days", "30"]
            command += ["-subj", f"/O=Attested Containers demo/CN={signer}"]
            command += ["-keyout", str(self.key(signer)), "-outform", "DER"]
            command += ["-out", str(self.certificate(signer))]
            subprocess.run(command, check=True, capture_output=True)

    def build_images(self) -> None:
        """From the distribution's packages, as OCI layouts (see images.py)."""
        script = Path(__file__).with_name("images.py")
        command = [sys.executable, str(script), str(self.layouts), "--cache", str(self._cache)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        self.sources: dict[str, str] = json.loads(done.stdout)

    def convert_and_sign(self) -> None:
        for name in PROGRAMS:
            arguments: list[Argument] = ["image", "convert", self.sources[name]]
            arguments += ["-o", self.bundle(name), "--name", f"{name}:1", "--reject-unaccepted"]
            # A ring: each accepts the next one, and through it all the others.
            following = PROGRAMS[(PROGRAMS.index(name) + 1) % len(PROGRAMS)]
            rule = f"{self.certificate(self.owner_of(following))}:{following}:1"
            arguments += ["--accept", rule]
            arguments += [f"--signal={SIGTERM}", "--log-fd", "1", "--log-fd", "2"]
            self.stage.acon(*arguments, show=name == "gateway")
            if name in DELEGATING:
                self._delegate(self.bundle(name), show=name == "model")
            self.sign(self.bundle(name), self.owner_of(name), show=name == "gateway")

    def publish(self, name: str, *, show: bool = False) -> None:
        """Image and signed manifest go to the registry together."""
        self.stage.acon("image", "publish", self.bundle(name), self.published(name), show=show)

    def _delegate(self, bundle: Path, *, show: bool) -> None:
        to = f"{self.certificate('csp')}:python:2"
        arguments: list[Argument] = [
            "image",
            "delegate",
            bundle,
            "--layer",
            INTERPRETER_LAYER,
            "--to",
            to,
        ]
        self.stage.acon(*arguments, show=show)

    def sign(self, bundle: Path, signer: str, *, show: bool = False) -> None:
        arguments: list[Argument] = ["image", "sign", bundle, "--key", self.key(signer)]
        self.stage.acon(*arguments, "--cert", self.certificate(signer), show=show)

    def vendor(
        self,
        name: str,
        version: int,
        aliases: list[str],
        *,
        signer: str = "csp",
        show: bool = False,
    ) -> Path:
        """A layer-only image that vouches for one interpreter build under these aliases."""
        bundle = self.bundle(name)
        arguments: list[Argument] = ["vendor", "make", self.sources[f"interpreter-{version}"]]
        for alias in aliases:
            arguments += ["--alias", alias]
        self.stage.acon(*arguments, "-o", bundle, show=show)
        keys: list[Argument] = ["--key", self.key(signer), "--cert", self.certificate(signer)]
        self.stage.acon("vendor", "sign", bundle, *keys, show=show)
        return bundle

    def changed(self, name: str, into: str, *, signer: str, **fields: object) -> Path:
        """A copy of a bundle whose manifest says something else, signed by `signer`."""
        bundle = self.bundle(into)
        shutil.copytree(self.bundle(name), bundle)
        manifest = json.loads((bundle / "manifest.json").read_bytes())
        for field, value in fields.items():
            manifest[field] = {**manifest[field], **value} if isinstance(value, dict) else value
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        (bundle / "manifest.json").write_text(text)
        (bundle / "signature").unlink(missing_ok=True)
        self.sign(bundle, signer)
        return bundle
