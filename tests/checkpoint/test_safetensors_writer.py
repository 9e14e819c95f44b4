import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from perl_megatron.checkpoint.safetensors_format import DTYPES
from perl_megatron.checkpoint.safetensors_writer import HEADER_BYTES, SafetensorsWriter
from perl_megatron.errors import UserError

MIB = 2**20


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_library_reads_back_every_bit(tmp_path, dtype):
    random = torch.randint(0, 2 if dtype is torch.bool else 256, (24 * 8,), dtype=torch.uint8)
    whole = random.view(dtype)
    tensors = {
        "matrix": whole.view(6, -1),
        "transposed é": whole.view(6, -1).T,
        "scalar": whole[3],
        "nothing": whole[:0].view(0, 4),
    }
    writer = SafetensorsWriter(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (dtype, tensor.shape)
        expected = tensor.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(read[name].view(-1).view(torch.uint8), expected), name
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_tensors_stand_aligned(tmp_path):
    writer = SafetensorsWriter(tmp_path / "a.safetensors")
    first, second = torch.arange(3, dtype=torch.uint8), torch.ones(2, dtype=torch.float64)
    writer.add("first", first)
    assert not writer.has_room("second", second)
    assert writer.has_room("third", first)
    writer.finish()
    content = (tmp_path / "a.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert content.endswith(bytes(first.tolist()))


def test_a_full_header_takes_no_more_and_is_still_whole(tmp_path):
    writer = SafetensorsWriter(tmp_path / "a.safetensors", header_bytes=512)
    count = 0
    while writer.has_room(f"tensor {count}", torch.ones(1)):
        writer.add(f"tensor {count}", torch.full((1,), float(count)))
        count += 1
    assert 2 < count < 12
    writer.finish()
    assert (tmp_path / "a.safetensors").stat().st_size == 8 + 512 + 4 * count
    read = load_file(tmp_path / "a.safetensors")
    assert [read[f"tensor {number}"].item() for number in range(count)] == list(range(count))


def test_an_unfinished_file_does_not_look_whole(tmp_path):
    writer = SafetensorsWriter(tmp_path / "a.safetensors")
    writer.add("a", torch.ones(1000))
    with pytest.raises(SafetensorError, match=r"[hH]eader"):
        load_file(tmp_path / "a.safetensors")


def test_a_full_disk_names_tensor_and_file(tmp_path, small_files):
    writer = SafetensorsWriter(tmp_path / "a.safetensors")
    with small_files(HEADER_BYTES + 5000):
        writer.add("small", torch.ones(1000))
        with pytest.raises(UserError, match=r"(?s)cannot write tensor large: .*a\.safetensors.*free some space"):
            writer.add("large", torch.ones(1000))
    with small_files(HEADER_BYTES - 1), pytest.raises(UserError, match="the weight file"):
        SafetensorsWriter(tmp_path / "b.safetensors")


def test_a_dtype_that_the_format_has_not_is_named(tmp_path):
    writer = SafetensorsWriter(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"(?s)tensor a has dtype torch.complex64.*a\.safetensors"):
        writer.add("a", torch.ones(1, dtype=torch.complex64))


PROGRAM = """
import json, re, sys
from pathlib import Path
import torch
from perl_megatron.checkpoint.hf_files import open_checkpoint, save_checkpoint

folder, count, mib = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def memory(key):  # getrusage would give the peak of the process that started this one, if that is higher
    return int(re.search(key + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def stream(count):
    for number in range(count):
        yield f"tensor {number}", torch.full((mib * 2**18,), float(number))

def save(name, count):
    save_checkpoint(folder / name, stream(count), folder / "source", max_shard_bytes=count * mib * 2**20 // 2)

def read(name, count):
    checkpoint = open_checkpoint(folder / name)
    for number in range(count):
        assert checkpoint[f"tensor {number}"][-1] == number

(folder / "source").mkdir()
(folder / "source" / "config.json").write_text("{}")
save("first", 1)  # loads code and starts threads
read("first", 1)
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
resident = memory("VmRSS")
save("saved", count)
written = memory("VmHWM") - resident
read("saved", count)
print(json.dumps([written, memory("VmHWM") - resident]))
"""


def test_memory_holds_a_few_tensors_whatever_the_folder_holds(tmp_path):
    size, count = 8, 60
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path), str(count), str(size)]
    # Freed memory goes back to the system at once, so that what is measured is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    written, read = json.loads(result.stdout.splitlines()[-1])
    # The design holds one tensor; one more may be on its way in, and half of one is room for the interpreter's own.
    bound = 2.5 * size * MIB
    assert 0 < written < bound
    assert 0 < read < bound
