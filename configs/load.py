"""Turn `[CONFIG.yaml] [dotted.key=value ...]` into a validated, frozen config.

Called by the driver before anything heavy is imported. Every mistake becomes one ConfigurationError whose message
names the key and the fix.
"""

import difflib
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pydantic
import yaml

from configs.schema import RecipeConfig, Section

ConfigT = TypeVar("ConfigT", bound=RecipeConfig)


class ConfigurationError(ValueError):
    """The user's input cannot be run; the message names the key, file or row, and the fix. Exit code 2."""


def load(config_class: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    """Read an optional YAML file, apply dotted overrides in order, validate.

    Raises:
        ConfigurationError: naming the file or key that is wrong, and what would be right.
    """
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if len(files) > 1:
        raise ConfigurationError(f"one configuration file at most, got {len(files)}: {', '.join(files)}")
    values = _read(pathlib.Path(files[0])) if files else {}
    texts = {key for key, field in leaves(config_class) if field.annotation in (str, str | None)}
    for override in overrides:
        _apply(values, override, texts)
    try:
        return config_class.model_validate(_with_defaults(config_class, values))
    except pydantic.ValidationError as error:
        raise ConfigurationError(_explain(config_class, error)) from error


def dump(config: RecipeConfig) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def help_text(config_class: type[RecipeConfig], recipe: str) -> str:
    """Every key with its default and meaning, a line or two each."""
    lines = [f"usage: python -m {recipe} [CONFIG.yaml] [dotted.key=value ...]", ""]
    defaults = config_class()
    for key, field in leaves(config_class):
        value = functools.reduce(getattr, key.split("."), defaults)
        lines += [f"{key} = {yaml_scalar(value)}", f"    {field.description}"]
    return "\n".join(lines)


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config class as (dotted key, pydantic field)."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _with_defaults(config_class: type[RecipeConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Fill what a given section leaves out from the recipe's default for it, which may differ from the section's."""
    filled = dict(values)
    for name, field in config_class.model_fields.items():
        given = values.get(name, {})
        if isinstance(field.default, Section) and (given is None or isinstance(given, dict)):
            filled[name] = field.default.model_dump() | (given or {})
    return filled


def yaml_scalar(value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain words: on, off, yes, no and dates are strings, as `transport.verify: off` means them."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such configuration file (an override is written key=value)")
    try:
        values = _Loader(path.read_text()).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str, texts: set[str]) -> None:
    key, _, text = override.partition("=")
    try:
        value = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{key}: {text!r} is not a YAML value; quote it") from error
    if key in texts and isinstance(value, int | float):
        value = text
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.setdefault(section, {}), dict):
            raise ConfigurationError(f"{key}: {section} is not a section")
        values = values[section]
    values[name] = value


def _explain(config_class: type[RecipeConfig], error: pydantic.ValidationError) -> str:
    known = [key for key, _ in leaves(config_class)]
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key; {_hint(key, known)}")
        elif item["type"] == "value_error" and isinstance(item["input"], dict):  # a combination: its message names keys
            lines.append(message)
        else:
            lines.append(f"{key}: {message}, got {item['input']!r}")
    return "\n".join(lines)


def _hint(key: str, known: list[str]) -> str:
    """The likeliest key that was meant, or those of the same section."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if near:
        return f"did you mean {near[0]}?"
    section = key.rpartition(".")[0]
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    return f"{section} has {', '.join(siblings)}" if section and siblings else "--help lists every key"
