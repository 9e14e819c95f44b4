# ruff: noqa: E402
"""Runs engines through their contract and writes what it measured: `contract_worker.py FOLDER OUTPUT TP ENGINE…`.

Started by test_engine_contract.py, alone or under torchrun, because a process is started for a layout. FOLDER holds the
policies `a` and `b` (the same shape, other weights), `flat` (almost uniform distributions) and images. Alone, the
engines are also compared with transformers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from perl_megatron.runtime import environment

environment.prepare_process()

import numpy as np
import psutil
import torch
import torch.distributed as dist
from corruptions import Corruptor, complaints, with_stale_features
from servers import wait_for_server
from tiny_checkpoint import make_view

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.config.schema import ParallelConfig, RolloutConfig
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.model.architecture import read_architecture
from perl_megatron.rollout.engine import BANNED_LOGIT_BIAS, RolloutEngine, Sampling
from perl_megatron.runtime import collective, platform, topology
from perl_megatron.types import Rollout, View

platform.install()

MAX_TOKENS = 10
SAMPLED = Sampling(num_rollouts=3, temperature=1.0, top_p=1.0, max_tokens=MAX_TOKENS)
COOL = Sampling(num_rollouts=3, temperature=0.7, top_p=0.6, max_tokens=MAX_TOKENS)
GREEDY = Sampling(num_rollouts=1, temperature=0.0, top_p=1.0, max_tokens=MAX_TOKENS)
LONG = Sampling(num_rollouts=16, temperature=1.0, top_p=1.0, max_tokens=40)


class Reference:
    """transformers' own forward pass over prompt and response, in float64."""

    def __init__(self, path: Path, encoder: PromptEncoder):
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

        self.encoder = encoder
        self.processor = AutoProcessor.from_pretrained(path)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager"
        )
        self.model = model.eval()

    @torch.no_grad()
    def logits(self, view: View, tokens: np.ndarray) -> torch.Tensor:
        """[R, V]: what predicts each response token, banned tokens biased."""
        text = self.processor.apply_chat_template(
            self.encoder.messages(view), tokenize=False, add_generation_prompt=True
        )
        images = [self.encoder.image(key) for key in self.encoder.encode(view).image_keys]
        inputs = self.processor(text=[text], images=images, return_tensors="pt")
        prompt = inputs.pop("input_ids")
        ids = torch.cat([prompt, torch.from_numpy(tokens)[None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(ids)
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(tokens))], dim=1)
        logits = self.model(input_ids=ids, **inputs).logits[0, prompt.shape[1] - 1 : -1].double()
        logits[:, list(self.encoder.banned_token_ids)] += BANNED_LOGIT_BIAS
        return logits

    def gaps(self, views: Sequence[View], rollouts: Sequence[Rollout], sampling: Sampling) -> tuple[float, float]:
        """Largest |engine - reference| of a log-probability; share of tokens that are the reference's argmax."""
        gap, hits = 0.0, []
        by_index = {view.index: view for view in views}
        for rollout in rollouts:
            logits = self.logits(by_index[rollout.view_index], rollout.token_ids)
            tokens = torch.from_numpy(rollout.token_ids)
            hits += (logits.argmax(dim=-1) == tokens).tolist()
            if sampling.temperature > 0:
                logits = logits / sampling.temperature
                logits = nucleus(logits, sampling.top_p)
            log_probs = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].numpy()
            gap = max(gap, float(np.abs(log_probs - rollout.logprob_rollout).max()))
        return gap, float(np.mean(hits))


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Written out token by token: the most likely tokens until their mass reaches ``top_p``."""
    kept = torch.full_like(logits, float("-inf"))
    for row, probabilities in enumerate(logits.softmax(dim=-1)):
        mass = 0.0
        for token in probabilities.argsort(descending=True).tolist():
            kept[row, token] = logits[row, token]
            mass += float(probabilities[token])
            if mass >= top_p:
                break
    return kept


def weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """In the order of a policy's."""
    checkpoint = open_checkpoint(path)
    return ((name, checkpoint[name]) for name in published_shapes(read_architecture(path)))


class Again:
    """Weights that can be drawn again, as those of a trainer."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return weights(self.path)


def process_state() -> dict[str, object]:
    """What an engine must leave as it found it."""
    names = ("LOCAL_WORLD_SIZE", "LD_PRELOAD", "OMP_NUM_THREADS")
    return {
        "torch_random": torch.random.get_rng_state().sum().item(),
        "numpy_random": int(np.random.get_state()[1].sum()),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads.__name__,
        "environment": [os.environ.get(name) for name in names],
    }


def start(name: str, layout: topology.Topology, tensor_parallel: int, encoder: PromptEncoder) -> RolloutEngine:
    config = RolloutConfig(max_concurrent_sequences=16, cpu_cache_gib=0.25)
    if name.startswith("server"):
        return start_server_engine(name, config, encoder)
    if name == "embedded":
        from perl_megatron.rollout.embedded import EmbeddedEngine

        return EmbeddedEngine(config, encoder=encoder, model_path=encoder.model_path, dtype=torch.float32)
    from perl_megatron.rollout import vllm_colocated, vllm_start

    # 16 prompts do not fit into one step of max_model_length tokens. None may be cut in two: vLLM would have to rewind
    # its seeded generators, which CPU generators cannot do.
    vllm_start.CPU_BATCHED_TOKENS = 0
    return vllm_colocated.VllmColocatedEngine(
        config,
        encoder=encoder,
        model_path=encoder.model_path,
        topology=layout,
        tensor_parallel_size=tensor_parallel,
        seed=0,
        dtype=torch.float32,
        max_model_length=192,
        max_images=4,
    )


def start_server_engine(name: str, config: RolloutConfig, encoder: PromptEncoder) -> RolloutEngine:
    """'server|direct|ADDRESSES' or 'server|disk|ADDRESSES|FOLDER'; all servers are waited for."""
    from perl_megatron.rollout.server_engine import ServerEngine

    environment.prepare_vllm(cuda=False)  # its end of the weight transfer is imported here
    _, transfer, addresses, *folder = name.split("|")
    settings = {"engine": "server", "servers": tuple(addresses.split(",")), "weight_transfer": transfer}
    settings |= {"sync_deadline": 120.0, "shared_folder": Path(folder[0]) if folder else None}
    for address in addresses.split(","):
        wait_for_server(address)
    return ServerEngine(
        config.model_copy(update=settings),
        encoder=encoder,
        model_path=encoder.model_path,
        dtype=torch.float32,
        max_model_length=192,
    )


def corruption_switches(
    name: str, engine: Any, layout: topology.Topology
) -> tuple[Callable[[str], None], Callable[[str], None]]:
    """``switch`` and ``attest`` of ``complaints``: the last process that holds weights is corrupted."""
    if name == "vllm":
        model = engine._llm.apply_model(lambda model: model)[0]
        corruptor = Corruptor(model, corrupts=layout.rank == layout.world_size - 1)
        return corruptor.switch, lambda mode: setattr(engine, "_attestation", mode)
    addresses = [server.address for server in engine._fleet.servers]

    def switch(kind: str) -> None:
        for address in addresses if layout.rank == 0 else ():
            engine._fleet._clients[address].call("corrupt", kind, address == addresses[-1])
        collective.barrier()

    def attest(mode: str) -> None:
        pusher = engine._fleet._pusher
        if pusher is not None:
            pusher._config = pusher._config.model_copy(update={"attestation": mode})

    return switch, attest


def dump(rollouts: Sequence[Rollout]) -> list[dict[str, object]]:
    return [
        {
            "view": rollout.view_index,
            "tokens": rollout.token_ids.tolist(),
            "logprobs": rollout.logprob_rollout.tolist(),
            "types": [str(rollout.token_ids.dtype), str(rollout.logprob_rollout.dtype)],
            "finish": rollout.finish_reason,
            "text": rollout.text,
            "versions": rollout.weight_versions.tolist(),
        }
        for rollout in rollouts
    ]


def refusal(engine: RolloutEngine, stream: list[tuple[str, torch.Tensor]]) -> str:
    """The message with which a faulty stream is refused; '' if it is not."""
    try:
        engine.update_weights(iter(stream), version=99)
    except ValueError as error:
        return str(error)
    return ""


def measure(folder: Path, name: str, layout: topology.Topology, tensor_parallel: int) -> dict[str, object]:
    encoder = PromptEncoder(folder / "a", system_prompt="Think.")
    images = sorted((folder / "images").iterdir())
    # One to four images; the first image comes in every view, in other places: stale features would be noticed.
    views = [make_view([*images[1 : count + 1], images[0]], index=count) for count in range(4)]
    prompts = [encoder.encode(view) for view in views]
    seeds = [11, 12, 13, 14]
    before = process_state()
    engine = start(name, layout, tensor_parallel, encoder)

    def run(sampling: Sampling, seeds: Sequence[int] = seeds) -> list[Rollout]:
        return engine.generate(views, prompts, sampling, seeds=seeds)

    report: dict[str, object] = {"prompts": [[len(each.token_ids), len(each.image_keys)] for each in prompts]}
    report |= {"name": engine.name, "version": engine.weight_version, "digest_a": engine.digest()}
    sampled = run(SAMPLED)
    report["cache_use"] = dataclasses.asdict(engine.take_cache_use())
    long = make_view(images[:1], question="Which digit is in image 1? " * 15)
    engine.generate([long], [encoder.encode(long)], SAMPLED, seeds=[15])
    report["cache_use_long"] = dataclasses.asdict(engine.take_cache_use())
    compared = {"sampled": (sampled, SAMPLED), "greedy": (run(GREEDY), GREEDY), "cool": (run(COOL), COOL)}
    report |= {"again": dump(run(SAMPLED)), "other_seeds": dump(run(SAMPLED, [21, 22, 23, 24]))}

    sync = engine.update_weights(Again(folder / "b"), version=7)
    updated = run(GREEDY)
    for _ in range(2):
        engine.sleep()
    for _ in range(2):
        engine.wake()
    report["woken"] = dump(run(GREEDY))
    report |= {"sync": [sync.num_bytes, sync.num_tensors, sync.version, sync.seconds > 0], "digest_b": engine.digest()}
    engine.update_weights(Again(folder / "flat"), version=8)
    report["long"] = dump(run(LONG))
    engine.sleep()
    engine.update_weights(Again(folder / "a"), version=9)
    report |= {"restored": dump(run(SAMPLED)), "digest_restored": engine.digest()}
    if name != "embedded":
        brought, other = (lambda: Again(folder / "b")), (lambda: Again(folder / "a"))
        report["complaints"] = complaints(engine, brought, other, *corruption_switches(name, engine, layout))
        report["attested"] = dump(run(GREEDY))
        if name == "vllm" and layout.world_size == 1:  # one of several replicas might wait for another that failed
            stale = with_stale_features(engine, other, run, GREEDY)
            report["stale"] = stale if isinstance(stale, str) else dump(stale)
    report["refusals"] = refusals(engine, folder)
    engine.close()
    report["state_kept"] = process_state() == before
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    # Python's own book-keeper of shared memory ends with this process, not before.
    report["children"] = [command for command in children if "multiprocessing.resource_tracker" not in command]

    if layout.world_size == 1:
        reference = Reference(folder / "a", encoder)
        report["gaps"] = {key: reference.gaps(views, *value) for key, value in compared.items()}
        report["gaps"]["updated"] = Reference(folder / "b", encoder).gaps(views, updated, GREEDY)
    report |= {key: dump(rollouts) for key, (rollouts, _) in compared.items()} | {"updated": dump(updated)}
    report["encoder"] = {"end": encoder.end_token_ids, "banned": encoder.banned_token_ids}
    total = torch.tensor([float(layout.rank + 1)])
    dist.all_reduce(total)
    dist.all_reduce(total, group=layout.tensor_group())
    report["sum_after"] = total.item()
    ranks = collective.gather_objects({key: value for key, value in report.items() if key != "children"})
    report["same_on_all_ranks"] = all(json.dumps(rank) == json.dumps(ranks[0]) for rank in ranks)
    return report


def refusals(engine: RolloutEngine, folder: Path) -> list[str]:
    """How streams with a foreign, a doubled and a missing weight are refused."""
    stream = list(weights(folder / "a"))
    return [
        refusal(engine, [*stream[:2], ("model.layers.9.input_layernorm.weight", stream[0][1])]),
        refusal(engine, [*stream[:2], stream[1]]),
        refusal(engine, stream[:-1]),
    ]


def main() -> None:
    folder, output, tensor_parallel = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    layout = topology.initialize(ParallelConfig(tensor=tensor_parallel), seed=0, timeout_seconds=300)
    reports = {name.split("|")[0]: measure(folder, name, layout, tensor_parallel) for name in sys.argv[4:]}
    if layout.rank == 0:
        output.write_text(json.dumps(reports))
    topology.shutdown()


if __name__ == "__main__":
    main()
