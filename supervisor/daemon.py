"""The daemon `acond`: reads its configuration, runs the supervisor, ends in order."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import structlog
import tomli_w
import trio

from supervisor.config import (
    Config,
    config_digest_sha384,
    effective_config,
    effective_table,
    read_config,
)
from supervisor.errors import Refusal
from supervisor.events import Event
from supervisor.formats.log_events import StartEvent, encode_event
from supervisor.measurement import in_worker_thread
from supervisor.plugin_host import PluginHost, host_for, load_plugins
from supervisor.ram import refuse_active_swap
from supervisor.runtime_dir import held, prepare_runtime_dir
from supervisor.service import run_supervisor

EXIT_REFUSED = 1
EXIT_USAGE = 2
# Every part has a deadline of its own; this one is for a plugin that ignores them all.
SHUTDOWN_LIMIT_S = 180

_EPILOG = """\
example:
  acond --config /etc/acond.toml
  acond --config /etc/acond.toml --print-config     # every default shown
  acond --config /etc/acond.toml --print-identity   # what the first log entry will say

exit status: 0 stopped when asked to, 1 refused or failed, 2 wrong usage or configuration
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="acond",
        description="Run measured containers inside a confidential VM.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="the TOML file")
    parser.add_argument(
        "--print-config", action="store_true", help="show it with every default, and end"
    )
    parser.add_argument(
        "--print-identity", action="store_true", help="show what `Start` will measure, and end"
    )
    options = parser.parse_args(arguments)
    inspecting = options.print_config or options.print_identity
    try:
        config = read_config(options.config)
        _configure_logging(config.log_level)
        relay = _Relay()
        if not inspecting:
            prepare_runtime_dir(config)
            if not config.unsafe_allow_swap:
                refuse_active_swap()
        plugins = load_plugins(config, report=relay.emit, make_dirs=not inspecting)
        host = host_for(config, plugins)
        relay.host = host
    except Refusal as error:
        sys.stderr.write(f"acond: {error}\n")  # the log may not be set up
        return EXIT_USAGE
    if options.print_config:
        sys.stdout.write(_toml(effective_table(config, host.configs)))
        return 0
    if options.print_identity:
        sys.stdout.write(_identity(host, effective_config(config, host.configs)) + "\n")
        return 0
    return _run(config, host)


class _Relay:
    """Lets plugins report events before the host that carries them is made."""

    host: PluginHost | None = None

    def emit(self, event: Event) -> None:
        if self.host is not None:
            self.host.emit(event)


def _toml(table: dict[str, object]) -> str:
    return tomli_w.dumps(_without_nulls(table))


def _without_nulls(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError("a configuration is a table")
    return {
        key: _without_nulls(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item is not None
    }


def _identity(host: PluginHost, effective: str) -> str:
    event = StartEvent(
        components=host.components, config_digest_sha384=config_digest_sha384(effective)
    )
    return encode_event(event)[1].decode()


def _run(config: Config, host: PluginHost) -> int:
    log = structlog.stdlib.get_logger("supervisor.daemon")
    _raise_descriptor_limit()
    limit = _ShutdownLimit()
    try:
        with held(Path(config.runtime_dir)):
            trio.run(_serve_until_signal, config, host, limit)
    except Exception as failure:
        for error in _leaves(failure):
            if isinstance(error, Refusal):
                log.error("ended", reason=str(error))
            else:
                log.error("failed", reason=repr(error), exc_info=error)
        return EXIT_REFUSED
    finally:
        limit.disarm()
    log.info("stopped")
    return 0


def _raise_descriptor_limit() -> None:
    """As many descriptors as we may have: a container holds about five while it runs, and
    the usual soft limit of 1024 is there for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log = structlog.stdlib.get_logger("supervisor.daemon")
    log.info("descriptors", limit=hard, limit_before=soft)


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for one in error.exceptions for leaf in _leaves(one)]


class _ShutdownLimit:
    """Ends the process when an orderly shutdown does not end: in a thread, so that even a
    plugin that blocks the event loop cannot hold it."""

    def __init__(self) -> None:
        self._timer = threading.Timer(SHUTDOWN_LIMIT_S, self._give_up)
        self._timer.daemon = True
        self._armed = False

    def arm(self) -> None:
        """From here on; idempotent."""
        if not self._armed:
            self._armed = True
            self._timer.start()

    def disarm(self) -> None:
        self._timer.cancel()

    def _give_up(self) -> None:
        log = structlog.stdlib.get_logger("supervisor.daemon")
        log.error("shutdown took too long", limit_s=SHUTDOWN_LIMIT_S)
        os._exit(EXIT_REFUSED)


async def _serve_until_signal(config: Config, host: PluginHost, limit: _ShutdownLimit) -> None:
    serving = trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        # Outside of what it cancels: a second signal during shutdown, unread, would be
        # raised again by trio at the end, and kill us after all was done.
        async with trio.open_nursery() as listening:
            listening.start_soon(_stop_when_asked, signals, serving, limit)
            with serving:
                async with trio.open_nursery() as nursery:
                    await nursery.start(run_supervisor, config, host, in_worker_thread, limit.arm)
                    _tell_service_manager("READY=1")
            listening.cancel_scope.cancel()


async def _stop_when_asked(
    signals: AsyncIterator[int], serving: trio.CancelScope, limit: _ShutdownLimit
) -> None:
    log = structlog.stdlib.get_logger("supervisor.daemon")
    async for signum in signals:
        log.info("stopping", signal=signal.Signals(signum).name)
        limit.arm()
        serving.cancel()


def _tell_service_manager(text: str) -> None:
    """sd_notify(3): one datagram to the socket that systemd names, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.send(text.encode())
    except OSError as error:
        # Whoever waits for it gives up on us; nobody else should suffer.
        log = structlog.stdlib.get_logger("supervisor.daemon")
        log.warning("the service manager cannot be told", address=address, error=repr(error))


def _configure_logging(level: str) -> None:
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


if __name__ == "__main__":
    sys.exit(main())
