"""`perl-megatron serve` with workers that a test can corrupt: `corruptible_server.py CONFIG OPTION…`."""

import sys

from perl_megatron.cli import main

if __name__ == "__main__":
    from perl_megatron.runtime import environment, platform

    environment.prepare_process()
    environment.prepare_vllm_server(cuda=False)
    platform.install()
    from perl_megatron.rollout import vllm_serve

    vllm_serve.WORKER_EXTENSION = "corruptible_worker.CorruptibleExtension"
    sys.exit(main(["serve", *sys.argv[1:]]))
