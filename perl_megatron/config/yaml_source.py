"""YAML as a list of settings, each with the place that set it.

Only YAML's core types are read (no tags, no code), by the rules of YAML 1.2: `1e-4` is a number, `no` is a word, `010`
is ten. A key that is set twice in one mapping is an error.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from perl_megatron.errors import UserError

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")


def parse(text: str, where: str) -> yaml.Node | None:
    """Parse one YAML document; None where it is empty. `where` names the text in errors (UserError)."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise UserError(f"not valid YAML: {error.problem}", where=f"{where}{line}") from error
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", where=where) from error


def read(path: Path) -> yaml.Node | None:
    """Parse a YAML file (UTF-8). A missing or unreadable file is a UserError."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        fix = f"give a YAML file that can be read; paths are relative to the current directory, {Path.cwd()}"
        what = f"cannot read the config file: {error.strerror or error}"
        raise UserError(what, where=str(path), fix=fix) from error
    except UnicodeDecodeError as error:
        fix = "save it as UTF-8, or give another file"
        raise UserError(f"cannot read the config file: {error}", where=str(path), fix=fix) from error


def is_null(node: yaml.Node | None) -> bool:
    """Whether the node is empty or a plain null."""
    return node is None or (isinstance(node, yaml.ScalarNode) and node.style is None and bool(_NULL.match(node.value)))


def line(node: yaml.Node) -> int:
    """1-based line of the node in its text."""
    return node.start_mark.line + 1


def items(node: yaml.MappingNode, where: str) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """The mapping's (key, key node, value node); a key that is not a word, or that comes twice, is a UserError."""
    seen: dict[str, int] = {}
    result: list[tuple[str, yaml.Node, yaml.Node]] = []
    for key_node, value_node in node.value:
        place = f"{where}:{line(key_node)}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError("a key must be a word", where=place)
        key = key_node.value
        if key in seen:
            raise UserError(f"the key '{key}' is set twice (first in line {seen[key]})", where=place, fix="keep one")
        seen[key] = line(key_node)
        result.append((key, key_node, value_node))
    return result


def plain(node: yaml.Node | None, where: str, *, _ancestors: frozenset[int] = frozenset()) -> Any:
    """The node as None, bool, int, float, str, list or dict. UserError for tags and self-containing values."""
    if node is None:
        return None
    place = f"{where}:{line(node)}"
    if id(node) in _ancestors:
        raise UserError("a value contains itself", where=place)
    inside = _ancestors | {id(node)}
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, place)
    if isinstance(node, yaml.SequenceNode):
        return [plain(item, where, _ancestors=inside) for item in node.value]
    assert isinstance(node, yaml.MappingNode)
    return {key: plain(value, where, _ancestors=inside) for key, _, value in items(node, where)}


def _scalar(node: yaml.ScalarNode, place: str) -> Any:
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        raise UserError(f"the YAML tag {node.tag} is not allowed", where=place, fix="write the plain value")
    if node.style is not None:
        return node.value
    text = node.value
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text) and math.isfinite(float(text)):
        return float(text)
    return text


def dump_scalar(value: Any) -> str:
    """The value, or a tuple of such, on one line of YAML that `plain` reads back equal (as a list)."""
    if isinstance(value, str | Path):
        return yaml.safe_dump(str(value), default_style='"', width=math.inf, allow_unicode=True).rstrip("\n")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(dump_scalar, value))}]"
    return repr(value)
