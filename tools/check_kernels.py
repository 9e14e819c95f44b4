"""Compile the Triton loss kernels for every target, without a GPU: `python tools/check_kernels.py [--all] [--write]`.

Fails where a kernel spills registers, touches local memory, or needs more shared memory than a block may have. Needs
triton (requirements/kernels.lock; `make check-kernels` installs it apart). Results are kept in build/kernels, by what
they depend on: Triton's version, the kernels' source and the settings. `--write` renews the table in docs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TABLE = ROOT / "docs" / "kernels_compiled.md"
CACHE = ROOT / "build" / "kernels" / "compiled"
SOURCES = [ROOT / "perl_megatron" / "kernels" / name for name in ("triton_kernels.py", "triton_settings.py")]

HIDDEN_SIZES = {2048: "3B", 3584: "7B", 5120: "32B", 8192: "72B"}
MAIN_SIZES = (2048,)
"""What is compiled without ``--all``."""
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that one block may have (CUDA C++ Programming Guide, technical specifications per compute capability; CDNA 3
Instruction Set Architecture, LDS)."""


@dataclass(frozen=True)
class Compilation:
    """One kernel as it is launched somewhere."""

    target: str
    kernel: str
    dtype: str
    hidden: int
    entropy: bool = True
    gradient: bool = True


@dataclass(frozen=True)
class Compiled:
    """What came out of it."""

    registers: int
    spilled: int
    """Bytes of spilled registers, and accesses to local memory."""
    shared: int
    """Bytes of shared memory."""
    seconds: float

    def faults(self, target: str) -> list[str]:
        """Why it must not be used."""
        limit = SHARED_MEMORY[target]
        return [
            *([f"{self.spilled} bytes of registers or local memory spilled"] if self.spilled else []),
            *([f"{self.shared} bytes of shared memory, of {limit}"] if self.shared > limit else []),
        ]


def compilations(hidden_sizes: Iterable[int], targets: Iterable[str] = TARGETS) -> list[Compilation]:
    """All ways in which the loss kernels are launched at these sizes."""
    cases = []
    for target in targets:
        cases.append(Compilation(target, "combine_splits", "float32", 0))
        for hidden in hidden_sizes:
            for dtype in ("bfloat16", "float32"):
                for kernel in ("add_up_splits", "logits_gradient"):
                    cases += [Compilation(target, kernel, dtype, hidden, entropy) for entropy in (True, False)]
                # The logits themselves, for the most probable tokens.
                cases.append(Compilation(target, "logits_gradient", dtype, hidden, entropy=False, gradient=False))
    return cases


def check(cases: list[Compilation]) -> dict[Compilation, Compiled | str]:
    """Each one's outcome, or the end of the compiler's last words; two at a time, each target in its own process."""
    found: dict[Compilation, Compiled | str] = {}
    for case in cases:
        stored = CACHE / f"{_key(case)}.json"
        if stored.is_file():
            found[case] = Compiled(**json.loads(stored.read_text()))
    groups: dict[tuple[str, int, str], list[Compilation]] = {}
    for case in cases:
        if case not in found:
            groups.setdefault((case.target, case.hidden, case.dtype), []).append(case)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for part in pool.map(_compile, groups.values()):
            found |= part
    return found


def _compile(cases: list[Compilation]) -> dict[Compilation, Compiled | str]:
    """In a process of its own: some configurations end the compiler's process."""
    command = [sys.executable, __file__, "--worker", json.dumps([asdict(case) for case in cases])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    found: dict[Compilation, Compiled | str] = {}
    for case, line in zip(cases, lines, strict=False):
        found[case] = Compiled(**json.loads(line))
        CACHE.mkdir(parents=True, exist_ok=True)
        (CACHE / f"{_key(case)}.json").write_text(line)
        print(f"  {case.target:7} H={case.hidden:<5} {case.dtype:9} {case.kernel:16} {line}", flush=True)
    missing = cases[len(lines) :]
    if missing:
        found[missing[0]] = (run.stderr.strip() or f"the compiler's process ended with {run.returncode}")[-2000:]
        found |= _compile(missing[1:]) if len(missing) > 1 else {}
    return found


def _key(case: Compilation) -> str:
    from importlib.metadata import version

    tools = [(ROOT / "tools" / name).read_text() for name in ("check_kernels.py", "compiled_kernel.py")]
    content = [version("triton"), repr(case), fingerprint(), *tools]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:32]


def fingerprint() -> str:
    """Of the kernels and their settings: a table with another one is out of date."""
    return hashlib.sha256("\n".join(source.read_text() for source in SOURCES).encode()).hexdigest()[:16]


def work(cases: list[dict[str, Any]]) -> None:
    """A process of ``check``: a line for each case, as soon as it is compiled."""
    from tools.compiled_kernel import compile_kernel

    for case in cases:
        print(json.dumps(asdict(compile_kernel(Compilation(**case)))), flush=True)


def table(found: dict[Compilation, Compiled | str]) -> str:
    """The outcome as Markdown."""
    from importlib.metadata import version

    lines = [
        "# The Triton loss kernels, as compiled",
        "",
        f"Written by `make check-kernels ARGUMENTS='--all --write'` with Triton {version('triton')}: compiled ahead of",
        "time, on a machine without a GPU. What they do: [kernels.md](kernels.md). How fast they are was not measured.",
        f"Kernels and settings: `{fingerprint()}`.",
        "",
        "| target | H | inputs | kernel | registers | spilled | shared memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, outcome in found.items():
        assert isinstance(outcome, Compiled)
        variant = "logits only" if not case.gradient else "" if case.entropy else "without entropy"
        kernel = f"`{case.kernel}`{f', {variant}' if variant else ''}"
        size = f"{case.hidden} ({HIDDEN_SIZES[case.hidden]})" if case.hidden else "any"
        limit = SHARED_MEMORY[case.target]
        lines.append(
            f"| {case.target} | {size} | {case.dtype} | {kernel} | {outcome.registers} | {outcome.spilled} "
            f"| {outcome.shared:,} of {limit:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="every model's hidden size, not only the 3B's")
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.relative_to(ROOT)} (with --all)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return 0
    if options.write and (options.target or not options.all):
        parser.error("--write needs all targets and sizes: --all, and no --target")
    cases = compilations(HIDDEN_SIZES if options.all else MAIN_SIZES, options.target or TARGETS)
    print(f"== compiling {len(cases)} kernels ahead of time")
    found = check(cases)
    bad = 0
    for case in cases:
        outcome = found[case]
        for fault in [outcome] if isinstance(outcome, str) else outcome.faults(case.target):
            print(f"FAILED {case}: {fault}")
            bad += 1
    print(f"{len(cases) - bad} of {len(cases)} kernels compiled without spilling and within shared memory")
    if options.write and not bad:
        TABLE.write_text(table({case: found[case] for case in cases}))
        print(f"wrote {TABLE.relative_to(ROOT)}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
