"""GPU memory of a run, in bytes by part, from config.json and a recipe: neither torch nor a GPU is needed.

Weights, LoRA, gradients and optimizer follow from the shapes and are exact (tests count them with torch). Activations
are counted too, tensor by tensor that a compiled layer keeps for its backward pass, then scaled by the few factors
below, which were fitted to measurements; `python -m g4trainer.calibration` prints them all, with the model's error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from g4trainer import gemma, lora_targets
from g4trainer.recipe import Recipe

Checkpointing = Literal["none", "half", "full"]
Attention = Literal["eager", "sdpa"]
AttentionSetting = Literal["auto", "eager", "sdpa"]
EmbeddingsSetting = Literal["auto", "card", "host"]

GIB = 2**30
BF16, FP32 = 2, 4

SMALL_CARD_BYTES = 16 * GIB
"""Cards up to this size keep per-layer embeddings on the host unless the recipe says otherwise."""
UNQUANTIZED_LINEARS = ("router.proj", "patch_embedder.input_proj")
"""Linear modules that stay in bf16, as suffixes of their names (g4trainer.quantization says why)."""
NF4_BLOCK, STATISTICS_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one in turn: bitsandbytes' double quantization."""
NF4_TABLES = (16 + 256 + 1) * FP32
"""Of each quantized layer: the two code books, and the mean of its scales."""
ADAM = 2 * FP32
"""Bytes of AdamW's two moments for each trained parameter."""

EAGER_BELOW_TOKENS = 1024
"""Sequences shorter than this take eager text attention, which is faster there and keeps its scores."""
SCORE_BYTES = 4
"""Kept of each score of eager attention: measured 1.78 GiB a sample at 60 layers, 32 heads and 504 tokens."""
KEPT = {"text": 1.045, "vision": 1.00}
"""Kept by a compiled layer, against the count below. Fitted, see g4trainer.calibration."""
UNCOMPILED = 1.5
"""The same without compilation, where norms, activations and casts each keep their input."""
WORKSPACE_LAYERS = 1.5
"""Temporaries of the layer at work, as multiples of what it keeps: gradients of its inputs, and recomputed values."""
DEQUANTIZED_COPIES = 2
"""The largest matrix in bf16: the weight at work, and the one whose memory is not yet reused."""
LOGIT_BYTES = BF16 + 3 * FP32
"""Of each logit: as computed, in fp32, its softmax and its gradient."""
FRAGMENTATION = 0.03
"""Share of what is not weights that the allocator holds beside what is used."""
CUDA_CONTEXT = 768 * 2**20
"""Held by the CUDA context, cuBLAS and Triton outside the allocator: 763 MiB on an H200. The driver decides."""
ANSWER_TOKENS = 10
CHAT_ANSWER_TOKENS = 256
"""That an answer of a chat may have at most."""
LAYER = re.compile(r"(model\.(?:language_model|vision_tower).*?layers\.\d+)\.(.+?)(?:\.linear)?$")
"""Names of linear modules that are in a layer: the layer, and the module in it."""


@dataclass(frozen=True)
class Shape:
    """What one sample is made of."""

    tokens: int
    """Of the padded sequence: text and image."""
    patches: int
    """Of its images, padding included: the vision tower computes all of them."""
    supervised: int
    """Positions whose logits are computed."""


@dataclass(frozen=True)
class Step:
    """How a micro-batch is computed."""

    micro_batch: int
    checkpointing: Checkpointing
    attention: Attention
    accumulates: bool
    """Whether an optimizer step has several micro-batches, so that gradients are there during the forward pass."""
    compiled: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the moment of the peak."""

    parts: Mapping[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Layer:
    """What one layer keeps for its backward pass, and what it is made of."""

    kind: Literal["text", "vision"]
    kept: int
    """Bytes a token (or patch), attention scores apart."""
    heads: int
    keys: int
    """Bytes a token that its keys and values take in the generation cache; 0 where it uses another layer's."""


class Model:
    """A model with its adapters, in bytes. config: a parsed config.json. Raises ValueError where it is no Gemma 4."""

    def __init__(self, recipe: Recipe, config: Mapping[str, Any], *, number_bytes: int = BF16, shards: int = 1) -> None:
        """
        number_bytes: of each weight that is not quantized, and of each activation: 2 on a GPU, 4 on a CPU.
        shards: GPUs that share the base model's weights, each gathering those of the layer at work.
        """
        self.shards = shards
        self.facts = gemma.facts_of(config)
        self.recipe = recipe
        linears = self.facts.linears
        nf4 = recipe.model.quantization == "nf4"
        self.quantized = [one for one in linears if nf4 and not one.name.endswith(UNQUANTIZED_LINEARS)]
        self.adapted = lora_targets.adapted_linears(self.facts, recipe.lora)
        self.adapted_experts = lora_targets.adapted_experts(self.facts, recipe.lora)
        self.lora_parameters = lora_targets.lora_parameters(self.facts, recipe.lora)
        kept = self.facts.parameters - sum(one.parameters for one in self.quantized)
        on_host = recipe.model.per_layer_embeddings == "host" and shards == 1  # "auto": see planner.for_card
        self.host_bytes = self.facts.per_layer_embedding_parameters * number_bytes if on_host else 0
        """Of embeddings that are moved off the card once all weights are read."""
        kept -= self.host_bytes // number_bytes
        experts = [one.parameters for one in self.facts.expert_weights]
        self.weights = {
            "weights in NF4": sum(_nf4_bytes(one.parameters) for one in self.quantized),
            "unquantized weights": (kept - self.facts.expert_parameters) * number_bytes,
            "experts": sum(_nf4_bytes(one) if nf4 else one * number_bytes for one in experts),
        }
        if shards > 1:
            self.weights = _sharded(self.weights, linears, number_bytes, shards)
        self.largest_matrix = max([*(one.parameters for one in linears), *(experts if nf4 else ())]) * BF16
        self.layers = _layers(self.facts, config, recipe.lora.r, number_bytes, self.adapted_experts)
        text = config["text_config"]
        count = text.get("num_experts") or 0
        self.expert_share = text.get("top_k_experts", 0) / count if count else 0.0
        self.vocabulary = int(config["text_config"].get("vocab_size", 262_144))
        self.width = int(config["text_config"]["hidden_size"])
        self.vision_width = int(config["vision_config"]["hidden_size"])
        self.patches_a_token = int(config["vision_config"].get("pooling_kernel_size", 3)) ** 2

    @property
    def loading(self) -> int:
        """Bytes when the last weight was read, before any is moved to the host."""
        return sum(self.weights.values()) + self.host_bytes

    @property
    def loaded(self) -> int:
        """Bytes once the base model is there with its adapters, before the first step."""
        return sum(self.weights.values()) + self.lora_parameters * FP32

    def shape(self, text_tokens: int) -> Shape:
        """A sample of one image that fills its budget. text_tokens: all tokens that are not the image's."""
        budget = self.recipe.model.max_soft_tokens
        return Shape(budget + text_tokens, budget * self.patches_a_token, ANSWER_TOKENS)


def embeddings_on_host(setting: EmbeddingsSetting, card_bytes: int | None) -> bool:
    """Whether a run keeps per-layer embeddings off its card.

    setting: `model.per_layer_embeddings` of the recipe. card_bytes: the card's memory in all; None without a card.
    """
    if card_bytes is None:
        return False
    return setting == "host" or (setting == "auto" and card_bytes <= SMALL_CARD_BYTES)


def attention_for(setting: AttentionSetting, tokens: int) -> Attention:
    """The text layers' attention on a GPU: what the recipe says, or what is fastest at that length.

    setting: `model.attn_implementation` of the recipe. tokens: length of a sample.
    """
    if setting == "auto":
        return "eager" if tokens < EAGER_BELOW_TOKENS else "sdpa"
    return setting


def answer_tokens(recipe: Recipe) -> int:
    """The most that are generated for an answer, before the labels are known."""
    stated = recipe.evaluation.max_new_tokens
    if stated != "auto":
        return stated
    return CHAT_ANSWER_TOKENS if recipe.data.task == "chat" else ANSWER_TOKENS


def training(model: Model, shape: Shape, step: Step) -> Memory:
    """The peak of an optimizer step: at the end of the forward pass, or when the backward pass is in a late layer."""
    batch, lora = step.micro_batch, model.lora_parameters
    held = {**model.weights, "LoRA": lora * FP32, "optimizer": lora * ADAM}
    gradients = lora * FP32
    kept = {"text": 0, "vision": 0}
    working = dict(kept)
    for index, layer in enumerate(model.layers):
        whole = batch * _activations(layer, shape, step)
        recomputed = step.checkpointing == "full" or (step.checkpointing == "half" and index % 2 == 0)
        kept[layer.kind] += batch * _input_of(layer, model, shape) if recomputed else whole
        working[layer.kind] = max(working[layer.kind], whole)
    dequantized = DEQUANTIZED_COPIES * model.largest_matrix if model.quantized else 0
    logits = batch * shape.supervised * model.vocabulary * LOGIT_BYTES
    again = step.checkpointing != "none"
    forward = {
        **held,
        "gradients": gradients if step.accumulates else 0,
        "bf16 copies of LoRA": lora * BF16,
        "activations, text": kept["text"],
        "activations, vision": kept["vision"],
        "logits": logits,
        "workspace": int(WORKSPACE_LAYERS * working["text"] * again) + dequantized * again,
    }
    vision_parameters = sum(one.inputs + one.outputs for one in model.adapted if one.group == "vision")
    backward = {
        **held,
        "gradients": gradients,
        "bf16 copies of LoRA": model.recipe.lora.r * vision_parameters * BF16,
        "activations, text": 0,
        "activations, vision": kept["vision"],
        "logits": 0,
        "workspace": int((WORKSPACE_LAYERS + again) * working["vision"]) + dequantized,
    }
    moments = [Memory(forward, "end of the forward pass"), Memory(backward, "backward pass of the vision tower")]
    return max(moments, key=lambda memory: memory.total)


def evaluation(model: Model, shape: Shape, batch: int, *, new_tokens: int, trained: bool = True) -> Memory:
    """The peak of answering a batch: the prompt's forward pass, with its keys and values in the cache.

    trained: whether the optimizer's moments are still there, as they are when the validation loss is measured.
    """
    step = Step(batch, "none", attention_for(model.recipe.model.attn_implementation, shape.tokens), accumulates=False)
    lora = model.lora_parameters
    working = max(batch * _activations(layer, shape, step) for layer in model.layers)
    cache = sum(layer.keys for layer in model.layers) * batch * (shape.tokens + new_tokens)
    parts = {
        **model.weights,
        "LoRA": lora * FP32,
        "optimizer": lora * ADAM if trained else 0,
        "bf16 copies of LoRA": lora * BF16,
        "generation cache": cache,
        "logits": batch * model.vocabulary * (BF16 + FP32),
        "workspace": int(WORKSPACE_LAYERS * working) + (DEQUANTIZED_COPIES * model.largest_matrix),
    }
    return Memory(parts, "evaluation")


def with_reserve(memory: Memory) -> Memory:
    """The same with what the allocator holds but does not use: what a card must have free."""
    fixed = {"weights in NF4", "unquantized weights", "experts", "weights, its share", "LoRA", "optimizer"}
    moving = sum(size for name, size in memory.parts.items() if name not in fixed)
    return Memory({**memory.parts, "fragmentation": int(FRAGMENTATION * moving)}, memory.moment)


def _sharded(
    weights: Mapping[str, int], linears: Sequence[gemma.Linear], number_bytes: int, shards: int
) -> dict[str, int]:
    """Weights of one GPU among those that share them: its part, and what is gathered.

    That is the layer at work and the next one, and all step long what is in no layer, as the embeddings.
    """
    layers: dict[str, int] = {}
    for linear in linears:
        found = LAYER.match(linear.name)
        if found:
            layers[found[1]] = layers.get(found[1], 0) + linear.parameters * number_bytes
    whole, experts = sum(weights.values()), weights["experts"]
    in_one = max(layers.values()) + experts // sum("language_model" in name for name in layers)
    gathered = 2 * in_one + whole - sum(layers.values()) - experts
    return {"weights, its share": -(-whole // shards), "weights, gathered": gathered}


def _activations(layer: Layer, shape: Shape, step: Step) -> int:
    """Bytes that a layer keeps of one sample when nothing is computed again."""
    length = shape.tokens if layer.kind == "text" else shape.patches
    kept = layer.kept * length * KEPT[layer.kind] * (1 if step.compiled else UNCOMPILED)
    scores = SCORE_BYTES * layer.heads * length**2 if step.attention == "eager" and layer.kind == "text" else 0
    return int(kept + scores)


def _input_of(layer: Layer, model: Model, shape: Shape) -> int:
    """Bytes of one sample's input to a layer, all that a checkpointed layer keeps."""
    return BF16 * (shape.tokens * model.width if layer.kind == "text" else shape.patches * model.vision_width)


def _layers(
    facts: gemma.ModelFacts,
    config: Mapping[str, Any],
    r: int,
    number_bytes: int,
    adapted_experts: Sequence[gemma.ExpertWeight],
) -> tuple[Layer, ...]:
    """Every text and vision layer, in the order of the model, from the names and shapes of its linear modules."""
    by_layer: dict[str, dict[str, gemma.Linear]] = {}
    for linear in facts.linears:
        found = LAYER.match(linear.name)
        if found:
            by_layer.setdefault(found[1], {})[found[2].rpartition(".")[2]] = linear
    text, vision = config["text_config"], config["vision_config"]
    experts: dict[str, list[gemma.ExpertWeight]] = {}
    for weight in adapted_experts:
        experts.setdefault(weight.name.partition(".experts.")[0], []).append(weight)
    return tuple(
        _layer("vision", linears, vision, r, number_bytes)
        if "vision_tower" in name
        else _layer("text", linears, text, r, number_bytes, experts.get(name, ()))
        for name, linears in by_layer.items()
    )


def _layer(
    kind: Literal["text", "vision"],
    linears: Mapping[str, gemma.Linear],
    settings: Mapping[str, Any],
    r: int,
    number_bytes: int,
    adapted_experts: Sequence[gemma.ExpertWeight] = (),
) -> Layer:
    """Counts what the backward pass needs: inputs of linear modules (for LoRA), and of norms and products.

    The residual stream, the norm before and the output after attention and MLP: 6 widths. Queries, keys and values
    before and after their norms and rotation, the attention's output; gate, up and their product; r for each adapter.
    """
    width, gate = linears["gate_proj"].inputs, linears["gate_proj"].outputs
    queries = linears["q_proj"].outputs
    keys = linears["k_proj"].outputs if "k_proj" in linears else 0
    elements = 6 * width + 3 * queries + 4 * keys + 3 * gate + r * len(linears)
    elements += sum(one.outputs for one in linears.values() if one.clipped) // number_bytes  # what was clipped, a byte
    if "per_layer_input_gate" in linears:
        elements += 2 * width + 2 * linears["per_layer_input_gate"].outputs
    if "proj" in linears:  # the router: each token passes the experts it chose, whose output its weight multiplies
        chosen, inner = settings["top_k_experts"], settings["moe_intermediate_size"]
        elements += chosen * (width + 2 * inner) + 2 * width
        elements += chosen * sum(weight.inputs + r for weight in adapted_experts)  # what their two factors were given
    return Layer(
        kind=kind,
        kept=elements * number_bytes,
        heads=int(settings["num_attention_heads"]),
        keys=2 * keys * number_bytes if kind == "text" else 0,
    )


def _nf4_bytes(weights: int) -> int:
    """Packed weights, 8-bit scales of blocks, fp32 scales of those, and the tables that go with them."""
    scales = -(-weights // NF4_BLOCK)
    return -(-weights // 2) + scales + -(-scales // STATISTICS_BLOCK) * FP32 + NF4_TABLES
