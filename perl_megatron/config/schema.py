"""The configuration: every field typed, documented and checked. An unknown key is an error.

The help text, docs and error messages are made from the descriptions here. Batch sizes have one unit, the question;
``derive.py`` computes and prints the rest.
"""

from __future__ import annotations

from perl_megatron.config.actor_section import ActorSection
from perl_megatron.config.algorithm_sections import AlgorithmConfig, FilterConfig
from perl_megatron.config.deadline_section import DeadlinesConfig
from perl_megatron.config.endpoint_section import EndpointConfig
from perl_megatron.config.evaluation_section import EvaluationConfig
from perl_megatron.config.launch_section import LaunchConfig
from perl_megatron.config.question_sections import DataConfig, PermutationConfig
from perl_megatron.config.reward_section import RewardConfig
from perl_megatron.config.rollout_section import RolloutConfig
from perl_megatron.config.run_sections import (
    ModelConfig,
    OptimizerSection,
    ParallelConfig,
    RunConfig,
    SupervisedConfig,
)
from perl_megatron.config.section import Section


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    permutation: PermutationConfig = PermutationConfig()
    rollout: RolloutConfig = RolloutConfig()
    filter: FilterConfig = FilterConfig()
    reward: RewardConfig = RewardConfig()
    judge: EndpointConfig = EndpointConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    actor: ActorSection = ActorSection()
    optimizer: OptimizerSection = OptimizerSection()
    supervised: SupervisedConfig = SupervisedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    endpoint: EndpointConfig = EndpointConfig()
    launch: LaunchConfig = LaunchConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
