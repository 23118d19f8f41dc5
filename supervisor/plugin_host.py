"""Finds, checks, orders and freezes plugins, and walks their hooks.

Inside one hook call nothing is concurrent; concurrency lives between calls. Who
fails, hangs or answers wrongly is named, and what then happens depends on the
hook's kind (see `supervisor.hookspecs`).
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import pluggy
import structlog
import trio

from supervisor import plugin_contract
from supervisor.config import Config, config_error
from supervisor.context import PluginContext
from supervisor.errors import (
    ConfigError,
    DeadlineExceeded,
    Denied,
    PluginContractError,
    Refusal,
    RuntimeFailed,
)
from supervisor.events import Event, HookFailed
from supervisor.formats.log_events import Component
from supervisor.hookspecs import PROJECT, Hooks
from supervisor.identity import own_component, plugin_component
from supervisor.verdicts import Allow, Deny

ENTRY_POINT_GROUP = "supervisor.plugins"
# An observer that falls this far behind loses events (counted): 256 is a burst of starts.
OBSERVER_BUFFER = 256

T = TypeVar("T")
# (plugin name, bound method, argument names); measure hooks answer without being awaited.
Implementation = tuple[str, Callable[..., Awaitable[object]], tuple[str, ...]]
log = structlog.stdlib.get_logger("supervisor.plugins")


class LoadedPlugin(msgspec.Struct, frozen=True, kw_only=True):
    """One plugin as made: its object, its validated table and what was measured of it."""

    name: str
    plugin: object
    config: msgspec.Struct
    component: Component


def load_plugins(
    config: Config, *, report: Callable[[Event], None], make_dirs: bool = True
) -> tuple[LoadedPlugin, ...]:
    """Import exactly the plugins that the configuration lists, in its order.

    Each gets its table validated into its own `Config` Struct and a private folder
    below `runtime_dir`. Raises `ConfigError` (operator's fault) or
    `PluginContractError` (plugin's fault); nothing unlisted is imported.
    """
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    by_name: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)
    loaded = []
    for name in config.plugins.order:
        found = by_name.get(name, [])
        if len(found) != 1:
            raise ConfigError(
                f"$.plugins.order: {name}",
                f"exactly one installed package must offer this plugin in {ENTRY_POINT_GROUP}",
                expected="one of: " + ", ".join(sorted(by_name)) if not found else "1",
                actual=name if not found else len(found),
            )
        loaded.append(_load(found[0], config, report, make_dirs))
    return tuple(loaded)


def _load(
    point: importlib.metadata.EntryPoint,
    config: Config,
    report: Callable[[Event], None],
    make_dirs: bool,
) -> LoadedPlugin:
    name = point.name
    try:
        plugin_class = point.load()
    except Exception as error:
        raise PluginContractError(name, "must be importable", actual=repr(error)) from error
    config_class = plugin_contract.check_plugin_class(name, plugin_class)
    try:
        table = msgspec.convert(config.plugin.get(name, {}), config_class)
    except msgspec.ValidationError as error:
        raise config_error(error, f"$.plugin.{name}") from error
    runtime_dir = Path(config.runtime_dir, "plugins", name)
    if make_dirs:
        # Others may pass through (a container's root lies below) but not list.
        try:
            runtime_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("$.runtime_dir", "must be writable", actual=error) from error
    context = PluginContext(
        name=name,
        runtime_dir=runtime_dir,
        log=structlog.stdlib.get_logger(plugin=name),
        report=report,
    )
    try:
        plugin = plugin_class(table, context)
    except Refusal:
        raise
    except Exception as error:
        raise PluginContractError(name, "must be constructible", actual=repr(error)) from error
    if point.dist is None:
        raise PluginContractError(name, "must belong to an installed distribution")
    component = plugin_component(name, point.module, plugin_class, point.dist)
    return LoadedPlugin(name=name, plugin=plugin, config=table, component=component)


def host_for(config: Config, plugins: Sequence[LoadedPlugin]) -> PluginHost:
    """The host of these plugins, as the configuration bounds and names them."""
    named = config.providers
    return PluginHost(
        plugins,
        hook_timeout_s=config.hooks.timeout_s,
        providers={hook: getattr(named, hook) for hook in named.__struct_fields__},
    )


class PluginHost:
    """The frozen set of plugins and the five ways to walk their hooks.

    Made from plugins in config order; nothing can be added afterwards. Observers are
    called from `observe_forever`, which its owner runs as a task.
    """

    def __init__(
        self,
        plugins: Sequence[LoadedPlugin],
        *,
        hook_timeout_s: float = 10,
        providers: Mapping[str, str | None] | None = None,
    ) -> None:
        self._hook_timeout_s = hook_timeout_s
        self.components = (own_component(), *(plugin.component for plugin in plugins))
        self.configs = {plugin.name: plugin.config for plugin in plugins}
        self.lost_events: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(Hooks)
        for loaded in plugins:
            plugin_contract.check_implementations(loaded.name, loaded.plugin)
            try:
                manager.register(loaded.plugin, name=loaded.name)
                manager.check_pending()
            except pluggy.PluginValidationError as error:
                raise PluginContractError(
                    loaded.name, "is no valid plugin", actual=error
                ) from error
        order = {plugin.name: place for place, plugin in enumerate(plugins)}
        self._implementations: dict[str, tuple[Implementation, ...]] = {}
        for hook in plugin_contract.hook_names():
            implementations = getattr(manager.hook, hook).get_hookimpls()
            implementations.sort(key=lambda impl: order[impl.plugin_name])
            self._implementations[hook] = tuple(
                (impl.plugin_name, impl.function, tuple(impl.argnames)) for impl in implementations
            )
        self._providers = dict(providers or {})
        self._check_providers()
        voices = [plugin for plugin, _, _ in self._implementations["serve_container"]]
        if len(voices) > 1:
            raise ConfigError(
                "$.plugins.order",
                "at most one plugin may serve the containers' sockets (serve_container)",
                actual=", ".join(voices),
            )
        self._observers = {
            plugin: trio.open_memory_channel[Event](OBSERVER_BUFFER)
            for plugin, _, _ in self._implementations["observe"]
        }

    def implementations(self, hook: str) -> tuple[Implementation, ...]:
        """(plugin name, bound function, argument names), in config order."""
        return self._implementations[hook]

    # --- gates --------------------------------------------------------------------------

    async def judge(self, hook: str, event: object, *, item: str) -> None:
        """Walk a gate. Returns when every configured implementation allowed; else `Denied`.

        A configured gate that raises, hangs past the deadline or answers anything but
        `Allow` or `Deny` denies. Cancelling the caller is no verdict and propagates.
        """
        for plugin, function, names in self._implementations[hook]:
            answer: object
            # Outside the scope: cancelled at the deadline, it may fail besides.
            try:
                with trio.move_on_after(self._hook_timeout_s) as scope:
                    answer = await function(event) if names else await function()
            except Exception as error:
                answer = self._failed(plugin, hook, f"{type(error).__name__}: {error}")
            # `cancel_called`, not a timeout exception: a plugin that swallows Cancelled
            # would otherwise still have its late Allow counted.
            if scope.cancel_called:
                answer = self._failed(plugin, hook, f"no answer in {self._hook_timeout_s:g} s")
            elif not isinstance(answer, Allow | Deny):
                answer = self._failed(plugin, hook, f"not a verdict: {type(answer).__name__}")
            if isinstance(answer, Deny):
                raise Denied(item, f"{plugin} ({hook}) denied it", actual=answer.reason)

    # --- provide ------------------------------------------------------------------------

    def provider(self, hook: str) -> Implementation | None:
        """The one implementation that the config names, or the only one there is."""
        implementations = self._implementations[hook]
        named = self._providers.get(hook)
        for implementation in implementations:
            if named in (None, implementation[0]):
                return implementation
        return None

    async def provide(self, hook: str, *arguments: object) -> object:
        """Call the provider. Raises its `Refusal`, or `RuntimeFailed` for anything else."""
        implementation = self.provider(hook)
        if implementation is None:
            raise ConfigError("$.plugins.order", f"no configured plugin provides {hook}")
        plugin, function, names = implementation
        try:
            with trio.fail_after(self._hook_timeout_s):
                return await function(*arguments[: len(names)])
        except trio.TooSlowError as error:
            self._failed(plugin, hook, "no answer in time")
            raise DeadlineExceeded(
                plugin, f"{hook} must answer", expected=f"within {self._hook_timeout_s:g} s"
            ) from error
        except Refusal:
            raise
        except Exception as error:
            self._failed(plugin, hook, repr(error))
            raise RuntimeFailed(plugin, f"{hook} failed", actual=repr(error)) from error

    def _check_providers(self) -> None:
        for hook in plugin_contract.hook_names("provide"):
            able = [plugin for plugin, _, _ in self._implementations[hook]]
            named = self._providers.get(hook)
            if named is not None and named not in able:
                raise ConfigError(
                    f"$.providers.{hook}",
                    "names a plugin that does not provide it",
                    expected=" or ".join(able) or "none of the configured plugins does",
                    actual=named,
                )
            if named is None and len(able) > 1:
                raise ConfigError(
                    f"$.providers.{hook}",
                    "must say which of several plugins provides it",
                    expected=" or ".join(able),
                    actual="nothing",
                )

    # --- observe ------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Tell every observer; never waits, never raises. A full observer loses the event."""
        for plugin, (sender, _) in self._observers.items():
            try:
                sender.send_nowait(event)
            except trio.WouldBlock:
                if not self.lost_events[plugin]:
                    log.warning("an observer is too slow and loses events", plugin=plugin)
                self.lost_events[plugin] += 1
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                pass

    async def observe_forever(self) -> None:
        """Feed the observers, each in a task of its own, until `close_observers` and drained."""
        async with trio.open_nursery() as nursery:
            for plugin, function, names in self._implementations["observe"]:
                receiver = self._observers[plugin][1]
                nursery.start_soon(self._observe, plugin, function, bool(names), receiver)

    def close_observers(self) -> None:
        """No more events: observers get what is buffered, then `observe_forever` returns."""
        for sender, _ in self._observers.values():
            sender.close()
        if self.lost_events:
            log.warning("events lost by observers", lost=dict(self.lost_events))
        if self.failures:
            log.warning("hooks failed", failures=dict(self.failures))

    async def _observe(
        self,
        plugin: str,
        function: Callable[..., Awaitable[object]],
        wants_event: bool,
        receiver: trio.MemoryReceiveChannel[Event],
    ) -> None:
        async with receiver:
            async for event in receiver:
                try:
                    with trio.move_on_after(self._hook_timeout_s) as scope:
                        await (function(event) if wants_event else function())
                except Exception as error:
                    self._failed(plugin, "observe", f"{type(error).__name__}: {error}")
                if scope.cancel_called:
                    self._failed(plugin, "observe", f"hung for {self._hook_timeout_s:g} s")

    def _failed(self, plugin: str, hook: str, reason: str) -> Deny:
        self.failures[plugin] += 1
        log.warning("hook failed", plugin=plugin, hook=hook, reason=reason)
        if hook != "observe":  # an observer that fails at every event must not feed itself
            self.emit(HookFailed(plugin=plugin, hook=hook, reason=reason))
        return Deny(reason)
