"""What a plugin must look like to be registered; everything else is refused by name."""

from __future__ import annotations

import inspect

import msgspec

from supervisor.errors import PluginContractError
from supervisor.hookspecs import PROJECT, HookKind, Hooks, hook_kind


def hook_names(kind: HookKind | None = None) -> tuple[str, ...]:
    """All declared hooks, or those of one kind, in declaration order."""
    return tuple(
        name
        for name in vars(Hooks)
        if hook_kind(name) is not None and kind in (None, hook_kind(name))
    )


def check_plugin_class(name: str, plugin_class: object) -> type[msgspec.Struct]:
    """A plugin is a class with a `Config` Struct; returns that Struct.

    The Struct must be frozen, refuse unknown keys and have a default for every field,
    so that a table left out means something and a typing error is found.
    """
    if not isinstance(plugin_class, type):
        raise PluginContractError(name, "the entry point must name a class", actual=plugin_class)
    config_class = getattr(plugin_class, "Config", None)
    if not (isinstance(config_class, type) and issubclass(config_class, msgspec.Struct)):
        raise PluginContractError(name, "the class needs a `Config` that is a msgspec.Struct")
    settings = config_class.__struct_config__
    if not (settings.frozen and settings.forbid_unknown_fields):
        raise PluginContractError(name, "`Config` must be frozen and forbid unknown fields")
    for field in msgspec.structs.fields(config_class):
        if field.required:
            raise PluginContractError(name, "every setting needs a default", actual=field.name)
    return config_class


def check_implementations(name: str, plugin: object) -> None:
    """Refuse unknown hooks, wrong colours, wrappers, orderings and defaulted arguments."""
    # `dir(plugin)`, as pluggy: a hook set on the instance is a hook.
    for attribute in dir(plugin):
        function = getattr(plugin, attribute, None)
        options = getattr(function, f"{PROJECT}_impl", None)
        kind = hook_kind(attribute)
        if options is None:
            if kind is not None:
                raise PluginContractError(
                    f"{name}.{attribute}", "has a hook's name and must be marked @hookimpl"
                )
            continue
        item = f"{name}.{attribute}"
        if kind is None:
            raise PluginContractError(
                item, "is no hook", expected=" ".join(hook_names()), actual=attribute
            )
        for option in ("wrapper", "hookwrapper", "tryfirst", "trylast", "optionalhook", "specname"):
            if options.get(option):
                raise PluginContractError(item, f"must not use {option}: the config orders hooks")
        _check_signature(item, kind, attribute, function)


def _check_signature(item: str, kind: HookKind, hook: str, function: object) -> None:
    if not inspect.isroutine(function):
        raise PluginContractError(item, "must be a method")
    is_async = inspect.iscoroutinefunction(function)
    if is_async != (kind != "measure"):
        raise PluginContractError(
            item,
            f"a {kind} hook has one colour",
            expected="def" if kind == "measure" else "async def",
            actual="async def" if is_async else "def",
        )
    declared = list(inspect.signature(getattr(Hooks, hook)).parameters)[1:]
    taken = inspect.signature(function).parameters
    for parameter in taken.values():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise PluginContractError(item, "takes plain arguments only", actual=parameter)
        if parameter.default is not inspect.Parameter.empty:
            raise PluginContractError(item, "no argument may have a default", actual=parameter)
    # Gates and observers may ignore the event; the others need what they are given.
    optional = kind in ("gate", "observe") and not taken
    if not optional and list(taken) != declared:
        raise PluginContractError(
            item,
            "must take the declared arguments in order",
            expected=", ".join(declared),
            actual=", ".join(taken),
        )
