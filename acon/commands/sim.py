"""`acon sim`: a software TD for laptops and CI. It protects nothing, and says so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command, add_group

if TYPE_CHECKING:
    from plugins.tdx_sim.firmware import BaseImage
    from plugins.tdx_sim.wire import Description

_PKI = Path("/var/lib/acon-sim")
_SOCKET = Path("/run/acon-sim/td.sock")
_BASE_FIELDS = ("firmware", "kernel", "initrd", "command_line")


def add_parser(sub: SubParsers) -> None:
    group = add_group(sub, "sim", summary="a software TD for trying things; it protects nothing")
    init = add_command(
        group,
        "init",
        summary="make the simulator's own keys and root certificate, once",
        example="acon sim init",
        run=_init,
    )
    root = add_command(
        group,
        "root",
        summary="print the root certificate that `--trust-simulated-root` takes",
        example="acon sim root > simulated-root.pem",
        run=_root,
    )
    collateral = add_command(
        group,
        "collateral",
        summary="issue collateral for 30 days",
        example="acon sim collateral -o collateral.json",
        run=_collateral,
    )
    collateral.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    collateral.add_argument("--at", metavar="RFC3339", help="time of issue (default: now)")
    serve = add_command(
        group,
        "run",
        summary="be the software TD until SIGTERM; its registers last as long",
        example="acon sim run",
        run=_run,
    )
    serve.add_argument("--quote-delay", metavar="S", type=float, default=0.0)
    boot = add_command(
        group,
        "boot",
        summary="boot the software TD that runs again: its registers fall to zero",
        example="acon sim boot",
        run=_boot,
    )
    for parser in (init, root, collateral, serve):
        parser.add_argument("--pki", metavar="DIR", type=Path, default=_PKI)
    for parser in (serve, boot):
        parser.add_argument("--td-socket", metavar="PATH", type=Path, default=_SOCKET)
        for name in _BASE_FIELDS:
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, metavar="TEXT", help=f"the base image's {name}")


def _init(args: argparse.Namespace) -> int:
    from acon.output import result
    from plugins.tdx_sim.pki import ensure_pki

    pki = ensure_pki(args.pki)
    result(
        args,
        {"pki": str(pki.directory), "root": str(pki.root_pem_path)},
        f"{pki.root_pem_path}: the simulation's root; no verifier trusts it unless told to",
    )
    return 0


def _root(args: argparse.Namespace) -> int:
    from acon.output import result

    pem = _existing(args).joinpath("root.pem").read_text(encoding="ascii")
    result(args, {"root_pem": pem}, pem.rstrip("\n"))
    return 0


def _collateral(args: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from acon.files import write_whole
    from acon.output import result
    from acon.times import parse_rfc3339
    from plugins.tdx_sim.collateral import issue
    from plugins.tdx_sim.pki import ensure_pki

    at = datetime.now(UTC) if args.at is None else parse_rfc3339(args.at, item="--at")
    write_whole(args.output, issue(ensure_pki(_existing(args)), at).encode())
    result(args, {"file": str(args.output)}, f"{args.output}: collateral of the simulation")
    return 0


def _run(args: argparse.Namespace) -> int:
    import logging
    import signal

    import trio

    from acon.output import result
    from plugins.tdx_sim.pki import ensure_pki
    from plugins.tdx_sim.process import serve

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    pki = ensure_pki(args.pki)

    async def until_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:

                async def start(
                    task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED,
                ) -> None:
                    await serve(
                        args.td_socket,
                        pki,
                        base_image=_base_image(args),
                        quote_delay_s=args.quote_delay,
                        task_status=task_status,
                    )

                path = await nursery.start(start)
                result(args, {"socket": str(path)}, f"SIMULATION: a software TD serves at {path}")
                await signals.__anext__()
                nursery.cancel_scope.cancel()

    try:
        trio.run(until_signal)
    except* Exception as group:
        raise _first(group) from None
    return 0


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    """What went wrong first: nurseries wrap even a lone exception."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _boot(args: argparse.Namespace) -> int:
    import msgspec

    from acon.output import result
    from plugins.tdx_sim.client import boot

    description = boot(args.td_socket, _base_image(args))
    result(args, msgspec.to_builtins(description), _described(description))
    return 0


def _described(description: Description) -> str:
    return "\n".join(
        [
            f"SIMULATION: boot {description.boots}",
            f"MRTD     {description.mr_td}",
            *(f"RTMR[{index}]  {value}" for index, value in enumerate(description.rtmrs)),
        ]
    )


def _base_image(args: argparse.Namespace) -> BaseImage | None:
    """The base image that the options name; None (as it was, or the default) without any."""
    from plugins.tdx_sim.firmware import BaseImage

    given = {name: getattr(args, name) for name in _BASE_FIELDS if getattr(args, name) is not None}
    return BaseImage(**given) if given else None


def _existing(args: argparse.Namespace) -> Path:
    """The PKI's folder. Only `init` and `run` make one: another's root would help nobody."""
    from acon.errors import UsageError

    directory: Path = args.pki
    if not (directory / "root.pem").is_file():
        raise UsageError(str(directory), "must hold the simulator's PKI; `acon sim init` makes it")
    return directory
