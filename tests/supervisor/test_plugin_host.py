"""Plugins are found, checked, ordered and walked; what fails, hangs or lies is named."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from supervisor import (
    Allow,
    ConfigError,
    DeadlineExceeded,
    Denied,
    Deny,
    Event,
    PluginContext,
    PluginContractError,
    RuntimeFailed,
    Sealed,
    UnknownItem,
    hookimpl,
)
from supervisor.config import parse_config
from supervisor.plugin_host import OBSERVER_BUFFER, PluginHost, load_plugins
from supervisor.testing import plugin


class NoConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing to configure."""


class Base:
    Config = NoConfig

    def __init__(self, config: NoConfig, context: PluginContext) -> None:
        self.config = config
        self.calls = 0


class Allowing(Base):
    @hookimpl
    async def judge_image(self, event: object) -> Allow:
        self.calls += 1
        return Allow()


class Denying(Base):
    @hookimpl
    async def judge_image(self) -> Deny:
        return Deny("not on a Monday")


class Raising(Base):
    @hookimpl
    async def judge_image(self, event: object) -> Allow:
        raise ValueError("broken gate")

    @hookimpl
    async def observe(self, event: Event) -> None:
        raise ValueError("broken observer")


class Hanging(Base):
    @hookimpl
    async def judge_image(self, event: object) -> Allow:
        await trio.sleep_forever()
        return Allow()


class SwallowingCancellation(Base):
    """Answers after its deadline, as a plugin that catches everything would."""

    @hookimpl
    async def judge_image(self, event: object) -> Allow:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.calls += 1
        return Allow()


class Lying(Base):
    @hookimpl
    async def judge_image(self, event: object) -> bool:
        return True


def host(tmp_path: Path, *classes: type, timeout_s: float = 5) -> PluginHost:
    loaded = [plugin(each, tmp_path, name=each.__name__.lower()) for each in classes]
    return PluginHost(loaded, hook_timeout_s=timeout_s)


async def judge(plugins: PluginHost) -> None:
    await plugins.judge("judge_image", Sealed(), item="an image")


async def test_a_gate_that_allows_lets_the_event_through(tmp_path: Path) -> None:
    await judge(host(tmp_path, Allowing))


async def test_no_gate_configured_is_no_obstacle(tmp_path: Path) -> None:
    await judge(host(tmp_path, Base))


@pytest.mark.parametrize(
    ("class_", "reason"),
    [
        (Denying, "not on a Monday"),
        (Raising, "ValueError: broken gate"),
        (Hanging, "no answer in 5 s"),
        (SwallowingCancellation, "no answer in 5 s"),
        (Lying, "not a verdict: bool"),
    ],
)
async def test_a_gate_without_an_allow_denies_and_is_named(
    tmp_path: Path, class_: type, reason: str, autojump_clock: object
) -> None:
    with pytest.raises(Denied) as caught:
        await judge(host(tmp_path, Allowing, class_))
    assert caught.value.item == "an image"
    assert caught.value.actual == reason
    assert class_.__name__.lower() in caught.value.rule


async def test_the_first_deny_ends_the_walk(tmp_path: Path) -> None:
    loaded = [plugin(each, tmp_path, name=each.__name__.lower()) for each in (Denying, Allowing)]
    with pytest.raises(Denied):
        await judge(PluginHost(loaded))
    assert isinstance(loaded[1].plugin, Allowing) and loaded[1].plugin.calls == 0


async def test_cancelling_the_caller_is_no_verdict(tmp_path: Path, autojump_clock: object) -> None:
    with trio.move_on_after(1) as scope:
        await judge(host(tmp_path, Hanging))
    assert scope.cancelled_caught


async def test_config_order_decides_not_the_order_of_registration(tmp_path: Path) -> None:
    seen: list[str] = []

    def recording(name: str) -> type:
        class Recording(Base):
            @hookimpl
            async def judge_image(self, event: object) -> Allow:
                seen.append(name)
                return Allow()

        return Recording

    names = ["c", "a", "b"]
    loaded = [plugin(recording(name), tmp_path, name=name) for name in names]
    await judge(PluginHost(loaded))
    assert seen == names


# --- contracts -----------------------------------------------------------------------------


class UnknownHook(Base):
    @hookimpl
    async def judge_imgae(self, event: object) -> Allow:
        return Allow()


class WrongColour(Base):
    @hookimpl
    def judge_image(self, event: object) -> Allow:
        return Allow()


class AsyncRegister(Base):
    @hookimpl
    async def registers(self, rtmr_index: int) -> object:
        return object()


class Unmarked(Base):
    async def judge_image(self, event: object) -> Allow:
        return Allow()


class TryFirst(Base):
    @hookimpl(tryfirst=True)
    async def judge_image(self, event: object) -> Allow:
        return Allow()


class Wrapper(Base):
    @hookimpl(wrapper=True)
    def judge_image(self, event: object):  # type: ignore[no-untyped-def]  # what is refused
        return (yield)


class Defaulted(Base):
    @hookimpl
    async def judge_image(self, event: object = None) -> Allow:
        return Allow()


class OtherArgument(Base):
    @hookimpl
    async def judge_image(self, image: object) -> Allow:
        return Allow()


def test_a_hook_that_is_set_on_the_instance_is_checked_too(tmp_path: Path) -> None:
    class Late(Base):
        def __init__(self, config: NoConfig, context: PluginContext) -> None:
            super().__init__(config, context)

            @hookimpl(tryfirst=True)
            async def judge_image(event: object) -> Allow:
                return Allow()

            self.judge_image = judge_image

    with pytest.raises(PluginContractError, match="must not use tryfirst"):
        host(tmp_path, Late)


@pytest.mark.parametrize(
    ("class_", "item", "rule"),
    [
        (UnknownHook, "unknownhook.judge_imgae", "is no hook"),
        (WrongColour, "wrongcolour.judge_image", "a gate hook has one colour"),
        (AsyncRegister, "asyncregister.registers", "a measure hook has one colour"),
        (Unmarked, "unmarked.judge_image", "must be marked @hookimpl"),
        (TryFirst, "tryfirst.judge_image", "must not use tryfirst"),
        (Wrapper, "wrapper.judge_image", "must not use wrapper"),
        (Defaulted, "defaulted.judge_image", "no argument may have a default"),
        (OtherArgument, "otherargument.judge_image", "must take the declared arguments"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_refused_by_name(
    tmp_path: Path, class_: type, item: str, rule: str
) -> None:
    with pytest.raises(PluginContractError) as caught:
        host(tmp_path, class_)
    assert caught.value.item == item
    assert rule in caught.value.rule


class MutableConfig(msgspec.Struct):
    a: int = 1


class RequiredConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    a: int


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (MutableConfig, "must be frozen"),
        (RequiredConfig, "needs a default"),
        (dict, "needs a `Config`"),
        (None, "needs a `Config`"),
    ],
)
def test_a_configuration_struct_must_be_strict(tmp_path: Path, config: object, rule: str) -> None:
    class_ = type("Some", (Base,), {"Config": config})
    with pytest.raises(PluginContractError, match=rule):
        plugin(class_, tmp_path)


# --- providers -------------------------------------------------------------------------------


class Providing(Base):
    @hookimpl
    async def layer_store(self) -> object:
        return "a store"


class OtherProvider(Base):
    @hookimpl
    async def layer_store(self) -> object:
        return "another store"


class FailingProvider(Base):
    @hookimpl
    async def layer_store(self) -> object:
        raise OSError("no disk")


class RefusingProvider(Base):
    @hookimpl
    async def layer_store(self) -> object:
        raise UnknownItem("disk", "is not there")


class HangingProvider(Base):
    @hookimpl
    async def layer_store(self) -> object:
        await trio.sleep_forever()
        return None


async def test_two_providers_need_the_configuration_to_name_one(tmp_path: Path) -> None:
    loaded = [plugin(each, tmp_path, name=each.__name__) for each in (Providing, OtherProvider)]
    with pytest.raises(ConfigError, match="must say which of several plugins"):
        PluginHost(loaded)
    named = PluginHost(loaded, providers={"layer_store": "OtherProvider"})
    assert await named.provide("layer_store") == "another store"
    with pytest.raises(ConfigError, match="does not provide it"):
        PluginHost(loaded, providers={"layer_store": "nobody"})


@pytest.mark.parametrize(
    ("class_", "error"),
    [
        (FailingProvider, RuntimeFailed),
        (RefusingProvider, UnknownItem),
        (HangingProvider, DeadlineExceeded),
        (Base, ConfigError),
    ],
)
async def test_a_provider_that_fails_is_an_error_to_the_caller(
    tmp_path: Path, class_: type, error: type[Exception], autojump_clock: object
) -> None:
    with pytest.raises(error):
        await host(tmp_path, class_).provide("layer_store")


# --- observers -------------------------------------------------------------------------------


class Collecting(Base):
    def __init__(self, config: NoConfig, context: PluginContext) -> None:
        super().__init__(config, context)
        self.seen: list[Event] = []
        self.gate = trio.Event()
        self.gate.set()

    @hookimpl
    async def observe(self, event: Event) -> None:
        await self.gate.wait()
        self.seen.append(event)


async def observed(plugins: PluginHost, act: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plugins.observe_forever)
        act()
        plugins.close_observers()


async def test_a_raising_observer_disturbs_nobody(tmp_path: Path) -> None:
    loaded = [plugin(each, tmp_path, name=each.__name__) for each in (Raising, Collecting)]
    plugins = PluginHost(loaded)

    def thrice() -> None:
        for _ in range(3):
            plugins.emit(Sealed())

    await observed(plugins, thrice)
    collecting = loaded[1].plugin
    assert isinstance(collecting, Collecting) and len(collecting.seen) == 3
    assert plugins.failures == {"Raising": 3}


async def test_a_slow_observer_loses_events_that_are_counted_and_delays_nobody(
    tmp_path: Path,
) -> None:
    loaded = [plugin(Collecting, tmp_path, name="slow")]
    collecting = loaded[0].plugin
    assert isinstance(collecting, Collecting)
    collecting.gate = trio.Event()
    plugins = PluginHost(loaded)

    def burst() -> None:
        for _ in range(OBSERVER_BUFFER + 10):
            plugins.emit(Sealed())
        collecting.gate.set()

    await observed(plugins, burst)
    assert plugins.lost_events["slow"] == 10
    assert len(collecting.seen) == OBSERVER_BUFFER


# --- finding ---------------------------------------------------------------------------------


def test_a_plugin_that_nobody_installed_is_named_with_what_there_is(tmp_path: Path) -> None:
    config = parse_config(f'runtime_dir="{tmp_path}"\n[plugins]\norder=["tdx_simm"]')
    with pytest.raises(ConfigError) as caught:
        load_plugins(config, report=lambda event: None)
    assert "tdx_simm" in caught.value.item
    assert caught.value.expected is not None and "tdx_sim" in caught.value.expected


def test_nothing_but_the_listed_plugins_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Point:
        module = "supervisor.testing"

        def __init__(self, name: str) -> None:
            self.name = name
            self.dist = importlib.metadata.distribution("attested-containers")

        def load(self) -> type:
            loaded.append(self.name)
            return type(self.name, (Base,), {"__module__": "supervisor.testing"})

    points = [Point("wanted"), Point("unwanted")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    config = parse_config(f'runtime_dir="{tmp_path}"\n[plugins]\norder=["wanted"]')
    plugins = load_plugins(config, report=lambda event: None)
    assert loaded == ["wanted"]
    assert [each.name for each in plugins] == ["wanted"]
    doubled = [Point("wanted"), Point("wanted")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: doubled)
    with pytest.raises(ConfigError, match="exactly one installed package"):
        load_plugins(config, report=lambda event: None)


def test_an_unknown_setting_of_a_plugin_is_refused_with_its_path(tmp_path: Path) -> None:
    config = parse_config(
        f'runtime_dir="{tmp_path}"\n[plugins]\norder=["tdx_sim"]\n[plugin.tdx_sim]\nsokket="x"'
    )
    with pytest.raises(ConfigError) as caught:
        load_plugins(config, report=lambda event: None)
    assert caught.value.item.startswith("$.plugin.tdx_sim")
    assert "sokket" in caught.value.rule
