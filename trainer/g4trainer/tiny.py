"""The embedded default: a tiny random Gemma 4 with tokenizer and processor, and scikit-learn's handwritten digits.

The model is an ordinary model folder of a few megabytes that `AutoModelForMultimodalLM` and `AutoProcessor` load. It
has what the real ones have (vision tower with clipped linears, per-layer embeddings, a layer that shares keys and
values, sliding and full attention, logit softcapping), so that a run on it takes the same path through the code.
"""

import io
import json
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForMultimodalLM, Gemma4Config, GemmaTokenizer
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

Like = Literal["E2B", "E4B", "26B-A4B", "31B"]

SEED = 20260402
PATCH_SIZE = 4  # pixels
POOLING_KERNEL_SIZE = 2  # patches a side of a soft token; 1 is broken upstream (its padding mask is inverted)
CLIP_BOUND = 6.0  # of every clipped linear: finite, so that the clamps act
EMBEDDING_STD = 0.5
HELD_OUT_DIGITS = 397

SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|image>", "<|image|>", "<image|>"),
    *("<|audio>", "<|audio|>", "<audio|>", "<|video|>", "<|channel>", "<channel|>", "<|think|>"),
)
TOKENIZER_ROLES = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
}
CORPUS = (
    "zero one two three four five six seven eight nine",
    "Which digit is it? What is shown in the image? Answer with one of the labels.",
    "user model system thought",
)
VOCABULARY_SIZE = 512
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] | trim -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if EMPTY_THOUGHT and not enable_thinking -%}
        {{- '<|channel>thought\\n<channel|>' -}}
    {%- endif -%}
{%- endif -%}
"""
"""Gemma 4's turn format. The larger sizes end the generation prompt with an empty thought block, E2B and E4B do not."""


def write_model(folder: Path, *, like: Like = "E2B") -> None:
    """Writes the model folder: config, safetensors (fp32, from a fixed seed), tokenizer, processor, chat template.

    like: the size whose structure is imitated; the embedded default is shaped like E2B.
    """
    processor = make_processor(like)
    model = make_model(like, processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_digits(folder: Path) -> None:
    """Writes scikit-learn's 1,797 real handwritten digits (8 x 8 pixels) as parquet: 1,400 to train, 397 to test."""
    digits = load_digits()
    train, test = train_test_split(
        range(len(digits.target)), test_size=HELD_OUT_DIGITS, stratify=digits.target, random_state=SEED
    )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(DIGIT_NAMES))})
    for split, indices in (("train", train), ("test", test)):
        rows = {
            "image": [{"bytes": _png(digits.images[index]), "path": None} for index in indices],
            "label": [int(digits.target[index]) for index in indices],
        }
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))


def make_model(like: Like, tokenizer: Any) -> Any:
    """A Gemma4ForConditionalGeneration with random weights from a fixed seed, in fp32 on the CPU."""
    config = make_config(like, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
        _initialize(model)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, _token(tokenizer, "<turn|>")]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


def make_config(like: Like, tokenizer: Any) -> Any:
    """The configuration of a tiny Gemma 4 with the structure of one of the real sizes."""
    shared_layers, experts, large = like in ("E2B", "E4B"), like == "26B-A4B", like in ("26B-A4B", "31B")
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if large else 1,
        "num_global_key_value_heads": 1 if large else None,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 32,
        "attention_k_eq_v": large,
        "use_bidirectional_attention": "vision" if large else None,
        "num_kv_shared_layers": 1 if shared_layers else 0,
        "use_double_wide_mlp": like == "E2B",
        "vocab_size_per_layer_input": VOCABULARY_SIZE,
        "hidden_size_per_layer_input": 8 if shared_layers else 0,
        "enable_moe_block": experts,
        "num_experts": 4 if experts else None,
        "top_k_experts": 2 if experts else None,
        "moe_intermediate_size": 32 if experts else None,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "patch_size": PATCH_SIZE,
        "pooling_kernel_size": POOLING_KERNEL_SIZE,
        "position_embedding_size": 4608,
        "use_clipped_linears": shared_layers,
        "standardize": large,
    }
    return Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        boi_token_id=_token(tokenizer, "<|image>"),
        eoi_token_id=_token(tokenizer, "<image|>"),
        image_token_id=_token(tokenizer, "<|image|>"),
        video_token_id=_token(tokenizer, "<|video|>"),
        boa_token_id=_token(tokenizer, "<|audio>"),
        eoa_token_index=_token(tokenizer, "<audio|>"),
        audio_token_id=_token(tokenizer, "<|audio|>"),
        tie_word_embeddings=True,
    )


def make_processor(like: Like = "E2B") -> Any:
    """A Gemma4Processor around the tiny tokenizer, with the chat template of the size that is imitated."""
    empty_thought = "true" if like in ("26B-A4B", "31B") else "false"
    sizes = {"patch_size": PATCH_SIZE, "pooling_kernel_size": POOLING_KERNEL_SIZE, "max_soft_tokens": 70}
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**sizes),
        video_processor=Gemma4VideoProcessor(**sizes),
        tokenizer=make_tokenizer(),
        chat_template=CHAT_TEMPLATE.replace("EMPTY_THOUGHT", empty_thought),
        image_seq_length=70,
    )


def make_tokenizer() -> Any:
    """A GemmaTokenizer of 512 tokens: Gemma 4's special tokens, 256 bytes, and merges learned from a few words."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    learned = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106 a token's name
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split(pattern="▁", behavior="merged_with_previous", invert=False)
    learned.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    learned.train_from_iterator(CORPUS, trainer)
    bpe = json.loads(learned.to_str())["model"]
    tokenizer = GemmaTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        extra_special_tokens=TOKENIZER_ROLES,
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS[5:]]})
    return tokenizer


@torch.no_grad()
def _initialize(model: torch.nn.Module) -> None:
    """Weights of unit gain: linear layers of standard deviation 1/sqrt(fan-in), embeddings of 0.5, finite clamps."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.normal_(std=EMBEDDING_STD)
        elif isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            module.weight.normal_(std=module.in_features**-0.5)
        elif isinstance(module, Gemma4ClippableLinear) and module.use_clipped_linears:
            for name, sign in (("input_min", -1), ("input_max", 1), ("output_min", -1), ("output_max", 1)):
                getattr(module, name).fill_(sign * CLIP_BOUND)
    for name, parameter in model.named_parameters():
        if name.endswith("position_embedding_table"):
            parameter.normal_(std=EMBEDDING_STD)
        elif ".experts." in name:  # (experts, out, in)
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _png(pixels: Any) -> bytes:
    """A grey PNG of scikit-learn's pixels, which run from 0 to 16."""
    image = Image.fromarray((pixels * 255 / 16).round().astype("uint8"), mode="L")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _token(tokenizer: Any, name: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(name))
