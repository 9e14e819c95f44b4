"""`perl-megatron serve`: vLLM's own HTTP server, with the settings, routes and worker methods that a trainer needs."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import torch
import uvloop
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from perl_megatron.config.schema import Config
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.rollout import vllm_child, vllm_start, vllm_transfer
from perl_megatron.runtime import environment, platform

WORKER_EXTENSION = "perl_megatron.rollout.vllm_worker.WorkerExtension"

OPEN_PATHS = frozenset({"/health", "/ping"})
"""What is answered without a key: whether the server is there."""


def serve(
    config: Config,
    encoder: PromptEncoder,
    *,
    host: str,
    port: int,
    key: str | None,
    max_images: int,
    log_requests: bool,
) -> None:
    """Serve `model.path` until the process is told to end (SIGTERM or Ctrl-C); the workers end with it.

    ``max_images`` bounds the images of a prompt. With ``key``, every route but ``OPEN_PATHS`` demands it.
    """
    environment.set_server_key(key)
    settings = vllm_start.arguments(
        config.rollout,
        encoder=encoder,
        model_path=config.model.path,
        seed=config.run.seed,
        dtype=getattr(torch, config.model.dtype),
        max_model_length=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        max_images=max_images,
    )
    # Sleep mode is for engines that share a device with a trainer.
    settings.pop("enable_sleep_mode", None)
    settings |= {
        "tensor_parallel_size": config.rollout.tensor_parallel or 1,
        "host": host,
        "port": port,
        "enable_scale_out": True,  # the route that takes token ids
        "worker_extension_cls": WORKER_EXTENSION,
        "weight_transfer_config": {"backend": vllm_transfer.transport_name()},
        "middleware": [f"{__name__}.{RequireKey.__name__}"] if key is not None else [],
        "disable_uvicorn_access_log": not log_requests,
    }
    vllm_child.prepare_children()
    if not platform.is_cuda():
        vllm_start.register_model_class()
    uvloop.run(run_server(_arguments(settings)))


def _arguments(settings: dict[str, Any]) -> Any:
    """vLLM's command line with these settings; its own checks run."""
    from vllm.config import WeightTransferConfig

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    settings = settings | {"weight_transfer_config": WeightTransferConfig(**settings["weight_transfer_config"])}
    for name, value in settings.items():
        assert hasattr(arguments, name), f"vLLM's server has no setting {name}"
        setattr(arguments, name, value)
    validate_parsed_serve_args(arguments)
    return arguments


class RequireKey:
    """Demands the key on all routes; vLLM's own check leaves out those that change weights and call workers."""

    def __init__(self, app: ASGIApp):
        key = environment.server_key()
        assert key is not None, "only used with a key"
        self._app, self._digest = app, _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what carries the key; 401 for the rest."""
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN_PATHS:
            kind, _, given = (Headers(scope=scope).get("Authorization") or "").partition(" ")
            if kind.lower() != "bearer" or not secrets.compare_digest(_digest(given), self._digest):
                await JSONResponse({"error": "the key is missing or wrong"}, status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
