"""The shape of every published Qwen2.5-VL tensor, from the numbers in config.json. Pure; reads nothing."""

from __future__ import annotations

from perl_megatron.model.architecture import Architecture

Shapes = dict[str, tuple[int, ...]]


def published_shapes(architecture: Architecture) -> Shapes:
    """Published name → shape, of every tensor that a complete checkpoint holds."""
    return _vision_shapes(architecture) | _language_shapes(architecture)


def _language_shapes(architecture: Architecture) -> Shapes:
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    layer: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    vocabulary = (architecture.vocabulary_size, hidden)
    shapes: Shapes = {"model.embed_tokens.weight": vocabulary}
    shapes |= _repeat("model.layers", architecture.num_layers, layer)
    shapes["model.norm.weight"] = (hidden,)
    if not architecture.tied_embeddings:
        shapes["lm_head.weight"] = vocabulary
    return shapes


def _vision_shapes(architecture: Architecture) -> Shapes:
    vision = architecture.vision
    hidden, ffn = vision.hidden_size, vision.ffn_size
    block: Shapes = {
        "norm1.weight": (hidden,),
        "norm2.weight": (hidden,),
        "attn.qkv.weight": (3 * hidden, hidden),
        "attn.qkv.bias": (3 * hidden,),
        "attn.proj.weight": (hidden, hidden),
        "attn.proj.bias": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.gate_proj.bias": (ffn,),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.up_proj.bias": (ffn,),
        "mlp.down_proj.weight": (hidden, ffn),
        "mlp.down_proj.bias": (hidden,),
    }
    merged = hidden * vision.merge_size**2
    return {
        "visual.patch_embed.proj.weight": (
            hidden,
            vision.in_channels,
            vision.temporal_patch_size,
            vision.patch_size,
            vision.patch_size,
        ),
        **_repeat("visual.blocks", vision.depth, block),
        "visual.merger.ln_q.weight": (hidden,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (vision.out_hidden_size, merged),
        "visual.merger.mlp.2.bias": (vision.out_hidden_size,),
    }


def _repeat(prefix: str, count: int, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{index}.{name}": shape for index in range(count) for name, shape in shapes.items()}
