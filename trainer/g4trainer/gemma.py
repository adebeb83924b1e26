"""Facts of each Gemma 4 size, and of any model folder, from `config.json` alone: neither torch nor Google is needed.

Counts follow from the shapes: what transformers builds from the same configuration has exactly as many parameters and
linear modules (the tests compare them on the meta device).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Size = Literal["E2B", "E4B", "26B-A4B", "31B"]
Group = Literal["language", "vision", "projection", "router"]

TURN, END_OF_TURN = "<|turn>", "<turn|>"
IMAGE, BEGIN_IMAGE, END_IMAGE = "<|image|>", "<|image>", "<image|>"
CHANNEL, END_OF_CHANNEL = "<|channel>", "<channel|>"
SPECIAL_TOKENS = (TURN, END_OF_TURN, BEGIN_IMAGE, IMAGE, END_IMAGE)
"""Tokens that training and inference rely on. Their ids are looked up by name, in the tokenizer."""
EMPTY_THOUGHT = f"{CHANNEL}thought\n{END_OF_CHANNEL}"
"""What the larger sizes' generation prompt ends with when thinking is off."""
SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""What `max_soft_tokens` may be: upper bounds of the tokens that one image takes."""
MODEL_TYPE = "gemma4"


@dataclass(frozen=True)
class Linear:
    """One linear module: its name as transformers names it, and its shape."""

    name: str
    group: Group
    inputs: int
    outputs: int
    clipped: bool = False
    """Whether a Gemma4ClippableLinear with bounds of its own holds it."""

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ExpertWeight:
    """One 3-D parameter of a layer's experts: (experts, outputs, inputs)."""

    name: str
    experts: int
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        return self.experts * self.inputs * self.outputs


@dataclass(frozen=True)
class ModelFacts:
    """What a configuration says about a model. Counts leave the audio tower out unless they say otherwise."""

    linears: tuple[Linear, ...]
    """Every linear module but the output head, in the order of the model: what "all-linear" adapts."""
    embedding_parameters: int
    """Token and per-layer embeddings; the output head is tied to the first."""
    per_layer_embedding_parameters: int
    """Of these, the per-layer ones of E2B and E4B, which may stay on the host."""
    expert_weights: tuple[ExpertWeight, ...]
    """Two in a layer: no linear modules, so "all-linear" adapts none."""
    other_parameters: int
    """Norms, scales and the table of patch positions."""
    audio_parameters: int
    """Parameters of the audio tower and its projection, which g4kit does not load."""
    text_layers: int
    vision_layers: int
    bidirectional_images: bool
    """Whether image tokens attend to one another in both directions, which needs mm_token_type_ids."""

    @property
    def expert_parameters(self) -> int:
        return sum(weight.parameters for weight in self.expert_weights)

    @property
    def parameters(self) -> int:
        """Parameters that a run loads."""
        return (
            sum(linear.parameters for linear in self.linears)
            + self.embedding_parameters
            + self.expert_parameters
            + self.other_parameters
        )

    @property
    def published_parameters(self) -> int:
        """Parameters of the published weights, the audio tower included."""
        return self.parameters + self.audio_parameters

    def lora_parameters(self, r: int) -> int:
        """Parameters that "all-linear" trains at rank `r`."""
        return sum(r * (linear.inputs + linear.outputs) for linear in self.linears)


def true_config(size: Size) -> dict[str, Any]:
    """`config.json` of a published size, as far as it decides shapes and structure."""
    large = size in ("26B-A4B", "31B")
    text, vision = dict(_TEXT[size]), dict(_LARGE_VISION if large else _SMALL_VISION)
    layers, period = text["num_hidden_layers"], 5 if size == "E2B" else 6
    text |= {
        "model_type": "gemma4_text",
        "vocab_size": 262_144,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": [("sliding" if (i + 1) % period else "full") + "_attention" for i in range(layers)],
        "vocab_size_per_layer_input": 262_144,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 262_144 if large else 131_072,
        "attention_k_eq_v": large,
        "use_bidirectional_attention": "vision" if large else None,
        "enable_moe_block": size == "26B-A4B",
        "tie_word_embeddings": True,
    }
    audio = None if large else {"model_type": "gemma4_audio", **_AUDIO}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"model_type": "gemma4_vision", **vision},
        "audio_config": audio,
        "tie_word_embeddings": True,
    }


def read_facts(folder: Path) -> ModelFacts:
    """Facts of a model folder. Raises FileNotFoundError without config.json, ValueError where it is no Gemma 4."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    return facts_of(config, source=str(path))


def facts_of(config: Mapping[str, Any], *, source: str = "config.json") -> ModelFacts:
    """Facts of a parsed `config.json`. Raises ValueError where it is no multimodal Gemma 4, naming `source`."""
    found = config.get("model_type")
    if found != MODEL_TYPE or not config.get("text_config") or not config.get("vision_config"):
        raise ValueError(f"{source}: got model_type {found!r}; a multimodal Gemma 4 says {MODEL_TYPE!r}.")
    text, vision = {**_TEXT_DEFAULTS, **config["text_config"]}, {**VISION_DEFAULTS, **config["vision_config"]}
    audio = config.get("audio_config")
    per_layer = text["hidden_size_per_layer_input"] * text["num_hidden_layers"]
    per_layer_embeddings = text["vocab_size_per_layer_input"] * per_layer
    return ModelFacts(
        linears=(*_vision_linears(vision), *_text_linears(text), *_projections(text, vision)),
        embedding_parameters=text["vocab_size"] * text["hidden_size"] + per_layer_embeddings,
        per_layer_embedding_parameters=per_layer_embeddings,
        expert_weights=tuple(_expert_weights(text)),
        other_parameters=_text_scales(text) + _vision_scales(vision),
        audio_parameters=_audio_parameters({**_AUDIO, **audio}, text) if audio else 0,
        text_layers=text["num_hidden_layers"],
        vision_layers=vision["num_hidden_layers"],
        bidirectional_images=text["use_bidirectional_attention"] == "vision",
    )


def _text_linears(text: Mapping[str, Any]) -> Iterator[Linear]:
    width, prefix = text["hidden_size"], "model.language_model"
    for index, kind in enumerate(_layer_types(text)):
        layer = f"{prefix}.layers.{index}"
        head, key_value_heads = _attention_shape(text, index, kind)
        queries = text["num_attention_heads"] * head
        attention = [("q_proj", width, queries)]
        if not _shares_keys(text, index):
            keys = key_value_heads * head
            attention.append(("k_proj", width, keys))
            if not (text["attention_k_eq_v"] and kind == "full_attention"):
                attention.append(("v_proj", width, keys))
        attention.append(("o_proj", queries, width))
        for name, inputs, outputs in attention:
            yield Linear(f"{layer}.self_attn.{name}", "language", inputs, outputs)
        inner = text["intermediate_size"]
        if text["use_double_wide_mlp"] and _shares_keys(text, index):
            inner *= 2
        yield Linear(f"{layer}.mlp.gate_proj", "language", width, inner)
        yield Linear(f"{layer}.mlp.up_proj", "language", width, inner)
        yield Linear(f"{layer}.mlp.down_proj", "language", inner, width)
        extra = text["hidden_size_per_layer_input"]
        if extra:
            yield Linear(f"{layer}.per_layer_input_gate", "language", width, extra)
            yield Linear(f"{layer}.per_layer_projection", "language", extra, width)
        if text["enable_moe_block"]:
            yield Linear(f"{layer}.router.proj", "router", width, text["num_experts"])


def _vision_linears(vision: Mapping[str, Any]) -> Iterator[Linear]:
    width, inner, clipped = vision["hidden_size"], vision["intermediate_size"], vision["use_clipped_linears"]
    queries, keys = (vision[name] * vision["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    prefix = "model.vision_tower"
    yield Linear(f"{prefix}.patch_embedder.input_proj", "vision", 3 * vision["patch_size"] ** 2, width)
    shapes = {
        "self_attn.q_proj": (width, queries),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (queries, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }
    for index in range(vision["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            yield Linear(f"{prefix}.encoder.layers.{index}.{name}.linear", "vision", inputs, outputs, clipped)


def _projections(text: Mapping[str, Any], vision: Mapping[str, Any]) -> Iterator[Linear]:
    width, extra = text["hidden_size"], text["hidden_size_per_layer_input"] * text["num_hidden_layers"]
    if extra:
        yield Linear("model.language_model.per_layer_model_projection", "projection", width, extra)
    yield Linear("model.embed_vision.embedding_projection", "projection", vision["hidden_size"], width)


def _layer_types(text: Mapping[str, Any]) -> list[str]:
    """The stated kinds of the layers, else five sliding to one full; the last is always full."""
    count = text["num_hidden_layers"]
    stated = text["layer_types"] or [("sliding" if (i + 1) % 6 else "full") + "_attention" for i in range(count)]
    return [*stated[:-1], "full_attention"]


def _shares_keys(text: Mapping[str, Any], index: int) -> bool:
    return bool(index >= text["num_hidden_layers"] - text["num_kv_shared_layers"])


def _attention_shape(text: Mapping[str, Any], index: int, kind: str) -> tuple[int, int]:
    """Size of a head, and the number of key-value heads, of one layer.

    A published config.json states them for full attention as `global_*`; one that transformers 5.23 saved lists the
    layers that differ.
    """
    heads = {"head_dim": text["head_dim"], "num_key_value_heads": text["num_key_value_heads"]}
    by_layer = text["per_layer_config"]
    if by_layer is not None:  # keys are padded with zeros: "05" is layer 5
        heads |= next((own for key, own in by_layer.items() if int(key) == index), {})
    elif kind == "full_attention":
        heads["head_dim"] = text["global_head_dim"]
        if text["attention_k_eq_v"] and text["num_global_key_value_heads"]:
            heads["num_key_value_heads"] = text["num_global_key_value_heads"]
    return int(heads["head_dim"]), int(heads["num_key_value_heads"])


def _expert_weights(text: Mapping[str, Any]) -> Iterator[ExpertWeight]:
    experts, width, inner = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    for index in range(text["num_hidden_layers"] if text["enable_moe_block"] else 0):
        prefix = f"model.language_model.layers.{index}.experts"
        yield ExpertWeight(f"{prefix}.gate_up_proj", experts, width, 2 * inner)
        yield ExpertWeight(f"{prefix}.down_proj", experts, inner, width)


def _text_scales(text: Mapping[str, Any]) -> int:
    """Parameters of norms and router scales; those of value norms have no scale."""
    width, extra = text["hidden_size"], text["hidden_size_per_layer_input"]
    total = width + extra  # the last norm, and that of the per-layer projection
    for index, kind in enumerate(_layer_types(text)):
        head, _ = _attention_shape(text, index, kind)
        total += 4 * width + head + (0 if _shares_keys(text, index) else head)
        total += width if extra else 0
        if text["enable_moe_block"]:
            total += 3 * width + width + text["num_experts"]
    return int(total)


def _vision_scales(vision: Mapping[str, Any]) -> int:
    width = vision["hidden_size"]
    layer = 4 * width + 2 * vision["head_dim"]
    return int(vision["num_hidden_layers"] * layer + 2 * vision["position_embedding_size"] * width)


def _audio_parameters(audio: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    """Of the audio tower (a conformer) and its projection into the language model."""
    width, (first, second), frequencies = audio["hidden_size"], audio["subsampling_conv_channels"], 128
    subsampling = 9 * first + first + 9 * first * second + second + second * (frequencies // 4) * width
    feed_forward = 2 * (4 * width * width) + 2 * width
    attention = 5 * width * width + width // audio["num_attention_heads"] + 2 * width
    convolution = 2 * width * width + width * width + audio["conv_kernel_size"] * width + 2 * width
    layer = 2 * feed_forward + attention + convolution + width
    output = width * audio["output_proj_dims"] + audio["output_proj_dims"]
    return int(
        subsampling + audio["num_hidden_layers"] * layer + output + audio["output_proj_dims"] * text["hidden_size"]
    )


_TEXT: dict[Size, dict[str, Any]] = {
    "E2B": {
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "sliding_window": 512,
        "num_kv_shared_layers": 20,
        "hidden_size_per_layer_input": 256,
    },
    "E4B": {
        "hidden_size": 2560,
        "num_hidden_layers": 42,
        "intermediate_size": 10240,
        "use_double_wide_mlp": False,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": None,
        "sliding_window": 512,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
    },
    "26B-A4B": {
        "hidden_size": 2816,
        "num_hidden_layers": 30,
        "intermediate_size": 2112,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "sliding_window": 1024,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "31B": {
        "hidden_size": 5376,
        "num_hidden_layers": 60,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "sliding_window": 1024,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
}
"""The published text configurations, google/gemma-4-*-it."""

_SMALL_VISION = {
    "hidden_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "intermediate_size": 3072,
    "use_clipped_linears": True,
    "standardize": False,
}
_LARGE_VISION = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "intermediate_size": 4304,
    "use_clipped_linears": False,
    "standardize": True,
}
_AUDIO = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "subsampling_conv_channels": [128, 32],
    "conv_kernel_size": 5,
    "output_proj_dims": 1536,
}

# What transformers assumes where a config.json does not say (configuration_gemma4.py).
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "layer_types": None,
    "per_layer_config": None,
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": False,
    "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "enable_moe_block": False,
    "num_experts": 0,
    "moe_intermediate_size": 0,
}
VISION_DEFAULTS: dict[str, Any] = {
    **_SMALL_VISION,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10_240,
    "use_clipped_linears": False,
}
