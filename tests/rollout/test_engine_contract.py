"""The engines' contract, the same for all. contract_worker.py measures in three launches; here it is judged."""

import json
from pathlib import Path

import pytest
from launch_ranks import launch_ranks
from servers import ServerProcess
from tiny_checkpoint import make_images, make_policy

from perl_megatron.rollout.engine import vllm_obstacle

WORKER = Path(__file__).with_name("contract_worker.py")
MAX_TOKENS, LONG_TOKENS = 10, 40
VLLM = vllm_obstacle(cuda=False)
needs_vllm = pytest.mark.skipif(VLLM is not None, reason=str(VLLM))
ENGINES = ["embedded", pytest.param("vllm", marks=needs_vllm), pytest.param("server", marks=needs_vllm)]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    for seed, name in enumerate(("a", "b")):
        # Tied, as the 3B policy is: an engine that keeps a copy of the output layer has to renew it.
        make_policy(folder / name, seed=seed, scale=3.0, tie=True)
    make_policy(folder / "flat", seed=2, tie=True)
    make_images(folder / "images", [(28, 28), (56, 84), (100, 131), (30, 20)])
    return folder


@pytest.fixture(scope="module")
def servers(folder):
    """One server in one process, one tensor-parallel in two; they start while other engines are measured."""
    servers = [ServerProcess(folder / "servers", folder / "a", tensor_parallel=size) for size in (1, 2)]
    yield servers
    for server in servers:
        server.kill()


def launch(folder, *, processes, tensor_parallel, engines):
    """Reports by engine."""
    output = folder / f"{processes}-{tensor_parallel}.json"
    arguments = (folder, output, tensor_parallel, *engines)
    launch_ranks(WORKER, *arguments, log=output.with_suffix(".log"), processes=processes, timeout=800)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def alone(folder, request):
    engines = ["embedded"]
    if VLLM is None:
        first, _ = request.getfixturevalue("servers")
        engines += ["vllm", f"server|direct|{first.address}"]
    return launch(folder, processes=1, tensor_parallel=1, engines=engines)


@pytest.fixture(scope="module")
def two_ranks(folder, request):
    """The embedded engine, vLLM tensor-parallel, and two servers, one of them tensor-parallel, on two ranks."""
    engines = ["embedded"]
    if VLLM is None:
        addresses = ",".join(server.address for server in request.getfixturevalue("servers"))
        engines += ["vllm", f"server|disk|{addresses}|{folder / 'shared'}"]
    return launch(folder, processes=2, tensor_parallel=2, engines=engines)


@pytest.fixture(scope="module")
def two_replicas(folder):
    """Two vLLM replicas."""
    return launch(folder, processes=2, tensor_parallel=1, engines=["vllm"])


@pytest.fixture
def report(alone, request):
    return alone[request.param]


each_engine = pytest.mark.parametrize("report", ENGINES, indirect=True)


def assert_alike(rollouts, expected, *, exactly=False):
    """The same tokens, and log-probabilities but for float rounding."""
    assert tokens(rollouts) == tokens(expected)
    for rollout, reference in zip(rollouts, expected, strict=True):
        assert rollout["logprobs"] == pytest.approx(reference["logprobs"], abs=0 if exactly else 1e-5)
    if exactly:
        assert rollouts == expected


def tokens(rollouts):
    return [rollout["tokens"] for rollout in rollouts]


@each_engine
def test_every_view_gets_its_rollouts_in_order(report):
    assert [rollout["view"] for rollout in report["sampled"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [rollout["view"] for rollout in report["greedy"]] == [0, 1, 2, 3]
    for rollout in report["sampled"]:
        assert 1 <= len(rollout["tokens"]) == len(rollout["logprobs"]) <= MAX_TOKENS
        assert rollout["types"] == ["int64", "float32"]


@each_engine
def test_seeds_are_reproducible_and_rollouts_distinct(report):
    assert_alike(report["again"], report["sampled"], exactly=report["name"] != "server")
    assert len({tuple(ids) for ids in tokens(report["sampled"])}) == 12
    assert not set(map(tuple, tokens(report["other_seeds"]))) & set(map(tuple, tokens(report["sampled"])))


@each_engine
def test_log_probabilities_equal_transformers(report):
    """The bound of the issue is 1e-4; float32 against float64 leaves about 2e-6 here."""
    for kind in ("sampled", "greedy", "cool", "updated"):
        assert report["gaps"][kind][0] <= 2e-5, kind


@each_engine
def test_greedy_is_transformers_argmax(report):
    assert report["gaps"]["greedy"][1] == 1.0
    assert report["gaps"]["sampled"][1] < 0.5  # the random policy's samples are not: the check can fail


@each_engine
def test_a_response_ends_with_its_turn_or_at_the_limit(report):
    end, reasons = set(report["encoder"]["end"]), set()
    assert len(report["long"]) == 64
    for rollout in report["long"]:
        stopped = rollout["tokens"][-1] in end
        assert rollout["finish"] == ("stop" if stopped else "length")
        assert not end & set(rollout["tokens"][:-1])
        assert stopped or len(rollout["tokens"]) == LONG_TOKENS
        assert "<|im_end|>" not in rollout["text"]
        reasons.add(rollout["finish"])
    assert reasons == {"stop", "length"}


@each_engine
def test_vision_tokens_are_never_sampled(report):
    """Five of 480 nearly equally likely tokens: about 25 of these 2,500 would be."""
    sampled = [token for rollout in report["long"] for token in rollout["tokens"]]
    assert len(sampled) > 2000
    assert not set(sampled) & set(report["encoder"]["banned"])


@each_engine
def test_an_update_changes_results_to_those_of_the_new_weights(report):
    assert report["gaps"]["updated"][1] == 1.0
    assert tokens(report["updated"]) != tokens(report["greedy"])
    assert tokens(report["restored"]) == tokens(report["sampled"])
    num_bytes, num_tensors, version, took_time = report["sync"]
    assert num_bytes == 4 * (1_018_816 - 480 * 128)  # the tied output layer is not sent
    assert num_tensors > 100
    assert version == 7
    assert took_time


@each_engine
def test_an_engine_that_has_slept_samples_as_before(report):
    """What an update of a sleeping engine comes to is in ``restored``."""
    assert_alike(report["woken"], report["updated"], exactly=report["name"] != "server")


@each_engine
def test_rollouts_carry_the_version_of_their_weights(report):
    kinds = ("sampled", "updated", "long", "restored")
    versions = [{version for rollout in report[kind] for version in rollout["versions"]} for kind in kinds]
    assert versions == [{0}, {7}, {8}, {9}]


@each_engine
def test_faulty_streams_are_refused_by_name(report):
    foreign, doubled, missing = report["refusals"]
    assert "no weight model.layers.9.input_layernorm.weight" in foreign
    assert "came twice" in doubled
    assert "1 weights did not come: " in missing


@each_engine
def test_the_process_is_left_as_it_was(report):
    assert report["state_kept"]
    assert report["children"] == []
    assert report["sum_after"] == 1.0


@needs_vllm
def test_digests_tell_weights_apart_and_agree_between_engines(alone, two_ranks):
    reports = [*alone.values(), *two_ranks.values()]
    for kind in ("digest_a", "digest_b", "digest_restored"):
        assert len({report[kind] for report in reports}) == 1
    assert alone["vllm"]["digest_a"] == alone["vllm"]["digest_restored"] != alone["vllm"]["digest_b"]


PLACES = {
    "a_row_of_a_fused_shard": "model.layers.1.self_attn.k_proj.weight",
    "a_shard_of_the_vision_tower": "visual.blocks.0.attn.qkv.weight",
    "a_bias_of_the_merger": "visual.merger.mlp.0.bias",
    "rotary_angles": "the buffer ",
    "an output layer that stays old": "model.embed_tokens.weight",
    "a single number": "model.layers.0.self_attn.o_proj.weight",
}


@needs_vllm
@pytest.mark.parametrize(
    ("layout", "name"),
    [("alone", "vllm"), ("two_ranks", "vllm"), ("two_replicas", "vllm"), ("alone", "server"), ("two_ranks", "server")],
)
def test_a_corrupted_shard_stops_the_run_and_is_named(layout, name, request):
    """Of the last rank or worker alone, and on all ranks; without a corruption the same update goes through."""
    report = request.getfixturevalue(layout)[name]
    place = "process" if name == "vllm" else "worker"
    complaints = dict(report["complaints"])
    assert complaints.pop("nothing") == ""
    assert complaints.keys() == PLACES.keys()
    for kind, complaint in complaints.items():
        assert ("vLLM holds" if name == "vllm" else "servers hold") + " other numbers than" in complaint
        assert PLACES[kind] in complaint, kind
        assert f"({place} {0 if layout == 'alone' else 1})" in complaint
    assert tokens(report["attested"]) == tokens(report["updated"])


@each_engine
def test_prompts_and_images_are_computed_once(report):
    """Three rollouts of four views, which all show the first image; three of a view with a long prompt.

    vLLM's cache is of whole blocks, 128 tokens on a CPU, which only the long prompt fills.
    """
    use, prompts, long = report["cache_use"], report["prompts"], report["cache_use_long"]
    assert use["prompt_tokens"] == 3 * sum(tokens for tokens, _ in prompts)
    assert use["images"] == 3 * sum(images for _, images in prompts) == 30
    assert use["encoded_images"] == 4
    assert 3 * 128 < long["prompt_tokens"] < 3 * 182
    if report["name"] != "embedded":
        assert (use["cached_tokens"], long["cached_tokens"]) == (0, 2 * 128)
    else:
        assert use["cached_tokens"] == 2 * use["prompt_tokens"] // 3
        assert long["cached_tokens"] == 2 * long["prompt_tokens"] // 3


@needs_vllm
def test_features_of_old_weights_would_not_go_unnoticed(alone):
    """If nothing cached is dropped in an update, vLLM fails, or samples other tokens than with the same weights."""
    stale = alone["vllm"]["stale"]
    assert "Encoder cache miss" in stale if isinstance(stale, str) else tokens(stale) != tokens(alone["vllm"]["greedy"])


def assert_same_results(report, expected):
    for kind in ("sampled", "greedy", "cool", "updated", "woken", "long", "restored"):
        assert_alike(report[kind], expected[kind])
    assert_alike(report["again"], report["sampled"], exactly=report["name"] != "server")
    assert report["same_on_all_ranks"]
    assert report["state_kept"]
    assert report["children"] == []


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_give_the_results_of_one(alone, two_ranks, name):
    """The embedded engine and servers share views, vLLM is tensor-parallel; the servers' weights came over a folder.

    Collectives work afterwards: (1 + 2) · 2.
    """
    assert_same_results(two_ranks[name], alone[name])
    assert two_ranks[name]["sum_after"] == 6.0


@needs_vllm
def test_two_vllm_replicas_give_the_results_of_one(alone, two_replicas):
    assert_same_results(two_replicas["vllm"], alone["vllm"])
    assert two_replicas["vllm"]["sum_after"] == 3.0


@needs_vllm
def test_servers_sample_what_the_colocated_engine_does(alone):
    assert_same_results(alone["server"], alone["vllm"])


@needs_vllm
def test_a_server_that_is_told_to_end_leaves_no_process_behind(servers, alone, two_ranks):
    for server in servers:
        assert server.end() == []
