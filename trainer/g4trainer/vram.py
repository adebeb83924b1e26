"""GPU memory of a run, in bytes by part, from config.json and a recipe: neither torch nor a GPU is needed.

Weights, LoRA, gradients and optimizer follow from the shapes and are exact (tests count them with torch). Activations
are counted too, tensor by tensor that the compiler keeps of a layer for its backward pass, which is then gone through
layer by layer; `python -m g4trainer.calibration` prints the model's error on what was measured.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
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
BUCKET_BYTES = 64 * 2**20
"""Gradients that several GPUs sum at once: enough to fill the network, and the last of them, for which all wait, is
little."""
BUCKETS_UNDER_WAY = 4
"""At most, each in a buffer of its own: the network has work while one is filled and one is taken in."""

EAGER_BELOW_TOKENS = 1024
"""Sequences shorter than this take eager text attention, which is faster there and keeps its scores."""
SCORE_BYTES = 2 * BF16
"""Kept of each score of eager attention: the product of query and key, and its softmax."""
UNCOMPILED = 2.0
"""Kept without compilation, against a compiled layer: norms, activations and casts each keep their input. Of the twelve
settings that are not compiled in benchmarks/README.md."""
MOVING_INNER, MOVING_WIDTHS = 4, 2
"""In flight in a layer's backward pass, a token: gradients of the MLP's product (the base weight's part and LoRA's), of
gate and up; and of the layer's output and input. Measured on their own: 26B-A4B and E4B with all computed again."""
CUBLAS_WORKSPACES = 2 * 32 * 2**20
"""PyTorch's, of the forward pass's thread and the backward pass's, on an H200; on older cards less."""
ANSWERING_LAYERS, ANSWERING_MATRICES = 1.5, 2
"""Temporaries of an evaluation: as multiples of what its largest layer would keep, and of the largest matrix in bf16.
Assumed."""
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
    """Bytes a token (or patch), attention scores apart, its input included."""
    input: int
    """Bytes a token of its input: all that is kept where the layer is computed again."""
    moving: int
    """Bytes a token in flight in its backward pass."""
    matrix: int
    """Bytes of its largest weight once dequantized; 0 where none is quantized."""
    adapters: int
    """Parameters of its LoRA."""
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
        self.shards, self.number_bytes = shards, number_bytes
        self.facts = gemma.facts_of(config)
        self.recipe = recipe
        linears = self.facts.linears
        nf4 = recipe.model.quantization == "nf4"
        self.quantized = [one for one in linears if nf4 and not one.name.endswith(UNQUANTIZED_LINEARS)]
        self.adapted = lora_targets.adapted_linears(self.facts, recipe.lora)
        self.adapted_experts = lora_targets.adapted_experts(self.facts, recipe.lora)
        self.lora_parameters = lora_targets.lora_parameters(self.facts, recipe.lora)
        self.largest_adapter = lora_targets.largest_adapter(self.facts, recipe.lora)
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
        self.layers = _layers(self, config)
        text = config["text_config"]
        count = text.get("num_experts") or 0
        self.expert_share = text.get("top_k_experts", 0) / count if count else 0.0
        self.vocabulary = int(text.get("vocab_size", 262_144))
        self.width = int(text["hidden_size"])
        per_layer = (one.outputs for one in linears if one.name.endswith("per_layer_model_projection"))
        self.per_layer_width = next(per_layer, 0)
        self.patch = next(one.inputs for one in linears if one.name.endswith("patch_embedder.input_proj"))
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
    """The peak of an optimizer step: at the end of the forward pass, or in the backward pass of some layer.

    Gone through from the last layer to the first: what a layer kept is let go of behind it, and its adapters have
    gradients; one that is computed again keeps all that it would, while it is at work. Several GPUs hold buffers for
    gradients on their way (g4trainer.gradients).
    """
    batch, lora = step.micro_batch, model.lora_parameters
    held = {
        **model.weights,
        "LoRA": lora * FP32,
        "optimizer": lora * ADAM,
        "batch": batch * shape.patches * model.patch * (FP32 + BF16),
    }
    layers = [_kept_by(layer, shape, step, recomputed) for layer, recomputed in _in_order(model, step)]
    kept = {kind: sum(one.kept for one in layers if one.layer.kind == kind) for kind in ("text", "vision")}
    # Per-layer embeddings: what their norm was given, in fp32, for it is not compiled; what it said; its gradient.
    kept["text"] += batch * shape.tokens * model.per_layer_width * (FP32 + 2 * BF16)
    kept["vision"] += batch * shape.patches**2 // model.patches_a_token * BF16  # the matrix that pools patches
    copied = lora - sum(one.layer.adapters for one in layers if one.recomputed)
    made = lora - sum(one.layer.adapters for one in layers)  # whose gradients this pass has made
    buffers = math.prod(gradient_buffers(lora, model.largest_adapter)) if model.recipe.job.gpus > 1 else 0

    def moment(name: str, *, logits: int = 0, workspace: int = 0) -> Memory:
        parts = {
            **held,
            "gradients": ((lora if step.accumulates else made) + buffers) * FP32,
            "bf16 copies of LoRA": copied * BF16,
            "activations, text": kept["text"],
            "activations, vision": kept["vision"],
            "logits": logits,
            "workspace": workspace + (CUBLAS_WORKSPACES if model.number_bytes == BF16 else 0),
        }
        return Memory(parts, name)

    logits = batch * (shape.supervised * model.vocabulary * LOGIT_BYTES + shape.tokens * model.width * FP32)
    peak = moment("end of the forward pass", logits=logits)
    for one in reversed(layers):
        name = "backward pass of the " + ("text layers" if one.layer.kind == "text" else "vision tower")
        if one.layer.kind == "vision":
            kept["text"] = 0
        peak = max(peak, moment(name, workspace=one.working), key=lambda memory: memory.total)
        kept[one.layer.kind] -= one.kept
        copied -= 0 if one.recomputed else one.layer.adapters
        made += one.layer.adapters
    return peak


def gradient_buffers(parameters: int, largest: int) -> tuple[int, int]:
    """How many buffers each of several GPUs holds for gradients on their way, and for how many numbers each.

    parameters: that are trained. largest: of them in one tensor.
    """
    size = min(max(BUCKET_BYTES // FP32, largest), parameters)
    return min(BUCKETS_UNDER_WAY, math.ceil(parameters / size)) if size else 0, size


def kept_by_layers(model: Model, shape: Shape, step: Step) -> int:
    """Bytes of one sample from the forward to the backward pass, where nothing is computed again."""
    return sum(_activations(layer, shape, step) for layer in model.layers)


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
        "workspace": int(ANSWERING_LAYERS * working) + ANSWERING_MATRICES * model.largest_matrix,
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


@dataclass(frozen=True)
class _Kept:
    """A layer in a step, in bytes of the whole micro-batch."""

    layer: Layer
    recomputed: bool
    kept: int
    """From its forward pass to its backward pass."""
    working: int
    """Beside that while its backward pass is at work: a weight, gradients, and what was computed again."""


def _in_order(model: Model, step: Step) -> Iterator[tuple[Layer, bool]]:
    """The layers as the forward pass meets them, and whether each is computed again."""
    for index, layer in enumerate(model.layers):
        yield layer, step.checkpointing == "full" or (step.checkpointing == "half" and index % 2 == 0)


def _kept_by(layer: Layer, shape: Shape, step: Step, recomputed: bool) -> _Kept:
    length = step.micro_batch * (shape.tokens if layer.kind == "text" else shape.patches)
    whole = step.micro_batch * _activations(layer, shape, step)
    kept = layer.input * length if recomputed else whole
    copies = layer.adapters * BF16 if recomputed else 0
    return _Kept(layer, recomputed, kept, whole - kept + copies + layer.moving * length + layer.matrix)


def _activations(layer: Layer, shape: Shape, step: Step) -> int:
    """Bytes that a layer keeps of one sample when nothing is computed again."""
    length = shape.tokens if layer.kind == "text" else shape.patches
    kept = layer.kept * length * (1 if step.compiled else UNCOMPILED)
    scores = SCORE_BYTES * layer.heads * length**2 if step.attention == "eager" and layer.kind == "text" else 0
    return int(kept + scores)


def _layers(model: Model, config: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Every text and vision layer, in the order of the model, from the names and shapes of its linear modules."""
    text, vision = config["text_config"], config["vision_config"]
    adapted = {one.name for one in model.adapted}
    experts: dict[str, list[gemma.ExpertWeight]] = {}
    for weight in model.facts.expert_weights:
        experts.setdefault(weight.name.partition(".experts.")[0], []).append(weight)
    return tuple(
        _layer("vision", linears, model, vision, adapted, ())
        if "vision_tower" in name
        else _layer("text", linears, model, text, adapted, experts.get(name, ()))
        for name, linears in _by_layer(model.facts.linears).items()
    )


def _by_layer(linears: Sequence[gemma.Linear]) -> dict[str, dict[str, gemma.Linear]]:
    """Of each layer's name the linear modules in it, by the last part of theirs."""
    found: dict[str, dict[str, gemma.Linear]] = {}
    for linear in linears:
        match = LAYER.match(linear.name)
        if match:
            found.setdefault(match[1], {})[match[2].rpartition(".")[2]] = linear
    return found


def _layer(
    kind: Literal["text", "vision"],
    linears: Mapping[str, gemma.Linear],
    model: Model,
    settings: Mapping[str, Any],
    adapted: Collection[str],
    experts: Sequence[gemma.ExpertWeight],
) -> Layer:
    """Counts what the compiler keeps for the backward pass, as it cut the graphs of every size's layers.

    Five widths: the layer's input, what attention and MLP are given and what they say. Queries and keys before and
    after norm and rotation, values before and after their norm, the attention's output; keys and values of the text
    layers are repeated for every query head. Gate, up and their product; r for each adapter. Less than 1 % is left out.
    """
    r, number_bytes = model.recipe.lora.r, model.number_bytes
    width, gate = linears["gate_proj"].inputs, linears["gate_proj"].outputs
    queries = linears["q_proj"].outputs
    keys, values = (linears[one].outputs if one in linears else 0 for one in ("k_proj", "v_proj"))
    elements = 5 * width + 5 * queries + keys + values + 3 * gate + r * len(linears)
    if linears["q_proj"].clipped:  # keys, values, up and the output clip their input for themselves; a byte an element
        elements += 3 * width + queries + width // number_bytes
    if "per_layer_input_gate" in linears:
        elements += 2 * width + 2 * linears["per_layer_input_gate"].outputs
    adapted_experts = [one for one in experts if one in model.adapted_experts]
    if experts:  # behind a router: each token passes those it chose, whose output its weight multiplies
        chosen, inner = settings["top_k_experts"], settings["moe_intermediate_size"]
        elements += chosen * (width + 2 * inner) + 3 * width + settings["num_experts"] * FP32 // number_bytes
        elements += chosen * sum(one.inputs + r for one in adapted_experts)  # what their two factors were given
    adapters = sum(one.inputs + one.outputs for one in linears.values() if one.name in adapted)
    adapters += sum(one.experts * (one.inputs + one.outputs) for one in adapted_experts)
    matrices = [*(one.parameters for one in linears.values()), *(one.parameters for one in experts)]
    return Layer(
        kind=kind,
        kept=elements * number_bytes,
        input=width * number_bytes,
        moving=(MOVING_INNER * gate + MOVING_WIDTHS * width) * number_bytes,
        matrix=max(matrices) * BF16 if model.quantized else 0,
        adapters=r * adapters,
        heads=int(settings["num_attention_heads"]),
        keys=2 * keys * number_bytes if kind == "text" else 0,
    )


def _nf4_bytes(weights: int) -> int:
    """Packed weights, 8-bit scales of blocks, fp32 scales of those, and the tables that go with them."""
    scales = -(-weights // NF4_BLOCK)
    return -(-weights // 2) + scales + -(-scales // STATISTICS_BLOCK) * FP32 + NF4_TABLES
