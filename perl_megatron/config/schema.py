"""The configuration: every field typed, documented and checked. An unknown key is an error.

The help text, docs and error messages are made from the descriptions here. Batch sizes have one unit, the question;
``derive.py`` computes and prints the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def _as_texts(value: object) -> object:
    """A list of texts may be written as one, with commas, which is shorter on a command line."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


class RunConfig(Section):
    """Where a run lives and how long it is."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `directory/name`."""
    directory: Path = Path("runs")
    """Folder that holds all runs."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random stream."""
    steps: int = Field(default=100, ge=1)
    """Number of training steps."""
    save_every: int = Field(default=50, ge=0)
    """Steps between checkpoints (0: only the last one)."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints to keep."""
    record_rollouts: bool = True
    """Whether all rollouts are written to `rollouts/` (JSON lines: about 7 bytes a prompt token, 35 a response token);
    `perl-megatron triage` needs them."""
    collective_timeout: float = Field(default=1800.0, gt=0)
    """Seconds before a stuck collective ends the job."""


class ModelConfig(Section):
    """The policy."""

    path: Path
    """Hugging Face folder of the Qwen2.5-VL policy to start from."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of parameters and activations (main parameters and gradients are always float32)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation of megatron-core."""
    loss_kernel: Literal["auto", "reference", "tiled", "triton"] = "auto"
    """How log-probabilities and their gradients are computed from hidden states: 'reference' with the logits of all
    tokens in memory, 'tiled' with one tile of them; 'auto' the fastest that runs here."""
    fp8: Literal["none", "e4m3", "hybrid"] = "none"
    """Matrix products of the language model's layers in 8 bits ('hybrid': e4m3 forward, e5m2 backward); needs CUDA,
    Transformer Engine and bfloat16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How Transformer Engine scales to 8 bits: by past maxima (then the log-probabilities before an update are scaled
    otherwise than those in it), by tensor, by block (Hopper and later), or in the MX format (Blackwell)."""


class ParallelConfig(Section):
    """How the ranks are laid out; the data-parallel size is what is left over."""

    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel size."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline-parallel size."""
    data: int | None = Field(default=None, ge=1)
    """Data-parallel size; None: the processes over the other sizes (1 where the command starts them itself)."""
    sequence: bool = False
    """Sequence parallelism (needs tensor > 1)."""
    context: int = Field(default=1, ge=1)
    """Context-parallel size: every sequence is cut over so many processes, which exchange keys and values."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks of each pipeline stage (interleaved schedule, needs pipeline > 1): less idle time, more messages."""
    first_stage_layers: int | None = Field(default=None, ge=1)
    """Language-model layers of the first pipeline stage, which also runs the vision tower; None: as many as others."""
    last_stage_layers: int | None = Field(default=None, ge=1)
    """Language-model layers of the last pipeline stage, which also computes the logits; None: as many as others."""


class DataConfig(Section):
    """The questions."""

    train: Path | None = None
    """JSON-lines file of training records."""
    evaluation: Path | None = None
    """JSON-lines file of held-out records."""
    system_prompt: str = (
        "First think about the question inside <think> </think>. Then give the final answer inside \\boxed{}."
    )
    """System message of every prompt."""
    max_prompt_tokens: int = Field(default=8192, ge=1)
    """Records with a longer prompt (images included) are dropped at load, counted and named; nothing is truncated."""
    min_pixels: int | None = Field(default=None, ge=784)
    """Images are enlarged to this area at least; None: the checkpoint's own setting."""
    max_pixels: int | None = Field(default=None, ge=784)
    """Images are reduced to this area at most, once, before engine and trainer; None: the checkpoint's own setting."""
    max_corrupt_fraction: float = Field(default=0.01, ge=0, le=1)
    """The run is refused if more than this share of records is corrupt (each one is dropped and named)."""


class PermutationConfig(Section):
    """Permuted views (PeRL, Algorithm 1)."""

    num_permuted: int = Field(default=1, ge=0)
    """n_s: permuted copies of each question beside the original; 0 is plain GRPO."""
    schedule: Literal["constant", "linear", "exponential", "power"] = "linear"
    """How the swap probability α decays over the run: 1 - t/T, 1 - c^(T-t), 1 - (t/T)^c."""
    start: float = Field(default=1.0, ge=0, le=1)
    """Scale of α: its value at the first step after warm-up."""
    coefficient: float = Field(default=2.0, gt=0)
    """The schedule's c: the exponent of 'power'; the base of 'exponential', which needs c < 1."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which α rises linearly from 0 before it decays."""


class RolloutConfig(Section):
    """Sampling of responses."""

    engine: Literal["auto", "vllm", "server", "embedded"] = "auto"
    """'vllm': colocated in the trainer's processes; 'server': the vLLM servers of rollout.servers; 'embedded':
    transformers; 'auto': vllm where it is installed."""
    servers: Annotated[tuple[str, ...], BeforeValidator(_as_texts)] = ()
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
    cpu_cache_gib: float = Field(default=1.0, gt=0)
    """vLLM on CPU: size of its key-value cache in GiB, for each engine rank."""
    sync_bucket_mib: int = Field(default=1024, ge=1)
    """Weights go to the engine in buckets; an update needs the memory of two. One holds the largest weight twice."""
    attestation: Literal["off", "sample", "full"] = "sample"
    """What of vLLM's weights is compared with what it was sent after every update: two columns of each (on a CPU, where
    that costs more, of a quarter of them in turn), or all."""
    full_attestation_every: int = Field(default=50, ge=0)
    """With 'sample': all numbers are compared after the first update and every so many (0: never)."""


class FilterConfig(Section):
    """Which groups are kept for the update."""

    no_signal: bool = True
    """Drop groups whose rewards are all exactly equal."""
    min_accuracy: float = Field(default=0.0, ge=0, le=1)
    """Drop groups whose mean accuracy is lower."""
    max_accuracy: float = Field(default=1.0, ge=0, le=1)
    """Drop groups whose mean accuracy is higher."""
    max_truncated: float = Field(default=1.0, ge=0, le=1)
    """Drop groups where more than this share of responses was cut at the token limit."""
    max_refills: int = Field(default=4, ge=0)
    """How often a step may draw again to replace dropped groups (0: train on what is left)."""


class RewardConfig(Section):
    """Weights of the reward's parts."""

    accuracy: float = Field(default=0.9, ge=0)
    """Weight of a right answer."""
    format: float = Field(default=0.1, ge=0)
    """Weight of the format `<think>…</think> … \\boxed{…}`."""


class AlgorithmConfig(Section):
    """The GRPO objective (method: PeRL Eq. 4-6)."""

    standardize: bool = True
    """Divide advantages by the group's standard deviation (unbiased, + 1e-6); False is Dr.GRPO's form."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """What the clip bounds hold: the ratio π_θ / π_old of each token, of the whole response (the paper's Eq. 6), or the
    response's geometric mean (GSPO, whose bounds are a few 1e-4). The latter two go with aggregation=sequence."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """ε of the lower clip bound 1 - ε."""
    clip_high: float = Field(default=0.2, gt=0)
    """ε of the upper clip bound 1 + ε."""
    dual_clip: float | None = Field(default=3.0, gt=1)
    """c: for negative advantages the objective is bounded by c·A; None turns it off."""
    kl_coefficient: float = Field(default=0.01, ge=0)
    """β: weight of the KL divergence from the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence (Schulman): k1 = -log r, k2 = (log r)²/2, k3 = r - 1 - log r."""
    aggregation: Literal["token", "sequence"] = "token"
    """'token': mean over all response tokens; 'sequence': mean over responses of their token means."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer steps (mini-batches of questions) for each training step."""
    old_policy: Literal["trainer", "engine"] = "trainer"
    """Whose log-probabilities log π_old are: recomputed by the trainer before the step's first update, or those that
    the engine sampled with. The latter saves a forward pass; the clip bounds then act on the gap between engine and
    trainer too, and it is not measured."""
    importance_correction: Literal["off", "truncated", "masked"] = "off"
    """Weighs the policy loss by v = π_old / π_rollout, because the engine's probabilities are not the trainer's:
    'truncated' by min(v, importance_high), 'masked' by v between the bounds and by 0 outside. Only with
    old_policy=trainer."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether v is the ratio of each token or of the whole response, whose spread grows with its length."""
    importance_low: float = Field(default=0.5, ge=0, le=1)
    """'masked': smaller ratios are left out of the policy loss (default: as veRL, 1 / importance_high)."""
    importance_high: float = Field(default=2.0, ge=1)
    """Larger ratios are cut to this value ('truncated') or left out ('masked'). Default: veRL's; it recommends 1.5 to 5
    for tokens, 2 to 10 for whole responses."""


class OptimizerSection(Section):
    """AdamW through megatron-core's (distributed) optimizer."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    vision_multiplier: float = Field(default=1.0, ge=0)
    """Learning rate of the vision tower as a multiple of optimizer.learning_rate; 0 freezes it."""
    merger_multiplier: float = Field(default=1.0, ge=0)
    """The same for the merger (between vision tower and language model); 0 freezes it."""
    language_multiplier: float = Field(default=1.0, ge=0)
    """The same for the language model, with embedding and output layer; 0 freezes it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate over the run, after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay (not on biases and norms)."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's first-moment decay."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Adam's second-moment decay."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Adam's ε."""
    clip_gradient: float = Field(default=1.0, ge=0)
    """Global gradient-norm bound (0: none)."""
    distributed: bool = True
    """Shard the optimizer over data-parallel ranks."""
    micro_batch_sequences: int = Field(default=8, ge=1)
    """Sequences in one micro-batch on each data-parallel rank."""


class SupervisedConfig(Section):
    """`perl-megatron sft`: imitation of the records' demonstrations."""

    steps: int = Field(default=100, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=64, ge=1)
    """Demonstrations in one step, over all ranks."""


class EvaluationConfig(Section):
    """Held-out evaluation, every question in several image orders."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations (0: only before and after training)."""
    num_orders: int = Field(default=4, ge=1)
    """Image orders of each question (fewer where a record has fewer); the original order is always one of them."""
    max_records: int | None = Field(default=None, ge=1)
    """Evaluate only the first so many records; None: all."""


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
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerSection = OptimizerSection()
    supervised: SupervisedConfig = SupervisedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
