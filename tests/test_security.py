"""What a stranger's file must not be able to do: run code, read outside its folder, or fill the memory."""

from __future__ import annotations

import ast
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl_megatron.config.schema import RolloutConfig
from perl_megatron.data import image_store, images
from perl_megatron.data.images import check_image, load_image
from perl_megatron.data.records import DroppedRecord, parse_record
from perl_megatron.errors import UserError
from perl_megatron.preparation import table_images
from perl_megatron.runtime.environment import weights_only_loads

REPOSITORY = Path(__file__).parents[1]
SOURCES = [path for folder in ("perl_megatron", "tools") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
ALLOWED = {
    # An unpickler that knows the parts of an index only (tests/checkpoint/test_torch_dist.py feeds it hostile ones).
    ("perl_megatron/checkpoint/torch_dist_index.py", "import pickle"),
    ("perl_megatron/checkpoint/state.py", "from pickle import UnpicklingError"),
}


def dangers(tree: ast.AST) -> Iterator[str]:
    """Calls that run what a file or a text holds, and imports of what does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if {name.split(".")[0] for name in names} & {
                "pickle",
                "dill",
                "joblib",
                "marshal",
                "shelve",
                "cloudpickle",
            }:
                yield ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = (
            (called == "torch.load" and options.get("weights_only") != "True")
            or called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "torch.hub.load")
            or options.get("allow_pickle") == "True"
            or options.get("trust_remote_code", "False") != "False"
            or options.get("shell") == "True"
            or (called.endswith("ForConditionalGeneration.from_pretrained") and "use_safetensors" not in options)
        )
        if unsafe:
            yield ast.unparse(node)


def test_nothing_runs_what_a_file_holds() -> None:
    found = {
        (str(path.relative_to(REPOSITORY)), danger)
        for path in SOURCES
        for danger in dangers(ast.parse(path.read_text()))
        if "verification" not in path.parts  # its policies are made by itself
    }
    assert found - ALLOWED == set()


@pytest.mark.parametrize(
    "program",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "transformers.XForConditionalGeneration.from_pretrained(path)",
    ],
)
def test_each_danger_is_seen(program: str) -> None:
    assert list(dangers(ast.parse(program)))


def test_torch_unpickles_no_programs_within_the_block(tmp_path: Path) -> None:
    import torch

    class Hostile:
        def __reduce__(self) -> object:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"weights": Hostile()}, tmp_path / "file.pt")
    with weights_only_loads(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=False)  # as torch's own checkpoint reader does
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "harm").exists()  # so the file was hostile


def test_transformers_is_not_led_out_of_the_policys_folder(tmp_path: Path) -> None:
    import torch

    from perl_megatron.rollout.embedded import EmbeddedEngine

    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    encoder: Any = None
    with pytest.raises(UserError, match="names a file outside the checkpoint"):
        EmbeddedEngine(RolloutConfig(), encoder=encoder, model_path=tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "images/../../secret.png", "a/b/../../../c.png"])
def test_records_cannot_name_files_outside_their_folder(path: str, tmp_path: Path) -> None:
    line = f'{{"id": "a", "images": ["{path}"], "text": "<image>", "answer": "7"}}'.encode()
    dropped = parse_record(line, "file:1", tmp_path)
    assert isinstance(dropped, DroppedRecord)
    assert "leaves the dataset's folder" in dropped.reason


def test_images_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of them is read: a sparse file of a terabyte costs its maker nothing."""
    path = tmp_path / "large.png"
    Image.new("RGB", (28, 28)).save(path)
    check_image(path)
    with path.open("r+b") as file:
        file.truncate(2**40)
    for read in (lambda: check_image(path), lambda: load_image(path, 784, 784)):
        with pytest.raises(UserError, match=f"has {2**40} bytes, more than {image_store.MAX_IMAGE_BYTES}") as error:
            read()
        assert error.value.where == str(path)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(UserError, match="more than 10"):
        check_image(path, content=b"a" * 11)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_images_cannot_hide_a_bomb_in_their_texts(kind: str, tmp_path: Path) -> None:
    """A PNG may carry compressed texts; a megabyte of zeros in a kilobyte, a thousand times."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packed = zlib.compress(bytes(2**23), 9)
    body = b"key\0\0" + packed if kind == "zTXt" else b"key\0\1\0\0\0" + packed
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(29 * 28)))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(kind.encode(), body) * 100 + pixels + chunk(b"IEND", b"")
    path = tmp_path / "texts.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the image"):
        check_image(path)


def test_archives_are_bounded_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_images, "MAX_IMAGE_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(2**20 + 1))
        archive.writestr("fine.png", bytes(2**20))
    assert (tmp_path / "images.zip").stat().st_size < 2**14
    reader = table_images.TableImages(None)
    table = tmp_path / "table.parquet"
    assert len(reader.read("fine.png", table)) == 2**20
    with pytest.raises(UserError, match="is larger than"):
        reader.read("bomb.png", table)
    with pytest.raises(UserError, match="leaves the folder"):
        reader.read("../secret.png", table)
    reader.close()
