"""The sections of the questions: which ones, and the orders of their images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from perl_megatron.config.section import Section, as_numbers, as_paths


class DataConfig(Section):
    """The questions."""

    train: Annotated[tuple[Path, ...], BeforeValidator(as_paths)] = ()
    """Training records: a JSON-lines file, a folder that `tools/import_dataset.py` wrote, or a list of such, which are
    sources of their own."""
    weights: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None, BeforeValidator(as_numbers)
    ] = None
    """How often each path of data.train is drawn from, in any unit; None: by size (all end their epochs together)."""
    evaluation: Path | None = None
    """JSON-lines file of held-out records."""
    epochs: int | None = Field(default=None, ge=1)
    """The run ends, even before run.steps, when so many questions were drawn as all training records this many times
    (each of them so often, unless data.weights favours some sources); None: as many as needed."""
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
    follow_links: bool = False
    """Images may be symbolic links to elsewhere, or lie in folders that are: set it where you have made the links
    yourself. By default a record with such an image is dropped as corrupt."""
    check: Literal["auto", "load", "draw"] = "auto"
    """When training images are decoded and prompts measured for the first time: 'load', before the run; 'draw', each
    question as it is drawn, so that large sets open in seconds; 'auto': at load up to 2 MiB of records."""
    decode_processes: int = Field(default=2, ge=0)
    """Processes of each rank that decode images ahead of need; 0: each rank decodes images when it needs them."""
    decode_ahead_mib: int = Field(default=256, ge=1)
    """Images decoded ahead of need are kept up to this size, on each rank, and up to half of data.pixel_cache_mib;
    those of a step should fit: others are decoded while the next step waits."""
    pixel_cache_mib: int = Field(default=2048, ge=1)
    """Decoded images (3 bytes for a pixel) are kept up to this size on each node, in memory that its processes share;
    beyond it they are decoded again when they are needed. The images of a step, and those decoded ahead, should fit."""


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
    orders: Literal["distinct", "independent", "released"] = "distinct"
    """The copies' orders: 'distinct' from each other and from the original; 'independent', each drawn from all orders,
    which may repeat or be the original; 'released': the ones that the released code's fixed seed gives every record."""
    recover_order: float = Field(default=0.0, ge=0, le=1)
    """Probability that a drawn question with several images is replaced by an auxiliary one about their order: which of
    the shuffled images is the same as each of the others (Visual Jigsaw)."""
