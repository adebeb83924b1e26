"""One optimizer step of eight samples, side by side: TRL's SFTTrainer, transformers' Trainer, and a whole run of ours.

    python -m benchmarks.step_time                     # the 31B, on a CUDA card with 120 GiB: about five minutes
    python -m benchmarks.step_time --layers 12         # fewer text layers
    python -m benchmarks.step_time --tiny              # on the CPU, the same code over a tiny model

Random weights at true shapes (true_shapes.py), photos made here as JPEG files, some 500 tokens a sample. The peers take
the published recipe's settings: every layer's activations computed again, logits at every position. Ours is a whole
`g4trainer run`: its reading of files, planning, input pipeline, training, checkpoints and evaluation. After that, the
loss and the LoRA gradients of one batch are compared, over a few layers: ours may differ from transformers' by twice
what transformers' own two attention kernels differ by. Exits with 1 where it does.
"""

# ruff: noqa: E402 torchvision's operators must be declared before anything imports transformers or peft

import contextlib
import gc
import io
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

from g4trainer import torchvision_operators

torchvision_operators.declare()

import datasets
import peft
import torch
import torch.nn.functional as F
import transformers
import trl
from benchmarks import true_shapes
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from g4trainer import gemma, timing, tiny, train, vram
from g4trainer import recipe as recipes
from g4trainer.attention import choose_attention
from g4trainer.collator import IGNORED, Collator
from g4trainer.compiled import compile_layers
from g4trainer.dataset import Example
from g4trainer.deadline import Deadline
from g4trainer.evaluate import predict
from g4trainer.forward import never_wait
from g4trainer.launch import make_run
from g4trainer.model import attach_lora
from g4trainer.rundir import RunDir, read_json

SAMPLES = 8
"""Of an optimizer step."""
PEER_STEPS, OUR_STEPS, TESTED = 2, 18, 256
LOGGED = 3
"""How often a run of ours writes a line: every sixth step, as one of 1,380 steps does."""
MICRO_BATCH = 4
LABELS = ("zero one two three four five six", "eight", "seven nine", "zero")
"""The longest has seven tokens: with the end of the turn, eight are generated for each image."""
PHOTO = 500, 375
"""Width and height: an ordinary picture of Oxford-IIIT Pet."""
PROMPT_TOKENS = 200
AGREEMENT_LAYERS = 6
"""Text layers of the comparison: in sixty random ones any rounding grows until nothing is alike."""
NOISE = 2.0
"""Ours may differ from one stock attention kernel by so many times what the two stock kernels differ by."""


def main() -> int:
    parser = true_shapes.parser_of_shapes(__doc__)
    parser.add_argument("--only", choices=("agreement", "peers", "ours"), nargs="+", default=())
    parser.add_argument("--auto", action="store_true", help="ours plans and tries its micro-batch, as a run does")
    options = parser.parse_args()
    parts = options.only or ("agreement", "peers", "ours")
    torch.backends.cuda.enable_cudnn_sdp(False)
    bench = Bench(options.size, options.layers, tiny_width=options.tiny, auto=options.auto)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    print(f"{bench.title}: {versions}, peft {peft.__version__}; {bench.card}, {bench.peak / 1e12:.0f} TFLOP/s measured")
    rows = bench.peers() if "peers" in parts else []
    rows += bench.ours() if "ours" in parts else []
    floor = bench.floor_operations()
    print("\n| what | s/sample | peak GiB | share of the measured peak |\n|---|---|---|---|")
    for what, seconds, gib in rows:
        share = f"{floor / seconds / bench.peak:.0%}" if bench.peak else "-"
        print(f"| {what} | {seconds:.4f} | {gib:.1f} | {share} |")
    if "agreement" not in parts:
        return 0
    del bench
    shallow = Bench(options.size, AGREEMENT_LAYERS, tiny_width=options.tiny)
    return 0 if shallow.agreement() else 1


class Bench:
    """A base model and samples, and what is measured of them."""

    def __init__(self, size: gemma.Size, layers: int | None, *, tiny_width: bool, auto: bool = False) -> None:
        self.size, self.tiny, self.auto = size, tiny_width, auto
        self.title = f"{size}{f', {layers} text layers' * bool(layers)}{' (tiny)' * tiny_width}"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.card = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.peak = measured_peak(self.device)
        self.config = true_shapes.tiny_config(size) if tiny_width else true_shapes.true_config(size, layers)
        if not tiny_width:
            tiny.PATCH_SIZE = self.config.vision_config.patch_size
            tiny.POOLING_KERNEL_SIZE = self.config.vision_config.pooling_kernel_size
        self.processor = tiny.make_processor(size)
        self.config.image_token_id = self.processor.image_token_id
        self.budget = 70 if tiny_width else true_shapes.BUDGET
        self.steps = (1, 6, 8) if tiny_width else (PEER_STEPS, OUR_STEPS, TESTED)
        self.base = true_shapes.build(self.config, self.device)
        self.base.config.use_cache = False
        self.collate = Collator(
            self.processor, max_soft_tokens=self.budget, pad_to_multiple_of=train.PADDING[self.device.type]
        )
        self.prompt = self._prompt()
        self.examples = [
            Example(f"train/{number}", (photo(number),), self.prompt, LABELS[number % len(LABELS)])
            for number in range(SAMPLES * self.steps[1])
        ]

    def _prompt(self) -> str:
        """A question that makes a sample about as long as one with a list of 37 breeds."""
        words = itertools.cycle(["Which breed is it?", *LABELS])
        text = next(words)
        while len(self.processor.tokenizer(text)["input_ids"]) < PROMPT_TOKENS:
            text += f" {next(words)}"
        return text

    def model(self) -> Any:
        """The base with fresh adapters."""
        torch.manual_seed(0)
        return attach_lora(self.base, recipes.Lora(), base_model=f"gemma-4-{self.size}-it")

    def agreement(self) -> bool:
        """Whether loss and gradients of one batch agree with transformers' own; prints by how much."""
        model = self.model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
        batch = {k: v.to(self.device) for k, v in self.collate(self.examples[:MICRO_BATCH]).items()}
        stock = {kind: self._stock_step(model, batch, kind) for kind in ("sdpa", "eager")}
        length = batch["input_ids"].shape[1]
        choose_attention(self.base, "auto", tokens=length, device=self.device)
        never_wait(self.base)
        if self.device.type == "cuda":
            compile_layers(model)
        ours = self._our_step(model, batch)
        noise, found = (difference(stock["sdpa"], other) for other in (stock["eager"], ours))
        print(f"{length} tokens a sample; loss {stock['sdpa'][0]:.4f}; relative differences of loss, gradients:")
        print(f"  transformers' sdpa and eager: {noise[0]:.1e}, {noise[1]:.1e}")
        print(f"  transformers' sdpa and ours: {found[0]:.1e}, {found[1]:.1e}")
        self._drop(model)
        floors = (1e-3, 1e-3)  # where two kernels happen to agree, bf16 still rounds
        return all(one <= NOISE * max(most, floor) for one, most, floor in zip(found, noise, floors, strict=True))

    def _stock_step(self, model: Any, batch: dict[str, torch.Tensor], attention: str) -> tuple[float, torch.Tensor]:
        model.set_attn_implementation({"text_config": attention, "vision_config": attention})
        labels = batch["labels"]
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "kept_labels", "logits_to_keep")}
        true_shapes.checkpoint_activations(model)
        model.train()
        with self._bf16():
            logits = model(**inputs).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        model.get_base_model().activation_checkpointing_disable()
        return loss.item(), gradients(model)

    def _our_step(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "kept_labels")}
        model.train()
        with self._bf16():
            logits = model(**inputs, use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["kept_labels"].flatten(), ignore_index=IGNORED)
        loss.backward()
        return float(loss.detach()), gradients(model)

    def _bf16(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def peers(self) -> list[tuple[str, float, float]]:
        """The published settings through TRL and transformers, and TRL's without accumulation."""
        settings = ((SFTTrainer, 2, "TRL SFTTrainer"), (SFTTrainer, SAMPLES, "TRL SFTTrainer"), (Trainer, 2, "Trainer"))
        return [self._peer(kind, micro, name) for kind, micro, name in settings]

    def _peer(self, kind: Any, micro: int, name: str) -> tuple[str, float, float]:
        model = self.model()
        model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
        clock = Clock(self.device)
        common = {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": SAMPLES // micro,
            "max_steps": self.steps[0],
            "learning_rate": 5e-5,
            "bf16": self.device.type == "cuda",
            "use_cpu": self.device.type == "cpu",
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
            "remove_unused_columns": False,
            "dataloader_num_workers": 4 if self.device.type == "cuda" else 0,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "optim": "adamw_torch_fused" if self.device.type == "cuda" else "adamw_torch",
        }
        rows = datasets.Dataset.from_dict(
            {"index": list(range(SAMPLES * self.steps[0])), "labels": [[0]] * SAMPLES * self.steps[0]}
        )
        data = {"model": model, "train_dataset": rows, "data_collator": self._stock_batch, "callbacks": [clock]}
        if kind is SFTTrainer:
            arguments = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
            kind(args=arguments, processing_class=self.processor, **data).train()
        else:
            kind(args=TrainingArguments(**common), **data).train()
        self._drop(model)
        return f"{name}, {micro} x {SAMPLES // micro}, full checkpointing", clock.seconds / SAMPLES, clock.gib

    def _stock_batch(self, rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        made = self.collate([self.examples[row["index"] % len(self.examples)] for row in rows])
        return {name: tensor for name, tensor in made.items() if name not in ("logits_to_keep", "kept_labels")}

    def ours(self) -> list[tuple[str, float, float]]:
        """A whole run; rows of its training and of its evaluation."""
        never_wait(self.base)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            self._stage(root)
            run = RunDir(make_run(root / "recipe.toml", root))
            batches: list[float] = []
            with self._random_base(), timed_batches(batches):
                code = train.run_attempt(run, Deadline(None))
            if code:
                raise SystemExit(f"the run ended with {code!r}")
            return self._read(run, batches)

    def _read(self, run: RunDir, batches: list[float]) -> list[tuple[str, float, float]]:
        plan, results = read_json(run.plan), read_json(run.results)
        lines = [json.loads(line) for line in (run.metrics / "0001.jsonl").read_text().splitlines()]
        stamps = [datetime.fromisoformat(line["time"]).timestamp() for line in lines if "learning_rate" in line]
        steps = [(after - before) / plan["logging_steps"] for before, after in itertools.pairwise(stamps)]
        print("seconds by phase", json.dumps(results["seconds"]), "steps", [round(step, 2) for step in steps])
        for tried in plan["trial"] or ():
            print("tried", json.dumps(tried))
        micro, batch = plan["per_device_train_batch_size"], plan["evaluation_batch_size"]
        gib = results["train"]["peak_memory_bytes"] / 2**30
        print(f"evaluation batches of {batch}: seconds {[round(one, 1) for one in batches]}")
        what = f"g4kit run, {micro} x {SAMPLES // micro}, checkpointing {plan['activation_checkpointing']}"
        rows = [(what, statistics.median(steps) / SAMPLES, gib)]
        print(f"an answered image: {min(batches) / batch:.4f} s, {max(self._answer_tokens())} tokens and the end")
        return rows

    def _answer_tokens(self) -> list[int]:
        return [len(self.collate.answer_ids(label)) for label in LABELS]

    def _stage(self, root: Path) -> None:
        model, data = root / "models" / "random", root / "datasets" / "photos"
        model.mkdir(parents=True)
        self.processor.save_pretrained(model)
        (model / "config.json").write_text(json.dumps({"model_type": "gemma4", **self.config.to_dict()}))
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(LABELS))})
        for split, count in (("train", len(self.examples)), ("test", self.steps[2])):
            rows = {
                "image": [
                    {"bytes": photo(number + (split == "test") * 10_000), "path": None} for number in range(count)
                ],
                "label": [number % len(LABELS) for number in range(count)],
            }
            data.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(str(data / f"{split}.parquet"))
        for folder in (model, data):
            (folder / "STAGED.json").write_text('{"files": {}}')
        cut = f"per_device_train_batch_size = {MICRO_BATCH}\nactivation_checkpointing = 'none'\n" * (not self.auto)
        (root / "recipe.toml").write_text(
            f"name = 'step-time'\n[model]\nid = 'random'\nmax_soft_tokens = {self.budget}\n"
            f"[data]\ndataset = 'photos'\nvalidation_size = 0.0\nprompt = {json.dumps(self.prompt)}\n"
            f"[training]\nnum_train_epochs = 1\n{cut}load_best_model = false\n[evaluation]\nbaseline = false\n"
            f"[job]\naccelerator = 'nvidia-h200-141gb'\n"
        )

    @contextlib.contextmanager
    def _random_base(self) -> Iterator[None]:
        """The run is given this base instead of reading one."""
        with (
            mock.patch("g4trainer.train.load_base", return_value=self.base),
            mock.patch("g4trainer.planner.LOG_LINES_A_RUN", LOGGED),
        ):
            yield

    def _drop(self, model: Any) -> None:
        """Takes the adapters off the base again, and what a trainer has turned on."""
        model.zero_grad(set_to_none=True)
        self.base.activation_checkpointing_disable()
        self.base = model.unload()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def floor_operations(self) -> float:
        """Of a sample's forward pass and input gradients, nothing computed twice; of matrix products alone."""
        document = {"name": "b", "model": {"id": "x", "max_soft_tokens": self.budget}, "data": {"dataset": "x"}}
        model = vram.Model(recipes.parse_recipe(document, source="benchmark"), described(self.config))
        encoded = self.collate.encode(self.examples[0]).input_ids
        shape = model.shape(len(encoded) - encoded.count(self.processor.image_token_id))
        one = timing.forward_operations(model, shape)
        return 2 * one.base + 3 * one.lora + 3 * (one.text_attention + one.vision_attention)


class Clock(TrainerCallback):
    """Seconds of the fastest optimizer step after the first, and the peak of memory."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.stamps: list[float] = []

    def on_train_begin(self, *event: Any, **context: Any) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self._stamp()

    def on_step_end(self, *event: Any, **context: Any) -> None:
        self._stamp()

    def _stamp(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        taken = [after - before for before, after in itertools.pairwise(self.stamps)]
        return min(taken[1:] or taken)

    @property
    def gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0


@contextlib.contextmanager
def timed_batches(seconds: list[float]) -> Iterator[None]:
    """Adds the seconds of every evaluation batch of a run."""

    def timed(*arguments: Any, on_batch: Any, **options: Any) -> Any:
        last = time.perf_counter()

        def noted(predictions: Any) -> None:
            nonlocal last
            seconds.append(time.perf_counter() - last)
            on_batch(predictions)
            last = time.perf_counter()

        return predict(*arguments, on_batch=noted, **options)

    with mock.patch("g4trainer.evaluator.predict", timed):
        yield


def described(config: Any) -> dict[str, Any]:
    """What g4trainer.vram reads of a config.json."""
    parts = ("text_config", "vision_config")
    return {"model_type": gemma.MODEL_TYPE, **{part: getattr(config, part).to_dict() for part in parts}}


def photo(seed: int) -> bytes:
    """A JPEG file of that size, no two alike: noise at a tenth of the resolution, enlarged."""
    noise = random.Random(seed).randbytes(50 * 38 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (50, 38), noise).resize(PHOTO).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def gradients(model: Any) -> torch.Tensor:
    """All LoRA gradients in one vector on the CPU, and takes them off the model."""
    taken = [p.grad.flatten().to("cpu", torch.float32) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(taken)


def difference(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor]) -> tuple[float, float]:
    return abs(one[0] / other[0] - 1), float((one[1] - other[1]).norm() / one[1].norm())


def measured_peak(device: torch.device) -> float:
    """Operations a second of a large bf16 matrix product; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / 10)
    return 2 * 8192**3 / min(times)


if __name__ == "__main__":
    raise SystemExit(main())
