"""NF4 against bf16: one mixture-of-experts layer of the 26B-A4B, and the loss of whole models before the first step.

    python -m benchmarks.experts layer                # outputs, gradients, time and memory of one layer, in a minute
    python -m benchmarks.experts layer --compile      # the layer compiled, as a run on a GPU computes it
    python -m benchmarks.experts loss --size 26B-A4B  # at full depth; needs room for the bf16 weights
    python -m benchmarks.experts layer --tiny         # on the CPU, the same code over a tiny model

Random weights at true shapes (true_shapes.py draws them by name, so both have the same). `layer`: nothing but the
experts differs. The router, which comes before them, is in bf16 in both and chooses the same experts, for a token that
is sent elsewhere would show the router's error. LoRA is on attention, dense MLP, router and experts, lora_B is not
zero, and the loss is the squared distance of the layer's output to fixed random numbers. What each branch adds is as
large as the residual stream: a smaller share would hide the experts' error. `loss`: every weight that a run holds at
NF4 differs. Prints Markdown tables; exits with 1 where a cosine is below what is wanted, or the losses are more than
2 % apart.
"""

# ruff: noqa: E402 torchvision's operators must be declared before anything imports transformers or peft

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from g4trainer import torchvision_operators

torchvision_operators.declare()

import torch
import torch.nn.functional as F
from benchmarks import true_shapes

from g4trainer import gemma
from g4trainer import recipe as recipes
from g4trainer.compiled import compile_layers
from g4trainer.model import ADAPTER, adapted_modules, attach_lora
from g4trainer.quantization import EXPERT_WEIGHTS

Held = Literal["nf4", "bf16"]
OUTPUT_WANTED, LORA_WANTED = 0.99, 0.98
LOSS_WITHIN = 0.02
LORA_B_STD = 0.01
LAYER = "model.language_model.layers.0"  # of sliding attention
LINEARS = r".*\.language_model\.layers\.0\..*(_proj|router\.proj)"
EXPERTS = ["layers.0.experts.gate_up_proj", "layers.0.experts.down_proj"]
WARM_UP = 3
AGREEMENT_HEAD = "|  | cosine | relative error | wanted |\n|---|---|---|---|"
COST_HEAD = """\
| experts | LoRA on experts | forward, ms | with backward, ms | experts' weights, MiB | peak beside weights, MiB |
|---|---|---|---|---|---|"""
LOSS_HEAD = """\
| size | supervised tokens | loss, bf16 | loss, NF4 | difference | its standard error | a token differs by |
|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layer", "loss"))
    parser.add_argument("--size", choices=get_args(gemma.Size), default="26B-A4B", help="of `loss`")
    parser.add_argument("--samples", type=int, default=16, help="of some 500 tokens")
    parser.add_argument("--supervised", type=int, default=128, help="tokens of a sample whose loss `loss` takes")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10, help="measurements of time, of which the median is printed")
    parser.add_argument("--compile", action="store_true", help="compile the layer")
    parser.add_argument("--tiny", action="store_true", help="the structure of the size at a tiny width")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU: no time or memory here is a measurement"
    print(f"{card}, torch {torch.__version__}{', tiny' if options.tiny else ''}\n")
    return compare_layers(options, device) if options.what == "layer" else compare_losses(options, device)


# One layer


def compare_layers(options: argparse.Namespace, device: torch.device) -> int:
    config = true_shapes.tiny_config("26B-A4B") if options.tiny else true_shapes.true_config("26B-A4B", 2)
    costs: list[str] = []
    healthy = True
    for with_experts in (True, False):
        subject = Subject(config, device, rank=options.rank, samples=options.samples, with_experts=with_experts)
        found = {}
        for held in get_args(Held):
            subject.hold_experts_in(held)
            found[held] = subject.results()
            if options.compile:
                compile_layers(subject.layer, backend="inductor" if device.type == "cuda" else "aot_eager")
            costs.append(cost_row(subject, held, with_experts, options.repeats))
        if with_experts:
            healthy = tell_agreement(found["nf4"], found["bf16"], subject.tokens, options.rank)
        del subject
        free()
    print(f"\n{options.samples} samples, {'compiled' if options.compile else 'not compiled'}:\n")
    print("\n".join([COST_HEAD, *costs]))
    return 0 if healthy else 1


class Subject:
    """A decoder layer with adapters, and what goes in."""

    def __init__(self, config: Any, device: torch.device, *, rank: int, samples: int, with_experts: bool) -> None:
        self.device = device
        base = true_shapes.build(config, device, "nf4")
        for name, parameter in base.named_parameters():
            if true_shapes.ADDED.search(name):
                parameter.fill_(1.0)
        settings = recipes.Lora(
            r=rank, lora_alpha=rank, target_modules=LINEARS, target_parameters=EXPERTS if with_experts else []
        )
        torch.manual_seed(0)
        self.model = attach_lora(base, settings, base_model="gemma-4-26B-A4B-it").train()
        text = self.model.get_base_model().model.language_model
        self.layer = text.layers[0]
        self.adapters = adapted_modules(self.model)
        for adapter in self.adapters.values():
            torch.nn.init.normal_(adapter.lora_B[ADAPTER].weight, std=LORA_B_STD)
        length = true_shapes.ROWS * true_shapes.COLUMNS + true_shapes.TEXT_TOKENS
        self.tokens = samples * length
        dtype = text.norm.weight.dtype
        drawn = torch.randn(2, samples, length, config.text_config.hidden_size, device=device)
        self.inputs = F.rms_norm(drawn[0], drawn.shape[-1:]).to(dtype)
        self.target = drawn[1]
        positions = torch.arange(length, device=device)[None]
        self.others = {
            "shared_kv_states": {},
            "position_embeddings": text.rotary_emb(self.inputs, positions, config.text_config.layer_types[0]),
            "attention_mask": torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None],
            "position_ids": positions,
        }

    @property
    def experts(self) -> Any:
        found = self.layer.experts
        return found.get_base_layer() if hasattr(found, "get_base_layer") else found

    def hold_experts_in(self, held: Held) -> None:
        """They are at NF4 at first; "bf16" puts the numbers there that they were quantized from."""
        if held == "nf4":
            return
        for name in EXPERT_WEIGHTS:
            shape = getattr(self.experts, name).quant_state.shape
            weight = true_shapes.initial(f"{LAYER}.experts.{name}", shape, self.device, self.inputs.dtype)
            setattr(self.experts, name, torch.nn.Parameter(weight, requires_grad=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output: torch.Tensor = self.layer(inputs, **self.others)
        return output.float()

    def step(self) -> torch.Tensor:
        """Forward and backward pass; returns the gradient of the input."""
        inputs = self.inputs.detach().requires_grad_()
        F.mse_loss(self.forward(inputs), self.target).backward()
        assert inputs.grad is not None
        return inputs.grad

    def results(self) -> "Results":
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            self.layer.router.register_forward_hook(lambda _, __, output: seen.update(chosen=output[-1])),
            self.layer.experts.register_forward_hook(lambda _, __, output: seen.update(experts=output)),
        ]
        with torch.no_grad():
            output = self.forward(self.inputs)
        for hook in hooks:
            hook.remove()
        self.model.zero_grad(set_to_none=True)
        input_gradient = self.step()
        found = Results(
            chosen=seen["chosen"].sort(-1).values.cpu(),
            tensors={
                "the experts' output by itself": seen["experts"],
                "what the layer adds to its input": output - self.inputs,
                "the layer's output": output,
                "gradient of the layer's input": input_gradient,
                **dict(lora_gradients(self.adapters)),
            },
        )
        self.model.zero_grad(set_to_none=True)
        return found


@dataclass
class Results:
    chosen: torch.Tensor
    """(tokens, experts a token), sorted."""
    tensors: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        self.tensors = {name: tensor.detach().float().cpu() for name, tensor in self.tensors.items()}


def lora_gradients(adapters: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Of all adapters of a part of the layer, side by side."""
    parts = {
        "attention": ".self_attn.",
        "dense MLP": ".mlp.",
        "router": ".router.",
        "experts, gate_up_proj": ".gate_up_proj",
        "experts, down_proj": ".experts.down_proj",
    }
    for title, part in parts.items():
        for factor in ("lora_A", "lora_B"):
            gradients = [getattr(one, factor)[ADAPTER].weight.grad for name, one in adapters.items() if part in name]
            if gradients:
                yield f"LoRA gradient: {title}, {factor}", torch.cat([one.flatten() for one in gradients])


def tell_agreement(nf4: Results, bf16: Results, tokens: int, rank: int) -> bool:
    """Prints the first table; whether all is as wanted."""
    same = float((nf4.chosen == bf16.chosen).all(-1).float().mean())
    print(f"NF4 experts against bf16 experts, {tokens:,} tokens, r = {rank}; same experts chosen for {same:.2%}:\n")
    print(AGREEMENT_HEAD)
    healthy = same == 1.0
    for name, found in nf4.tensors.items():
        expected = bf16.tensors[name]
        cosine = float(F.cosine_similarity(found.flatten().double(), expected.flatten().double(), dim=0))
        error = float((found - expected).norm() / expected.norm())
        wanted = OUTPUT_WANTED if name == "the layer's output" else LORA_WANTED if "LoRA" in name else None
        healthy &= math.isfinite(cosine) and (wanted is None or cosine >= wanted)
        print(f"| {name} | {cosine:.4f} | {error:.3f} | {wanted or ''} |")
    return healthy


def cost_row(subject: Subject, held: Held, with_experts: bool, repeats: int) -> str:
    def forward() -> None:
        subject.forward(subject.inputs.detach().requires_grad_())

    def both() -> None:
        subject.step()
        subject.model.zero_grad(set_to_none=True)

    experts = sum(bytes_of(getattr(subject.experts, name)) for name in EXPERT_WEIGHTS)
    one_way = seconds_of(forward, subject.device, repeats)
    free()
    before = true_shapes.gibibytes(subject.device)
    there_and_back = seconds_of(both, subject.device, repeats)
    peak = true_shapes.gibibytes(subject.device, peak=True) - before
    return (
        f"| {held} | {'yes' if with_experts else 'no'} | {one_way * 1e3:.1f} | {there_and_back * 1e3:.1f} "
        f"| {experts / 2**20:,.0f} | {peak * 1024:,.0f} |"
    )


def seconds_of(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """The median, after a few that warm up."""
    found = []
    for _ in range(WARM_UP + repeats):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - begun)
    return statistics.median(found[WARM_UP:])


def bytes_of(weight: Any) -> int:
    """With its statistics, where it is packed."""
    state = getattr(weight, "quant_state", None)
    statistics_of = [] if state is None else [state.absmax, state.state2.absmax]
    return sum(tensor.nbytes for tensor in (weight, *statistics_of))


# Whole models


def compare_losses(options: argparse.Namespace, device: torch.device) -> int:
    config = true_shapes.tiny_config(options.size) if options.tiny else true_shapes.true_config(options.size, None)
    losses = {}
    for quantization in ("nf4", "none"):
        begun = time.perf_counter()
        losses[quantization] = losses_of(config, quantization, options.samples, options.supervised, device)
        print(
            f"{quantization}: {time.perf_counter() - begun:.0f} s, {true_shapes.gibibytes(device):.1f} GiB held after"
        )
        free()
    nf4, full = losses["nf4"], losses["none"]
    off = float(nf4.mean() / full.mean() - 1)
    error = float((nf4 - full).std() / math.sqrt(len(full)) / full.mean())
    print(f"\n{LOSS_HEAD}")
    print(
        f"| {options.size} | {len(full):,} | {full.mean():.4f} | {nf4.mean():.4f} | {off:+.3%} | {error:.3%} "
        f"| {(nf4 - full).abs().mean():.4f} |"
    )
    return 0 if abs(off) <= LOSS_WITHIN else 1


@torch.inference_mode()
def losses_of(
    config: Any, quantization: Literal["nf4", "none"], samples: int, supervised: int, device: torch.device
) -> torch.Tensor:
    """Of each supervised token of a model without adapters, which is what a fresh adapter leaves it: (tokens,) fp64."""
    model = true_shapes.build(config, device, quantization).eval()
    torch.manual_seed(0)
    found = []
    for _ in range(samples):  # one by one, so that the logits take little memory
        batch = true_shapes.batch_of(1, config, device)
        length = batch["input_ids"].shape[1]
        kept = torch.arange(length - supervised - 1, length - 1, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(**batch, logits_to_keep=kept, use_cache=False).logits.float()
        found.append(F.cross_entropy(logits[0], batch["input_ids"][0, -supervised:], reduction="none").double().cpu())
    return torch.cat(found)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    raise SystemExit(main())
