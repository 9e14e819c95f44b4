"""What a stranger's file must not be able to do: run code, read outside its folder, or fill the memory."""

from __future__ import annotations

import ast
import json
import os
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
from perl_megatron.data.links import link_problem
from perl_megatron.data.records import DroppedRecord, parse_record, read_records
from perl_megatron.data.row_formats import RECORDS
from perl_megatron.data.row_import import NumberedRow, RowSettings, convert_rows
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


IN_THREADS = (
    *("ahead.py", "chat/*.py", "rollout/*.py", "data/images.py", "data/image_*.py", "data/images_ahead.py"),
    *("data/pixel_store.py", "data/worker_pool.py", "data/processor.py", "data/patches.py", "data/records.py"),
    *("checkpoint/conversion.py", "checkpoint/background.py", "checkpoint/read_ahead.py"),
)
"""What several threads of a process may be in at once."""
PARSING = ("np.load", "np.lib.format.read_array", "np.lib.format.open_memmap", "compile", "eval", "exec")


def parses_python(tree: ast.AST) -> Iterator[str]:
    """Calls that use Python's parser: CPython 3.11 keeps its depth for all threads together (gh-106905), so now and
    then one fails where a garbage collection lets another in. NumPy's headers are read by it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            if module in ("ast", "numpy.lib.format") or any(alias.name == "ast" for alias in node.names):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).replace("numpy.", "np.")
            if called in PARSING:
                yield ast.unparse(node)


def test_no_thread_uses_pythons_parser() -> None:
    package = REPOSITORY / "perl_megatron"
    for pattern in IN_THREADS:
        paths = list(package.glob(pattern))
        assert paths, pattern
        for path in paths:
            assert not list(parses_python(ast.parse(path.read_text()))), path


@pytest.mark.parametrize(
    "program",
    ["import ast", "from ast import literal_eval", "np.load(path)", "numpy.load(path)", "compile(text, '', 'eval')"],
)
def test_each_use_of_the_parser_is_seen(program: str) -> None:
    assert list(parses_python(ast.parse(program)))


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


@pytest.mark.parametrize("is_folder", [False, True])
def test_links_do_not_lead_out_of_a_data_set_but_where_that_is_allowed(is_folder: bool, tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data, elsewhere):
        folder.mkdir()
        Image.new("RGB", (28, 28)).save(folder / "own.png")
    (data / "alias.png").symlink_to("own.png")
    (data / "link").symlink_to(elsewhere if is_folder else elsewhere / "own.png")
    linked = "link/own.png" if is_folder else "link"
    images = ("own.png", "alias.png", linked)
    lines = [{"id": image, "images": [image], "text": "<image>?", "answer": "7"} for image in images]
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = read_records(data / "train.jsonl", max_corrupt_fraction=0.5)
    assert [record.id for record in dataset.records] == ["own.png", "alias.png"]
    assert "is a link that leaves the dataset's folder; data.follow_links=true allows it" in dataset.dropped[0].reason
    followed = read_records(data / "train.jsonl", max_corrupt_fraction=0, follow_links=True)
    assert [link_problem(record) is None for record in followed.records] == [True, True, False]

    table, rows = data / "table.parquet", [NumberedRow(f"file:{number}", "", line) for number, line in enumerate(lines)]
    for follow_links in (False, True):
        settings = RowSettings(RECORDS, tmp_path / "target", data, "source", follow_links=follow_links)
        outcomes = [outcome for (outcome,) in convert_rows(rows, settings=settings)]
        assert [outcome.line is not None for outcome in outcomes] == [True, True, follow_links]
        reader = table_images.TableImages(None, follow_links=follow_links)
        assert reader.read("alias.png", table)
        if follow_links:
            assert reader.read(linked, table)
        else:
            assert "--follow-links allows it" in outcomes[2].reason
            with pytest.raises(UserError, match="is a link that leaves the folder") as error:
                reader.read(linked, table)
            assert error.value.fix is not None
            assert "source.follow_links" in error.value.fix


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


@pytest.mark.timeout(60)
def test_pipes_and_devices_are_no_images(tmp_path: Path) -> None:
    """A pipe would be waited for without end, and a device has no size that could be refused."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    settings = RowSettings(RECORDS, tmp_path / "target", tmp_path, "source", follow_links=True)
    reader = table_images.TableImages(None)
    os.mkfifo(tmp_path / "pipe.zip")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(UserError, match="not a regular file"):
            check_image(tmp_path / name)
        with pytest.raises(UserError, match="is not there"):
            reader.read(name, tmp_path / "table.parquet")
        row = NumberedRow("file:1", "1", {"id": "1", "images": [name], "text": "<image>?", "answer": "7"})
        ((outcome,),) = convert_rows([row], settings=settings)
        assert outcome.line is None
        assert "not a regular file" in outcome.reason
