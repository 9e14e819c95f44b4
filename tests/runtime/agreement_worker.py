"""One rank of `test_agreement.py`; prints JSON."""

import json
import os

import torch.distributed as dist

from perl_megatron.runtime.agreement import Agreement, DivergedError

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
agreement = Agreement(60)


def outcome(facts):
    try:
        agreement.compare(facts)
    except DivergedError as error:
        return str(error)
    return "passed"


usual = {"phase": "update", "step": 3, "tokens": 12}
cases = {
    "equal": usual,
    "other value": {**usual, "tokens": 13 if rank == 2 else 12},
    "other phase": {"phase": "save", "step": 3} if rank == 1 else usual,
    "equal again": usual,
}
print(json.dumps({name: outcome(facts) for name, facts in cases.items()}))
dist.destroy_process_group()
