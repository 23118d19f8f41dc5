"""A software TD's registers and quotes, for laptops and CI. It protects nothing.

The TD is a process of its own (`acon sim`), as hardware is; this plugin is its client.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from plugins.tdx_sim.client import SimQuoteSource, SimRegisters
from plugins.tdx_sim.registers import GUEST_RTMRS
from plugins.tdx_sim.wire import QuoteVersion
from supervisor import ConfigError, PluginContext, QuoteSource, Registers, hookimpl

DEFAULT_SOCKET = "/run/acon-sim/td.sock"

_Seconds = Annotated[int, msgspec.Meta(ge=1, le=3600)]


class TdxSim:
    """Measures into a software TD and has it quoted. See `supervisor.hookspecs`."""

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """`socket` is where `acon sim` serves; `timeout_s` bounds all requests but quotes."""

        socket: Annotated[str, msgspec.Meta(min_length=1)] = DEFAULT_SOCKET
        quote_version: QuoteVersion = 4
        timeout_s: _Seconds = 5
        quote_timeout_s: _Seconds = 30

    def __init__(self, config: Config, context: PluginContext) -> None:
        self._config = config
        context.log.warning(
            "SIMULATION: registers and quotes are a software TD's and protect nothing",
            socket=config.socket,
        )

    @hookimpl
    def registers(self, rtmr_index: int) -> Registers:
        """RTMR 2 or 3. Raises `ConfigError` for one that a guest cannot extend."""
        if rtmr_index not in GUEST_RTMRS:
            raise ConfigError(
                "measurement.rtmr_index",
                "a guest can extend this register",
                expected=" or ".join(map(str, GUEST_RTMRS)),
                actual=rtmr_index,
            )
        return SimRegisters(Path(self._config.socket), rtmr_index, timeout_s=self._config.timeout_s)

    @hookimpl
    async def quote_source(self) -> QuoteSource:
        """Quotes of the configured version."""
        return SimQuoteSource(
            Path(self._config.socket),
            quote_version=self._config.quote_version,
            timeout_s=self._config.timeout_s,
            quote_timeout_s=self._config.quote_timeout_s,
        )
