"""Settings: dataclass defaults, then a YAML file, then `a.b=c` overrides (layer 0).

An unknown key, or a value of the wrong type, is an error that names the file, the key and the
nearest known one.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ipx2p.errors import InputError, suggestion
from ipx2p.files import atomic_write

Config = TypeVar("Config")


def load_config(
    kind: type[Config], path: str | Path | None, overrides: Sequence[str] = ()
) -> Config:
    """Build the dataclass `kind` from its defaults, the YAML file and the overrides.

    Args:
        kind: a dataclass; nested ones are groups, written `group.key` in overrides.
        path: the YAML file; None for the defaults alone.
        overrides: `group.key=value` strings; values are read as YAML.
    Raises: InputError for a missing or broken file, an unknown key, a wrong type, a missing value.
    """
    settings = OmegaConf.structured(kind)
    try:
        for where, values in read_settings(path, overrides):
            _check_keys(kind, OmegaConf.to_container(values), where)
            settings = OmegaConf.merge(settings, values)
        where = path or "command line"
        if missing := OmegaConf.missing_keys(settings):
            raise InputError(f"{path}: {', '.join(sorted(missing))} must be set and is not")
        return OmegaConf.to_object(settings)  # resolves interpolations such as ${oc.env:HOME}
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise InputError(f"{where}: {key}{_one_line(str(error).splitlines()[0])}") from error


def read_settings(
    path: str | Path | None, overrides: Sequence[str] = ()
) -> list[tuple[str, DictConfig]]:
    """The YAML file and the overrides, each with its place for messages; keys are not checked."""
    found = [] if path is None else [(str(path), _read_yaml(Path(path)))]
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise InputError(f"{override!r} is not an override, expected key=value")
        try:
            found.append(("command line", OmegaConf.from_dotlist([override])))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise InputError(f"{override!r}: the value is not YAML: {_one_line(error)}") from error
    return found


def save_config(config: Any, path: str | Path) -> None:
    """Write a config dataclass, every value resolved, as YAML that `load_config` reads back."""
    with atomic_write(path) as temporary:
        OmegaConf.save(OmegaConf.structured(config), temporary)


def config_differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The dotted keys in which two config dataclasses differ, with both values."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    both = ((key, before.get(key), after.get(key)) for key in before | after)
    return [(key, one, other) for key, one, other in both if one != other]


def _read_yaml(path: Path) -> DictConfig:
    try:
        values = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"config file {path} is a folder, expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read config file {path}: {_one_line(error)}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path} is not YAML: {_one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise InputError(f"{path} holds a list, expected groups of `key: value`")
    return values


def _check_keys(kind: type, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in fields:
            near = suggestion(str(name), list(fields), prefix)
            raise InputError(f"{where}: unknown key {key}; {near}")
        group = _inner_type(fields[name])
        if dataclasses.is_dataclass(group) and isinstance(value, Mapping):
            _check_keys(group, value, where, f"{key}.")
        elif dataclasses.is_dataclass(group) and value is not None:
            names = ", ".join(field.name for field in dataclasses.fields(group))
            raise InputError(f"{where}: {key} is {value!r}, expected a group with keys {names}")
        elif typing.get_origin(group) is dict and isinstance(value, list):
            raise InputError(f"{where}: {key} is {value!r}, expected a group of NAME: VALUE")
        elif typing.get_origin(group) is list and not isinstance(value, list):
            raise InputError(f"{where}: {key} is {value!r}, expected a list such as [{value}]")
        elif isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value):
            raise InputError(f"{where}: {key} is {value!r}, expected a list of single values")


def _inner_type(annotation: Any) -> Any:
    """The type T in an annotation `T | None`, or the annotation itself."""
    options = [option for option in typing.get_args(annotation) if option is not type(None)]
    is_optional = isinstance(annotation, types.UnionType) and len(options) == 1
    return options[0] if is_optional else annotation


def _flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flatten(value, f"{prefix}{field.name}.")
        elif isinstance(value, dict):
            yield from ((f"{prefix}{field.name}.{name}", item) for name, item in value.items())
        else:
            yield f"{prefix}{field.name}", value


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
