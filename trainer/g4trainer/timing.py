"""Seconds of a run, from floating-point operations, the card's rates and measured efficiency; no torch is needed.

A step takes what the card computes, or what the host needs to start every kernel of every layer, whichever is longer:
small models and small micro-batches wait for the host. The card's time is that of matrix products, by its rate, and of
everything between them, by its bandwidth and what the layers keep: narrow models spend more of theirs on the second.
All was fitted to passes on an H200 (`python -m g4trainer.calibration` prints the steps); other cards are scaled by
their published rates, which is why their range is wide.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from g4trainer.recipe import Recipe
from g4trainer.vram import (
    ADAM,
    FP32,
    GIB,
    Attention,
    Checkpointing,
    Model,
    Shape,
    Step,
    answer_tokens,
    attention_for,
    kept_by_layers,
)

RECOMPUTED: Mapping[Checkpointing, float] = {"none": 0.0, "half": 0.5, "full": 1.0}
"""Share of the forward pass that the backward pass computes again."""
ACHIEVED_RATE = 0.8
"""Of a card's published dense bf16 rate, what large matrix products reach: 790 of 989 TFLOP/s measured on an H200."""
PRODUCT_EFFICIENCY = 0.70
"""Of that, what a layer's matrix products reach, LoRA's and attention's forward pass among them. This and the six
below: fitted together to 14 forward and backward passes of 31B, 26B-A4B and E4B, each within 3 %."""
FORWARD_TRAFFIC, BACKWARD_TRAFFIC = 2.9, 3.9
"""Bytes that norms, activations and sums move through the card's memory, as multiples of what the layers keep."""
EXPERTS_EFFICIENCY = 0.17
"""Of ACHIEVED_RATE, what grouped products over 128 experts reach, sorting and gathering rows included: 26B-A4B with 259
rows an expert."""
ATTENTION_BACKWARD_EFFICIENCY = 0.33
"""The same for attention in the backward pass."""
MASKED_FORWARD_EFFICIENCY, MASKED_BACKWARD_EFFICIENCY = 0.10, 0.041
"""The same for the text layers' scaled_dot_product_attention, which has a mask and heads of 256 and 512."""
LINEAR_FORWARD_S, LINEAR_BACKWARD_S, LINEAR_STEP_S = 0.00044, 0.00019, 0.00012
"""The host's time for a linear module: to start its kernels and its share of those between, and to clip and step its
adapter. Of the 31B at a micro-batch of 1; it goes by the host's processor."""
STEP_S = 0.02
"""Clipping, the optimizer's and the loss's own kernels, and the wait for them."""
DEQUANTIZATION = 0.73
"""Of a card's published bandwidth, what dequantizing reaches: 43.7 ms for both passes over the 31B, on an H200. Taken
for all that moves through its memory."""
DEQUANTIZED_BYTES = 0.5 + 2
"""For each weight: read at 4 bits, written in bf16."""
TOKEN_LAYER_S = 0.003
"""For one text layer of one generated token, not compiled. From 0.17 to 0.30 s a token measured at 60 layers."""
OPTIMIZER_BYTES = 2 * FP32 + 2 * FP32 + 2 * ADAM
"""Moved by AdamW and by clipping, for each trained parameter."""

READ_GIB_S = 0.8
"""From a bucket in the same region, by parallel readers; not measured on Cloud Run. From a disk, the NF4 copy was
loaded at 1.29 beside an H200: the bucket sets the pace."""
WRITE_GIB_S = 0.3
"""To the mounted bucket. An assumption."""
START_S = 60.0
"""Container, imports, data and the first compilation of each layer: 38 to 49 s of it measured beside an H200."""
CHECKPOINT_EVERY_S = 300.0
CLOSING_S = 45.0
"""What an attempt leaves of its timeout: the safety margin of g4trainer.deadline and a last checkpoint."""
CALIBRATED_ON = "nvidia-h200-141gb"
RANGE_CALIBRATED, RANGE_OTHER = (0.9, 1.2), (0.75, 1.6)
"""The estimate's lower and upper bound, as shares of it."""


@dataclass(frozen=True)
class Card:
    """Published rates of a GPU."""

    tflops: float
    """Dense bf16 with fp32 accumulation, in TFLOP/s."""
    bandwidth_gb_s: float
    """Of its memory, in GB/s."""


CARDS: Mapping[str, Card] = {
    "nvidia-rtx-pro-6000": Card(500, 1597),
    "nvidia-l4": Card(121, 300),
    "nvidia-a100-40gb": Card(312, 1555),
    "nvidia-a100-80gb": Card(312, 2039),
    "nvidia-h100-80gb": Card(989, 3350),
    "nvidia-h100-mega-80gb": Card(989, 3350),
    "nvidia-h200-141gb": Card(989, 4800),
    "nvidia-b200": Card(2250, 8000),
}
"""By Cloud Run's and Vertex AI's names, as in limits.json. Of NVIDIA's data sheets; where one states the rate with
sparsity, half of it."""


@dataclass(frozen=True)
class Samples:
    """How many images a run sees."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Time:
    """Expected seconds by phase, in order, and what the estimate may be off by."""

    phases: Mapping[str, float]
    seconds_a_sample: float
    slices: int
    """Attempts under the recipe's timeout."""
    low: float
    high: float
    """Seconds in all, at least and at most."""
    calibrated: bool
    """Whether the step was measured on this card."""

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def step_seconds(
    model: Model, shape: Shape, card: Card, *, micro_batch: int, checkpointing: Checkpointing, accumulation: int
) -> float:
    """Of one optimizer step. What several GPUs send one another is not counted."""
    again = RECOMPUTED[checkpointing]
    weights, linears = _weights_pass_s(model, card), len(model.facts.linears)
    forward, backward = _forward_s(model, shape, card), _backward_s(model, shape, card)
    passes = weights * (2 + again) + micro_batch * (forward * (1 + again) + backward)
    optimizer = model.lora_parameters * OPTIMIZER_BYTES / (card.bandwidth_gb_s * 1e9)
    host = accumulation * (LINEAR_FORWARD_S * (1 + again) + LINEAR_BACKWARD_S) + LINEAR_STEP_S
    return max(accumulation * passes + optimizer + STEP_S, linears * host)


def answer_seconds(model: Model, shape: Shape, card: Card, *, batch: int) -> float:
    """Of one image of the evaluation, whose batch goes on to its longest answer."""
    token = _weights_pass_s(model, card) + TOKEN_LAYER_S * model.facts.text_layers
    return _forward_s(model, shape, card) + answer_tokens(model.recipe) * token / batch


def estimate_time(
    recipe: Recipe,
    model: Model,
    shape: Shape,
    samples: Samples,
    *,
    micro_batch: int,
    checkpointing: Checkpointing,
    evaluation_batch_size: int,
    evaluations: int,
    card_name: str,
) -> Time:
    """From the first attempt's start to results.json, on one of CARDS.

    evaluations: measurements of the validation loss.
    """
    card, training = CARDS[card_name], recipe.training
    share = training.effective_batch_size // recipe.job.gpus
    step = step_seconds(
        model,
        shape,
        card,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        accumulation=max(1, share // micro_batch),
    )
    steps = math.ceil(training.num_train_epochs * math.ceil(samples.train / training.effective_batch_size))
    answer = answer_seconds(model, shape, card, batch=evaluation_batch_size)
    answers = answer * _answered_by_one(samples.test, evaluation_batch_size, recipe.job.gpus)
    train = steps * step
    validation = evaluations * samples.validation * step / share * 0.5 / recipe.job.gpus  # no backward pass
    checkpoint = model.lora_parameters * (FP32 + ADAM) / GIB / WRITE_GIB_S
    phases = {
        "load": START_S + sum(model.weights.values()) / GIB / READ_GIB_S,
        "baseline": answers if recipe.evaluation.baseline else 0.0,
        "train": train + validation,
        "checkpoints": checkpoint * max(1, round(train / CHECKPOINT_EVERY_S)),
        "final": answers,
    }
    if recipe.evaluation.validation:
        phases["validation"] = answer * _answered_by_one(samples.validation, evaluation_batch_size, recipe.job.gpus)
    low, high = RANGE_CALIBRATED if card_name == CALIBRATED_ON else RANGE_OTHER
    slices = attempts_needed(sum(phases.values()), phases["load"], recipe.job.timeout_s)
    phases["retries"] = (slices - 1) * (phases["load"] + CLOSING_S)
    total = sum(phases.values())
    return Time(phases, step / share, slices, low * total, high * total, card_name == CALIBRATED_ON)


def _answered_by_one(samples: int, batch: int, gpus: int) -> int:
    """Samples that the GPU with most of them answers: they take whole batches in turn."""
    batches = math.ceil(samples / batch)
    return min(samples, math.ceil(batches / gpus) * batch)


def attempts_needed(total_s: float, load_s: float, timeout_s: int) -> int:
    """Attempts that the work takes when each loads the model again and stops before its timeout.

    Returns 0 where an attempt has no time left to work in: the timeout is too short for any progress.
    """
    useful = timeout_s - load_s - CLOSING_S
    return max(1, math.ceil((total_s - load_s) / useful)) if useful > 0 else 0


def _forward_s(model: Model, shape: Shape, card: Card) -> float:
    """The card's seconds for one sample, weights apart."""
    operations = forward_operations(model, shape)
    masked = _attention(model, shape) == "sdpa"
    seconds = (operations.base + operations.lora + operations.vision_attention) / PRODUCT_EFFICIENCY
    seconds += operations.experts / EXPERTS_EFFICIENCY
    seconds += operations.text_attention / (MASKED_FORWARD_EFFICIENCY if masked else PRODUCT_EFFICIENCY)
    return seconds / _rate(card) + FORWARD_TRAFFIC * _kept(model, shape) / _bandwidth(card)


def _backward_s(model: Model, shape: Shape, card: Card) -> float:
    """The same of its backward pass: gradients of every product's input, of LoRA's weights too."""
    operations = forward_operations(model, shape)
    masked = _attention(model, shape) == "sdpa"
    seconds = (operations.base + 2 * operations.lora) / PRODUCT_EFFICIENCY
    seconds += operations.experts / EXPERTS_EFFICIENCY
    seconds += 2.5 * operations.vision_attention / ATTENTION_BACKWARD_EFFICIENCY
    text = MASKED_BACKWARD_EFFICIENCY if masked else ATTENTION_BACKWARD_EFFICIENCY
    seconds += 2.5 * operations.text_attention / text
    return seconds / _rate(card) + BACKWARD_TRAFFIC * _kept(model, shape) / _bandwidth(card)


def _attention(model: Model, shape: Shape) -> Attention:
    return attention_for(model.recipe.model.attn_implementation, shape.tokens)


def _kept(model: Model, shape: Shape) -> int:
    """Bytes that all layers keep of a sample where nothing is computed again."""
    return kept_by_layers(model, shape, Step(1, "none", _attention(model, shape), accumulates=False))


def _rate(card: Card) -> float:
    return card.tflops * 1e12 * ACHIEVED_RATE


def _bandwidth(card: Card) -> float:
    return card.bandwidth_gb_s * 1e9 * DEQUANTIZATION


def _weights_pass_s(model: Model, card: Card) -> float:
    """Seconds to dequantize every weight once, the experts' too."""
    quantized = sum(one.parameters for one in model.quantized)
    if model.quantized:
        quantized += model.facts.expert_parameters
    return quantized * DEQUANTIZED_BYTES / _bandwidth(card)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one sample's forward pass."""

    base: float
    """The base model's matrix products, but for those of experts."""
    experts: float
    """Those of experts, their LoRA's too."""
    lora: float
    text_attention: float
    vision_attention: float

    @property
    def total(self) -> float:
        return self.base + self.experts + self.lora + self.text_attention + self.vision_attention


def forward_operations(model: Model, shape: Shape) -> Operations:
    """Of one sample."""
    lengths = {"vision": shape.patches}
    base = lora = 0.0
    attention = {"text": 0.0, "vision": 0.0}
    for linear in model.facts.linears:
        length = lengths.get(linear.group, shape.tokens)
        base += 2 * linear.parameters * length
        if linear.name.endswith(("q_proj", "q_proj.linear")):
            attention["vision" if linear.group == "vision" else "text"] += 4 * length**2 * linear.outputs
    for linear in model.adapted:
        lora += 2 * model.recipe.lora.r * (linear.inputs + linear.outputs) * lengths.get(linear.group, shape.tokens)
    passed = model.expert_share * shape.tokens  # tokens of each expert
    experts = 2 * model.facts.expert_parameters * passed
    adapters = sum(one.experts * (one.inputs + one.outputs) for one in model.adapted_experts)
    experts += 2 * model.recipe.lora.r * adapters * passed
    return Operations(base, experts, lora, attention["text"], attention["vision"])


def describe(time: Time) -> Mapping[str, Any]:
    """For JSON."""
    return {
        "seconds": {name: round(value) for name, value in time.phases.items()},
        "total_s": round(time.total),
        "range_s": [round(time.low), round(time.high)],
        "seconds_a_sample": round(time.seconds_a_sample, 4),
        "attempts": time.slices,
        "calibrated": time.calibrated,
    }
