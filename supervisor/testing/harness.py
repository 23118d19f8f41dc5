"""Plugins made without installing them, and a real supervisor around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
import trio

from supervisor.config import Config, config_error, parse_config
from supervisor.context import PluginContext
from supervisor.events import Event
from supervisor.formats.log_events import Component
from supervisor.measurement import RunBlocking
from supervisor.plugin_contract import check_plugin_class
from supervisor.plugin_host import LoadedPlugin, host_for
from supervisor.service import Supervisor, run_supervisor
from supervisor.testing.memory import InMemory

T = TypeVar("T")


def plugin(
    plugin_class: type,
    runtime_dir: Path,
    *,
    name: str | None = None,
    table: Mapping[str, object] | None = None,
    report: Callable[[Event], None] = lambda event: None,
) -> LoadedPlugin:
    """Make a plugin as the daemon would, without installing it; its digest is zeros.

    `report` gets what the plugin reports of itself (`PluginContext.report`). Raises what
    the daemon would: `PluginContractError`, `ConfigError`.
    """
    known_as = name or plugin_class.__name__.lower()
    config_class = check_plugin_class(known_as, plugin_class)
    try:
        config = msgspec.convert(dict(table or {}), config_class)
    except msgspec.ValidationError as error:
        raise config_error(error, f"$.plugin.{known_as}") from error
    folder = runtime_dir / "plugins" / known_as
    folder.mkdir(parents=True, exist_ok=True)
    context = PluginContext(
        name=known_as,
        runtime_dir=folder,
        log=structlog.stdlib.get_logger(known_as),
        report=report,
    )
    return LoadedPlugin(
        name=known_as,
        plugin=plugin_class(config, context),
        config=config,
        component=Component(
            name=known_as,
            version="0",
            digest_sha384="00" * 48,
            role="plugin",
            distribution="not installed",
        ),
    )


def in_memory_plugin(runtime_dir: Path) -> LoadedPlugin:
    """A machine in memory; `.plugin` is its `InMemory`."""
    return plugin(InMemory, runtime_dir, name="in_memory")


def config_for(plugins: Sequence[LoadedPlugin], runtime_dir: Path, toml: str = "") -> Config:
    """A configuration that names these plugins; `toml` adds further tables."""
    names = ", ".join(f'"{loaded.name}"' for loaded in plugins)
    text = f'runtime_dir = "{runtime_dir}"\n[plugins]\norder = [{names}]\n{toml}'
    return parse_config(text)


async def run_at_once(function: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """A `RunBlocking` without a thread; a checkpoint before, none inside or after."""
    await trio.lowlevel.checkpoint()
    return function()


@asynccontextmanager
async def running(
    plugins: Sequence[LoadedPlugin],
    runtime_dir: Path,
    toml: str = "",
    *,
    run_blocking: RunBlocking = run_at_once,
) -> AsyncIterator[Supervisor]:
    """A real supervisor around these plugins, shut down in order at exit.

    Measuring work runs in the event loop's thread unless `run_blocking` says otherwise, so
    that `autojump_clock` does not take a working thread for idleness.
    """
    config = config_for(plugins, runtime_dir, toml)
    host = host_for(config, plugins)
    async with trio.open_nursery() as nursery:
        supervisor: Supervisor = await nursery.start(run_supervisor, config, host, run_blocking)
        try:
            yield supervisor
        finally:
            nursery.cancel_scope.cancel()
