"""The section of the rollouts: which engine samples them, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from perl_megatron.config.section import Section, as_texts


class RolloutConfig(Section):
    """Sampling of responses."""

    engine: Literal["auto", "vllm", "server", "embedded"] = "auto"
    """'vllm': colocated in the trainer's processes; 'server': the vLLM servers of rollout.servers; 'embedded':
    transformers; 'auto': vllm where it is installed."""
    servers: Annotated[tuple[str, ...], BeforeValidator(as_texts)] = ()
    """Addresses of vLLM servers (`http://host:8000`), started by `perl-megatron serve` or otherwise; they share the
    questions, and those that fail are done without until they are back."""
    api_key_file: Path | None = None
    """File whose first line is the servers' key: `perl-megatron serve` demands it, the trainer sends it."""
    request_deadline: float = Field(default=600.0, gt=0)
    """Seconds in which a server has to answer for a view; then another one is asked for the same."""
    health_deadline: float = Field(default=60.0, gt=0)
    """Seconds without an answer to `/health` after which a server is taken for hung; they are also what a server may
    take over a message without much work in it."""
    sync_deadline: float = Field(default=600.0, gt=0)
    """Seconds in which servers have to have taken an update of the weights; also how long is waited for a server to be
    there at all."""
    weight_transfer: Literal["direct", "disk"] = "direct"
    """How weights get to servers: 'direct' through vLLM's weight transfer (NCCL, on CPUs gloo), 'disk' as a Hugging
    Face folder in rollout.shared_folder."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """0: strictly on-policy. 1: one-step-off: the rollouts of the next step are sampled during the update, by the
    weights before it; needs rollout.engine=server, and an objective that knows: algorithm.old_policy=engine, or an
    algorithm.importance_correction."""
    shared_folder: Path | None = None
    """For 'disk': a folder that the trainer's first process and all servers see under this path."""
    questions_per_step: int = Field(default=128, ge=1)
    """Informative questions (groups) that make up one training step."""
    questions_per_call: int | None = Field(default=None, ge=1)
    """Questions that are given to the engine at once; None: all that a step draws. Between two calls a run that is told
    to end can keep what it has, so they should be shorter than launch.grace_seconds; small calls leave engines idle."""
    num_rollouts: int = Field(default=6, ge=1)
    """n: responses sampled for each view."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling threshold; below 1 the trainer's log-probabilities differ from the sampling distribution."""
    max_response_tokens: int = Field(default=2048, ge=1)
    """Responses are cut at this length."""
    tensor_parallel: int | None = Field(default=None, ge=1)
    """vLLM: processes that one engine is spread over; the others form further engines, which share the questions. None:
    parallel.tensor, or 1 in a server."""
    max_concurrent_sequences: int = Field(default=64, ge=1)
    """Sequences that an engine works on at once."""
    gpu_memory_fraction: float = Field(default=0.5, gt=0, lt=1)
    """vLLM on CUDA: the share of device memory that it may take."""
    sleep_mode: bool = True
    """A colocated engine on CUDA gives its device memory to the trainer during log-probabilities and updates; each step
    then copies its weights to host memory and back. False: it keeps them, and vLLM its whole share, throughout."""
    cpu_cache_gib: float = Field(default=1.0, gt=0)
    """vLLM on CPU: size of its key-value cache in GiB, for each engine rank."""
    sync_bucket_mib: int = Field(default=1024, ge=1)
    """Weights go to the engine in buckets; an update needs the memory of two. One holds the largest weight twice."""
    attestation: Literal["off", "sample", "full"] = "sample"
    """What of vLLM's weights is compared with what it was sent after every update: two columns of each (on a CPU, where
    that costs more, of a quarter of them in turn), or all."""
    full_attestation_every: int = Field(default=50, ge=0)
    """With 'sample': all numbers are compared after the first update and every so many (0: never)."""
