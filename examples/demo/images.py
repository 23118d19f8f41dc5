"""Builds the demo's images, as OCI layouts, from the distribution's own packages.

    python examples/demo/images.py OUT --cache CACHE

Five images share a base layer (busybox and the links of a merged /usr) and an
interpreter layer (Python with its libraries, straight from the packages, with a
mark of who built it); each adds its program, the gateway also openssl:

    lowest  base   interpreter   [openssl]   program  highest

Besides, `interpreter-N` is the interpreter layer alone, as its vendor builds it for
security version N: what images that delegate it get.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from debs import AptFailed, download, members, package_of
from layers import MERGED, Layer
from oci import PackedLayer, Process, pack, write_layout

PROGRAMS = Path(__file__).with_name("programs")
# What a program in a container asks its supervisor with, for anybody to copy.
INSIDE = Path(__file__).parents[1] / "inside" / "acon_inside.py"
ENTRY_POINTS = "usr/lib/acon/entrypoint.d"
BUILD_FILE = "usr/lib/python-build-id"
INTERPRETER = "/usr/bin/python3"
# Where the interpreter stands among an image's layers, counted from 0.
INTERPRETER_LAYER = 1
GATEWAY_PORT = 8443
# Security versions of the interpreter: one before the images' own (2), and one after.
VERSIONS = (1, 2, 3)
_TAG = "1"
_PATH = "PATH=/usr/bin:/bin"
# What the programs never load: other languages' data, tools and tests.
_UNUSED_STDLIB = ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo")


@dataclass(frozen=True)
class Program:
    """One of the five: its port, the peers that it calls, files beside its own, and commands
    beside its program: those that begin with A to Z may be invoked by anybody."""

    name: str
    port: int
    peers: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    files: tuple[str, ...] = ()
    extra_env: tuple[str, ...] = ()
    entry_points: tuple[str, ...] = ()
    needs_openssl: bool = False
    asks_supervisor: bool = False

    @property
    def environment(self) -> tuple[str, ...]:
        ports = {one.name: one.port for one in PROGRAMS_OF_DEMO}
        return (
            _PATH,
            # A read-only root has no place for compiled modules.
            "PYTHONDONTWRITEBYTECODE=1",
            f"LISTEN_ADDRESS={self.address}",
            f"LISTEN_PORT={self.port}",
            *(f"{peer.upper()}_URL=http://127.0.0.1:{ports[peer]}" for peer in self.peers),
            *self.extra_env,
        )


PROGRAMS_OF_DEMO = (
    Program(
        "gateway",
        GATEWAY_PORT,
        peers=("intake", "audit"),
        address="0.0.0.0",
        extra_env=("CONTAINER_SOCKET=/run/acon.sock",),
        needs_openssl=True,
    ),
    Program("intake", 18101, peers=("features",)),
    Program("features", 18102, peers=("model",)),
    Program("model", 18103, peers=("audit",), files=("weights.json",)),
    Program(
        "audit",
        18104,
        extra_env=("CONTAINER_SOCKET=/run/acon.sock", "TRAIL_FILE=/tmp/trail"),
        entry_points=("Count", "forget"),
        asks_supervisor=True,
    ),
)


def build(
    out: Path,
    cache: Path,
    *,
    names: Iterable[str] | None = None,
    versions: Iterable[int] = VERSIONS,
) -> dict[str, str]:
    """Build images (all, or those named) and the vendor's interpreter layers.

    Returns names and sources, as `acon image convert` and `acon vendor make` take them.
    The images' own interpreter layer is version 2. Raises `AptFailed`.
    """
    wanted = tuple(PROGRAMS_OF_DEMO if names is None else (_program(name) for name in names))
    python_debs = [one for one in download(["python3"], cache) if _is_kept(package_of(one)[0])]
    base = pack(base_layer(cache).tar())
    files = interpreter_files(python_debs)
    interpreters = {
        version: pack(marked(files, version, _version_of(python_debs)).tar())
        for version in sorted({2, *versions})
    }
    openssl = None
    if any(program.needs_openssl for program in wanted):
        openssl = pack(openssl_layer(cache, beside=python_debs).tar())
    sources: dict[str, str] = {}
    for program in wanted:
        stack: list[PackedLayer] = [base, interpreters[2]]
        if program.needs_openssl and openssl is not None:
            stack.append(openssl)
        stack.append(pack(program_layer(program).tar()))
        process = Process(
            entrypoint=(INTERPRETER, f"/app/{program.name}.py"),
            env=program.environment,
            working_dir="/app",
        )
        write_layout(out / program.name, tag=_TAG, layers=stack, process=process)
        sources[program.name] = f"oci:{out / program.name}:{_TAG}"
    for version in versions:
        name = f"interpreter-{version}"
        write_layout(
            out / name, tag=str(version), layers=[interpreters[version]], process=Process()
        )
        sources[name] = f"oci:{out / name}:{version}"
    return sources


def base_layer(cache: Path) -> Layer:
    """busybox under all its names, the merged /usr, and where tmpfs will be mounted."""
    layer = Layer()
    for deb in download(["busybox-static"], cache):
        if package_of(deb)[0] == "busybox-static":
            layer.add_members(members(deb))
    for name in MERGED:
        layer.add_directory(f"usr/{name}")
        layer.add_link(name, f"usr/{name}")
    for name in ("dev", "proc", "run", "shared", "sys", "tmp"):
        layer.add_directory(name)
    for applet in _applets(layer.content("usr/bin/busybox")):
        if f"usr/bin/{applet}" not in layer:
            layer.add_link(f"usr/bin/{applet}", "busybox")
    return layer


def interpreter_files(debs: list[Path]) -> Layer:
    """The distribution's Python with the libraries that it needs."""
    layer = Layer()
    for deb in debs:
        layer.add_members(members(deb))
    for path in layer.paths():
        folder, _, name = path.rpartition("/")
        unused = folder.startswith("usr/lib/python3") and name in _UNUSED_STDLIB
        # glibc's character sets: Python has its own.
        if unused or name == "gconv" or path.startswith("usr/share/"):
            layer.remove(under=path)
    return layer


def marked(files: Layer, version: int, package_version: str) -> Layer:
    """The same files as the vendor builds them for security version `version`."""
    layer = Layer()
    layer.update(files)
    mark = f"vendor build python:{version} from {package_version}\n"
    layer.add_file(BUILD_FILE, mark.encode())
    return layer


def openssl_layer(cache: Path, *, beside: list[Path]) -> Layer:
    """The program `openssl`; its libraries are in the interpreter's layer already."""
    present = {package_of(deb)[0] for deb in beside}
    layer = Layer()
    for deb in download(["openssl"], cache):
        name, _ = package_of(deb)
        if name not in present and (name == "openssl" or _is_kept(name)):
            layer.add_members(members(deb))
    for folder in ("etc", "usr/share", "usr/lib/ssl"):
        layer.remove(under=folder)
    return layer


def program_layer(program: Program) -> Layer:
    """`/app` with the program, what all of them share, and its data; its further commands."""
    layer = Layer()
    for name in (f"{program.name}.py", "service.py", *program.files):
        layer.add_file(f"app/{name}", (PROGRAMS / name).read_bytes())
    if program.asks_supervisor:
        layer.add_file(f"app/{INSIDE.name}", INSIDE.read_bytes())
    for name in program.entry_points:
        content = (PROGRAMS / "entrypoints" / name).read_bytes()
        layer.add_file(f"{ENTRY_POINTS}/{name}", content, mode=0o755)
    return layer


def _program(name: str) -> Program:
    for program in PROGRAMS_OF_DEMO:
        if program.name == name:
            return program
    raise ValueError(f"the demo has no program {name}")


def _is_kept(package: str) -> bool:
    """Libraries and Python, but not the tools that packages need to be installed."""
    return package.startswith(("lib", "python3", "zlib")) and not package.startswith("libperl")


def _version_of(debs: list[Path]) -> str:
    """The version of the package that holds the interpreter itself."""
    for deb in debs:
        name, version = package_of(deb)
        if name.startswith("python3.") and name.endswith("-minimal"):
            return f"{name} {version}"
    raise AptFailed("no package python3.*-minimal among the interpreter's")


def _applets(busybox: bytes) -> list[str]:
    """busybox's own list of what it can be called."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "busybox")
        program.write_bytes(busybox)
        program.chmod(0o700)
        done = subprocess.run(
            [program, "--list"], capture_output=True, text=True, timeout=30, check=True
        )
    return sorted(done.stdout.split())


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the demo's images as OCI layouts.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, required=True, help="folder for .deb files")
    parser.add_argument("--image", action="append", help="only this one (repeat)")
    parser.add_argument(
        "--interpreter",
        metavar="N",
        action="append",
        type=int,
        help="only this security version of the vendor's layer (repeat)",
    )
    args = parser.parse_args()
    try:
        sources = build(
            args.out.resolve(),
            args.cache.resolve(),
            names=args.image,
            versions=args.interpreter or VERSIONS,
        )
    except AptFailed as error:
        sys.stderr.write(f"images: {error}\n")
        return 1
    sys.stdout.write(json.dumps(sources, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
