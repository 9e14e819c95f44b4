import io
from pathlib import Path

import pytest
from PIL import Image

from perl_megatron.runtime.image_errors import image_fault


@pytest.mark.parametrize("content", [b"", b"text", b"%!PS-Adobe"])
def test_a_fault_names_no_open_file(content: bytes, tmp_path: Path):
    (tmp_path / "image").write_bytes(content)
    faults = []
    with open(tmp_path / "image", "rb") as first, open(tmp_path / "image", "rb") as second:
        for file in (first, second, io.BytesIO(content), io.BytesIO(content)):
            with pytest.raises(OSError) as caught:
                Image.open(file, formats=("PNG",))
            faults.append(image_fault(caught.value))
    assert set(faults) == {"no image of a known format begins like this file"}


def test_other_faults_stay_as_they_are():
    assert image_fault(OSError("image file is truncated")) == "image file is truncated"
