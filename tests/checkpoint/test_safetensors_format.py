import json

import pytest
import torch
from safetensors.torch import save_file

from perl_megatron.checkpoint.safetensors_format import DTYPES, read_header, read_tensor
from perl_megatron.errors import UserError


def test_every_dtype_and_shape_is_read_as_the_library_wrote_it(tmp_path):
    shapes = [(), (0,), (3,), (2, 0, 3), (5, 7, 2)]
    tensors = {f"{name}{shape}": torch.ones(shape).to(dtype) for name, dtype in DTYPES.items() for shape in shapes}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    header = read_header(file)
    assert header.keys() == tensors.keys()
    assert [stored.start for stored in header.values()] == sorted(stored.start for stored in header.values())
    with file.open("rb") as opened:
        for name, stored in header.items():
            read = read_tensor(opened, stored)
            assert (read.dtype, read.shape) == (tensors[name].dtype, tensors[name].shape)
            assert torch.equal(read.view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8)), name


def write(file, header: object, body: bytes = b"") -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + body)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"\x00" * 16, b""),
        (b"{not json", b""),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234567"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123456789"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"1234567812345678"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b""),
        ({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, b"12345678"),
    ],
    ids=["zeros", "no JSON", "too short", "too long", "shape and bytes differ", "a gap", "no offsets", "dtype"],
)
def test_a_corrupt_file_is_named(tmp_path, header, body):
    file = tmp_path / "broken.safetensors"
    write(file, header, body)
    with pytest.raises(UserError, match=r"(?s)cannot read the weight file.*broken\.safetensors"):
        read_header(file)


@pytest.mark.parametrize("content", [b"", b"1234", (10**15).to_bytes(8, "little")], ids=["empty", "short", "huge"])
def test_a_file_without_a_header_is_named(tmp_path, content):
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"(?s)cannot read the weight file.*broken\.safetensors"):
        read_header(file)


@pytest.mark.parametrize(("missing", "name"), [(1, "third"), (4, "third"), (5, "second"), (16, "first")])
def test_the_first_tensor_that_is_cut_is_named(tmp_path, missing, name):
    spans = {"third": [12, 16], "first": [0, 4], "second": [4, 12]}  # in another order than their bytes
    header = {key: {"dtype": "F32", "shape": [(b - a) // 4], "data_offsets": [a, b]} for key, (a, b) in spans.items()}
    file = tmp_path / "cut.safetensors"
    write(file, {"__metadata__": {"format": "pt"}, **header}, bytes(16 - missing))
    with pytest.raises(UserError, match=rf"(?s)cut short: tensor {name} is the first .*cut\.safetensors"):
        read_header(file)


def test_a_dtype_that_torch_code_here_does_not_use_is_named(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.complex64)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"tensor a has dtype C64"):
        read_header(tmp_path / "c.safetensors")
