"""Rollouts by a server, against the bare requests: `python benchmarks/served_rollouts.py [--quick] [--json FILE]`.

The same requests to the same server, in turn: by our engine, and posted all at once by an HTTP client that only counts
the tokens. The difference is what our engine adds: a bound on what is under way, a check of every token in an answer,
text, caches' counters. Every call has images that no call before had.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rollout import QUESTIONS, ROLLOUTS, TOKENS, prepare, views_of
from served_server import running_server
from side_by_side import make_row, report

from perl_megatron.runtime import environment, platform

environment.prepare_process()
environment.prepare_vllm(cuda=platform.is_cuda())
platform.install()

import httpx  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from perl_megatron.config.schema import RolloutConfig  # noqa: E402
from perl_megatron.data.processor import PromptEncoder  # noqa: E402
from perl_megatron.launch.ports import free_port  # noqa: E402
from perl_megatron.rollout.engine import Sampling  # noqa: E402
from perl_megatron.rollout.server_answers import GENERATE, ImageUrls, request_body  # noqa: E402
from perl_megatron.rollout.server_engine import ServerEngine  # noqa: E402

GOAL = 1 / 0.95
PROMPT_TOKENS = 400
SAMPLING = Sampling(num_rollouts=ROLLOUTS, temperature=1.0, top_p=1.0, max_tokens=TOKENS)


def measure(folder: Path, address: str, num_questions: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds for a thousand tokens, of ours and of the bare requests, call by call in turn."""
    encoder = PromptEncoder(folder / "policy", system_prompt="Think.")
    config = RolloutConfig(engine="server", servers=(address,))
    length = PROMPT_TOKENS + TOKENS
    engine = ServerEngine(
        config, encoder=encoder, model_path=folder / "policy", dtype=torch.float32, max_model_length=length
    )
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for call in range(2 * (repeats + 1)):
        views = [view for number in range(num_questions) for view in views_of(folder / "images", call, number)]
        prompts = [encoder.encode(view) for view in views]
        seeds = [call * len(views) + index for index in range(len(views))]
        begin = time.perf_counter()
        # Who goes first changes: the machine may slow down or warm up.
        if call % 4 in (0, 3):
            side, rollouts = "ours", engine.generate(views, prompts, SAMPLING, seeds=seeds)
            tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        else:
            url_of, pairs = ImageUrls(encoder), zip(prompts, seeds, strict=True)
            bodies = [request_body(encoder, prompt, SAMPLING, seed, url_of) for prompt, seed in pairs]
            side, tokens = "bare", asyncio.run(ask_bare(address, bodies))
        seconds[side].append((time.perf_counter() - begin) / tokens * 1000)
    engine.close()
    return seconds["ours"][1:], seconds["bare"][1:]


async def ask_bare(address: str, bodies: list[dict[str, Any]]) -> int:
    """Sampled tokens."""
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None), trust_env=False) as http:
        replies = await asyncio.gather(*(http.post(f"{address}/{GENERATE}", json=body) for body in bodies))
    return sum(len(choice["token_ids"]) for reply in replies for choice in reply.json()["choices"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two questions, one call of each side")
    parser.add_argument("--repeats", type=int, default=9, help="calls of each side after one that warms up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    num_questions, repeats = (2, 1) if options.quick else (QUESTIONS, options.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        prepare(folder, 2 * (repeats + 1))
        settings = {
            "model": {"path": str(folder / "policy"), "dtype": "float32"},
            "data": {"max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {"max_response_tokens": TOKENS, "cpu_cache_gib": 0.5},
        }
        (folder / "server.yaml").write_text(yaml.safe_dump(settings))
        options_of_server = ["serve", str(folder / "server.yaml"), "--port", str(port), "--max-images", "4"]
        command = [sys.executable, "-m", "perl_megatron", *options_of_server]
        address, threads = f"http://127.0.0.1:{port}", os.environ | {"OMP_NUM_THREADS": "1"}
        with running_server(command, address, folder / "log", threads):
            ours, bare = measure(folder, address, num_questions, repeats)
    report("rollouts by a server", [make_row("1000 tokens", ours, "bare requests", bare, "s", GOAL)], options.json)


if __name__ == "__main__":
    main()
