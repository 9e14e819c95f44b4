"""Counter-based random streams: a draw depends only on its seed and its keys, never on what was drawn before.

So a stream can be re-created for any (step, record, view) in any process: resuming needs no generator state, and ranks
agree without talking. (The released PeRL code seeds 42 again for every item, which gives every item the same order.)
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the stream named by ``keys``; the same on every platform, Python version and run.

    The integer 1 and the string "1" are different keys, and ("ab", "c") differs from ("a", "bc").
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in (seed, *keys):
        kind, text = ("s", key) if isinstance(key, str) else ("i", str(int(key)))
        encoded = text.encode()
        digest.update(f"{kind}{len(encoded)}:".encode() + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """A fresh Philox generator for the stream named by ``keys``."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, *keys)))
