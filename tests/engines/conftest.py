"""For engines without their GPU packages: stands in for what they import and never use here."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any


class _Unused:
    """Whatever a module takes from the stub while it is imported: a base class, a decorator, a constant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> _Unused:
        return self


class _StubModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def stub_torchvision() -> None:
    """Lets an engine import torchvision where it is not installed: it belongs to one torch and one CUDA, and
    SGLang's configurations of image models, which nothing here uses, import it on the way to its pools.
    """
    if importlib.util.find_spec("torchvision") is None:
        import transformers.utils

        transformers.utils.is_torchvision_available()  # remembers that there is none, and goes without
        sys.meta_path.append(_Torchvision())
