import json

import pytest

from perl_megatron.runtime import doctor


def test_this_installation():
    report = doctor.examine(loss_kernel="tiled")
    assert json.loads(json.dumps(report)) == report
    assert report["missing"] == []
    text = doctor.render(report)
    assert "Loss kernels: tiled" in text
    for name in (*doctor.REQUIRED, *(part.name for part in doctor.OPTIONAL)):
        assert name in text
    assert report["packages"]["torch"] in text
    assert report["device"]["description"] in text


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda names: None)
    report = doctor.examine(loss_kernel=None)
    assert report["missing"] == list(doctor.REQUIRED)
    text = doctor.render(report)
    assert "pip install torch megatron-core" in text
    extra = "gpu" if report["device"]["cuda"] else "cpu"
    assert f"vLLM: pip install 'perl-megatron[{extra}]'" in text
    if not report["device"]["cuda"]:
        assert "Apex:" not in text  # there is no use for it here


@pytest.mark.parametrize(
    ("part", "cuda", "state"),
    [
        (doctor.Part("x", ("numpy",), "numpy", "", ""), False, "live"),
        (
            doctor.Part("x", ("numpy",), "numpy", "", "", needs_cuda=True),
            False,
            "installed, not usable: no CUDA device",
        ),
        (doctor.Part("x", ("numpy",), "no_such", "", ""), True, "installed, not usable: No module named 'no_such'"),
        (doctor.Part("x", ("no-such-package",), "numpy", "", "get it"), True, "not installed"),
    ],
)
def test_states(part, cuda, state):
    assert doctor._examine_part(part, cuda=cuda)["state"] == state
