"""Models of your own: ``package.module:factory``, imported, checked and called.

The factory gets the keyword arguments of the ``model`` section, and, where it names them, what
the data decide: ``shape`` (a :class:`~sweeper.config.DataShape`), ``channels``, ``height``,
``width``, ``classes``. It returns a module that maps images [B, channels, height, width] to logits
[B, classes].

A study file may not run code, so what it can name is bounded: modules of installed packages and of
``PYTHONPATH``, not the current folder's (see ``sweeper.__main__``); nothing of Python's own library
or of its installers; of torch only classes of modules. Which of these a worker imports for a study
that came out of a store is its owner's decision (``--allow-imports``).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from sweeper.config.data import DataShape
from sweeper.config.model import Custom as CustomConfig
from sweeper.errors import UsageError
from sweeper.study.suggest import did_you_mean

FROM_DATA = ("shape", *DataShape._fields)
"""Arguments that a factory need not be given: the data decide them."""

_NO_MODELS: Final = sys.stdlib_module_names | {"pip", "setuptools", "pkg_resources", "distutils"}
_CLASSES_ONLY: Final = frozenset({"torch", "mlflow", "optuna"})
"""Packages with functions that run what they are given (``torch.hub.load`` and its like)."""


def check_custom(config: CustomConfig) -> Callable[..., Any]:
    """Import the factory and check the section's arguments against its signature.

    Nothing is built. Raises UsageError where the factory cannot be imported, is not callable, or
    does not take the arguments; all wrong arguments are named at once.
    """
    factory = _import(config.name)
    parameters = _parameters(factory)
    if parameters is None:
        return factory
    mistakes = [*_unknown(config.arguments, parameters), *_missing(config.arguments, parameters)]
    if mistakes:
        raise UsageError(f"model {config.name}: {'; '.join(mistakes)}")
    return factory


def custom(config: CustomConfig, shape: DataShape) -> nn.Module:
    """Call the factory for data of ``shape``. Raises UsageError where that gives no module."""
    factory = check_custom(config)
    parameters = _parameters(factory) or {}
    from_data = {"shape": shape, **shape._asdict()}
    arguments = {name: from_data[name] for name in FROM_DATA if name in _by_keyword(parameters)}
    try:
        model = factory(**{**arguments, **config.arguments})
    except Exception as error:
        raise UsageError(
            f"model {config.name}: the factory must build a module from its arguments, but it "
            f"raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {config.name}: the factory must return a torch.nn.Module, but it returned "
            f"{type(model).__name__}"
        )
    return model


def _import(name: str) -> Callable[..., Any]:
    module_name, factory_name = name.split(":")
    _refuse(name, module_name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(
                f"model {name}: the module must be importable, but there is none named "
                f"{error.name!r}; install its package, or add its folder to PYTHONPATH"
            ) from error
        raise UsageError(
            f"model {name}: {module_name} needs the module {error.name!r}, which is not installed"
        ) from error
    except Exception as error:
        raise UsageError(
            f"model {name}: the module must be importable, but importing {module_name} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    factory = getattr(module, factory_name, None)
    if factory is None:
        public = [key for key, value in vars(module).items() if callable(value)]
        raise UsageError(
            f"model {name}: {module_name} has no {factory_name!r}"
            + did_you_mean(factory_name, public)
        )
    if not callable(factory):
        raise UsageError(
            f"model {name}: the factory must be callable, but it is a {type(factory).__name__}"
        )
    if inspect.isroutine(factory) or inspect.isclass(factory):
        _refuse(name, getattr(factory, "__module__", None) or module_name)
    package = module_name.partition(".")[0]
    if package in _CLASSES_ONLY and not _is_module_class(factory):
        raise UsageError(
            f"model {name}: of {package} only subclasses of torch.nn.Module can be a model, but "
            f"this is a {type(factory).__name__}; wrap it in a factory of your own package"
        )
    return factory  # type: ignore[no-any-return]  # callable() does not narrow Any


def _is_module_class(factory: Any) -> bool:
    return isinstance(factory, type) and issubclass(factory, nn.Module)


def _refuse(name: str, module_name: str) -> None:
    """Refuse what no model can be of: before it is imported, and after under its true name."""
    package = module_name.partition(".")[0]
    if package in _NO_MODELS:
        raise UsageError(
            f"model {name}: the factory must be of a package of models, but it is of Python's own "
            f"{package}; write a factory in a package of yours"
        )


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The factory's parameters, or None for a callable that does not tell them."""
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return None


def _by_keyword(parameters: dict[str, inspect.Parameter]) -> list[str]:
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return [name for name, parameter in parameters.items() if parameter.kind in kinds]


def _unknown(arguments: dict[str, Any], parameters: dict[str, inspect.Parameter]) -> list[str]:
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return []
    known = _by_keyword(parameters)
    return [
        f"there is no argument {name!r}{did_you_mean(name, known)}"
        for name in arguments
        if name not in known
    ]


def _missing(arguments: dict[str, Any], parameters: dict[str, inspect.Parameter]) -> list[str]:
    variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    by_keyword = _by_keyword(parameters)
    mistakes = []
    for name, parameter in parameters.items():
        if parameter.kind in variadic or parameter.default is not inspect.Parameter.empty:
            continue
        if name not in by_keyword:
            mistakes.append(f"the factory's argument {name!r} must have a name to be given by")
        elif name not in arguments and name not in FROM_DATA:
            mistakes.append(f"the factory needs {name!r}, but the section does not give it")
    return mistakes
