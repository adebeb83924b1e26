"""The embedded model and data: the same bytes every time, an ordinary model folder, and what the real sizes have."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from g4trainer import gemma, tiny
from g4trainer.rundir import manifest
from trainer.conftest import Folders
from trainer.making import collator, example, inputs_of


def test_model_and_data_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for copy in ("one", "two"):
        tiny.write_model(tmp_path / copy / "model")
        tiny.write_digits(tmp_path / copy / "data")
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json", "data/train.parquet"} <= one.keys()
    assert one == two
    assert sum(entry["size"] for entry in one.values()) < 10_000_000


@pytest.mark.parametrize("like", ["E2B", "E4B", "26B-A4B", "31B"])
def test_a_size_s_structure_is_imitated(like: tiny.Like, tiny_folder: Folders) -> None:
    folder = tiny_folder(like)
    config = AutoConfig.from_pretrained(folder)
    real = gemma.true_config(like)
    text = real["text_config"]
    own = config.text_config
    assert set(own.layer_types) == set(text["layer_types"])
    assert own.attention_k_eq_v == text["attention_k_eq_v"]
    assert own.use_bidirectional_attention == text["use_bidirectional_attention"]
    assert own.enable_moe_block == text["enable_moe_block"]
    assert own.use_double_wide_mlp == text.get("use_double_wide_mlp", False)
    assert bool(own.num_kv_shared_layers) == bool(text["num_kv_shared_layers"])
    assert bool(own.hidden_size_per_layer_input) == bool(text["hidden_size_per_layer_input"])
    assert own.final_logit_softcapping == text["final_logit_softcapping"]
    assert config.vision_config.use_clipped_linears == real["vision_config"]["use_clipped_linears"]
    assert config.vision_config.standardize == real["vision_config"]["standardize"]
    assert collator(like).prompts([example()])["input_ids"].shape[1] > own.sliding_window, "or it would never slide"


def test_it_loads_as_any_model_folder_does(tiny_folder: Folders) -> None:
    model, report = AutoModelForMultimodalLM.from_pretrained(tiny_folder("E2B"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tiny_folder("E2B"))
    assert type(processor).__name__ == "Gemma4Processor"
    bounds = {
        float(getattr(module, name))
        for module in model.modules()
        if isinstance(module, Gemma4ClippableLinear)
        for name in ("input_min", "input_max", "output_min", "output_max")
    }
    assert bounds == {-tiny.CLIP_BOUND, tiny.CLIP_BOUND}


@pytest.mark.parametrize("like", ["26B-A4B", "31B"])
def test_image_tokens_see_each_other_only_with_mm_token_type_ids(like: tiny.Like, tiny_folder: Folders) -> None:
    """Why the collator forwards them: without them the larger sizes lose bidirectional attention, and say nothing."""
    model = AutoModelForMultimodalLM.from_pretrained(tiny_folder(like)).eval()
    batch = inputs_of(collator(like)([example()]))
    causal = {**batch, "mm_token_type_ids": torch.zeros_like(batch["mm_token_type_ids"])}
    with torch.inference_mode():
        assert not torch.allclose(model(**batch).logits, model(**causal).logits, atol=1e-2)


@pytest.mark.parametrize(("like", "thought"), [("E2B", ""), ("E4B", ""), ("31B", gemma.EMPTY_THOUGHT)])
def test_the_larger_sizes_prompt_ends_with_the_empty_thought(like: tiny.Like, thought: str) -> None:
    collate = collator(like)
    ids = collate.prompts([example()])["input_ids"][0].tolist()
    assert collate.text_of(ids).endswith(f"<turn|>\n<|turn>model\n{thought}")


def test_the_tokenizer_keeps_any_text() -> None:
    tokenizer = tiny.make_tokenizer()
    for text in ("seven", "Zwölf Boxkämpfer", "猫 และ 🐈", "a_b\tc\nd"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for name in tiny.SPECIAL_TOKENS:
        assert len(tokenizer(name, add_special_tokens=False)["input_ids"]) == 1


def test_the_digits_are_real_and_their_parts_apart(tmp_path: Path) -> None:
    tiny.write_digits(tmp_path)
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    parts = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {split: len(part) for split, part in parts.items()} == {"train": 1400, "test": 397}
    assert parts["train"].features["label"].names == list(tiny.DIGIT_NAMES)
    assert parts["train"][0]["image"].size == (8, 8)
    counts = torch.bincount(torch.tensor(parts["test"]["label"]))
    assert counts.min() >= 38, "every digit is held out as often as it is there"
