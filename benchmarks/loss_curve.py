"""Does the fast path learn as the plain one does? Loss curves of the embedded model, side by side.

    python -m benchmarks.loss_curve --out curves                 # 300 steps; on a CPU a quarter of an hour
    python -m benchmarks.loss_curve --out curves --only fast     # one curve; the others may follow

plain   transformers' own Trainer and loss over stock layers: fp32, eager attention, logits everywhere, a batch in one
        piece, nothing compiled; for three seeds, which order the samples and initialize the adapters
fast    the run's trainer as on a GPU: its collator, logits where a token is supervised, its attention, compiled layers,
        a batch in two micro-batches, fp32 adapters on layers that compute in bf16; for the first of the seeds

The weights at NF4 are the same in both. Printed are the largest and the mean difference of the smoothed curves, of fast
and plain at the same seed, and between the plain ones: their spread is the noise. Exits with 1 where the mean
difference is larger than the smallest between two plain ones.
"""

# ruff: noqa: E402 torchvision's operators must be declared before anything imports transformers or peft

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from g4trainer import torchvision_operators

torchvision_operators.declare()

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from g4trainer import recipe as recipes
from g4trainer import tiny
from g4trainer.attempt import Attempt
from g4trainer.attention import choose_attention
from g4trainer.collator import Collator
from g4trainer.compiled import compile_layers
from g4trainer.dataset import Example, load_splits
from g4trainer.deadline import Deadline
from g4trainer.model import attach_lora, load_base, load_processor
from g4trainer.planner import Plan, choose_plan, training_arguments
from g4trainer.recipe import Recipe
from g4trainer.rundir import RunDir
from g4trainer.trainer import RunTrainer

SEEDS = (42, 43, 44)
BATCH, MICRO_BATCHES = 8, 2
LEARNING_RATE = 2e-3
SMOOTHED_STEPS = 20
OURS_ALONE = ("logits_to_keep", "kept_labels")
"""Of a batch, what the stock loss does not know."""


class Bench:
    """The embedded model and data, and a curve of either path."""

    def __init__(self, root: Path, *, steps: int, backend: str, fp32: bool = False) -> None:
        """steps: optimizer steps of a curve. backend: of the compiled layers; "" compiles nothing.

        fp32: whether fast computes in fp32 too.
        """
        self.root, self.steps, self.backend, self.fp32 = root, steps, backend, fp32
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model_folder, data_folder = root / "model", root / "digits"
        if not self.model_folder.exists():
            write_model(self.model_folder)
            tiny.write_digits(data_folder)
        self.collator = Collator(load_processor(self.model_folder), max_soft_tokens=70, pixels_as_bytes=True)
        data = recipes.Data(dataset="digits", prompt="Which digit is it?", validation_size=0)
        self.examples: Sequence[Example] = load_splits(data_folder, data, seed=0).train

    def plain(self, seed: int) -> list[float]:
        """Losses by step of transformers' own Trainer."""
        model = self._model(seed, torch.float32)
        model.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
        plan, arguments = self._arguments(seed, micro_batches=1)
        losses = _Losses()
        collate = Collator(self.collator.processor, max_soft_tokens=70)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments | {"bf16": False}),
            data_collator=lambda samples: {k: v for k, v in collate(samples).items() if k not in OURS_ALONE},
            train_dataset=self.examples,
            callbacks=[losses],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return losses.checked(plan.total_steps)

    def fast(self, seed: int) -> list[float]:
        """Losses by step of the run's own trainer."""
        model = self._model(seed, torch.float32 if self.fp32 else torch.bfloat16)
        length = len(self.collator.encode(self.examples[0]).input_ids)
        choose_attention(model.get_base_model(), "auto", tokens=length, device=self.device)
        if self.backend and not compile_layers(model, backend=self.backend):
            raise SystemExit("no C compiler: pass --backend aot_eager, or '' to compile nothing")
        plan, arguments = self._arguments(seed, micro_batches=MICRO_BATCHES)
        losses = _Losses()
        with tempfile.TemporaryDirectory() as folder:
            nothing: Any = _Nothing()
            trainer = RunTrainer(
                model=model,
                args=TrainingArguments(**arguments | {"bf16": not self.fp32}),
                collator=self.collator,
                train=self.examples,
                validation=[],
                plan=plan,
                recipe_hash="0" * 64,
                load_best=False,
                attempt=Attempt(RunDir(Path(folder)), Deadline(None), nothing, nothing, nothing, nothing),
            )
            trainer.add_callback(losses)
            trainer.train_from(None)
        return losses.checked(plan.total_steps)

    def _model(self, seed: int, dtype: torch.dtype) -> Any:
        """Adapters in fp32 on a base model that computes in that dtype, its weights at NF4 always the same."""
        with mock.patch("g4trainer.model.compute_dtype", return_value=dtype):
            base = load_base(self.model_folder, recipes.Model(id="tiny", max_soft_tokens=70), device=self.device)
        set_seed(seed)
        return attach_lora(base, recipes.Lora(), base_model="tiny")

    def _arguments(self, seed: int, *, micro_batches: int) -> tuple[Plan, dict[str, Any]]:
        recipe = Recipe.model_validate(
            {
                "name": "loss-curve",
                "model": {"id": "tiny", "max_soft_tokens": 70},
                "data": {"dataset": "digits"},
                "training": {
                    "learning_rate": LEARNING_RATE,
                    "num_train_epochs": self.steps * BATCH / len(self.examples),
                    "effective_batch_size": BATCH,
                    "seed": seed,
                },
            }
        )
        plan = choose_plan(
            recipe,
            train_samples=len(self.examples),
            validation_samples=0,
            micro_batch=BATCH // micro_batches,
            activation_checkpointing="none",
            evaluation_batch_size=1,
        )
        device: Literal["cuda", "cpu"] = "cuda" if self.device.type == "cuda" else "cpu"
        arguments = training_arguments(recipe, plan, device=device, output_dir=str(self.root / "unused"), workers=0)
        return plan, arguments | {"logging_steps": 1}


def write_model(folder: Path) -> None:
    """The embedded model in bf16, so that reading it in fp32 gives no other weights to quantize."""
    processor = tiny.make_processor()
    tiny.make_model("E2B", processor.tokenizer).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


class _Losses(TrainerCallback):
    """The loss of every step, as the Trainer logs it."""

    def __init__(self) -> None:
        self._by_step: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **context: Any) -> None:
        if "loss" in (logs or {}):
            self._by_step[state.global_step] = float(logs["loss"])

    def checked(self, steps: int) -> list[float]:
        """The losses of all steps."""
        assert list(self._by_step) == list(range(1, steps + 1)), sorted(self._by_step)
        return list(self._by_step.values())


class _Nothing:
    """Stands for the claim, the status and the metrics of a run, on which the losses do not depend."""

    name = "0001-benchmark"

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_arguments, **_options: None


def smoothed(losses: Sequence[float]) -> torch.Tensor:
    """Means over the last SMOOTHED_STEPS steps, or as many as there are."""
    window = min(SMOOTHED_STEPS, len(losses))
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(dim=1)


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The largest and the mean absolute difference of two smoothed curves."""
    apart = (smoothed(one) - smoothed(other)).abs()
    return float(apart.max()), float(apart.mean())


def curves_wanted() -> dict[str, tuple[str, int]]:
    """Path and seed by the name of a curve."""
    return {"fast": ("fast", SEEDS[0]), **{f"plain-{seed}": ("plain", seed) for seed in SEEDS}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the curves; those that are there are kept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--backend", default="inductor", help="of the compiled layers: inductor, aot_eager, or ''")
    parser.add_argument("--fp32", action="store_true", help="fast in fp32 too: only what rounding does not explain")
    parser.add_argument("--only", choices=tuple(curves_wanted()), help="make this curve and end")
    options = parser.parse_args()
    bench = Bench(options.out, steps=options.steps, backend=options.backend, fp32=options.fp32)
    curves: dict[str, list[float]] = {}
    for name, (path, seed) in curves_wanted().items():
        file = options.out / f"{name}{'-fp32' * (options.fp32 and path == 'fast')}-{options.steps}.json"
        if not file.exists() and options.only in (None, name):
            file.write_text(json.dumps(getattr(bench, path)(seed)))
        if file.exists():
            curves[name] = json.loads(file.read_text())
    if options.only or len(curves) < len(curves_wanted()):
        return 0
    return report(curves, bench)


def report(curves: dict[str, list[float]], bench: Bench) -> int:
    """Prints the comparison; 1 where fast is farther from plain than seeds are from each other."""
    plain = [curves[f"plain-{seed}"] for seed in SEEDS]
    apart = difference(curves["fast"], plain[0])
    spread = [difference(one, other) for one, other in itertools.combinations(plain, 2)]
    print(
        f"{bench.steps} steps of {BATCH} on {bench.device.type}, torch {torch.__version__}, {bench.backend or 'eager'}"
    )
    for name, losses in curves.items():
        means = smoothed(losses)
        print(f"  {name:<9} first step {losses[0]:.6f}, smoothed: begins {means[0]:.4f}, ends {means[-1]:.4f}")
    print(f"fast and plain, same seed: at most {apart[0]:.2e}, on average {apart[1]:.2e}")
    print(f"plain, two seeds: at most {[f'{most:.2e}' for most, _ in spread]}, mean {[f'{m:.2e}' for _, m in spread]}")
    return int(apart[1] > min(mean for _, mean in spread))


if __name__ == "__main__":
    raise SystemExit(main())
