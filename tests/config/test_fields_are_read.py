"""A setting that nothing reads is a lie to the user."""

import ast
from pathlib import Path

import perl_megatron
from perl_megatron.config.deadline_section import DeadlinesConfig
from perl_megatron.config.load import config_fields

PACKAGE = Path(perl_megatron.__file__).parent
NOT_READERS = {PACKAGE / "config" / "derive.py", *(PACKAGE / "plan").glob("*.py")}
"""Checking a value, or showing it, is not using it."""
USED_BY_DERIVE = {"updates_per_step", "engine", "data", "tensor", "pipeline", "tensor_parallel"}
"""These reach the rest of the program as numbers of `Derived`. (Deadlines are read by the names of their phases, which
tests/runtime/test_watchdog.py compares.)"""


def test_every_field_is_read_somewhere():
    read = USED_BY_DERIVE | DeadlinesConfig.model_fields.keys()
    for path in PACKAGE.rglob("*.py"):
        if path not in NOT_READERS:
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert [key for key in config_fields() if key.rpartition(".")[2] not in read] == []
