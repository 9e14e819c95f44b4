"""Run under torchrun: compares the policy with transformers in several layouts, one after the other.

    torchrun --nproc-per-node 2 parity_worker.py FOLDER

FOLDER holds for each of 'untied' and 'tied' a checkpoint and NAME.reference.pt; writes result.json.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from tiny_policy import make_batch, policy_input

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.stream import export_tensors, export_weights, import_weights
from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.kernels.logprob import vocabulary_parallel_log_prob
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.policy import build_policy
from perl_megatron.runtime import platform, topology

MICRO_BATCHES = [[0, 1, 4], [2, 3, 5]]
LAYOUTS = {
    "tensor 2": ("untied", ParallelConfig(tensor=2)),
    "tensor 2, sequence": ("untied", ParallelConfig(tensor=2, sequence=True)),
    "pipeline 2": ("untied", ParallelConfig(pipeline=2)),
    "tied, tensor 2, sequence": ("tied", ParallelConfig(tensor=2, sequence=True)),
    "tied, pipeline 2": ("tied", ParallelConfig(pipeline=2)),
    "pipeline 2, recompute": ("untied", ParallelConfig(pipeline=2)),
}


def run_schedule(chunks, parallel: ParallelConfig, layout) -> list[torch.Tensor]:
    """Forward and backward of all micro-batches by megatron-core; the last stage gets their log-probabilities."""
    batch = make_batch()

    def loss(inputs, logits):
        log_prob, _ = vocabulary_parallel_log_prob(logits, inputs.targets, group=layout.tensor_group())
        weighted = (log_prob * inputs.weights).sum() * len(MICRO_BATCHES)  # undoes the mean over 'tokens' below
        return weighted, torch.tensor(1, dtype=torch.int), {"log_prob": log_prob.detach()}

    def step(iterator, model):
        inputs = next(iterator)
        output = model(inputs.token_ids, inputs.position_ids, inputs.vision, inputs.output_mask)
        return output, partial(loss, inputs)

    multiple = parallel.tensor if parallel.sequence else 1
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([policy_input(batch, members, multiple=multiple) for members in MICRO_BATCHES]),
        model=chunks,
        num_microbatches=len(MICRO_BATCHES),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return [result["log_prob"] for result in results]


def check_layout(folder: Path, name: str, parallel: ParallelConfig, recompute: str = "none") -> dict:
    """Import, run, and compare one layout. The last rank has all figures, the others not the log-probabilities'."""
    layout = topology.initialize(parallel, seed=0, timeout_seconds=120)
    source = open_checkpoint(folder / name)
    architecture = read_architecture(folder / name)
    model = ModelConfig(path=folder / name, dtype="float32", recompute=recompute)
    chunks = build_policy(architecture, model, parallel, layout)
    import_weights(chunks, architecture, layout, source)
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    log_probs = run_schedule(wrapped, parallel, layout)
    reference = torch.load(folder / f"{name}.reference.pt", weights_only=True)
    result: dict = {"round_trip": True, "num_tensors": 0, "gradient": {}}
    for tensor_name, tensor in export_weights(wrapped, architecture, layout):
        result["round_trip"] &= torch.equal(tensor, source[tensor_name])
        result["num_tensors"] += 1
    for tensor_name, tensor in export_tensors(wrapped, architecture, layout, select=lambda p: p.main_grad):
        result["gradient"][tensor_name] = relative_error(tensor, reference["gradients_64"][tensor_name])
    if layout.is_last_stage:
        order = [index for members in MICRO_BATCHES for index in members]
        ours = torch.cat(log_probs)
        result["log_prob"] = max_error(ours, torch.cat([reference["log_probs_32"][i] for i in order]))
        result["log_prob_64"] = max_error(ours, torch.cat([reference["log_probs_64"][i] for i in order]))
    topology.forget_layout()
    return result


def max_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return (ours - expected).abs().max().item()


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def check_log_prob_kernel() -> dict:
    """Two ranks with half of the vocabulary each against the whole vocabulary in one process, float64."""
    layout = topology.initialize(ParallelConfig(tensor=2), seed=0, timeout_seconds=120)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(11, 26, generator=generator, dtype=torch.float64).mul(4).requires_grad_()
    targets = torch.randint(0, 26, (11,), generator=generator)
    weights = torch.randn(2, 11, generator=generator, dtype=torch.float64)
    options = {"temperature": 0.7, "banned_token_ids": (0, 14)}
    part = whole.detach().chunk(2, 1)[layout.tensor_rank].clone().requires_grad_()
    expected = torch.stack(vocabulary_parallel_log_prob(whole, targets, **options))
    ours = torch.stack(vocabulary_parallel_log_prob(part, targets, group=layout.tensor_group(), **options))
    (expected * weights).sum().backward()
    (ours * weights).sum().backward()
    own_gradient = whole.grad.chunk(2, 1)[layout.tensor_rank]
    topology.forget_layout()
    return {"value": max_error(ours, expected), "gradient": max_error(part.grad, own_gradient)}


def main(folder: Path) -> None:
    platform.install()
    results = {}
    for label, (name, parallel) in LAYOUTS.items():
        recompute = "full" if "recompute" in label else "none"
        results[label] = check_layout(folder, name, parallel, recompute)
    results["log_prob kernel"] = check_log_prob_kernel()
    if platform.rank_and_world_size()[0] == 1:
        (folder / "result.json").write_text(json.dumps(results))
    topology.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
