"""The sections of a run: its place and length, the policy, how it is laid out, and how it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from perl_megatron.config.section import Section


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
    """How many of the newest checkpoints to keep."""
    keep_best: str | None = None
    """A metric (`evaluation/accuracy`): the checkpoint with its best value is kept too, however old it is. Only steps
    at which the metric is logged count: save where it is evaluated."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of run.keep_best is the best."""
    asynchronous_checkpoints: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in the CPU's memory of what each rank writes;
    if not, it waits."""
    record_rollouts: bool = True
    """Whether all rollouts are written to `rollouts/` (JSON lines: about 7 bytes a prompt token, 35 a response token);
    `perl-megatron triage` needs them."""


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
    vision: Literal["sharded", "replicated"] = "sharded"
    """Vision tower and merger over the tensor-parallel ranks: 'sharded', all work on every image together, or
    'replicated', each holds all of both, encodes its share of a micro-batch's images, and gets the others' features."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks of each pipeline stage (interleaved schedule, needs pipeline > 1): less idle time, more messages."""
    first_stage_layers: int | None = Field(default=None, ge=1)
    """Language-model layers of the first pipeline stage, which also runs the vision tower; None: as many as others."""
    last_stage_layers: int | None = Field(default=None, ge=1)
    """Language-model layers of the last pipeline stage, which also computes the logits; None: as many as others."""


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
    max_skipped_updates: int = Field(default=5, ge=1)
    """Updates whose loss or gradient is not finite are skipped, and their batches kept (`skipped/` in the run's folder,
    for `perl-megatron replay`); so many in a row end the run."""
    distributed: bool = True
    """Shard the optimizer over data-parallel ranks."""


class SupervisedConfig(Section):
    """`perl-megatron sft`: imitation of the records' demonstrations."""

    steps: int = Field(default=100, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=64, ge=1)
    """Demonstrations in one step, over all ranks."""
