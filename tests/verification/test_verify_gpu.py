"""`perl-megatron verify` on a GPU: TransformerEngine's layers and kernels against transformers. Skipped without one."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
NO_ENGINE = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="TransformerEngine is not installed"
)


def verify(tmp_path, *options):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "perl_megatron", "verify", *options, "--json", str(file)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return json.loads(file.read_text())


def test_torchs_layers_in_float32(tmp_path):
    assert verify(tmp_path)["layout"]["layers"] == "torch"


@NO_ENGINE
@pytest.mark.parametrize("options", [(), ("--recompute", "full"), ("--tied",)])
def test_transformer_engines_layers_in_bfloat16(tmp_path, options):
    assert verify(tmp_path, "--dtype", "bfloat16", *options)["layout"]["layers"] == "TransformerEngine"
