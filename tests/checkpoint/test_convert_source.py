"""What a conversion does with strange, damaged and failing sources and companions."""

import errno
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from random_checkpoint import MAX_FILE_BYTES, assert_same_bits, conversion, make_random_checkpoint
from safetensors.torch import load_file, save_file

from perl_megatron.checkpoint.convert import render_plan
from perl_megatron.checkpoint.manifest import verify_checkpoint
from perl_megatron.errors import UserError

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("source") / "source")


@pytest.fixture
def folder(source, tmp_path):
    """A copy of the source, to be changed."""
    return Path(shutil.copytree(source, tmp_path / "folder"))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_foreign_manifest_and_metadata_mean_nothing(folder, source, tmp_path):
    (folder / "manifest.json").write_text('{"made by": "someone"}')
    for content in ('{"about": "this model"}', "[]", "no JSON"):
        (folder / "metadata.json").write_text(content)
        conversion(folder, tmp_path / "a").run()
        assert_same_bits(tmp_path / "a", source)
        shutil.rmtree(tmp_path / "a")


def test_a_torch_dist_folder_that_lost_its_index_is_still_known(source, tmp_path):
    conversion(source, tmp_path / "a").run()
    (tmp_path / "a" / ".metadata").unlink()
    with pytest.raises(UserError, match=r"index of the torch_dist checkpoint is missing"):
        conversion(tmp_path / "a", tmp_path / "b", "hf")


def test_source_and_companions_of_different_models_are_refused(source, folder, tmp_path):
    conversion(source, tmp_path / "a").run()
    change_config(folder, num_attention_heads=3, num_key_value_heads=1)  # as many numbers, in another order
    for path in (source, tmp_path / "a"):
        with pytest.raises(UserError, match=r"(?s)different models.*config\.json, .*folder.config\.json"):
            conversion(path, tmp_path / "b", "hf", companions_from=folder)
    conversion(tmp_path / "a", tmp_path / "b", "hf", companions_from=source).run()
    assert_same_bits(tmp_path / "b", source)


@pytest.mark.parametrize("change", ["config", "same size", "another file"])
def test_changed_companions_are_another_conversion(source, folder, tmp_path, change):
    def failing(nbytes):
        failing.total += nbytes
        while failing.total > 2_000_000 and (tmp_path / ".a.partial.jsonl").read_text().count("\n") < 3:
            time.sleep(0.01)
        if failing.total > 2_000_000:
            raise KeyboardInterrupt

    failing.total = 0
    with pytest.raises(KeyboardInterrupt):
        conversion(source, tmp_path / "a", companions_from=folder).run(progress=failing)
    if change == "config":
        change_config(folder, bos_token_id=7)
    elif change == "same size":
        (folder / "tokenizer.json").write_text('{"words": {}}')
    else:
        (folder / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="another conversion"):
        conversion(source, tmp_path / "a", companions_from=folder).run(resume=True)


def test_chat_templates_in_their_folder_go_along(folder, tmp_path):
    template = folder / "additional_chat_templates" / "tools.jinja"
    template.parent.mkdir()
    template.write_text("{{ tools }}")
    conversion(folder, tmp_path / "a").run()
    verify_checkpoint(tmp_path / "a")
    conversion(tmp_path / "a", tmp_path / "b", "hf").run()
    assert (tmp_path / "b" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert "additional_chat_templates/tools.jinja" in list(render_plan(conversion(folder, tmp_path / "c")))[-1]


def test_an_overflow_is_named_and_infinities_stay(folder, tmp_path):
    weights = {name: tensor.float().clamp(-1, 1) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights[UP][3, 5] = torch.inf
    save_file(weights, folder / "model.safetensors")
    conversion(folder, tmp_path / "a", "hf", dtype=torch.float16).run()
    weights[UP][3, 6] = 65520.0
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"(?s)tensor {UP} has numbers that float16 cannot hold.*--dtype"):
        conversion(folder, tmp_path / "b", "hf", dtype=torch.float16).run()
    assert not (tmp_path / "b").exists()


def failing_reads(monkeypatch, of):
    """The system cannot read this file, or those in this folder, any more."""
    open_file = Path.open

    def fail(self, mode="r", *arguments, **options):
        if of in (self, *self.parents) and "r" in mode and "+" not in mode:
            raise OSError(errno.EIO, "bad disk", str(self))
        return open_file(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)


def test_a_source_that_cannot_be_read_is_not_the_targets_fault(source, tmp_path, monkeypatch):
    conversion(source, tmp_path / "a").run()
    plan = conversion(tmp_path / "a", tmp_path / "b", "hf", companions_from=source)
    with monkeypatch.context() as patch:
        failing_reads(patch, source / "tokenizer.json")
        with pytest.raises(UserError, match=r"(?s)cannot read .*bad disk.*source/tokenizer\.json.*copy it again"):
            plan.run()
    with monkeypatch.context() as patch:
        failing_reads(patch, tmp_path / "a")
        with pytest.raises(UserError, match=r"(?s) read.*bad disk.*where: .*/a/.*copy the checkpoint again"):
            plan.run(resume=True)


@pytest.mark.parametrize("damage", ["manifest", "file", "missing"])
def test_a_damaged_source_is_to_be_copied_again(source, tmp_path, damage):
    conversion(source, tmp_path / "a").run()
    file = tmp_path / "a" / ("manifest.json" if damage == "manifest" else "tokenizer.json")
    file.unlink() if damage == "missing" else file.write_text("{")
    with pytest.raises(UserError, match=rf"(?s){file.name}.*copy the checkpoint again, or take another"):
        conversion(tmp_path / "a", tmp_path / "b", "hf").run()
    assert not (tmp_path / "b").exists()


def test_an_error_does_not_wait_until_the_source_is_read_through(source, tmp_path, monkeypatch):
    conversion(source, tmp_path / "a").run()
    waited = []

    def verify(path, *, fix, keep_on):
        while keep_on() and len(waited) < 1000:
            waited.append(time.sleep(0.01))

    def interrupted(nbytes):
        raise KeyboardInterrupt

    monkeypatch.setattr("perl_megatron.checkpoint.conversion.verify_checkpoint", verify)
    with pytest.raises(KeyboardInterrupt):
        conversion(tmp_path / "a", tmp_path / "b", "hf", max_file_bytes=MAX_FILE_BYTES).run(progress=interrupted)
    assert len(waited) < 500
