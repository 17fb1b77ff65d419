"""A CoCa of a few thousand weights, batches of uneven texts, and open_clip's model with our names."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.models.captioner import Captioner
from vlm_train.models.text.decoder import TextDecoder
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.pooled import PooledVision
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import Batch, TextSpec

SPEC = TextSpec(vocab_size=50, context_length=10, pad_id=0, bos_id=48, eos_id=49)
WIDTH, NUM_QUERIES, NUM_LAYERS, NUM_HEADS = 16, 4, 2, 2
RENAMED = [
    (r"^visual\.transformer\.resblocks", "vision.tower.blocks"),
    (r"^visual\.attn_pool_contrastive", "vision.contrastive_pool"),
    (r"^visual\.attn_pool", "vision.generative_pool"),
    (r"^visual\.proj$", "image_projection.weight"),
    (r"^visual\.class_embedding", "vision.tower.class_token"),
    (r"^visual\.", "vision.tower."),
    (r"^text\.transformer\.resblocks", "text.blocks"),
    (r"^text\.text_projection", "text_projection.weight"),
    (r"^text_decoder\.resblocks\.(\d+)", r"decoder.blocks.\1.text"),
    (r"^text_decoder\.cross_attn", "decoder.blocks"),
    (r"^text_decoder\.text_projection", "vocabulary.weight"),
    (r"^text_decoder\.", "decoder."),
    (r"conv1", "patch_embed"),
    (r"positional_embedding", "position"),
    (r"ln_pre", "pre_norm"),
    (r"ln_(post|final)", "post_norm"),
    (r"ln_1_kv", "norm_image"),
    (r"ln_q", "norm_query"),
    (r"ln_k", "norm"),
    (r"ln_([12])", r"norm\1"),
    (r"attn\.in_proj_", "attention.qkv."),
    (r"attn\.out_proj", "attention.out"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
]


def make_captioner(**changes: Any) -> Captioner:
    """In fp64. `changes` are keywords of the whole; `vision` and `text` those of the towers."""
    torch.manual_seed(0)
    vision, text = changes.pop("vision", {}), changes.pop("text", {})
    sizes = {"width": WIDTH, "num_layers": NUM_LAYERS, "num_heads": NUM_HEADS}
    tower = VisionTransformer(image={"size": 32}, patch_size=8, **sizes)
    parts = {
        "vision": PooledVision(
            **{"tower": tower, "width": WIDTH, "num_queries": NUM_QUERIES, "num_heads": 2, **vision}
        ),
        "text": TextTransformer(**{"spec": SPEC, "pool": "cls", **sizes, **text}),
        "decoder": TextDecoder(**sizes),
    }
    return Captioner(**{**parts, "embed_dim": WIDTH, **changes}).double()


def make_batch(num_texts: int, *, longest: int = 8) -> Batch:
    """Random images, and texts of 1 to `longest` words between their first and last token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(num_texts, longest + 2, dtype=torch.int64)
    for place, row in enumerate(ids):
        length = longest - 3 * place % longest
        row[: length + 2] = torch.tensor([48, *torch.randint(1, 48, (length,), generator=generator), 49])
    return Batch(
        images=torch.randint(0, 256, (num_texts, 3, 32, 32), dtype=torch.uint8, generator=generator),
        text_ids=ids,
        text_mask=ids != 0,
        weights=torch.ones(num_texts),
        draws=torch.arange(num_texts),
    )


def open_clip_coca() -> nn.Module:
    """open_clip's model of the same sizes in fp32, every weight drawn anew: it leaves some uninitialised."""
    from open_clip.coca_model import CoCa

    sizes = {"width": WIDTH, "layers": NUM_LAYERS}
    texts = {"context_length": SPEC.context_length, "vocab_size": SPEC.vocab_size, "heads": NUM_HEADS, **sizes}
    images = {"image_size": 32, "patch_size": 8, "head_width": WIDTH // NUM_HEADS, **sizes}
    pools = {"attentional_pool": "cascade", "attn_pooler_queries": NUM_QUERIES, "attn_pooler_heads": 2}
    model = CoCa(
        embed_dim=WIDTH,
        vision_cfg={**images, **pools, "output_tokens": True},
        text_cfg={**texts, "embed_cls": True, "output_tokens": True},
        multimodal_cfg=texts,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            is_vector = parameter.ndim < 2
            parameter.copy_(is_vector + torch.empty_like(parameter).normal_(std=0.3, generator=generator))
    return model.eval()


def renamed(theirs: nn.Module) -> dict[str, Tensor]:
    """The weights of open_clip's CoCa by our names. Where its class token stands is part of our class token."""
    state = {name: tensor for name, tensor in theirs.state_dict().items() if "logit_scale" not in name}
    last = state["text.positional_embedding"][-1]
    state["text.positional_embedding"] = state["text.positional_embedding"][:-1]
    state["text.class_token"] = state.pop("text.cls_emb") + last
    ours = {}
    for name, tensor in state.items():
        is_right_factor = name.endswith(("visual.proj", "text_projection"))
        for pattern, name_of_ours in RENAMED:
            name = re.sub(pattern, name_of_ours, name)
        ours[name] = tensor.T if is_right_factor else tensor
    return ours
