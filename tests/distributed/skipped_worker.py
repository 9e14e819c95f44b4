"""Run by torchrun on two ranks: a weight of rank 1 becomes infinite, and every rank has to skip the update.

torchrun --nproc-per-node 2 skipped_worker.py CASE OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from perl_megatron.runtime import platform

platform.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from actor_case import make_config, make_encoder, make_sequences, with_log_probs  # noqa: E402

from perl_megatron.errors import UserError  # noqa: E402
from perl_megatron.replay.findings import examine  # noqa: E402
from perl_megatron.runtime import garbage  # noqa: E402
from perl_megatron.runtime import topology as layout  # noqa: E402
from perl_megatron.runtime.collective import gather_objects, rank  # noqa: E402
from perl_megatron.skipped import SkippedUpdates  # noqa: E402
from perl_megatron.train.actor import Actor  # noqa: E402
from perl_megatron.train.skipped_batch import load_batch  # noqa: E402

LAYOUTS: dict[str, dict[str, int]] = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}, "data": {"data": 2}}


def main(case: Path, out: Path) -> None:
    torch.set_num_threads(1)
    garbage.stay()
    encoder = make_encoder(case)
    for name, parallel in LAYOUTS.items():
        run = {"directory": out, "name": name}
        config = make_config(case, parallel=parallel, run=run, optimizer={"max_skipped_updates": 2})
        topology = layout.initialize(config.parallel, seed=0, timeout_seconds=120)
        actor = Actor(config, topology, encoder, total_steps=10)
        sequences = make_sequences(case, encoder)
        scored = with_log_probs(sequences, actor.log_probs(sequences), actor.reference_log_probs(sequences))
        follower = SkippedUpdates(config, encoder.image, supervised=False, note=lambda text: None)
        report: dict[str, Any] = {}
        follower.follow(0, scored, actor.update(scored))
        named = {name: parameter for chunk in actor.modules for name, parameter in chunk.named_parameters()}
        parameters = list(named.values())
        if rank() == 1:
            with torch.no_grad():
                named["language_model.decoder.final_layernorm.weight"][0] = torch.inf
        before = [parameter.detach().clone() for parameter in parameters]
        metrics = actor.update(scored)
        report["skipped"] = gather_objects(metrics["skipped_updates"])
        report["unchanged"] = gather_objects(
            all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
        )
        follower.follow(1, scored, metrics)
        try:
            follower.follow(2, scored, actor.update(scored))
            ended = ""
        except UserError as error:
            ended = str(error)
        report["ended"] = gather_objects(ended)
        batch = load_batch(out / name / "skipped" / "step-000002")
        report["same_batch"] = all(
            np.array_equal(a.response, b.response) and a.advantage == b.advantage
            for a, b in zip(batch.sequences, scored, strict=True)
        )
        findings = examine(actor, batch, lambda ids: "")
        report["findings"] = [[finding.what, finding.which, finding.detail] for finding in findings.all]
        report["agree"] = len({json.dumps(found) for found in gather_objects(report["findings"])}) == 1
        if rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(report))
        layout.forget_layout()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
