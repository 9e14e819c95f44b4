"""`perl-megatron serve`: one vLLM server for the engine `server` of a run with the same config."""

from __future__ import annotations

import logging

from perl_megatron.build import build_encoder
from perl_megatron.config.derive_engine import check_serving
from perl_megatron.config.schema import Config
from perl_megatron.data.processor import PromptEncoder
from perl_megatron.errors import UserError
from perl_megatron.questions import most_images, read_questions, training_questions
from perl_megatron.rollout.engine import INSTALL_VLLM, vllm_obstacle
from perl_megatron.runtime import environment, garbage, platform
from perl_megatron.runtime.addresses import is_loopback
from perl_megatron.runtime.key_file import read_key

logger = logging.getLogger(__name__)


def serve(config: Config, *, host: str, port: int, max_images: int | None, log_requests: bool) -> int:
    """Serve `model.path` until the process is told to end; returns the exit status.

    ``max_images`` bounds the images of a prompt; None: as many as the config's questions have.

    Raises:
        UserError: vLLM cannot run here, the address is open to others without a key, or a setting does not suit.
    """
    obstacle = vllm_obstacle(cuda=platform.is_cuda())
    if obstacle is not None:
        raise UserError(obstacle, where="perl-megatron serve", fix=INSTALL_VLLM)
    key = read_key(config.rollout.api_key_file, "rollout.api_key_file")
    if key is None and not is_loopback(host):
        raise UserError(
            "whoever reaches the server could change its weights and run code in it",
            where=f"--host {host}",
            fix="set rollout.api_key_file to a file with a key, or leave --host at 127.0.0.1",
        )
    check_serving(config.rollout)
    encoder = build_encoder(config)
    images = max_images or _most_images(config, encoder)
    environment.prepare_vllm_server(cuda=platform.is_cuda())
    with garbage.paused():
        from perl_megatron.rollout import vllm_serve  # imports vLLM, which reads the environment

    logger.info("serving %s at http://%s:%d, up to %d images a prompt", config.model.path, host, port, images)
    vllm_serve.serve(config, encoder, host=host, port=port, key=key, max_images=images, log_requests=log_requests)
    return 0


def _most_images(config: Config, encoder: PromptEncoder) -> int:
    if not config.data.train and config.data.evaluation is None:
        raise UserError(
            "it is not known how many images a prompt may have",
            where="perl-megatron serve",
            fix="pass --max-images N, or set data.train as in the run",
        )
    found = [most_images(training_questions(config, encoder).records, config.permutation)] if config.data.train else []
    if config.data.evaluation is not None:
        held_out = read_questions(config, config.data.evaluation, "data.evaluation", encoder)
        found.append(most_images(held_out, config.permutation))
    return max(1, *found)
