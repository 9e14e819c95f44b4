"""What a reward needs to be one: refused where it cannot be."""

from __future__ import annotations

from perl_megatron.config.reward_section import parse_function
from perl_megatron.config.schema import Config
from perl_megatron.errors import UserError


def check_reward(config: Config) -> None:
    """UserError where no part has a weight, or where a judge is wanted and there is none to ask."""
    reward = config.reward
    positive = (reward.accuracy, reward.format, reward.consistency, reward.judge)
    if not any((*positive, *(parse_function(text)[1] for text in reward.functions))):
        raise UserError(
            "all rewards are 0",
            where="reward.accuracy = 0, reward.format = 0, reward.consistency = 0",
            fix="set reward.accuracy or reward.format above 0",
        )
    if reward.judge > 0 and not config.judge.url:
        raise UserError(
            "the reward has a judge, and there is no endpoint to ask",
            where=f"reward.judge = {reward.judge:g}, judge.url = ''",
            fix="set judge.url=http://host:8000/v1, or reward.judge=0",
        )
