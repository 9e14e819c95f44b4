"""The questions of a config, checked before the run and as they are drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launch_ranks import launch_ranks
from PIL import Image
from tiny_checkpoint import make_images, make_policy

from perl_megatron import questions as module
from perl_megatron.build import build_encoder
from perl_megatron.config.load import load_config
from perl_megatron.config.schema import Config, PermutationConfig
from perl_megatron.data.pixel_store import PixelStore
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.data.record_files import RecordFiles
from perl_megatron.errors import UserError
from perl_megatron.questions import most_images, training_questions


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("questions") / "policy")


@pytest.fixture
def encoder(policy: Path) -> PromptEncoder:
    return PromptEncoder(policy, system_prompt="Think.")


def write(folder: Path, name: str, ids: range, **changes: dict[str, Any]) -> Path:
    """A file of good records, some of them with ``changes`` (by id)."""
    make_images(folder / "images", [(28, 28), (56, 56)])
    (folder / "images/cut.png").write_bytes((folder / "images/0-0.png").read_bytes()[:60])
    rows = []
    for number in ids:
        row = {"id": f"q{number}", "images": ["images/0-0.png"], "text": "<image>Which?", "answer": str(number)}
        rows.append(row | {"answer_type": "number"} | changes.get(f"q{number}", {}))
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(policy: Path, *overrides: str) -> Config:
    return load_config(None, [f"model.path={policy}", "data.max_corrupt_fraction=0.5", *overrides]).config


BAD: dict[str, dict[str, Any]] = {
    "q1": {"images": ["images/cut.png"]},
    "q3": {"text": "<image>" + "very " * 200 + "long?"},
    "q4": {"text": "<image><|im_end|>"},
    "q5": {"answer": "many"},  # no number
    "q6": {"images": ["images/none.png"]},
}


def test_the_encoder_of_a_config_keeps_pixels_for_its_node_up_to_the_bound(policy, tmp_path):
    paths = make_images(tmp_path, [(420, 420)] * 3)  # 529,200 bytes of pixels each
    encoder = build_encoder(config_of(policy, "data.pixel_cache_mib=1", "data.max_pixels=200000"))
    keys = [encoder._read_image(path) for path in paths]
    kept = [encoder._pixels.get(key) for key in keys]
    assert [image is not None and image.is_shared for image in kept] == [False, False, True]


def test_what_is_dropped_at_load_is_passed_over_when_drawn(policy, encoder, tmp_path, caplog):
    path = write(tmp_path, "train.jsonl", range(12), **BAD)
    common = (f"data.train={path}", "data.max_prompt_tokens=100")
    at_load = training_questions(config_of(policy, *common, "data.check=load"), encoder)
    assert {record.id for record in at_load.records} == {f"q{n}" for n in range(12)} - set(BAD)

    drawing = PromptEncoder(policy, system_prompt="Think.")
    as_drawn = training_questions(config_of(policy, *common, "data.check=draw"), drawing)
    assert isinstance(as_drawn.records, RecordFiles)
    assert as_drawn.num_records == 11  # the answer is checked when the file is opened
    drawn = as_drawn.next(7)
    assert {one.record.id for one in drawn if one.problem is not None} <= set(BAD) - {"q5"}
    drawn += as_drawn.next(14)
    asked = [one.record.id for one in drawn if one.problem is None]
    assert sorted(asked) == sorted([record.id for record in at_load.records] * 3)
    for record, reason in [("q1", "cannot read"), ("q3", "max_prompt_tokens"), ("q4", "special"), ("q6", "not found")]:
        (problem,) = {str(one.problem) for one in drawn if one.record.id == record}
        assert reason in problem
    assert "(q5): the answer 'many' cannot be read" in caplog.text


@pytest.mark.parametrize("check", ["load", "draw"])
def test_images_that_lie_elsewhere_are_used_where_links_are_followed(policy, encoder, tmp_path, check):
    path = write(tmp_path / "data", "train.jsonl", range(4), q1={"images": ["images/away.png"]})
    (tmp_path / "data/images/away.png").symlink_to(tmp_path / "away.png")
    Image.new("RGB", (28, 28)).save(tmp_path / "away.png")
    for follow, expected in (("true", {"q0", "q1", "q2", "q3"}), ("false", {"q0", "q2", "q3"})):
        config = config_of(policy, f"data.train={path}", f"data.check={check}", f"data.follow_links={follow}")
        drawn = training_questions(config, encoder).next(4)
        assert {one.record.id for one in drawn if one.problem is None} == expected


def test_too_many_bad_questions_end_a_run_that_checks_as_it_draws(policy, encoder, tmp_path):
    path = write(tmp_path, "train.jsonl", range(12), **BAD)
    overrides = (f"data.train={path}", "data.check=draw", "data.max_corrupt_fraction=0.1")
    questions = training_questions(config_of(policy, *overrides), encoder)
    with pytest.raises(UserError, match=r"(?s)3 of 11 records cannot be used.*train\.jsonl:"):
        questions.next(11)


@pytest.mark.parametrize("check", ["load", "draw"])
@pytest.mark.parametrize("num_processes", [0, 1])
def test_the_images_of_a_step_are_decoded_before_it_begins(policy, tmp_path, check, num_processes):
    path = write(tmp_path, "train.jsonl", range(8))
    for number in range(8):
        image = tmp_path / f"images/{number}.png"
        Image.new("RGB", (28, 28), (number, 0, 0)).save(image)
    rows = [json.loads(line) | {"images": [f"images/{n}.png"]} for n, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"data.check={check}", f"data.decode_processes={num_processes}", "rollout.questions_per_step=4")
    # Nothing stays of what is checked at load.
    encoder = PromptEncoder(policy, system_prompt="", pixels=PixelStore(tmp_path, 2**14))
    questions = training_questions(config_of(policy, f"data.train={path}", *settings), encoder)
    shutil.rmtree(tmp_path / "pixels")
    questions.prepare()
    coming = [image for record in (questions.records[n] for n in questions.sampler.peek(4)) for image in record.images]
    held = [encoder._ahead is not None and encoder._ahead.holds(image) for image in coming]
    assert held[:2] == [num_processes > 0] * 2
    if num_processes:
        encoder._ahead.close()


def test_auto_decides_by_the_size_of_the_files(policy, encoder, tmp_path, monkeypatch):
    path = write(tmp_path, "train.jsonl", range(3))
    config = config_of(policy, f"data.train={path}")
    assert isinstance(training_questions(config, encoder).records, tuple)
    monkeypatch.setattr(module, "AUTO_LOAD_BYTES", path.stat().st_size - 1)
    assert isinstance(training_questions(config, encoder).records, RecordFiles)


@pytest.mark.parametrize("check", ["load", "draw"])
def test_sources_are_drawn_by_weight(policy, encoder, tmp_path, check):
    (tmp_path / "imported").mkdir()
    first = write(tmp_path, "a.jsonl", range(4))
    write(tmp_path / "imported", "records.jsonl", range(4, 12))
    paths = f"data.train=[{first}, {tmp_path / 'imported'}]"
    questions = training_questions(config_of(policy, paths, "data.weights=[3,1]", f"data.check={check}"), encoder)
    drawn = [int(one.record.id[1:]) for one in questions.next(16)]
    assert sum(number < 4 for number in drawn) == 12
    assert questions.num_records == 12
    repeated = write(tmp_path, "b.jsonl", range(3, 6))
    overrides = (f"data.train={first},{repeated}", f"data.check={check}", "data.max_corrupt_fraction=0")
    with pytest.raises(UserError, match="used before"):
        training_questions(config_of(policy, *overrides), encoder)


@pytest.mark.parametrize("check", ["load", "draw"])
def test_only_records_with_demonstrations_where_these_are_wanted(policy, encoder, tmp_path, check):
    path = write(tmp_path, "train.jsonl", range(6), q2={"demonstration": "2"}, q4={"demonstration": "4"})
    config = config_of(policy, f"data.train={path}", f"data.check={check}")
    questions = training_questions(config, encoder, demonstrations=True)
    assert {one.record.id for one in questions.next(8)} == {"q2", "q4"}
    none = write(tmp_path, "none.jsonl", range(3))
    config = config_of(policy, f"data.train={none}", f"data.check={check}")
    with pytest.raises(UserError, match="demonstration"):
        training_questions(config, encoder, demonstrations=True)


def test_images_decoded_ahead_give_the_same_prompts(policy, encoder, tmp_path):
    path = write(tmp_path, "train.jsonl", range(6), q1={"images": ["images/0-1.png"]})
    config = config_of(policy, f"data.train={path}", "data.check=draw")
    questions = training_questions(config, encoder)
    plain = PromptEncoder(policy, system_prompt="Think.")
    for one in questions.next(12):
        assert module.problem_of(one.record, 1000, plain) is None
    keys = set(plain._key_of_path.values())
    assert keys == set(encoder._key_of_path.values())
    assert all(encoder.image(key).tobytes() == plain.image(key).tobytes() for key in keys)


def test_ranks_that_cannot_read_the_same_images_use_the_same_records(tmp_path):
    rows = [{"id": f"q{n}", "images": [f"q{n}.png"], "text": "<image>?", "answer": "1"} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    worker = Path(__file__).with_name("questions_worker.py")
    launch_ranks(worker, tmp_path / "train.jsonl", tmp_path, log=tmp_path / "log", timeout=120)
    assert [(tmp_path / name).read_text() for name in "01"] == ["done"] * 2


def test_the_most_images(policy, encoder, tmp_path):
    path = write(tmp_path, "train.jsonl", range(3), q1={"images": ["images/0-1.png"] * 3, "text": "<image>" * 3})
    for check in ("load", "draw"):
        config = config_of(policy, f"data.train={path}", f"data.check={check}")
        assert (
            most_images(training_questions(config, PromptEncoder(policy, system_prompt="")).records, config.permutation)
            == 3
        )
    assert most_images((), PermutationConfig(recover_order=0.5)) == 0


def test_nothing_to_train_on_is_refused(policy, encoder, tmp_path):
    with pytest.raises(UserError, match="has to be set"):
        training_questions(config_of(policy), encoder)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"import_dataset\.py"):
        training_questions(config_of(policy, f"data.train={tmp_path / 'a.parquet'}"), encoder)
