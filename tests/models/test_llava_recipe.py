"""LLaVA-1.5-7B without memory: sizes, what learns in each stage, with adapters and without, and what a sample costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from omegaconf import DictConfig

from vlm_train import build
from vlm_train.cli.compose import compose_config
from vlm_train.cli.stages import check_handover, compose_stages
from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.engine.flops import training_flops_per_sample
from vlm_train.errors import ConfigError

CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14}  # fmt: skip
VICUNA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
          "max_position_embeddings": 4096}  # fmt: skip
ADAPTERS = ("stages.instruct.optim.lr=2e-4", "stages.instruct.model.text.lora={rank: 128, alpha: 256, dropout: 0.05}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Configs, a processor and a tokenizer in place of what lies on the hub; no weights."""
    place = tmp_path_factory.mktemp("hub")
    transformers.CLIPVisionConfig(**CLIP).save_pretrained(place / "vision")  # type: ignore[arg-type]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336)
    processor.save_pretrained(place / "vision")
    BytePairTokenizer.train(["a red square"], vocab_size=300, context_length=64).save(str(place / "text"))
    transformers.AutoConfig.for_model(**VICUNA).save_pretrained(place / "text")
    return [f"model.vision.path={place / 'vision'}", f"model.text.path={place / 'text'}"]


def stages_of(*words: str) -> list[DictConfig]:
    listed = ["experiment=llava_1_5_7b", *words]
    return list(compose_stages(compose_config(listed), listed).values())


def built(config: DictConfig) -> Any:
    """The model on the meta device, with what the config freezes."""
    whole = torch.nn.Module()
    whole.model = build.skeleton(config).model
    build.make(config.optim).apply_frozen(whole)
    return whole.model


def millions(model: Any, *, learning: bool) -> float:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not learning) / 1e6


@pytest.mark.parametrize(
    ("words", "learning"), [((), 6759.40), (ADAPTERS, 340.80)], ids=["weights", "adapters"]
)  # connector 20.98 M; language model 6,738.42 M, adapters of rank 128 on its 224 linear layers 319.82 M
def test_sizes_and_what_learns(words: tuple[str, ...], learning: float, folders: list[str]) -> None:
    """Published: 6.74 B parameters of the language model, 576 tokens an image, 0.3 B of the tower, whose last layer is
    not read."""
    align, instruct = stages_of(*folders, *words)
    first, second = built(align), built(instruct)
    assert all(parameter.is_meta for model in (first, second) for parameter in model.parameters())
    assert first.tokens_per_image == 576 and len(first.vision.blocks) == 23
    assert millions(first.text, learning=False) == pytest.approx(6738.42, abs=0.005)
    assert millions(first, learning=True) == pytest.approx(20.98, abs=0.005)
    assert millions(second, learning=True) == pytest.approx(learning, abs=0.005)
    assert not millions(second.vision, learning=True)
    assert (first.image_spec.resize, second.image_spec.resize) == ("shortest", "pad")


def test_stages_are_those_of_the_paper(folders: list[str]) -> None:
    align, instruct = stages_of(*folders)
    told = [
        (c.data.template, c.optim.lr, c.trainer.global_batch, c.trainer.max_steps, c.schedule.warmup_steps)
        for c in (align, instruct)
    ]
    assert told == [("plain", 1e-3, 256, 2181, 66), ("vicuna", 2e-5, 128, 5198, 156)]
    assert 2181 == -(-558128 // 256) and 5198 == -(-665298 // 128)  # one epoch each
    assert all(c.schedule.warmup_steps == -(-c.trainer.max_steps * 3 // 100) for c in (align, instruct))
    rates = {group["pattern"]: group.get("lr") for group in stages_of(*folders, *ADAPTERS)[1].optim.groups}
    assert rates[r"model\.connector\..*"] == 2e-5 and rates[".*"] == 2e-4


@pytest.mark.parametrize("words", [(), ADAPTERS], ids=["weights", "adapters"])
def test_the_second_stage_takes_the_weights_of_the_first(words: tuple[str, ...], folders: list[str]) -> None:
    listed = ["experiment=llava_1_5_7b", *folders, *words]
    stages = compose_stages(compose_config(listed), listed)
    check_handover(stages)
    with pytest.raises(ConfigError, match="do not fit"):  # the twin: another connector
        list(stages.values())[1].model.connector.num_layers = 1
        check_handover(stages)


def test_what_a_sample_costs(folders: list[str]) -> None:
    """Arithmetic of 6 N a token for weights that learn, 4 N for those that do not, of N = 6.61 G in products: within
    8 %, the rest is attention and the tower."""
    align, instruct = (built(config) for config in stages_of(*folders))
    adapted = built(stages_of(*folders, *ADAPTERS)[1])
    products = 6.61e9
    assert 1 < training_flops_per_sample(align, 611, 1.0) / (4 * products * 611) < 1.08
    assert 1 < training_flops_per_sample(instruct, 800, 1.0) / (6 * products * 800) < 1.08
    assert 1 < training_flops_per_sample(adapted, 800, 1.0) / ((4 * products + 6 * 0.32e9) * 800) < 1.08
