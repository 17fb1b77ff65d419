"""Causal language models of Hugging Face transformers, fed with vectors: the text half of a generative model.

They train on texts one behind the other without padding (`packing.py`), through an attention of our own that
transformers knows by name; when they generate, it is torch's.

What it reads is already embedded, so that the tokens of an image can stand between those of a text. What it gives is
the last hidden state; logits are `hidden @ vocabulary.T`, formed by the objective where a label is.

Only the families in `FAMILIES` are taken. Others would be wrong without a sign: their logits are scaled or capped
behind the vocabulary (Gemma, Granite, Cohere), their layers carry a state from one packed text into the next (Jamba),
or they know their place by a bias of attention that has no positions (BLOOM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from vlm_train.assets import hub_access, resolve_asset
from vlm_train.errors import ConfigError, nearest
from vlm_train.models import lora as adapters
from vlm_train.models.layers import linear_flops
from vlm_train.models.packing import ATTENTION, Texts
from vlm_train.models.pretrained import PretrainedTower, on_meta
from vlm_train.types import TextSpec

FAMILIES = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
"""Values of `model_type` for which texts behind each other are tested to give the numbers of each alone."""

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on the longest text of a batch."""


class CausalLanguageModel(PretrainedTower):
    """A decoder-only language model: embedded tokens of texts -> hidden states.

    A frozen one still runs with a graph, since what it reads comes from parts that learn.

    Args:
        spec: what the tokenizer produces (given by the build); with `path`, the tokenizer of the same `path`.
        path: local folder or hub name of a pretrained model.
        pretrained: load the weights of `path`; otherwise only its architecture is taken.
        architecture: in place of `path`: `model_type`, one of `FAMILIES`, and keys of its transformers config, e.g.
            `{model_type: llama, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 4,
            num_attention_heads: 6}`. The vocabulary has the size of the tokenizer's.
        lora: keys of `lora.Lora`: low-rank adapters learn in place of the weights. None: there are none.

    Raises:
        ConfigError: not one of `path` and `architecture`, an unknown family, key or value, a tokenizer that does not
            fit, or adapters that cannot be.
    """

    def __init__(
        self,
        *,
        spec: TextSpec,
        path: str | None = None,
        pretrained: bool = True,
        architecture: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        if (path is None) == (architecture is None):
            raise ConfigError(
                "a language model needs a path or an architecture, and not both",
                got=f"path={path}, architecture={architecture}",
                remedy="set model.text.path or model.text.architecture, and the other to null",
            )
        config: Any = _config_of(path) if path is not None else _config_from(architecture or {}, spec)
        _check(config, spec)
        super().__init__(network=_load(path if pretrained else None, config))
        self.text_spec = spec
        self.width: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.context: int = num_positions(config)
        self.is_tied = self._head.weight is self._embedding.weight
        # the padding id is often that of the end of a text, whose row would get no gradient
        self._embedding.padding_idx = None
        if lora is not None:
            self._adapt(adapters.Lora.of(lora))

    def _adapt(self, lora: adapters.Lora) -> None:
        adapters.inject(self.network, self.blocks, lora)
        self.register_buffer(adapters.SCALE, torch.tensor(lora.scale, dtype=torch.float64))

    @property
    def _embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, cast(Any, self.network).get_input_embeddings())

    @property
    def _head(self) -> nn.Linear:
        return cast(nn.Linear, cast(Any, self.network).get_output_embeddings())

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's layers."""
        return cast(nn.ModuleList, cast(Any, self.network).base_model.layers)

    @property
    def vocabulary(self) -> Tensor:
        """[V, D]: the logits of a hidden state are its products with these rows."""
        return self._head.weight

    def embed(self, ids_BT: Tensor) -> Tensor:
        """ids [B, T] int64, each below `vocab_size` -> [B, T, D]."""
        return cast(Tensor, self._embedding(ids_BT))

    def forward(self, x_ND: Tensor, texts: Texts) -> Tensor:
        """Embedded tokens [N, D] of texts one behind the other -> their hidden states [N, D] behind the last norm.

        Args:
            x_ND: as `embed` gives them, or in their place what else is to be read.
            texts: where each text lies; it reads itself alone.
        """
        base = cast(Any, self.network).base_model
        output = base(
            inputs_embeds=x_ND[None],
            position_ids=texts.positions_N[None],
            attention_mask=x_ND.new_ones(1, 1, 1, 1, dtype=torch.bool),  # so that transformers makes none of its own
            use_cache=False,
            texts=texts,
        )
        return cast(Tensor, output.last_hidden_state).squeeze(0)

    @torch.no_grad()
    def generate(
        self,
        x_BTD: Tensor,
        lengths_B: Tensor,
        *,
        max_new_tokens: int,
        eos_id: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """What follows the first `lengths_B` tokens of each row: ids [B, max_new_tokens], behind the end filled with
        `eos_id`. Collective while blocks are sharded: ranks go on until the last has ended.

        Args:
            x_BTD: embedded prompts, padding behind them.
            lengths_B: int64, at least 1.
            max_new_tokens: as many at most.
            eos_id: ends a text.
            temperature: 0 takes the likeliest token; otherwise one is drawn, by torch's own generator.
            top_p: draw from the likeliest tokens that together have this probability.

        Raises:
            ConfigError: a prompt that leaves no room for `max_new_tokens`.
        """
        x_BTD, mask_BT = left_padded(x_BTD, lengths_B)
        if x_BTD.shape[1] + max_new_tokens > self.context:
            raise ConfigError(
                "an answer does not fit behind its prompt",
                got=f"{x_BTD.shape[1]} tokens and {max_new_tokens} new ones",
                allowed=f"{self.context} together",
                remedy="fewer new tokens, or shorter prompts",
            )
        drawing = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        ids_BN = cast(Any, self.network).generate(
            inputs_embeds=x_BTD,
            attention_mask=mask_BT.long(),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
            do_sample=temperature > 0,
            synced_gpus=any(isinstance(parameter, DTensor) for parameter in self.blocks.parameters()),
            **drawing,
        )
        return F.pad(ids_BN, (0, max_new_tokens - ids_BN.shape[1]), value=eos_id)

    def forward_flops(self, num_tokens: float) -> float:
        """Forward FLOPs of one text of `num_tokens` tokens with the logits of each, 2 per multiply-add; attention as
        torch counts it, the future included."""
        config = cast(Any, self.network).config
        attention = 4.0 * num_tokens**2 * config.num_attention_heads * _head_dim(config) * len(self.blocks)
        return attention + sum(linear_flops(linear, num_tokens) for linear in self._linears())

    def frozen_flops(self, num_tokens: float) -> float:
        """Those of `forward_flops` that are products with weights that do not learn."""
        frozen = [linear for linear in self._linears() if not linear.weight.requires_grad]
        return sum(linear_flops(linear, num_tokens) for linear in frozen)

    def _linears(self) -> list[nn.Linear]:
        """Every linear layer, those of adapters too, and the vocabulary."""
        return [*(module for module in self.blocks.modules() if isinstance(module, nn.Linear)), self._head]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLanguageModel:
        """Leaving the meta device gives every name a tensor of its own: what was tied is tied again."""
        super()._apply(fn, recurse)
        if self.is_tied:
            self._head.weight = self._embedding.weight
        return self


def left_padded(x_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose padding is behind them -> rows [B, T', D] that all end at the same place, T' the longest length, and
    their mask [B, T'] bool, True on real tokens."""
    longest = int(lengths_B.max())
    source_BT = torch.arange(longest, device=x_BTD.device) - (longest - lengths_B.to(x_BTD.device))[:, None]
    index_BTD = source_BT.clamp(min=0)[:, :, None].expand(-1, -1, x_BTD.shape[-1])
    return x_BTD.gather(1, index_BTD), source_BT >= 0


def _config_of(path: str) -> Any:
    with hub_access(path):
        config = AutoConfig.from_pretrained(resolve_asset(path))
    _check_family(config.model_type)
    return config


def _config_from(architecture: Mapping[str, Any], spec: TextSpec) -> Any:
    keys = dict(architecture)
    family = keys.pop("model_type", None)
    _check_family(family)
    known = set(AutoConfig.for_model(family).to_dict()) - {"vocab_size"}
    for key in keys:
        if key not in known:  # transformers keeps such a key and does nothing with it
            raise ConfigError(
                f"the architecture of a {family} language model has no such key",
                got=key,
                allowed="a key of its transformers config; vocab_size is the tokenizer's",
                remedy=f"did you mean {', '.join(nearest(key, known)) or 'none of it'}?",
            )
    ids = {"bos_token_id": spec.bos_id, "eos_token_id": spec.eos_id, "pad_token_id": None}
    try:
        return AutoConfig.for_model(family, **{**ids, **keys, "vocab_size": spec.vocab_size})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(
            f"no {family} language model has this architecture",
            got=dict(architecture),
            allowed=str(error).strip().splitlines()[-1].strip(),
            remedy="correct model.text.architecture",
        ) from error


def _check_family(family: Any) -> None:
    if family not in FAMILIES:
        raise ConfigError(
            "no language model of this family can be trained here: its attention or its logits are of another kind",
            got=f"model_type={family}",
            allowed=list(FAMILIES),
            remedy="set model.text.path or model.text.architecture.model_type to one of those families",
        )


def num_positions(config: Any) -> int:
    """Longest text of which every token is read at every later one."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check(config: Any, spec: TextSpec) -> None:
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in FIXED_ROTATIONS:
        raise ConfigError(
            "the rotary positions of a language model depend on the other texts of its batch",
            got=f"rope_type={rotation}",
            allowed=list(FIXED_ROTATIONS),
            remedy="take another model in model.text",
        )
    if spec.vocab_size > config.vocab_size or spec.context_length > num_positions(config):
        raise ConfigError(
            "the tokenizer does not fit the language model",
            got=f"{spec.vocab_size} tokens, context {spec.context_length}",
            allowed=f"at most {config.vocab_size} tokens, context at most {num_positions(config)}",
            remedy="give the tokenizer the same path as the language model, and a shorter context_length",
        )


def _load(path: str | None, config: Any) -> nn.Module:
    """The network with the weights at `path`, or with first values.

    Weights are fp32 whatever the file holds. What its folder says about generation (penalties, a temperature) is left
    out, or a greedy answer would not be one.
    """
    options: dict[str, Any] = {"attn_implementation": ATTENTION, "dtype": torch.float32}
    if path is not None and not on_meta():
        with hub_access(path):
            network = AutoModelForCausalLM.from_pretrained(
                resolve_asset(path), config=config, use_safetensors=True, **options
            )
    else:
        network = AutoModelForCausalLM.from_config(config, **options)
    network.generation_config = GenerationConfig()
    return network
