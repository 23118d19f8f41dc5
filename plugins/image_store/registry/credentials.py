"""Logins at registries, from a docker `config.json` as docker and podman write it.

Only logins that lie in the file itself are read. Credential helpers are programs that the
file names; this package starts none (the daemon holds a TD's trust), and says so where one
would be needed: for registries below `credHelpers`, and for those that `docker login` noted
by an empty entry when it gave the login to the `credsStore`.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path

import msgspec

from plugins.image_store.registry.names import parse_registry
from supervisor import ConfigError, Denied
from supervisor.formats.canonical_json import decode, member_path
from supervisor.formats.errors import FormatError
from supervisor.formats.typed_json import to_struct

MAX_FILE_BYTES = 2**20


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """A user's name and password, or the refresh token of an OAuth2 token server."""

    user: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        return "Login(…)"

    def __bool__(self) -> bool:
        return bool(self.user or self.password or self.identity_token)

    @property
    def basic(self) -> str:
        """The value of `Authorization` (RFC 7617), UTF-8."""
        pair = f"{self.user}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no log and no error may show."""
        encoded = self.basic.removeprefix("Basic ") if self.password else ""
        return tuple(text for text in (self.password, self.identity_token, encoded) if text)


class _Entry(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _File(msgspec.Struct, frozen=True):
    auths: dict[str, _Entry] = {}
    credsStore: str = ""
    credHelpers: dict[str, str] = {}


class Credentials:
    """The logins of one file, or none. Immutable; shows no secret when it is printed."""

    def __init__(self, path: Path | None = None, file: _File | None = None) -> None:
        self._path = path
        self._file = _File() if file is None else file
        self._logins = {
            key: _login(entry, item=member_path(f"{path}.auths", key))
            for key, entry in self._file.auths.items()
        }

    def __repr__(self) -> str:
        return f"Credentials({self.source!r})"

    @property
    def source(self) -> str:
        """Where logins were looked for, for refusals."""
        if self._path is None:
            return "no credentials file"
        store = self._file.credsStore
        left_out = f" (its credsStore {store[:80]!r} is left out)" if store else ""
        return f"{self._path}{left_out}"

    def login(self, registry: str, repository: str) -> Login | None:
        """The login for a repository: that of the longest key `HOST/PATH` it lies under.

        `registry` as `parse_registry` spells it. Raises `Denied` if the file leaves this
        registry's login to a credential helper.
        """
        best: tuple[int, Login] | None = None
        is_noted = False
        for key, login in self._logins.items():
            place = _place(key)
            if place is None or place[0] != registry:
                continue
            path = place[1]
            if path and repository != path and not repository.startswith(path + "/"):
                continue
            if not login:
                is_noted = True
            elif best is None or len(path) > best[0]:
                best = (len(path), login)
        if best is not None:
            return best[1]
        helper = self._helper(registry) or (self._file.credsStore if is_noted else "")
        if helper:
            raise Denied(
                registry,
                "credential helpers are left out: write a login for this registry into the file "
                "itself (podman login --authfile FILE, or docker login without credsStore)",
                expected=f"an entry with auth, or identitytoken, below auths in {self._path}",
                actual=f"only the helper {helper[:80]!r}",
            )
        return None

    def _helper(self, registry: str) -> str:
        for key, helper in self._file.credHelpers.items():
            place = _place(key)
            if helper and place is not None and place[0] == registry:
                return helper
        return ""


def load_credentials(path: Path | None) -> Credentials:
    """Read a docker `config.json` or podman `auth.json`; None: no logins. Blocking.

    Raises `ConfigError` if the file cannot be read, `FormatError` for what is wrong in it;
    both name the file, neither shows what it holds.
    """
    if path is None:
        return Credentials()
    value = decode(_read(path), item=str(path), max_bytes=MAX_FILE_BYTES)
    return Credentials(path, to_struct(value, _File, item=str(path)))


def _read(path: Path) -> bytes:
    try:
        # Nonblocking: a pipe in the file's place must not hang the daemon.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(str(path), "the credentials file must be a plain file")
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            str(path), "the credentials file must be readable", actual=error.strerror
        ) from None


def _login(entry: _Entry, *, item: str) -> Login:
    user, password = entry.username, entry.password
    if entry.auth:
        try:
            pair = base64.b64decode(entry.auth, validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            pair = ""
        user, colon, password = pair.partition(":")
        if not colon:
            raise FormatError(f"{item}.auth", "must be base64 of USER:PASSWORD")
        # Docker's own files are padded so.
        password = password.strip("\0")
    if ":" in user:
        raise FormatError(f"{item}.username", "a user's name must not hold ':'")
    return Login(user=user, password=password, identity_token=entry.identitytoken)


def _place(key: str) -> tuple[str, str] | None:
    """The registry and the path below it that a key names; None: no registry's name."""
    scheme, marker, rest = key.partition("://")
    if marker and scheme not in ("http", "https"):
        return None
    host, _, path = (rest if marker else key).partition("/")
    path = path.strip("/")
    # Docker's keys may end in the API's path; podman's name a part of the registry.
    if marker or path in ("v1", "v2"):
        path = ""
    try:
        return parse_registry(host), path
    except FormatError:
        return None
