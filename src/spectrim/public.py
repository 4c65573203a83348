"""Packages whose public names are imported when they are asked for, so that importing the package costs nothing."""

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar


class _Lazy(ModuleType):
    """Some functions have the name of their module, such as ``spectrim.anatomy``.

    The import system sets a module as an attribute of its package when it is loaded; here the function keeps the name.
    """

    _homes: ClassVar[Mapping[str, str]]

    def __getattr__(self, name: str) -> Any:
        if name not in self._homes:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        value = getattr(importlib.import_module(f"{self.__name__}.{self._homes[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in self._homes and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def import_when_asked(package: str, homes: Mapping[str, str]) -> None:
    """Let the names `homes` of a package be found in these modules of it."""
    sys.modules[package].__class__ = type("_Lazy", (_Lazy,), {"_homes": dict(homes)})
