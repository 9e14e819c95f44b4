"""`perl-megatron serve` as far as it goes without vLLM: what is refused, and what the server is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_checkpoint import make_images, make_policy

from perl_megatron import serving
from perl_megatron.config.load import load_config
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError

KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("serving") / "policy")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What vLLM's server was started with; it ends at once."""
    started: list[dict[str, Any]] = []

    def start(config: Config, encoder: object, **settings: Any) -> None:
        started.append(settings)

    monkeypatch.setattr(serving, "vllm_obstacle", lambda *, cuda: None)
    monkeypatch.setattr(serving.environment, "prepare_vllm_server", lambda *, cuda: None)
    import perl_megatron.rollout

    module = SimpleNamespace(serve=start)
    monkeypatch.setitem(sys.modules, "perl_megatron.rollout.vllm_serve", module)
    monkeypatch.setattr(perl_megatron.rollout, "vllm_serve", module, raising=False)
    return started


def config_of(policy: Path, *overrides: str) -> Config:
    return load_config(None, [f"model.path={policy}", *overrides]).config


def serve(config: Config, *, host: str = "127.0.0.1", max_images: int | None = 2) -> int:
    return serving.serve(config, host=host, port=8000, max_images=max_images, log_requests=False)


def key_file(folder: Path) -> str:
    (folder / "key").write_text(KEY + "\n")
    return f"rollout.api_key_file={folder / 'key'}"


def test_without_vllm_nothing_is_served(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "vllm_obstacle", lambda *, cuda: "vLLM is not installed")
    with pytest.raises(UserError, match="vLLM is not installed") as caught:
        serve(config_of(policy))
    assert "pip install" in str(caught.value.fix)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "no-such-host.invalid"])
def test_an_open_address_demands_a_key(policy: Path, served: list[dict[str, Any]], tmp_path: Path, host: str) -> None:
    with pytest.raises(UserError, match="change its weights and run code in it") as caught:
        serve(config_of(policy), host=host)
    assert caught.value.where == f"--host {host}"
    assert "rollout.api_key_file" in str(caught.value.fix)
    assert served == []
    assert serve(config_of(policy, key_file(tmp_path)), host=host) == 0
    assert served == [{"host": host, "port": 8000, "key": KEY, "max_images": 2, "log_requests": False}]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_needs_no_key_and_may_have_one(
    policy: Path, served: list[dict[str, Any]], tmp_path: Path, host: str
) -> None:
    serve(config_of(policy), host=host)
    serve(config_of(policy, key_file(tmp_path)), host=host)
    assert [settings["key"] for settings in served] == [None, KEY]


def test_a_file_without_a_key_is_refused(policy: Path, served: list[dict[str, Any]], tmp_path: Path) -> None:
    """Also on loopback: whoever sets a file means a key."""
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match="is not a key"):
        serve(config_of(policy, f"rollout.api_key_file={tmp_path / 'empty'}"))
    assert served == []


def test_a_server_that_could_not_answer_the_trainer_is_refused(policy: Path, served: list[dict[str, Any]]) -> None:
    overrides = ("rollout.num_rollouts=5", "rollout.max_concurrent_sequences=4")
    with pytest.raises(UserError, match="all 5 rollouts"):
        serve(config_of(policy, *overrides))
    assert served == []


def test_an_unknown_number_of_images_is_refused(policy: Path, served: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="how many images") as caught:
        serve(config_of(policy), max_images=None)
    assert "--max-images" in str(caught.value.fix)
    assert served == []


def write_records(folder: Path, *num_images: int) -> Path:
    images = make_images(folder / "images", [(28, 28)] * 3)
    rows = [
        {
            "id": str(number),
            "images": [f"images/{image.name}" for image in images[:count]],
            "text": "<image>" * count + "Which digit?",
            "answer": "7",
            "answer_type": "number",
        }
        for number, count in enumerate(num_images)
    ]
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(("train", "evaluation", "most"), [((1, 2), (3,), 3), ((2, 1), (1,), 2), ((0,), (0,), 1)])
def test_as_many_images_as_the_questions_have(
    policy: Path,
    served: list[dict[str, Any]],
    tmp_path: Path,
    train: tuple[int, ...],
    evaluation: tuple[int, ...],
    most: int,
) -> None:
    files = {key: tmp_path / key for key in ("train", "evaluation")}
    for folder in files.values():
        folder.mkdir()
    records = {"train": write_records(files["train"], *train)}
    records["evaluation"] = write_records(files["evaluation"], *evaluation)
    overrides = [f"data.{key}={file}" for key, file in records.items()]
    serve(config_of(policy, *overrides), max_images=None)
    assert served[0]["max_images"] == most


def test_twice_as_many_images_where_the_order_is_asked_for(
    policy: Path, served: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The auxiliary question shows every image of a record twice."""
    overrides = [f"data.train={write_records(tmp_path, 1, 3, 2)}", "permutation.recover_order=0.1"]
    serve(config_of(policy, *overrides), max_images=None)
    assert served[0]["max_images"] == 6
