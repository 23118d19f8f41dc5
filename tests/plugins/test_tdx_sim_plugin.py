"""The plugin: its hooks, its configuration, and that it says what it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import pluggy
import pytest
import structlog
import trio
from structlog.testing import capture_logs

from plugins.tdx_sim import TdxSim, process
from plugins.tdx_sim.pki import ensure_pki
from supervisor import ConfigError, PluginContext
from supervisor.formats.event_log import replay
from supervisor.formats.quote import parse_quote
from supervisor.hookspecs import PROJECT, Hooks
from supervisor.plugin_contract import check_implementations, check_plugin_class

DIGEST = bytes(range(48))


def made(config: TdxSim.Config, tmp_path: Path) -> TdxSim:
    context = PluginContext(
        name="tdx_sim",
        runtime_dir=tmp_path,
        log=structlog.get_logger(),
        report=lambda event: None,
    )
    return TdxSim(config, context)


def test_it_implements_declared_hooks_only(tmp_path: Path) -> None:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    manager.register(made(TdxSim.Config(), tmp_path), name="tdx_sim")
    manager.check_pending()
    hooks = {hook.name for hook in manager.get_hookcallers(manager.get_plugin("tdx_sim")) or ()}
    assert hooks == {"registers", "quote_source"}


def test_the_plugin_host_would_take_it(tmp_path: Path) -> None:
    assert check_plugin_class("tdx_sim", TdxSim) is TdxSim.Config
    check_implementations("tdx_sim", made(TdxSim.Config(), tmp_path))


def test_it_warns_that_it_is_a_simulation(tmp_path: Path) -> None:
    with capture_logs() as logs:
        made(TdxSim.Config(), tmp_path)
    [entry] = logs
    assert entry["log_level"] == "warning"
    assert "SIMULATION" in entry["event"]


@pytest.mark.parametrize(
    ("table", "path"),
    [
        ({"quote_version": 3}, "quote_version"),
        ({"socket": ""}, "socket"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"quote_timeout_s": 3601}, "quote_timeout_s"),
        ({"sockett": "/x"}, "sockett"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(table: dict[str, object], path: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=path):
        msgspec.convert(table, TdxSim.Config)


def test_the_configuration_has_no_value_that_canonical_json_lacks() -> None:
    values = msgspec.to_builtins(TdxSim.Config()).values()
    assert {type(value) for value in values} == {str, int}


@pytest.mark.parametrize("rtmr_index", [0, 1, 4])
def test_a_register_that_a_guest_cannot_extend_is_refused(tmp_path: Path, rtmr_index: int) -> None:
    with pytest.raises(ConfigError) as refused:
        made(TdxSim.Config(), tmp_path).registers(rtmr_index)
    assert refused.value.actual == str(rtmr_index)


@pytest.mark.parametrize("version", [4, 5])
async def test_what_it_measures_is_what_it_quotes(tmp_path: Path, version: int) -> None:
    path = tmp_path / "td.sock"
    config = msgspec.convert({"socket": str(path), "quote_version": version}, TdxSim.Config)
    plugin = made(config, tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(process.serve, path, ensure_pki(tmp_path / "pki")))
        registers = plugin.registers(3)
        await trio.to_thread.run_sync(registers.extend, DIGEST)
        assert await trio.to_thread.run_sync(registers.read) == replay([DIGEST])
        quote = parse_quote(await (await plugin.quote_source()).quote(bytes(64)))
        nursery.cancel_scope.cancel()
    assert quote.header.version == version
    assert quote.body.rtmrs[3] == replay([DIGEST])
