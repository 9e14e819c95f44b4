"""Named by an import of megatron-core, for mixtures of experts."""

fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = None
