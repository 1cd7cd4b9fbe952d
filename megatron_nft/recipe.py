"""Recipes: YAML files and `a.b=c` overrides into a `Config`, and back.

A recipe may name another as its `base:`, relative to itself, and overlay it: sections merge,
lists are replaced. `${oc.env:NAME}` stands for an environment variable. Paths inside a recipe are
not touched: a relative one is relative to the working directory of the run, not to the recipe.
"""

import difflib
import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_nft.config import Config
from megatron_nft.validation import leaves, validate

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def load(recipe: Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a recipe with overrides like `rollout.answers=8`.

    `data.train[0].path=…` reaches into a list that the recipe has; `data.train=[{path: …}]`
    replaces it. Raises ValueError for a file that cannot be read, a key that does not exist, a
    value of the wrong type and everything that `validate` rejects.
    """
    layer = _read(Path(recipe), ())
    for override in overrides:
        layer = _override(layer, override)
    config = _build(Config, layer, "", str(recipe))
    try:
        validate(config)
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}") from None
    return config


def read[T](kind: type[T], path: Path) -> T:
    """A file of another kind, read as strictly: `kind` is a dataclass of dataclasses."""
    return _build(kind, _read_yaml(Path(path)), "", str(path))


def save(config: Config, path: Path) -> None:
    """Write every value, defaults too, so that `load(path)` gives the same configuration."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), encoding="utf-8")


def differences(a: Config, b: Config) -> list[str]:
    """The dotted keys whose values differ, in the order of the fields."""
    values_a, values_b = dict(leaves(a)), dict(leaves(b))
    absent = object()
    keys = dict.fromkeys([*values_a, *values_b])
    return [key for key in keys if values_a.get(key, absent) != values_b.get(key, absent)]


# Files and overrides into nested dictionaries


def _read(path: Path, overlaid_by: tuple[Path, ...]) -> dict:
    """The recipe's values over those of its base; each file is checked by itself."""
    layer = _read_yaml(path)
    base = layer.pop("base", None)
    _build(Config, layer, "", str(path))
    if base is None:
        return layer
    if not isinstance(base, str):
        raise ValueError(f"{path}: base was {base!r}; it may be the path of another recipe")
    chain = (*overlaid_by, path.resolve())
    base_path = path.parent / base
    if base_path.resolve() in chain:
        names = " -> ".join(str(p) for p in (*chain, base_path.resolve()))
        raise ValueError(f"{path}: base was {base!r}, which leads back to itself: {names}")
    return _overlay(_read(base_path, chain), layer)


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file (looked for {path.absolute()})")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path), resolve=True, throw_on_missing=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable recipe: {error}") from None
    if not isinstance(layer, dict):
        raise ValueError(f"{path}: held {type(layer).__name__}; a recipe is keys and values")
    return layer


def _overlay(base: dict, layer: dict) -> dict:
    return OmegaConf.to_container(OmegaConf.merge(base, layer))


def _override(layer: dict, override: str) -> dict:
    key, equals, text = override.partition("=")
    where = f"override {override!r}"
    if not equals or not key.strip():
        raise ValueError(f"{where}: it may be `key=value`, such as rollout.answers=8")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]), resolve=True)["v"]
        if not isinstance(value, str) and _type_of(key) is str:
            value = text  # a path named 2024 is a path
        tree = OmegaConf.create(layer)
        OmegaConf.update(tree, key.strip(), value, merge=True)
    except (yaml.YAMLError, OmegaConfBaseException, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    layer = OmegaConf.to_container(tree)
    _build(Config, layer, "", where)
    return layer


def _type_of(key: str) -> Any:
    """The type of the field under a dotted key; None where there is no such field."""
    kind: Any = Config
    for name in re.split(r"[.\[\]]+", key.strip("]")):
        if typing.get_origin(kind) in (list, tuple):
            kind = typing.get_args(kind)[0]
        else:
            kind = typing.get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


# Nested dictionaries into dataclasses


def _build(kind: Any, value: Any, key: str, where: str) -> Any:
    """`value` as a `kind`: a dataclass, a list or tuple of kinds, or a scalar; types are strict."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _build_dataclass(kind, value, key, where)
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], v, f"{key}[{i}]", where) for i, v in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        items = zip(arguments, value, strict=True)
        return tuple(_build(k, v, f"{key}[{i}]", where) for i, (k, v) in enumerate(items))
    if origin is dict and isinstance(value, dict):
        return {str(k): _build(arguments[1], v, f"{key}.{k}", where) for k, v in value.items()}
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    may_be = SCALARS.get(kind) or f"a list of {len(arguments) if origin is tuple else 'sections'}"
    raise _wrong_type(value, key, may_be, where)


def _build_dataclass(kind: Any, value: Any, key: str, where: str) -> Any:
    names = [field.name for field in fields(kind)]
    if not isinstance(value, dict):
        raise _wrong_type(value, key, f"a section with the keys {', '.join(names)}", where)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in names:
            nearest = _nearest(str(name), names, prefix)
            raise ValueError(f"{where}: there is no key {prefix}{name}; {nearest}")
    types = typing.get_type_hints(kind)
    return kind(**{n: _build(types[n], v, f"{prefix}{n}", where) for n, v in value.items()})


def _nearest(name: str, names: list[str], prefix: str) -> str:
    if near := difflib.get_close_matches(name, names, n=1):
        return f"the nearest is {prefix}{near[0]}"
    elsewhere = {key.rpartition(".")[2]: key for key, _ in leaves(Config())}
    if near := difflib.get_close_matches(name, elsewhere, n=1):
        return f"the nearest is {elsewhere[near[0]]}"
    return f"it may be {', '.join(prefix + n for n in names)}"


def _wrong_type(value: Any, key: str, may_be: str, where: str) -> ValueError:
    given = f"{value!r} ({type(value).__name__})"
    return ValueError(f"{where}: {key} was {given}; it may be {may_be}")
