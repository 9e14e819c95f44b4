"""What an evaluation's settings imply, and those that are refused."""

import pytest
from derive_case import TINY, config_of

from perl_megatron.config.derive import derive
from perl_megatron.errors import UserError
from perl_megatron.evaluation.preflight import check_evaluation


def test_the_longest_sequence_may_be_an_evaluation_s():
    lengths = ("data.max_prompt_tokens=1000", "rollout.max_response_tokens=200")
    for evaluation, longest in (
        ((), 1200),
        (("evaluation.max_response_tokens=300",), 1300),
        (
            ("evaluation.max_response_tokens=100",),
            1200,
        ),
    ):
        derived = derive(config_of(*lengths, *evaluation), world_size=1, architecture=TINY, command="eval")
        assert derived.max_sequence_tokens == longest


def test_greedy_answers_are_asked_for_once():
    with pytest.raises(UserError, match="3 greedy answers"):
        derive(config_of("evaluation.num_rollouts=3"), world_size=1, architecture=TINY)
    sampled = config_of("evaluation.num_rollouts=3", "evaluation.temperature=0.7")
    derive(sampled, world_size=1, architecture=TINY)


def test_a_server_takes_all_answers_at_once():
    overrides = ("evaluation.num_rollouts=9", "evaluation.temperature=1", "rollout.max_concurrent_sequences=8")
    server = ("rollout.engine=server", "rollout.servers=http://127.0.0.1:1")
    with pytest.raises(UserError, match="9 answers to a question are one request"):
        derive(config_of(*overrides, *server), world_size=1, architecture=TINY, command="eval")


def test_preflight(tmp_path):
    with pytest.raises(UserError, match="no endpoint to ask"):
        check_evaluation(config_of("evaluation.ask=endpoint"))
    with pytest.raises(UserError, match="no evaluation data"):
        check_evaluation(config_of("evaluation.ask=endpoint", "endpoint.url=http://127.0.0.1:1/v1"))
    with pytest.raises(UserError, match="no folder with benchmarks"):
        check_evaluation(config_of("evaluation.benchmarks=blink"))
    (tmp_path / "blink").mkdir()
    check_evaluation(config_of("evaluation.benchmarks=blink", f"evaluation.benchmark_folder={tmp_path}"))
