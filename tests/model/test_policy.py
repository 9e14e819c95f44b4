"""The policy in one process; tests/distributed/test_layout_matrix.py compares it with transformers in every layout."""

from dataclasses import replace

import pytest
import torch
from tiny_policy import IMAGE_TOKEN, WITHOUT_IMAGES, hf_model, micro_batch

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.stream import import_weights
from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.policy import build_policy
from perl_megatron.runtime import topology


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    hf_model(tied=False).save_pretrained(folder)
    layout = topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    architecture = read_architecture(folder)

    def build(**model):
        (policy,) = chunks = build_policy(architecture, ModelConfig(path=folder, **model), ParallelConfig(), layout)
        import_weights(chunks, architecture, layout, open_checkpoint(folder))
        return policy

    yield build
    topology.shutdown()


@pytest.fixture(scope="module")
def policy(build):
    return build(dtype="float32")


def logits(policy, inputs, *, select=True):
    places = inputs.output_places if select else None
    hidden = policy(inputs.token_ids, inputs.position_ids, inputs.vision, places, inputs.shared_prompts)
    return hidden @ policy.output_weight()[: policy.architecture.vocabulary_size].t()


def zero_gradients(policy):
    """megatron-core's linear layers add theirs to a buffer, which its DistributedDataParallel makes otherwise."""
    policy.zero_grad()
    for parameter in policy.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)


def test_selected_rows_are_those_of_all_positions(policy):
    inputs = micro_batch([0, 2, 4])
    everything = logits(policy, inputs, select=False)
    assert everything.shape[0] == inputs.token_ids.numel()
    chosen = everything[inputs.output_places]
    torch.testing.assert_close(logits(policy, inputs), chosen, rtol=0, atol=1e-5)


def test_right_padding_and_company_do_not_change_a_sequence(policy):
    alone = logits(policy, micro_batch([2]))
    together = logits(policy, micro_batch([2, 0, 6], length_multiple=130))
    torch.testing.assert_close(together[: len(alone)], alone, rtol=0, atol=2e-5)


def test_an_image_token_that_is_not_an_images_place_is_text(policy):
    inputs = micro_batch([WITHOUT_IMAGES])
    inputs.token_ids[0, 2] = IMAGE_TOKEN
    before = logits(policy, inputs)
    assert before.isfinite().all()
    with_image = micro_batch([6, WITHOUT_IMAGES])
    with_image.token_ids[1, 2] = IMAGE_TOKEN
    torch.testing.assert_close(logits(policy, with_image)[-len(before) :], before, rtol=0, atol=2e-5)


def test_changing_an_image_changes_the_answer(policy):
    inputs = micro_batch([3])
    before = logits(policy, inputs)
    inputs.vision.patches[:4] += 1.0
    assert (logits(policy, inputs) - before).abs().max() > 1e-2


def test_gradients_of_an_image_used_twice_are_summed(policy):
    weight = policy.vision_model.patch_embed.weight

    def gradient(members):
        zero_gradients(policy)
        logits(policy, micro_batch(members)).square().sum().backward()
        return weight.grad.clone()

    torch.testing.assert_close(gradient([0, 1]), gradient([0]) + gradient([1]), rtol=1e-4, atol=1e-3)


def test_no_selected_position_gives_no_logits_and_zero_gradients(policy):
    inputs = replace(micro_batch([6]), output_places=torch.zeros(0, dtype=torch.int64))
    zero_gradients(policy)
    output = logits(policy, inputs)
    assert output.shape[0] == 0
    output.sum().backward()
    assert policy.language_model.output_layer.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(build, policy, recompute):
    inputs = micro_batch([0, 3])
    gradients = []
    for model in (policy, build(dtype="float32", recompute=recompute)):
        model.train()
        zero_gradients(model)
        logits(model, inputs).square().mean().backward()
        gradients.append(
            {
                name: parameter.main_grad if parameter.grad is None else parameter.grad
                for name, parameter in model.named_parameters()
            }
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize(("recompute", "of_attention", "of_mlp"), [("none", 1, 1), ("selective", 2, 1), ("full", 2, 2)])
def test_recomputation_takes_place(build, recompute, of_attention, of_mlp):
    model = build(dtype="float32", recompute=recompute)
    model.train()
    counts = {"core_attention": 0, "mlp": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    blocks = [*model.language_model.decoder.layers, *model.vision_model.decoder.layers]
    for block in blocks:
        block.self_attention.core_attention.register_forward_hook(count("core_attention"))
        block.mlp.register_forward_hook(count("mlp"))
    zero_gradients(model)
    logits(model, micro_batch([0, 3])).square().mean().backward()
    assert counts == {"core_attention": of_attention * len(blocks), "mlp": of_mlp * len(blocks)}


def test_bfloat16_is_near_float32(build, policy):
    """Eight bits of mantissa through 7 blocks: the yardstick is the model's own error when only its weights round."""
    inputs = micro_batch([0, 2])
    low = build(dtype="bfloat16")
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        exact = logits(policy, inputs).log_softmax(-1)
        rounded_model = build(dtype="float32")
        for parameter in rounded_model.parameters():
            parameter.copy_(parameter.bfloat16())
        from_weights = (logits(rounded_model, inputs).log_softmax(-1) - exact).abs().mean()
        output = logits(low, inputs)
    assert output.dtype == torch.bfloat16
    error = (output.float().log_softmax(-1) - exact).abs().mean()
    assert error <= 6 * from_weights
    assert error <= 0.1


def test_angles_that_megatron_core_cuts_for_context_ranks_are_refused(build):
    """Trap 3: the positions are already those of one context rank, and other angles would pass in silence."""

    class TwoContextRanks:
        def size(self):
            return 2

        def rank(self):
            return 0

    policy = build(dtype="float32")
    policy.language_model.rotary_pos_emb.cp_group = TwoContextRanks()
    with pytest.raises(AssertionError, match="cut the rotary angles a second time"):
        logits(policy, micro_batch([0, 2], length_multiple=4))
