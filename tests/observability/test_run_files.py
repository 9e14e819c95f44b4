import itertools
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perl_megatron.config.load import load_config
from perl_megatron.errors import UserError
from perl_megatron.observability import event_file
from perl_megatron.observability.json_lines import read_rows, to_line, write_rows
from perl_megatron.observability.metrics_log import MetricsLog
from perl_megatron.observability.recorder import RolloutRecorder
from perl_megatron.observability.report import write_report
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.observability.summary import read_summary, summarize, summary_rows, summary_table, write_summary
from perl_megatron.types import EncodedPrompt, Group, Record, Rollout, View


@pytest.fixture
def loaded(tmp_path):
    return load_config(None, ["model.path=m", f"run.directory={tmp_path / 'runs'}", "run.name=demo"])


def test_a_refused_run_leaves_nothing(loaded, tmp_path):
    folder = RunFolder.of(loaded.config)
    folder.check_available(resume=False)
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder.create(loaded, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_overwritten(loaded):
    folder = RunFolder.create(loaded, resume=False)
    assert load_config(folder.config).config == loaded.config
    with pytest.raises(UserError, match="exists"):
        RunFolder.create(loaded, resume=False)
    assert RunFolder.create(loaded, resume=True) == folder


def test_resumed_metrics_have_each_step_once(tmp_path, monkeypatch):
    monkeypatch.setattr(event_file, "_numbers", itertools.count(9))  # '9' and '10' have another order than 9 and 10
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, tmp_path / "tensorboard")
    for step in (1, 2, 3):
        log.log(step, {"loss": step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    log = MetricsLog(path, tmp_path / "tensorboard", resumed_step=2)
    assert log.has(2, "loss")
    assert not log.has(3, "loss")
    log.log(3, {"loss": 30.0, "gradient_norm": float("inf")})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert read_rows(path)[-1]["gradient_norm"] is None
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_unknown_metric_is_not_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    with pytest.raises(AssertionError):
        log.log(1, {"losss": 1.0})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_json_lines_hold_any_text(tmp_path):
    rows = [{"text": "a\u2028b\nc\x85d", "n": 1}]
    write_rows(tmp_path / "x.jsonl", rows)
    assert read_rows(tmp_path / "x.jsonl") == rows
    assert to_line({"x": float("nan")}) == '{"x": null}\n'


def make_group(record_id: str, *, rewards=(1.0, 0.0), trained: bool = True) -> Group:
    record = Record(record_id, (), "<image><image> which?", "A", kind="find")
    orders = ((0, 1), (1, 0))
    views = tuple(View(record_id, i, order, (), "which?", "AB"[i], "choice", "find") for i, order in enumerate(orders))
    prompts = tuple(
        EncodedPrompt(np.zeros(3, np.int64), (0,), (0, 1), np.ones((2, 3), np.int64), tuple(f"key{s}" for s in order))
        for order in orders
    )
    rollouts = []
    for index, reward in enumerate(rewards):
        tokens, log_probs, versions = np.array([5, 6]), np.array([-1.0, -2.0], np.float32), np.array([3, 4])
        rollout = Rollout(index, tokens, log_probs, "stop", "<b>", versions, {"accuracy": reward}, reward)
        if trained:
            rollout.logprob_old, rollout.advantage = np.array([-1.0, -2.5], np.float32), 0.7
            rollout.importance = np.array([1.0, 0.5])
        rollouts.append(rollout)
    return Group(record, views, prompts, rollouts)


def test_recorder(tmp_path):
    recorder = RolloutRecorder(tmp_path, image_of=lambda key: Image.new("RGB", (28, 28)))
    recorder.record(1, kept=[make_group("a")], dropped=[make_group("b", trained=False)])
    recorder.record(2, kept=[make_group("a")])
    rows = read_rows(recorder.path(1))
    assert [(row["record"], row["kept"], row["view"], row["order"]) for row in rows] == [
        ("a", True, 0, [0, 1]),
        ("a", True, 1, [1, 0]),
        ("b", False, 0, [0, 1]),
        ("b", False, 1, [1, 0]),
    ]
    assert (rows[1]["answer"], rows[1]["images"]) == ("B", ["key1", "key0"])
    assert (rows[0]["logprob_rollout_mean"], rows[0]["logprob_old_mean"], rows[0]["logprob_gap_max"]) == (
        -1.5,
        -1.75,
        0.5,
    )
    assert rows[0]["importance_mean"] == 0.75
    assert rows[0]["weight_versions"] == [[3, 0, 1], [4, 1, 2]]
    assert (rows[0]["prompt_token_ids"], rows[0]["response_token_ids"]) == ([0, 0, 0], [5, 6])
    assert (rows[0]["logprob_rollout"], rows[0]["logprob_old"]) == ([-1.0, -2.0], [-1.0, -2.5])
    assert rows[2]["logprob_old"] is None
    assert (rows[2]["advantage"], rows[2]["logprob_gap_max"], rows[2]["logprob_ref_mean"]) == (None, None, None)
    assert rows[2]["importance_mean"] is None
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["key0.png", "key1.png"]
    RolloutRecorder(tmp_path, resumed_step=1)
    assert recorder.path(1).exists()
    assert not recorder.path(2).exists()


def test_recorded_log_probabilities_come_back_bit_for_bit(tmp_path):
    group = make_group("a")
    values = np.array([-1 / 3, -np.inf, -1e-42, np.nan, -123.456], np.float32)
    group.rollouts[0].logprob_rollout, group.rollouts[0].token_ids = values, np.arange(5)
    recorder = RolloutRecorder(tmp_path)
    group.rollouts[0].logprob_old = None
    recorder.record(1, kept=[group])
    recorded = read_rows(recorder.path(1))[0]["logprob_rollout"]
    assert [value is None for value in recorded] == [False, True, False, True, False]
    returned = np.array([value for value in recorded if value is not None], np.float32)
    assert returned.tobytes() == values[np.isfinite(values)].tobytes()


ROWS = [
    {"step": 0, "evaluation/accuracy": 0.5, "evaluation/flip_rate": 0.4, "evaluation/accuracy/find": 0.5},
    {"step": 1, "loss": 0.1, "reward/mean": 0.2, "seconds/step": 2.0, "groups/kept": 3, "groups/dropped_no_signal": 2},
    {
        "step": 2,
        "loss": None,
        "reward/mean": 0.3,
        "seconds/step": 4.0,
        "groups/kept": 4,
        "groups/dropped_truncated": 1,
        "logprob_gap/mean": 1e-6,
        "memory/peak_rss_gib": 2.0,
    },
    {"step": 2, "evaluation/accuracy": 0.8, "evaluation/flip_rate": 0.1, "evaluation/accuracy/find": 0.9},
]


def test_summary():
    summary = summarize(ROWS, engine="vllm", layout="tensor 2", seconds_total=61.0)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.5, 0.8)
    assert (summary["flip_rate_before"], summary["flip_rate_after"]) == (0.4, 0.1)
    assert (summary["steps"], summary["seconds_per_step"], summary["groups_kept"]) == (2, 3.0, 7)
    assert summary["groups_dropped"] == {"no_signal": 2, "truncated": 1}
    assert summary["peak_rss_gb"] == pytest.approx(2.147483648)
    assert ("held-out accuracy, before → after", "50.0% → 80.0%") in summary_rows(summary)
    assert summary_table(summary, title="demo").row_count == len(summary_rows(summary))


def test_summary_of_a_run_without_evaluation():
    summary = summarize([{"step": 1, "loss": 1.0}], engine="embedded", layout="tensor 1", seconds_total=1.0)
    assert summary["accuracy_before"] is None
    assert dict(summary_rows(summary))["held-out accuracy, before → after"] == "not measured → not measured"


def test_report_holds_everything_and_escapes_it(loaded):
    folder = RunFolder.create(loaded, resume=False)
    write_rows(folder.metrics, ROWS)
    write_summary(folder.summary, summarize(ROWS, engine="vllm", layout="tensor 2", seconds_total=61.0))
    RolloutRecorder(folder.rollouts, image_of=lambda key: Image.new("RGB", (28, 28))).record(
        2, kept=[make_group("<a>")]
    )
    write_report(folder)
    page = folder.report.read_text()
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 1 + 4  # the curves, and two images of each of two rollouts
    assert "&lt;a&gt;" in page
    assert "<a>" not in page
    for text in ("50.0% → 80.0%", "accuracy/find", "directory:", "what the optimizer minimised"):
        assert text in page
    assert read_summary(folder.summary) == json.loads(folder.summary.read_text())


def test_report_of_a_run_that_has_only_begun(loaded):
    folder = RunFolder.create(loaded, resume=False)
    write_report(folder)
    assert "<h2>Curves</h2>" in folder.report.read_text()


RESUMED_OTHERWISE = (
    *("judge.url=http://b:1/v1", "judge.deadline=5", "endpoint.url=http://c:1/v1", "reward.judge_failure=zero"),
    *("data.weights=[1, 2]", "data.decode_processes=3", "data.epochs=2", "filter.max_refills=9", "run.steps=7"),
)


def test_a_run_is_resumed_with_other_ways_to_its_judge_but_the_same_judge(loaded, tmp_path):
    folder = RunFolder.create(loaded, resume=False)
    own = ["model.path=m", f"run.directory={tmp_path / 'runs'}", "run.name=demo"]
    folder.check_same_run(load_config(None, [*own, *RESUMED_OTHERWISE]).config)
    for changed in ("judge.model=other", "reward.judge=0.5", "data.check=draw", "algorithm.objective=cispo"):
        with pytest.raises(UserError, match=changed.partition("=")[0]):
            folder.check_same_run(load_config(None, [*own, changed]).config)
