"""A run's adapter on other images: with the prompt, the processor and the decoding of the run's own evaluation.

A request is a folder, in the bucket or on this machine:

    request.json    {"images": [{"name": what it is called, "file": path, below the folder or absolute}],
                     "which": "after", "before" or "both", "prompt": null, or the question of a chat run}
    answers.jsonl   what was answered so far, replaced whole at most every status interval
    answers.json    all answers, written last
    failed.json     why no retry can help
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from g4trainer import evaluate
from g4trainer.artifacts import read_adapter
from g4trainer.attention import choose_attention
from g4trainer.collator import Collator
from g4trainer.dataset import DataError, Example
from g4trainer.evaluate import Generator, Prediction, generator_of, half_batch
from g4trainer.exits import ExitCode, ModelError, TrainerError
from g4trainer.gemma import read_facts
from g4trainer.metrics import status_interval_s
from g4trainer.model import attach_lora, load_adapter_weights, load_base, load_processor
from g4trainer.outcome import KNOWN, end_request
from g4trainer.planner import Plan
from g4trainer.recipe import FrozenRecipe, load_frozen
from g4trainer.rundir import RunDir, read_json, write_bytes, write_json
from g4trainer.staged import base_model_folder

Which = Literal["after", "before", "both"]
CPU_PARAMETERS = 1_000_000_000
"""A larger model answers too slowly without a GPU to be of use."""

log = logging.getLogger(__name__)


class RequestError(TrainerError):
    """Images, or a question, that cannot be answered."""

    code = ExitCode.BAD_INPUT
    remedy = "correct that, or leave it out, and ask again."


@dataclass(frozen=True)
class Image:
    name: str
    path: Path


@dataclass(frozen=True)
class Request:
    images: tuple[Image, ...]
    which: Which
    prompt: str | None
    """None for the run's own."""


@dataclass(frozen=True)
class Said:
    prediction: str | None
    """The label that the answer names, None where it names none; the answer itself for chat."""
    raw_text: str


@dataclass(frozen=True)
class Answer:
    """One line of answers.jsonl."""

    image: str
    after: Said | None
    """With the adapter; None where it was not asked for."""
    before: Said | None
    """Of the base model."""


def answer_request(run: RunDir, folder: Path, *, show: Callable[[Answer], None] = lambda answer: None) -> ExitCode:
    """Answers a request and writes answers.json. Never raises for what has a known cause: that becomes failed.json.

    show: called with each answer, as they come.
    """
    failed = folder / "failed.json"
    if (folder / "answers.json").exists():
        return ExitCode.DONE
    if failed.exists():
        return ExitCode(read_json(failed)["exit_code"])
    try:
        answers = _answer_all(run, read_request(folder), folder / "answers.jsonl", show)
    except DataError as error:
        return end_request(failed, RequestError(str(error)))
    except KNOWN as error:
        return end_request(failed, error)
    write_json(folder / "answers.json", {"answers": [asdict(answer) for answer in answers]})
    return ExitCode.DONE


def read_request(folder: Path) -> Request:
    """Raises DataError where request.json is missing or not of the form that is told above."""
    try:
        document = read_json(folder / "request.json")
        images = tuple(Image(str(entry["name"]), folder / entry["file"]) for entry in document["images"])
        which, prompt = document["which"], document.get("prompt")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/request.json: cannot be used: {error!r}.") from error
    if which not in get_args(Which) or not images or not (prompt is None or isinstance(prompt, str)):
        raise DataError(f"{folder}/request.json: got which = {which!r}, prompt = {prompt!r}, {len(images)} images.")
    return Request(images, which, prompt)


class Predictor:
    """A finished run's model, ready to answer."""

    def __init__(self, run: RunDir, device: torch.device) -> None:
        """Raises ModelError where the run has no adapter or no evaluation yet, or this machine cannot run the model."""
        self.frozen: FrozenRecipe = load_frozen(run.recipe)
        recipe = self.frozen.recipe
        self._run, self._device = run, device
        adapter = read_adapter(run)
        if adapter is None:
            raise ModelError(f"{run.run_id}: has no adapter.", "wait for the end of its training, or resume the run.")
        self._tensors = adapter[0]
        self._folder = base_model_folder(run.root, recipe.model)
        if device.type == "cpu" and read_facts(self._folder).parameters > CPU_PARAMETERS:
            raise ModelError(
                f"{recipe.model.id}: there is no GPU here, and without one an answer takes minutes.",
                "write --target cloudrun, or use a machine with a GPU.",
            )
        self.labels = labels_of(run) if recipe.data.task == "classify" else ()
        self.batch_size = Plan.from_json(read_json(run.plan)).evaluation_batch_size

    def question(self, asked: str | None) -> str:
        """The run's prompt; that of a chat run must be asked. Raises DataError."""
        data = self.frozen.recipe.data
        if data.task == "classify":
            if asked is not None:
                raise DataError("--prompt: the run classifies, and answers the question of its recipe; leave it out.")
            return data.prompt.replace("{labels}", ", ".join(self.labels))
        if asked is None:
            raise DataError("--prompt: the run was trained on questions of their own; write one.")
        return asked

    def load(self, sample: Example) -> None:
        """Loads model and adapter as the run did. sample: whose length chooses the attention kernel."""
        recipe = self.frozen.recipe
        collator = Collator(load_processor(self._folder), max_soft_tokens=recipe.model.max_soft_tokens)
        tokens = collator.prompts([sample])["input_ids"].shape[1]
        base = load_base(self._folder, recipe.model, device=self._device)
        choose_attention(base, recipe.model.attn_implementation, tokens=tokens, device=self._device)
        self.model = attach_lora(base, recipe.lora, base_model=recipe.model.id)
        load_adapter_weights(self.model, self._tensors)
        self.model.eval()
        self.generator: Generator = generator_of(self.model, collator, self.labels, recipe.evaluation)

    def answers(self, examples: Sequence[Example], which: Which) -> Iterator[list[Answer]]:
        """Answers batch by batch; out of GPU memory it goes on with half of one. Raises OutOfMemory."""
        start, size = 0, self.batch_size
        while start < len(examples):
            batch = examples[start : start + size]
            try:
                after = self._said(batch, adapted=True) if which != "before" else [None] * len(batch)
                before = self._said(batch, adapted=False) if which != "after" else [None] * len(batch)
            except torch.OutOfMemoryError as error:
                size = half_batch(size, error)
                log.warning("out of GPU memory: going on with %d images at a time", size)
                torch.cuda.empty_cache()
                continue
            start += len(batch)
            yield [Answer(example.id, *said) for example, *said in zip(batch, after, before, strict=True)]

    def _said(self, batch: Sequence[Example], *, adapted: bool) -> list[Said | None]:
        with nullcontext() if adapted else self.model.disable_adapter():
            made: list[Prediction] = evaluate.predict(self.generator, batch, batch_size=len(batch))
        return [Said(prediction.prediction, prediction.raw_text) for prediction in made]


def labels_of(run: RunDir) -> tuple[str, ...]:
    """The classes in the data set's order, from an evaluation. Raises ModelError where there was none yet."""
    for name in ("final", "baseline"):
        path = run.evaluation / f"{name}.json"
        if path.exists():
            return tuple(read_json(path)["confusion"]["rows"])
    raise ModelError(f"{run.run_id}: has no evaluation yet.", "wait for the end of the run, or resume it.")


def load_examples(images: Sequence[Image], prompt: str) -> list[Example]:
    """Raises DataError with every image that cannot be read."""
    examples, problems = [], []
    for image in images:
        try:
            example = Example(image.name, (image.path.read_bytes(),), prompt, "")
            example.open_images()
            examples.append(example)
        except OSError as error:
            problems.append(f"{image.name}: cannot be read: {error.strerror}; write the path of an image.")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return examples


def _answer_all(run: RunDir, request: Request, published: Path, show: Callable[[Answer], None]) -> list[Answer]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = Predictor(run, device)
    examples = load_examples(request.images, predictor.question(request.prompt))
    log.info("loading %s with the adapter of %s", predictor.frozen.recipe.model.id, run.run_id)
    predictor.load(examples[0])
    interval_s, answers, last_s = status_interval_s(), list[Answer](), -math.inf
    for batch in predictor.answers(examples, request.which):
        answers += batch
        for answer in batch:
            show(answer)
        if time.monotonic() - last_s >= interval_s:
            write_bytes(published, b"".join(to_line(answer) for answer in answers))
            last_s = time.monotonic()
        log.info("%d of %d images", len(answers), len(examples))
    return answers


def to_line(answer: Answer) -> bytes:
    return json.dumps(asdict(answer), ensure_ascii=False).encode() + b"\n"
