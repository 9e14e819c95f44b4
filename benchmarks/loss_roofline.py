"""What the Triton loss kernels need at least, by calculation: `python benchmarks/loss_roofline.py [--tokens N]`.

NO MEASUREMENT. For each model and GPU: floating-point operations of the products, bytes to and from the GPU's memory
for the tiles that are used, the time of each by itself at the data sheet's peak (bfloat16 without sparsity), of which
the longer is the least that a pass can take, and memory over inputs and gradients, ours and that of plain torch. Real
kernels reach a part of a peak; what the exponentials take is left out. To measure, on a machine that has a GPU:
`python benchmarks/loss.py --device cuda`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from perl_megatron.kernels.triton_settings import ROWS_OF_SPLIT, TILE
from perl_megatron.plan import gpus as plan_gpus
from perl_megatron.plan.gpus import Gpu

HALF, SINGLE = 2, 4
"""Bytes of a bfloat16 and of a float32 number."""


GPUS = [plan_gpus.GPUS[key] for key in ("a100-80g", "h100-80g", "b200", "mi300x")]
MODELS = {"3B": (2048, 151_936, 1), "7B": (3584, 152_064, 1), "32B": (5120, 152_064, 4), "72B": (8192, 152_064, 8)}
"""Hidden size, rows of the output weight, tensor-parallel size."""


@dataclass(frozen=True)
class Work:
    """Of one rank, forward and backward."""

    flops: float
    bytes: float
    memory: float
    """Bytes over inputs and their gradients, at the peak."""
    plain_memory: float
    """The same for logits in bfloat16, their float32 copy and its log-softmax, and the gradient of that."""

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """For the arithmetic alone, and for the memory traffic alone: the longer one is the least time."""
        return self.flops / gpu.flops, self.bytes / gpu.bandwidth


def work(tokens: int, hidden: int, rows: int) -> Work:
    """T tokens over a rank's rows of the output weight.

    Forward: the weight comes once, as the blocks of a split run side by side, and all hidden states come once for each
    split. Backward, for each tile of rows: the weight twice, hidden states twice, the logits' gradient written and read
    twice, and the float32 gradient of the hidden states read and written; the weight's gradient is written once.
    """
    splits, tiles = math.ceil(rows / ROWS_OF_SPLIT), math.ceil(rows / TILE.rows)
    weight, states = rows * hidden * HALF, tokens * hidden * HALF
    forward = weight + splits * states
    backward = 2 * weight + tiles * (2 * states + 2 * tokens * hidden * SINGLE) + 3 * tokens * rows * HALF
    return Work(
        flops=8.0 * tokens * hidden * rows,
        bytes=forward + backward + rows * hidden * SINGLE,
        memory=min(tokens, TILE.tokens) * TILE.rows * HALF + tokens * hidden * SINGLE + TILE.rows * hidden * SINGLE,
        plain_memory=tokens * rows * (HALF + 2 * SINGLE + SINGLE),
    )


def table(tokens: int) -> str:
    """Markdown."""
    lines = [
        f"| T = {tokens}: model | products | traffic | GPU | arithmetic | traffic | memory | plain torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, (hidden, vocabulary, tensor) in MODELS.items():
        needed = work(tokens, hidden, math.ceil(vocabulary / tensor))
        for gpu in GPUS:
            arithmetic, traffic = needed.seconds(gpu)
            lines.append(
                f"| {model}, TP {tensor} | {needed.flops / 1e12:.1f} TFLOP | {needed.bytes / 1e9:.1f} GB | {gpu.name} "
                f"| {1e3 * arithmetic:.1f} ms | {1e3 * traffic:.1f} ms | {needed.memory / 2**30:.2f} GiB "
                f"| {needed.plain_memory / 2**30:.1f} GiB |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=8192, help="response tokens of a micro-batch")
    print("Calculated, not measured.\n")
    print(table(parser.parse_args().tokens))


if __name__ == "__main__":
    main()
