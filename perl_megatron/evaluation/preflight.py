"""What `perl-megatron eval` can check before anything starts."""

from __future__ import annotations

from perl_megatron.config.derive import check_endpoint_evaluation, require_evaluation_data
from perl_megatron.config.schema import Config
from perl_megatron.evaluation.benchmarks.registry import local_copies


def check_evaluation(config: Config) -> None:
    """UserError where there is nothing to ask, or no endpoint to ask it."""
    if config.evaluation.ask == "endpoint":
        check_endpoint_evaluation(config)
    if config.evaluation.benchmarks:
        local_copies(config.evaluation.benchmarks, config.evaluation.benchmark_folder)
    else:
        require_evaluation_data(config)
