"""Files of the distribution's own packages, fetched and resolved by its own apt.

apt verifies the archive's signatures; nothing is installed on this machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

_APT_TIMEOUT_S = 600
_UNPACK_TIMEOUT_S = 120
# What `apt-get --simulate` says of each package: `Inst name (version origin [arch])`.
_CHOSEN = re.compile(r"Inst (?P<name>[^ :]+)(?::\S+)? (?:\[\S+\] )?\((?P<version>\S+) ")


class AptFailed(Exception):
    """apt or dpkg-deb could not do it; the text holds their words."""


def download(packages: list[str], cache: Path) -> list[Path]:
    """Packages and all that they depend on, as `.deb` files in `cache`; sorted by name.

    apt is told that nothing is installed, so what it picks does not depend on this machine.
    """
    archives = cache / "archives"
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    nothing_installed = cache / "status"
    nothing_installed.write_bytes(b"")
    options = (
        f"Dir::State::status={nothing_installed}",
        f"Dir::Cache::archives={archives}",
        # The cache may lie where the user _apt cannot write; we need no other privilege.
        "APT::Sandbox::User=root",
        "APT::Keep-Downloaded-Packages=true",
    )
    command = ["apt-get", "install", "-y", "--no-install-recommends"]
    for option in options:
        command += ["-o", option]
    _apt([*command, "--download-only", *packages])
    listed = _apt([*command, "--print-uris", "--reinstall", "--simulate", *packages])
    found: list[Path] = []
    for line in listed.splitlines():
        chosen = _CHOSEN.match(line)
        if chosen is None:
            continue
        # apt writes the colon of a version's epoch as %3a in file names.
        version = chosen["version"].replace(":", "%3a")
        matching = sorted(archives.glob(f"{chosen['name']}_{version}_*.deb"))
        if not matching:
            raise AptFailed(f"apt did not fetch {chosen['name']} {chosen['version']}")
        found.append(matching[0])
    if not found:
        raise AptFailed(f"apt knows no package {', '.join(packages)}")
    return sorted(found)


def package_of(deb: Path) -> tuple[str, str]:
    """Name and version, as the file says."""
    text = _run(["dpkg-deb", "--show", "--showformat", "${Package} ${Version}", str(deb)])
    name, _, version = text.decode("utf-8").partition(" ")
    return name, version


def members(deb: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every entry of a package with its content (empty unless it is a regular file)."""
    process = subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        if process.stdout is None or process.stderr is None:
            raise RuntimeError("pipes were asked for")
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isreg() else None
                    yield member, file.read() if file is not None else b""
            # The padding behind the archive, so that dpkg-deb does not see a closed pipe.
            while process.stdout.read(65536):
                pass
            words = process.stderr.read().decode("utf-8", "replace")
            if process.wait(_UNPACK_TIMEOUT_S) != 0:
                raise AptFailed(f"{deb.name}: {words}")
        finally:
            process.kill()


def _apt(command: list[str]) -> str:
    return _run(command).decode("utf-8", "replace")


def _run(command: list[str]) -> bytes:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_APT_TIMEOUT_S, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AptFailed(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip()
        raise AptFailed(f"{' '.join(command[:2])}: {words}")
    return done.stdout
