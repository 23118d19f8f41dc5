"""A real registry for tests: Debian's `docker-registry`, plain, or private with TLS."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry_tls import make_server_tls

from benchmarks.registry import running_registry

USER = "reader"
# Of a registry on loopback that lives as long as one test.
PASSWORD = "loopback-only"
# bcrypt of PASSWORD, the only form that the registry reads; made with crypt(3).
PASSWORD_BCRYPT = "$2y$05$abcdefghijklmnopqrstuucJNoj1zsjPrqk/a2HjbuRSfW87b9Cb2"


@dataclass(frozen=True)
class LocalRegistry:
    """A registry that answers.

    `name`: "127.0.0.1:PORT", as in references. `storage`: its files, which a test may look at.
    `ca_file`: PEM of the authority that signed its certificate, None: plain HTTP.
    `auth_file`: a docker config.json with its credentials, None: it asks for none.
    """

    name: str
    storage: Path
    ca_file: Path | None = None
    auth_file: Path | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.ca_file is None else 'https'}://{self.name}"

    def reference(self, repository: str, tag: str = "1") -> str:
        """`docker://127.0.0.1:PORT/REPOSITORY:TAG`"""
        return f"docker://{self.name}/{repository}:{tag}"


def why_no_registry() -> str | None:
    if shutil.which("docker-registry") is None:
        return "needs docker-registry (Debian: docker-registry)"
    return None


@contextmanager
def local_registry(folder: Path, *, tls_and_auth: bool = False) -> Iterator[LocalRegistry]:
    """Run a registry with all its files below `folder`, which its owner removes.

    With `tls_and_auth` it speaks TLS only, under an authority made here, and wants USER and
    PASSWORD. The process ends with the body, and with this process if that is killed.
    """
    http: dict[str, object] = {}
    auth: dict[str, object] | None = None
    ca_file = None
    if tls_and_auth:
        folder.mkdir(parents=True, exist_ok=True)
        tls = make_server_tls(folder, "127.0.0.1")
        ca_file = tls.ca_file
        http["tls"] = {"certificate": str(tls.certificate_file), "key": str(tls.key_file)}
        passwords = folder / "htpasswd"
        passwords.write_text(f"{USER}:{PASSWORD_BCRYPT}\n")
        auth = {"htpasswd": {"realm": "loopback", "path": str(passwords)}}
    with running_registry(folder, http=http, auth=auth) as name:
        auth_file = write_auth_file(folder / "auth.json", name) if tls_and_auth else None
        yield LocalRegistry(name, folder / "storage", ca_file, auth_file)


def write_auth_file(path: Path, registry: str, password: str = PASSWORD) -> Path:
    """A docker config.json with USER's credentials for one registry."""
    token = base64.b64encode(f"{USER}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {registry: {"auth": token}}}))
    path.chmod(0o600)
    return path
