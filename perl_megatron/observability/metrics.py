"""Every metric that is logged: name, unit, meaning. Logging any other name is an error.

A name with a part in braces stands for a family: `seconds/{phase}` allows `seconds/update`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number that is logged."""

    name: str
    unit: str
    """'1' for a pure number or a share between 0 and 1."""
    meaning: str


CATALOGUE: tuple[Metric, ...] = (
    # The update
    Metric("loss", "1", "what the optimizer minimised: policy_loss + β · kl; in supervised training cross-entropy"),
    Metric("policy_loss", "1", "clipped or CISPO objective, negated, over the tokens of the step's kept groups"),
    Metric(
        "kl",
        "1",
        "estimate of the KL divergence from the reference policy (0 where the loss has no KL term: not measured)",
    ),
    Metric("entropy", "nats", "mean entropy of the policy's next-token distribution over response tokens"),
    Metric(
        "clip_fraction_low", "1", "share of response tokens where the lower bound took (CISPO: limited) the gradient"
    ),
    Metric(
        "clip_fraction_high", "1", "share of response tokens where the upper bound took (CISPO: limited) the gradient"
    ),
    Metric("clip_fraction_dual", "1", "share of response tokens bounded by the dual clip"),
    Metric(
        "ratio_mean",
        "1",
        "mean of π_θ / π_old over response tokens (1 at the first update of a step, unless π_old is the engine's)",
    ),
    Metric("ratio_max", "1", "maximum of π_θ / π_old over response tokens"),
    Metric("gradient_norm", "1", "global 2-norm of the gradient before clipping"),
    Metric("learning_rate", "1", "learning rate of the step's last update"),
    Metric("skipped_updates", "updates", "updates that were left out because their loss or gradient was not finite"),
    Metric("num_tokens", "tokens", "response tokens trained on"),
    Metric("num_sequences", "sequences", "responses trained on"),
    # What was drawn: over all sampled groups, dropped ones included
    Metric("reward/mean", "1", "mean reward of all sampled responses"),
    Metric("reward/std", "1", "standard deviation of the reward over all sampled responses"),
    Metric("reward/accuracy", "1", "share of right answers over all views"),
    Metric("reward/accuracy_original", "1", "share of right answers over views in the original image order"),
    Metric("reward/accuracy_permuted", "1", "share of right answers over views in another image order"),
    Metric("reward/format", "1", "share of responses in the asked-for format"),
    Metric("reward/part/{name}", "1", "mean of one part of the reward (docs/rewards.md), before its weight"),
    Metric("reward/kl_penalty", "1", "mean β · KL of a kept response, taken off its reward (algorithm.kl_in=reward)"),
    Metric("response/length_mean", "tokens", "mean response length, the end-of-turn token included"),
    Metric("response/length_max", "tokens", "longest response"),
    Metric("response/truncated", "1", "share of responses cut at the token limit"),
    Metric("response/unparsable", "1", "share of responses that hold no answer that can be graded"),
    Metric("groups/kept", "groups", "groups that were trained on, those carried over from earlier steps included"),
    Metric("groups/carried", "groups", "informative groups beyond what the step needs, kept for the next one"),
    Metric("groups/dropped", "groups", "groups that were drawn and dropped, all reasons together"),
    Metric("groups/dropped_{reason}", "groups", "groups dropped for this reason (algorithm/filter.py, drawn.py)"),
    Metric("groups/refills", "draws", "how often the step drew again to replace dropped groups"),
    Metric("permutation/alpha", "1", "swap probability α: how likely a question gets permuted copies"),
    # Engine and trainer
    Metric("logprob_gap/mean", "nats", "mean |logprob_rollout - logprob_old| over kept tokens: engine against trainer"),
    Metric("logprob_gap/max", "nats", "maximum of |logprob_rollout - logprob_old| over kept tokens"),
    Metric("logprob_gap/kl_k1", "nats", "KL(π_rollout ‖ π_old) of a token: mean of -log r, r = π_old / π_rollout"),
    Metric("logprob_gap/kl_k3", "nats", "KL(π_rollout ‖ π_old) of a token: mean of r - 1 - log r, never negative"),
    Metric(
        "importance/mean", "1", "mean weight of the policy loss, by tokens or responses (algorithm.importance_level)"
    ),
    Metric("importance/truncated", "1", "share of tokens, or responses, whose weight was cut to the upper bound"),
    Metric("importance/masked", "1", "share of tokens, or responses, that the policy loss left out"),
    *(
        Metric(f"{name}_{{part}}", unit, f"{name} of the views of one `part`: original, permuted, or `2_images` etc.")
        for name, unit in (
            ("logprob_gap/mean", "nats"),
            ("logprob_gap/max", "nats"),
            ("logprob_gap/kl_k1", "nats"),
            ("logprob_gap/kl_k3", "nats"),
            ("importance/mean", "1"),
            ("importance/truncated", "1"),
            ("importance/masked", "1"),
        )
    ),
    Metric(
        "rollout/prefix_hit_rate", "1", "share of prompt tokens, of all responses, that the engine had in its cache"
    ),
    Metric("rollout/image_hit_rate", "1", "share of images, of all responses, that the engine did not encode again"),
    Metric("rollout/staleness_mean", "steps", "mean age of the weights that sampled a token; 0 is on-policy"),
    Metric("rollout/staleness_max", "steps", "maximum of that age; at most rollout.max_staleness"),
    Metric("sync/seconds", "s", "time to bring the weights into the engine"),
    Metric("sync/bytes", "B", "size of the weights brought into the engine"),
    Metric("sync/attest_seconds", "s", "time to compare the engine's weights with what it was sent"),
    Metric("sync/tensors", "tensors", "number of weights brought into the engine"),
    # Time and memory
    Metric("seconds/step", "s", "wall time of the whole step"),
    Metric("seconds/{phase}", "s", "wall time of one phase of the step"),
    Metric(
        "data/idle_share",
        "1",
        "share of the step in which nothing was sampled or trained, as data were not there: what it would save if "
        "reading, checking and encoding of questions and decoding of images took no time (docs/data.md)",
    ),
    Metric("data/image_wait_seconds", "s", "of that time: until images were decoded"),
    Metric("save/background_seconds", "s", "time until the last checkpoint was complete, beside the training"),
    Metric("save/background_cpu_seconds", "s", "processor time of that, in the first process"),
    Metric("throughput/tokens_per_second", "tokens/s", "sampled response tokens over the step's wall time"),
    Metric("memory/peak_rss_gib", "GiB", "peak resident memory of all processes of this machine together, so far"),
    # Held-out evaluation: every question in several image orders, greedy
    Metric("evaluation/accuracy", "1", "share of right answers over all views"),
    Metric("evaluation/flip_rate", "1", "share of questions whose correctness changes with the image order"),
    Metric("evaluation/accuracy/{kind}", "1", "evaluation/accuracy of one question kind"),
    Metric("evaluation/flip_rate/{kind}", "1", "evaluation/flip_rate of one question kind"),
    Metric("evaluation/num_questions", "questions", "held-out questions evaluated"),
    Metric("evaluation/num_views", "views", "held-out questions times their image orders"),
)


def _pattern(name: str) -> re.Pattern[str]:
    # Braces become "one or more characters"; everything else is literal.
    return re.compile(
        "".join("[^/]+" if part.startswith("{") else re.escape(part) for part in re.split(r"({\w+})", name))
    )


_PATTERNS = [(_pattern(metric.name), metric) for metric in sorted(CATALOGUE, key=lambda metric: "{" in metric.name)]


def find_metric(name: str) -> Metric | None:
    """The catalogue's entry for a logged name, or None."""
    return next((metric for pattern, metric in _PATTERNS if pattern.fullmatch(name)), None)


def check_names(names: Iterable[str]) -> None:
    """Assert that the catalogue has all names."""
    unknown = [name for name in names if find_metric(name) is None]
    assert not unknown, f"metrics {unknown} are not in observability/metrics.py"


def catalogue_markdown() -> str:
    """The catalogue as a Markdown table, for the docs."""
    rows = [f"| `{metric.name}` | {metric.unit} | {metric.meaning.replace('|', '&#124;')} |" for metric in CATALOGUE]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows]) + "\n"
