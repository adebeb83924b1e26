"""A Gemma 4 at its true shapes on one GPU, random weights: does it train, how fast, in how much memory.

    python benchmarks/true_shapes.py --size 31B --batch 2 8
    python benchmarks/true_shapes.py --size 31B --tiny        # on the CPU, the same code over a tiny model

The weights are drawn and quantized one module at a time on the card, so that host memory holds none of them. LoRA is
attached by the trainer's own code. Each batch takes a few optimizer steps with activation checkpointing; printed are
the loss, whether the gradients are finite and the vision tower's non-zero, the peak of memory, and seconds a sample.
Exits with 1 where a loss or gradient is not finite, or a vision adapter got no gradient.
"""

# ruff: noqa: E402 torchvision's operators must be declared before anything imports transformers or peft

import argparse
import json
import re
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from g4trainer import torchvision_operators

torchvision_operators.declare()

import accelerate
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from transformers import AutoModelForMultimodalLM, Gemma4Config
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from g4trainer import experts, gemma
from g4trainer import recipe as recipes
from g4trainer.compiled import compile_layers
from g4trainer.forward import never_wait
from g4trainer.model import attach_lora, compute_dtype
from g4trainer.quantization import UNQUANTIZED, Nf4Config, compute_in, prepare_experts

BUDGET = 280  # soft tokens
ROWS, COLUMNS = 14, 19  # of soft tokens: what an ordinary photo fills of that budget
TEXT_TOKENS = 238  # beside the image's, so that a sample at 280 has 504
SUPERVISED = 10
LEARNING_RATE = 5e-5
ADDED = re.compile(r"post_(attention_layernorm|feedforward_layernorm|per_layer_input_norm)\.weight$")
BRANCH = 0.2  # what a layer adds to the residual stream, beside an embedding of 1


def main() -> int:
    parser = parser_of_shapes(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="samples a step, one measurement each")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each batch; the first is not timed")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--checkpointing", choices=("full", "none"), default="full")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--compile", action="store_true", help="compile each layer and place images, as a run does")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    begun = time.perf_counter()
    config = tiny_config(options.size) if options.tiny else true_config(options.size, options.layers)
    settings = recipes.Lora(r=options.rank, lora_alpha=options.rank)
    model = attach_lora(build(config, device, options.quantization), settings, base_model=f"gemma-4-{options.size}-it")
    if options.checkpointing == "full":
        checkpoint_activations(model)
    if options.compile:
        never_wait(model)
        compile_layers(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{options.size}{' (tiny)' if options.tiny else ''}: built in {time.perf_counter() - begun:.0f} s, "
        f"{gibibytes(device):.1f} GiB, {trained:,} parameters to train, torch {torch.__version__}"
    )
    healthy = True
    for size in options.batch:
        result = measure(model, batch_of(size, config, device), options.steps, device)
        print(json.dumps({"batch": size, **result}))
        healthy &= result["finite"] and result["vision_without_gradient"] == 0
    return 0 if healthy else 1


def parser_of_shapes(description: str | None) -> argparse.ArgumentParser:
    """For a benchmark's command line: which model is built."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=get_args(gemma.Size), default="31B")
    parser.add_argument("--layers", type=int, help="text layers to keep; default all")
    parser.add_argument("--tiny", action="store_true", help="the structure of the size at a tiny width")
    return parser


def true_config(size: gemma.Size, layers: int | None) -> Any:
    document = gemma.true_config(size)
    text = document["text_config"]
    if layers:
        text |= {"num_hidden_layers": layers, "layer_types": text["layer_types"][:layers]}
    return Gemma4Config(
        text_config=text, vision_config=document["vision_config"], audio_config=None, tie_word_embeddings=True
    )


def tiny_config(size: gemma.Size) -> Any:
    from g4trainer import tiny

    return tiny.make_config(size, tiny.make_tokenizer())


def build(config: Any, device: torch.device, quantization: Literal["nf4", "none"] = "nf4") -> Any:
    """The base model with random weights, at NF4 what a run holds at NF4, each weight made on the device.

    A weight depends on its name alone: the same model at NF4 and in full precision has the same weights.
    """
    dtype = compute_dtype(device)
    config._experts_implementation = experts.register()
    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModelForMultimodalLM.from_config(config, dtype=dtype)
    if quantization == "nf4":
        replace_with_bnb_linear(model, list(UNQUANTIZED), Nf4Config(str(dtype).removeprefix("torch.")))
        prepare_experts(model)
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = initial(name, parameter.shape, device, dtype)
        if isinstance(parameter, Params4bit):
            linear = module if isinstance(module, Linear4bit) else None
            real = Params4bit(weight, requires_grad=False, quant_type="nf4", module=linear).to(device)
        else:
            real = torch.nn.Parameter(weight, requires_grad=False)
        setattr(module, attribute, real)
    for name, buffer in model.named_buffers():
        if name.endswith("std_bias"):
            buffer.zero_()
        elif name.endswith("std_scale"):
            buffer.fill_(1.0)
    model.tie_weights()
    model.to(device)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = quantization == "nf4"  # what PEFT asks before it adapts 4-bit layers
    compute_in(model, dtype)
    return model


def initial(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers of unit gain for matrices; for norms and scales ones, but for two that keep rounding small.

    Gemma 4 has its attention's scale in the norm of the queries, and what a layer adds to the residual stream passes a
    norm of its own. With ones there, a random model of many layers makes of any rounding a different output.
    """
    if len(shape) == 1:
        value = shape[0] ** -0.5 if name.endswith("q_norm.weight") else BRANCH if ADDED.search(name) else 1.0
        return torch.full(shape, value, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, device=device, dtype=dtype, generator=generator).mul_(shape[-1] ** -0.5)


def checkpoint_activations(model: PeftModel) -> None:
    """Checkpoints every layer, never reentrant, whatever this version of transformers calls it."""
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def batch_of(size: int, config: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Random samples of one photo and a question, the last tokens supervised."""
    vision, text = config.vision_config, config.text_config
    pooling = vision.pooling_kernel_size
    rows, columns, patches, soft = ROWS * pooling, COLUMNS * pooling, BUDGET * pooling**2, ROWS * COLUMNS
    positions = torch.full((patches, 2), -1)
    positions[: rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    pixels = torch.rand(size, patches, 3 * vision.patch_size**2)
    pixels[:, rows * columns :] = 0
    ids = torch.randint(32, text.vocab_size // 2, (size, soft + TEXT_TOKENS))  # below the special tokens' ids
    ids[:, 8 : 8 + soft] = config.image_token_id
    tensors = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": pixels,
        "image_position_ids": positions.expand(size, -1, -1),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def measure(model: PeftModel, batch: dict[str, torch.Tensor], steps: int, device: torch.device) -> dict[str, Any]:
    """A few optimizer steps on one batch, the first of which warms up and is not timed; then one taken apart.

    As in a run, a step does not wait for the one before: the time is the mean of all but the first.
    """
    model.train()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), lr=LEARNING_RATE, fused=device.type == "cuda")
    loss_of = partial(supervised_loss, model, batch, device)
    vision = {name: p for name, p in adapters.items() if "vision_tower" in name and "lora_B" in name}
    numbers, still = [], 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for step in range(steps):
        if step == 1:
            synchronize(device)
            begun = time.perf_counter()
        loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(adapters.values()), 1.0)
        optimizer.step()
        numbers.append(torch.stack([loss.detach(), norm]))
        if step == 0:
            still = sum(not gradient(p) for p in vision.values())
        optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    seconds = (time.perf_counter() - begun) / max(1, steps - 1)
    told = torch.stack(numbers)
    return {
        "losses": [round(loss, 4) for loss in told[:, 0].tolist()],
        "finite": bool(told.isfinite().all()),
        "vision_without_gradient": still,
        "vision_adapters": len(vision),
        "peak_gib": round(gibibytes(device, peak=True), 2),
        "seconds_a_sample": round(seconds / len(batch["input_ids"]), 4),
        "tokens_a_sample": batch["input_ids"].shape[1],
        **(passes(loss_of, optimizer) if device.type == "cuda" else {}),
    }


def supervised_loss(model: PeftModel, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Of a forward pass that computes logits where they are supervised."""
    width = batch["input_ids"].shape[1]
    kept = torch.arange(width - SUPERVISED - 1, width - 1, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(**batch, logits_to_keep=kept, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, -SUPERVISED:].flatten())


def passes(loss_of: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds and memory of the forward and the backward pass, each for itself, and of what is held beside them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    figures = {"held_gib": torch.cuda.memory_allocated() / 2**30}
    begun = time.perf_counter()
    loss = loss_of()
    torch.cuda.synchronize()
    figures |= {
        "forward_s": time.perf_counter() - begun,
        "forward_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "after_forward_gib": torch.cuda.memory_allocated() / 2**30,
    }
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    loss.backward()
    torch.cuda.synchronize()
    figures |= {
        "backward_s": time.perf_counter() - begun,
        "backward_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    optimizer.zero_grad(set_to_none=True)
    return {name: round(figure, 3) for name, figure in figures.items()}


def synchronize(device: torch.device) -> None:
    """Waits for all that the device was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def gradient(parameter: torch.nn.Parameter) -> bool:
    """Whether a gradient came that is not all zero."""
    return parameter.grad is not None and bool(parameter.grad.any())


def gibibytes(device: torch.device, *, peak: bool = False) -> float:
    """Memory that torch holds on the GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    held: int = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return held / 2**30


if __name__ == "__main__":
    raise SystemExit(main())
