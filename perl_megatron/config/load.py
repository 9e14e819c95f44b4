"""Read a config: presets, YAML files, then `section.key=value` overrides; every value keeps the place that set it.

A file may start from another with a top-level `base: other.yaml` (relative to the file; its own keys win), and from
published settings with `preset: paper` or `preset: [paper, gspo]` (later ones win). Presets, also those of the command
line and of a base, are above the defaults and below all keys of files. All other relative paths in a config are
relative to the current directory.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from perl_megatron.config import yaml_source
from perl_megatron.config.preset_source import named_presets, preset_file
from perl_megatron.config.schema import Config
from perl_megatron.durable import replace_file
from perl_megatron.errors import UserError

Sections = TypeVar("Sections", bound=BaseModel)

COMMAND_LINE = "command line"
DEFAULT = "default"
BASE_KEY = "base"
PRESET_KEY = "preset"


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config and where each of its values comes from."""

    config: Config
    origins: dict[str, str]
    """For every dotted key: 'default', 'preset NAME', 'FILE:line' or 'command line'."""


@dataclass(frozen=True)
class _Setting:
    value: Any
    origin: str


@dataclass(frozen=True)
class ConfigFile:
    """A config file that was read once, to be loaded with many sets of overrides."""

    path: Path
    _settings: Mapping[str, _Setting]
    _presets: Sequence[str]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """UserError as from ``load_config``, for what the file itself holds."""
        presets: list[str] = []
        return cls(path, _read_file(path, Config, seen=(), presets=presets, beside=()), presets)

    def load(self, overrides: Sequence[str] = ()) -> LoadedConfig:
        """What ``load_config`` gives for the file as it was when it was read."""
        config, origins = _load(Config, self.path, dict(self._settings), list(self._presets), overrides)
        return LoadedConfig(config=config, origins=origins)


@functools.cache
def config_fields(schema: type[BaseModel] = Config) -> Mapping[str, FieldInfo]:
    """Every dotted key of the schema with its pydantic field (type, description, default)."""
    return MappingProxyType(dict(_fields(schema, "")))


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read `path` (None: defaults only), apply the overrides in order, and check everything.

    An override `preset=NAME` adds a preset to those of the file.

    Raises UserError for an unknown key or preset (with the nearest valid one), a key set twice, a wrong type or range,
    or a bad override, and names the place that set it.
    """
    config, origins = load_sections(Config, path, overrides)
    return LoadedConfig(config=config, origins=origins)


def load_sections(
    schema: type[Sections], path: Path | str | None, overrides: Sequence[str] = (), *, beside: Sequence[str] = ()
) -> tuple[Sections, dict[str, str]]:
    """The same for another model that consists of sections: an object of it, and the origin of every value.

    Only ``Config`` has presets. ``beside``: top-level keys of the file that the caller reads itself.
    """
    presets: list[str] = []
    own = {} if path is None else _read_file(Path(path), schema, seen=(), presets=presets, beside=beside)
    return _load(schema, path, own, presets, overrides)


def _load(
    schema: type[Sections],
    path: Path | str | None,
    own: dict[str, _Setting],
    presets: list[str],
    overrides: Sequence[str],
) -> tuple[Sections, dict[str, str]]:
    """Of the settings of a file (``own``) and its presets; both are changed."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if schema is Config and equals and key.strip() == PRESET_KEY:
            value = yaml_source.plain(yaml_source.parse(text, f"{COMMAND_LINE}: {override}"), COMMAND_LINE)
            presets += named_presets(value, COMMAND_LINE)
        else:
            own.update(_read_override(override, schema))
    settings = {key: setting for name in presets for key, setting in _read_preset(name).items()} | own
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        section, leaf = key.split(".")
        nested.setdefault(section, {})[leaf] = setting.value
    try:
        values = schema.model_validate(nested, strict=True)
    except ValidationError as error:
        raise _explain(error, schema, settings, path) from error
    return values, {key: settings[key].origin if key in settings else DEFAULT for key in config_fields(schema)}


RESOLVED = "# Every value of this run, with the place that set it."
"""The first line of what ``save_resolved`` writes."""


def save_resolved(loaded: LoadedConfig, path: Path) -> None:
    """Write the whole config as YAML, each value's origin as a comment. Loading the file gives an equal config."""
    lines = [RESOLVED]
    for section_name in Config.model_fields:
        lines.append(f"{section_name}:")
        section = getattr(loaded.config, section_name)
        for name in type(section).model_fields:
            origin = loaded.origins[f"{section_name}.{name}"].replace("\n", " ")
            lines.append(f"  {name}: {yaml_source.dump_scalar(getattr(section, name))}  # {origin}")
    replace_file(path, ("\n".join(lines) + "\n").encode())


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        section = _section_type(info)
        if section is None:
            yield prefix + name, info
        else:
            yield from _fields(section, f"{prefix}{name}.")


def _section_type(info: FieldInfo) -> type[BaseModel] | None:
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


@functools.cache
def _read_preset(name: str) -> Mapping[str, _Setting]:
    path = preset_file(name, f"preset {name}")
    root = yaml_source.read(path)
    assert isinstance(root, yaml.MappingNode), f"{path} holds sections"
    read: dict[str, _Setting] = {}
    for key, key_node, value_node in yaml_source.items(root, str(path)):
        origin = f"{path}:{yaml_source.line(key_node)}"
        read.update(_read_value(key, value_node, Config, where=str(path), origin=origin))
    return MappingProxyType({key: _Setting(setting.value, f"preset {name}") for key, setting in read.items()})


def _read_file(
    path: Path, schema: type[BaseModel], *, seen: tuple[Path, ...], presets: list[str], beside: Sequence[str]
) -> dict[str, _Setting]:
    """The settings of a file and its bases; the presets that they name are added to ``presets``, a base's first."""
    resolved = path.resolve()
    if resolved in seen:
        raise UserError("config files name each other as `base` in a circle", where=" → ".join(map(str, (*seen, path))))
    root = yaml_source.read(path)
    if yaml_source.is_null(root):
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError("a config file holds sections such as `model:`", where=f"{path}:1")
    settings: dict[str, _Setting] = {}
    own_presets: tuple[str, ...] = ()
    is_resolved = _is_resolved(path)
    for key, key_node, value_node in yaml_source.items(root, str(path)):
        if key == PRESET_KEY and schema is Config:
            where = f"{path}:{yaml_source.line(key_node)}"
            own_presets = named_presets(yaml_source.plain(value_node, str(path)), where)
        elif key == BASE_KEY:
            base = yaml_source.plain(value_node, str(path))
            if not isinstance(base, str):
                raise UserError("`base` is the path of one config file", where=f"{path}:{yaml_source.line(key_node)}")
            # The file's own keys win, wherever `base` stands in it.
            inherited = _read_file(path.parent / base, schema, seen=(*seen, resolved), presets=presets, beside=beside)
            settings = inherited | settings
        elif key not in beside:
            origin = f"{path}:{yaml_source.line(key_node)}"
            value = _read_value(key, value_node, schema, where=str(path), origin=origin, is_resolved=is_resolved)
            settings.update(value)
    presets += own_presets
    return settings


def _read_override(override: str, schema: type[BaseModel]) -> dict[str, _Setting]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(
            f"'{override}' is not an override", where=COMMAND_LINE, fix="write section.key=value, such as run.steps=50"
        )
    info = config_fields(schema).get(key)
    if info is not None and _takes_text(info) and not text.lstrip().startswith(("'", '"')):
        # Free text may hold anything, ': ' and '#' included.
        is_null = text.strip() in ("", "null", "~") and type(None) in get_args(info.annotation)
        return {key: _Setting(None if is_null else _as_text(info, text), COMMAND_LINE)}
    node = yaml_source.parse(text, f"{COMMAND_LINE}: {override}")
    return _read_value(key, node, schema, where=COMMAND_LINE, origin=COMMAND_LINE)


def _read_value(
    key: str, node: yaml.Node | None, schema: type[BaseModel], *, where: str, origin: str, is_resolved: bool = False
) -> dict[str, _Setting]:
    """The settings under a dotted key: one for a field, all of its fields for a section.

    A file that a run wrote (``is_resolved``) may hold keys of an earlier version, which are left out.
    """
    fields = config_fields(schema)
    if key in fields:
        return {key: _Setting(_field_value(fields[key], node, where), origin)}
    if key not in schema.model_fields:
        raise _unknown_key(key, schema, origin)
    if node is None or yaml_source.is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        example = next(dotted for dotted in fields if dotted.startswith(f"{key}."))
        raise UserError(f"`{key}` is a section, not a value", where=origin, fix=f"set its keys, such as {example}")
    settings: dict[str, _Setting] = {}
    for name, key_node, value_node in yaml_source.items(node, where):
        dotted = f"{key}.{name}"
        place = origin if origin == COMMAND_LINE else f"{where}:{yaml_source.line(key_node)}"
        if dotted in RETIRED and is_resolved:
            continue  # a run of an earlier version goes on with what came in its place
        if dotted not in fields:
            raise _unknown_key(dotted, schema, place)
        settings[dotted] = _Setting(_field_value(fields[dotted], value_node, where), place)
    return settings


def _field_value(info: FieldInfo, node: yaml.Node | None, where: str) -> Any:
    if isinstance(node, yaml.ScalarNode) and _takes_text(info) and not yaml_source.is_null(node):
        yaml_source.plain(node, where)  # refuses tags
        return _as_text(info, node.value)  # unconverted, so that a run may be called 2026
    return yaml_source.plain(node, where)


def _as_text(info: FieldInfo, text: str) -> str | Path:
    return Path(text) if Path in (info.annotation, *get_args(info.annotation)) else text


def _takes_text(info: FieldInfo) -> bool:
    return not _is_list(info) and bool({info.annotation, *get_args(info.annotation)} & {str, Path})


def _is_list(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is tuple


RETIRED = {
    "optimizer.micro_batch_sequences": "micro-batches are bounded in tokens, by actor.micro_batch_tokens",
    "run.collective_timeout": "every phase has a deadline of its own, in the section deadlines",
}
"""Keys of earlier versions, which run folders of theirs still have, and what came in their place."""


def _is_resolved(path: Path) -> bool:
    """Whether a run wrote the file."""
    with path.open(encoding="utf-8") as file:
        return file.readline().rstrip("\n") == RESOLVED


def _unknown_key(key: str, schema: type[BaseModel], origin: str) -> UserError:
    if key in RETIRED:
        return UserError(f"'{key}' is no setting any more: {RETIRED[key]}", where=origin, fix="remove the line")
    return UserError(f"unknown key '{key}'", where=origin, fix=f"did you mean '{nearest_key(key, schema)}'?")


def nearest_key(key: str, schema: type[BaseModel] = Config) -> str:
    """The valid dotted key or section that `key` most likely means."""
    keys = list(config_fields(schema))
    leaf = key.rpartition(".")[2]
    same_leaf = [candidate for candidate in keys if candidate.rpartition(".")[2] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda candidate: difflib.SequenceMatcher(None, key, candidate).ratio())

    def closeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        return max(whole, difflib.SequenceMatcher(None, leaf, candidate.rpartition(".")[2]).ratio() * 0.95)

    extra = (BASE_KEY, PRESET_KEY) if schema is Config else ()
    candidates = keys if "." in key else [*schema.model_fields, *extra, *keys]
    return max(candidates, key=closeness)


def _explain(
    error: ValidationError, schema: type[BaseModel], settings: dict[str, _Setting], path: Path | str | None
) -> UserError:
    problems, fields = error.errors(include_url=False), config_fields(schema)
    lines, places, fixes = [], [], []
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"][:2])
        if problem["type"] == "missing":
            if key not in fields:  # the whole section is missing
                key = next(name for name, info in fields.items() if info.is_required() and name.startswith(f"{key}."))
            lines.append(f"'{key}' has to be set")
            places.append(str(path) if path is not None else COMMAND_LINE)
        else:
            setting = settings[key]
            lines.append(f"{key} = {yaml_source.dump_scalar(setting.value)}: {_lower_first(problem['msg'])}")
            places.append(setting.origin)
        info = fields[key]
        fixes.append(f"{key}: {info.description}")
    return UserError("\n".join(lines), where=", ".join(dict.fromkeys(places)), fix="\n         ".join(fixes))


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
