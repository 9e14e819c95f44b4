"""The gate of the Triton kernels, as far as it goes without Triton (`make check-kernels` runs it as a whole)."""

import re

from perl_megatron.kernels.triton_settings import HALF, SINGLE
from tools import check_kernels
from tools.check_kernels import HIDDEN_SIZES, MAIN_SIZES, SHARED_MEMORY, TABLE, TARGETS, Compiled, compilations


def test_every_target_has_settings_and_a_limit():
    assert set(TARGETS) == set(HALF) == set(SINGLE) == set(SHARED_MEMORY)
    assert set(MAIN_SIZES) <= set(HIDDEN_SIZES)


def test_the_published_table_is_of_these_kernels_and_complete():
    """After a change: make check-kernels ARGUMENTS='--all --write'."""
    text = TABLE.read_text()
    assert f"`{check_kernels.fingerprint()}`" in text
    pinned = re.search(r"^triton==(.+)$", (check_kernels.ROOT / "requirements/kernels.lock").read_text(), re.MULTILINE)
    assert f"with Triton {pinned[1]}:" in text
    rows = [line for line in text.splitlines() if line.startswith(("| sm_", "| gfx"))]
    assert len(rows) == len(compilations(HIDDEN_SIZES))
    assert all(row.split("|")[6].strip() == "0" for row in rows)


def test_faults():
    assert Compiled(255, 0, 100, 1.0).faults("sm_80") == []
    assert "8 bytes" in Compiled(255, 8, 100, 1.0).faults("sm_80")[0]
    (fault,) = Compiled(255, 0, 65_537, 1.0).faults("gfx942")
    assert fault == "65537 bytes of shared memory, of 65536"


def test_a_compiler_that_dies_is_a_failure_of_that_kernel_alone(monkeypatch, tmp_path):
    """The first case ends the process; the others are compiled by a new one."""
    monkeypatch.setattr(check_kernels, "CACHE", tmp_path)
    monkeypatch.setattr(check_kernels, "_key", lambda case: str(hash(case)))
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "for case in json.loads(sys.argv[2]):\n"
        "    if case['kernel'] == 'combine_splits':\n"
        "        print('out of registers', file=sys.stderr, flush=True)\n"
        "        os.abort()\n"
        "    print(json.dumps({'registers': 1, 'spilled': 0, 'shared': 2, 'seconds': 0.1}), flush=True)\n"
    )
    monkeypatch.setattr(check_kernels, "__file__", str(worker))
    cases = [each for each in compilations([2048], ["sm_80"]) if each.dtype == "float32"]
    found = check_kernels._compile(cases)
    dead = [case for case in cases if isinstance(found[case], str)]
    assert [case.kernel for case in dead] == ["combine_splits"]
    assert found[dead[0]] == "out of registers"
    assert len(found) == len(cases) > 3
