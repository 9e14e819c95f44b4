"""Each cause, found in log-probabilities that transformers' own forward pass computed under a real fault."""

import json

import numpy as np
import pytest
import torch
from looking import ENGINE, TRAINER, broken, causes, look, verdict
from recorded_run import Transformers, record_run

from perl_megatron.data.permutation import invert
from perl_megatron.data.processor import PromptEncoder


def original(row) -> list[str]:
    """The image keys in the record's order."""
    return [row["images"][slot] for slot in invert(row["order"])]


def prompt_of(row, keys, encoder: PromptEncoder) -> list[int]:
    """The row's prompt with each image expanded for other images."""
    pad, ids, image = encoder.image_token_id, [], -1
    for before, token in zip([None, *row["prompt_token_ids"]], row["prompt_token_ids"], strict=False):
        if token != pad:
            ids.append(token)
        elif before != pad:
            image += 1
            ids += [pad] * (int(np.prod(encoder._grids[keys[image]])) // 4)
    return ids


def test_a_right_run_agrees(first_step):
    report = look(first_step)
    assert report.agrees
    assert causes(report) == {"engine": [], "trainer": []}
    for party in report.verdicts:
        assert (party.num_rollouts, party.num_mismatched) == (10, 0)
        assert 0 < party.plain.largest < party.tolerances[0] < 1e-4
    assert "no mismatch" in report.render()
    assert report.not_judged == ()


def test_the_tolerance_is_a_small_multiple_of_rounding(first_step, tmp_path):
    """A gap of a hundred-thousandth, ten times as much as rounding, is not accepted."""
    run = broken(first_step, tmp_path, ENGINE, lambda row: [value + 5e-5 for value in row[ENGINE]])
    report = look(run)
    assert verdict(report, "engine").num_mismatched == 10
    assert not verdict(report, "trainer").causes


@pytest.mark.parametrize("party", [ENGINE, TRAINER])
def test_images_in_the_original_order(first_step, teacher, tmp_path, party):
    """An engine that is given the record's images for every view, as one whose cache is keyed by record would be."""

    def log_probs(row):
        keys = original(row)
        return teacher.log_probs(row, keys=keys, prompt=prompt_of(row, keys, teacher.encoder))

    report = look(broken(first_step, tmp_path, party, log_probs))
    wrong, right = ("engine", "trainer") if party == ENGINE else ("trainer", "engine")
    assert causes(report) == {wrong: ["pixels"], right: []}
    found = verdict(report, wrong)
    assert [each.name for each in found.winners] == ["images in the record's original order"]
    assert (found.num_mismatched, found.winners[0].explained, found.winners[0].broken) == (4, 4, 0)
    assert found.winners[0].largest < found.tolerances[0] < found.plain.largest
    assert "0 of 6 original views, 4 of 4 permuted views" in found.where
    assert not report.agrees


def test_pixels_without_normalization(first_step, teacher, tmp_path):
    mean, deviation = (
        torch.tensor(values).repeat_interleave(392)
        for values in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    run = broken(
        first_step, tmp_path, ENGINE, lambda row: teacher.log_probs(row, pixels=lambda p: p * deviation + mean)
    )
    report = look(run)
    assert causes(report) == {"engine": ["pixels"], "trainer": []}
    (winner,) = verdict(report, "engine").winners
    assert winner.name == "pixels from 0 to 1 without mean and deviation"
    assert winner.explained == 8


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (
            "text positions: 0, 1, 2, … on all three axes",
            lambda right, prompt: np.tile(np.arange(right.shape[1]), (3, 1)),
        ),
        (
            "the response continues at the prompt's length",
            lambda right, prompt: np.where(np.arange(right.shape[1]) < prompt, right, np.arange(right.shape[1])),
        ),
    ],
)
def test_positions_of_the_trainer(first_step, teacher, tmp_path, name, fault):
    def log_probs(row):
        prompt, response = np.array(row["prompt_token_ids"]), row["response_token_ids"]
        ids = torch.tensor([[*prompt, *response]])
        length = torch.arange(ids.shape[1])
        if not row["images"]:
            return teacher.log_probs(row)
        right, _ = teacher.model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == teacher.encoder.image_token_id).int(),
            image_grid_thw=torch.tensor([teacher.encoder._grids[key] for key in row["images"]]),
        )
        assert right.shape[-1] == len(length)
        return teacher.log_probs(row, positions=fault(right[:, 0].numpy(), len(prompt)))

    report = look(broken(first_step, tmp_path, TRAINER, log_probs))
    assert causes(report) == {"engine": [], "trainer": ["mRoPE positions"]}
    found = verdict(report, "trainer")
    assert [each.name for each in found.winners] == [name]
    assert (found.num_mismatched, found.winners[0].explained) == (8, 8)  # two rollouts have no images


def test_a_missing_system_turn(first_step, teacher, tmp_path):
    encoder = teacher.encoder
    turn = encoder.tokenizer("<|im_start|>system\nThink.<|im_end|>\n", add_special_tokens=False).input_ids

    def log_probs(row):
        assert row["prompt_token_ids"][: len(turn)] == turn
        return teacher.log_probs(row, prompt=row["prompt_token_ids"][len(turn) :])

    report = look(broken(first_step, tmp_path, ENGINE, log_probs))
    assert causes(report) == {"engine": ["token ids"], "trainer": []}
    assert [each.name for each in verdict(report, "engine").winners] == ["without the system turn"]
    assert verdict(report, "engine").winners[0].explained == 10


def test_shifted_log_probabilities(first_step, tmp_path):
    run = broken(first_step, tmp_path, TRAINER, lambda row: [-1.0, *row[TRAINER][:-1]])
    report = look(run)
    assert causes(report) == {"engine": [], "trainer": ["token ids"]}
    assert [each.name for each in verdict(report, "trainer").winners] == ["log-probabilities written one token later"]


def test_a_lower_precision(first_step, policies, tmp_path):
    half = Transformers(policies[0], first_step.encoder, torch.bfloat16)
    report = look(broken(first_step, tmp_path, ENGINE, half.log_probs))
    assert causes(report) == {"engine": ["kernels"], "trainer": []}
    found = verdict(report, "engine")
    assert found.num_mismatched == 10
    assert found.plain.mean > 100 * found.tolerances[1]


def test_a_run_in_bfloat16(policies, tmp_path):
    """Its own rounding is no mismatch; 8-bit weights are, and so are wrong positions."""
    run = record_run(tmp_path, policies[0], policies[0], settings=("model.dtype=bfloat16",))
    half = Transformers(policies[0], run.encoder, torch.bfloat16)
    right = run.copy(tmp_path / "right").rewrite(lambda row: dict.fromkeys((ENGINE, TRAINER), half.log_probs(row)))
    report = look(right)
    assert report.agrees
    assert verdict(report, "engine").plain.largest > 1e-3

    text = broken(right, tmp_path, TRAINER, lambda row: half.log_probs(row, positions=counted(row)))
    assert causes(look(text)) == {"engine": [], "trainer": ["mRoPE positions"]}

    for layer in half.model.model.language_model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):  # one scale for each row, as weight-only quantization has
                scale = module.weight.abs().amax(dim=1, keepdim=True) / 448
                module.weight.data = (module.weight / scale).to(torch.float8_e4m3fn).to(torch.bfloat16) * scale
    quantized = right.copy(tmp_path / "quantized").rewrite(lambda row: {ENGINE: half.log_probs(row)})
    report = look(quantized)
    assert causes(report) == {"engine": ["kernels"], "trainer": []}
    assert [each.name for each in verdict(report, "engine").winners] == ["rounding of float8"]

    # Where the config says that the trainer multiplies in 8 bits, that is its rounding, and not the engine's.
    config = quantized.root / "config.yaml"
    config.write_text(config.read_text().replace('fp8: "none"', 'fp8: "e4m3"'))
    report = look(quantized.rewrite(lambda row: {TRAINER: row[ENGINE]}))
    assert verdict(report, "trainer").precision == "float8"
    assert causes(report) == {"engine": ["kernels"], "trainer": []}


def counted(row):
    length = len(row["prompt_token_ids"]) + len(row["response_token_ids"])
    return np.tile(np.arange(length), (3, 1))


def test_a_nucleus(policies, tmp_path):
    """The engine's log-probabilities are of the nucleus, the trainer's of the whole distribution."""
    run = record_run(tmp_path, policies[0], policies[0], top_p=0.7)
    gaps = [np.abs(np.subtract(row[ENGINE], row[TRAINER])).max() for row in run.rows]
    assert max(gaps) > 0.1
    report = look(run)
    assert report.agrees
    assert report.direct == (pytest.approx(max(gaps)), pytest.approx(report.direct[1]))
    swapped = run.copy(tmp_path / "swapped").rewrite(lambda row: {ENGINE: row[TRAINER]})
    assert causes(look(swapped))["engine"] == ["unexplained"]


def test_hypotheses_that_cannot_be_told_apart(first_step, teacher, tmp_path):
    """Two hypotheses that say the same of every rollout are both named."""

    def swapped(row):
        keys = row["images"][::-1]
        return teacher.log_probs(row, keys=keys, prompt=prompt_of(row, keys, teacher.encoder))

    run = first_step.copy(tmp_path / "two")
    rows = [row | {ENGINE: swapped(row)} for row in run.rows if len(row["images"]) == 2]
    run.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = verdict(look(run), "engine")
    assert [cause.value for cause in found.causes] == ["pixels"]
    assert {each.name for each in found.winners} == {"images in reversed order", "images 1 and 2 swapped"}
    permuted = [row for row in rows if row["view"] == 1]
    run.file.write_text("".join(json.dumps(row) + "\n" for row in permuted))
    names = {each.name for each in verdict(look(run), "engine").winners}
    assert "images in the record's original order" in names


def test_a_fault_of_a_few_is_no_verdict_on_all(first_step, teacher, tmp_path):
    """Eight rollouts with numbers from nowhere, two with text positions: what explains two of ten is no verdict."""

    def log_probs(row):
        counts = row["record"] == "two" and row["view"]
        return teacher.log_probs(row, positions=counted(row)) if counts else [-9.0] * len(row[ENGINE])

    found = verdict(look(broken(first_step, tmp_path, ENGINE, log_probs)), "engine")
    assert found.num_mismatched == 10
    assert [cause.value for cause in found.causes] == ["unexplained"]
    assert (found.tested[1].cause.value, found.tested[1].explained) == ("mRoPE positions", 2)


def test_a_fault_of_most_is_a_verdict_with_its_count(first_step, teacher, tmp_path):
    def log_probs(row):
        nowhere = row["record"] == "two" and row["view"]
        return [-9.0] * len(row[ENGINE]) if nowhere else teacher.log_probs(row, positions=counted(row))

    report = look(broken(first_step, tmp_path, ENGINE, log_probs))
    assert causes(report) == {"engine": ["mRoPE positions"], "trainer": []}
    (winner,) = verdict(report, "engine").winners
    assert (winner.explained, verdict(report, "engine").num_mismatched) == (6, 8)
    assert "The other rollouts are not explained by it." in report.render()


def test_numbers_that_are_not_finite_are_a_mismatch(first_step, tmp_path):
    run = broken(first_step, tmp_path, ENGINE, lambda row: [None, *row[ENGINE][1:]])
    report = look(run)
    assert causes(report) == {"engine": ["unexplained"], "trainer": []}
    content = json.loads(report.as_json())
    assert content["parties"]["engine"]["tested"][0]["largest"] == "inf"
    assert content["engine_against_trainer"] == ["inf", "inf"]
