"""Evaluation by generation: what the model says about each test image, and how good that is."""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from g4trainer import recipe as recipes
from g4trainer.collator import Collator
from g4trainer.compiled import generating
from g4trainer.dataset import DataError, Example
from g4trainer.exits import OutOfMemory
from g4trainer.gemma import END_OF_TURN
from g4trainer.memory_errors import as_out_of_memory
from g4trainer.model import is_sharded
from g4trainer.pixels import as_numbers
from g4trainer.ranks import ALONE, Ranks
from g4trainer.vram import CHAT_ANSWER_TOKENS

UNKNOWN = "(unknown)"
"""Column of the confusion matrix for answers that name no label."""
UNSPACED = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts without blanks between words, besides the wide ones of East Asia; by the names of their characters."""
Z_95 = 1.959963984540054
"""Quantile of the normal distribution for a two-sided 95 % interval."""


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl."""

    id: str
    truth: str
    prediction: str | None
    """The label that the answer names, None where it names none; the answer itself for chat."""
    raw_text: str
    correct: bool


class Generator:
    """Answers examples with a model: greedy, in batches, stopping at the end of the turn."""

    def __init__(
        self, model: Any, collator: Collator, labels: Sequence[str], *, max_new_tokens: int, constrained: bool
    ) -> None:
        self.model = model
        self.collator = collator
        self.labels = labels
        # A constrained answer that is cut off would name no label.
        self.max_new_tokens = max(max_new_tokens, longest_answer(collator, labels)) if constrained else max_new_tokens
        self.trie = label_trie(collator, labels) if constrained else None

    def answer(self, examples: Sequence[Example]) -> list[str]:
        """What the model says about each example, without special tokens."""
        return next(self.answers([examples]))

    def answers(self, batches: Sequence[Sequence[Example]]) -> Iterator[list[str]]:
        """The same for one batch after the other; a thread prepares the next one while the model answers."""
        with ThreadPoolExecutor(max_workers=1) as ahead:
            waiting = [ahead.submit(self._inputs, batch, len(batches[0])) for batch in batches[:1]]
            for index, batch in enumerate(batches):
                inputs = waiting.pop().result()
                waiting = [ahead.submit(self._inputs, after, len(batch)) for after in batches[index + 1 : index + 2]]
                yield self._answer(inputs)[: len(batch)]

    def _inputs(self, batch: Sequence[Example], size: int) -> dict[str, torch.Tensor]:
        """A generation batch. On CUDA a last one that is smaller is filled up: its shape would be compiled anew."""
        device = next(self.model.parameters()).device
        filled = [*batch, *[batch[-1]] * (size - len(batch) if device.type == "cuda" else 0)]
        tensors = self.collator.prompts(filled)
        return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in tensors.items()}

    def _answer(self, inputs: dict[str, torch.Tensor]) -> list[str]:
        # What is gathered in inference mode could not take part in training later.
        with torch.no_grad() if is_sharded(self.model) else torch.inference_mode():
            return self._answered(inputs)

    def _answered(self, inputs: dict[str, torch.Tensor]) -> list[str]:
        device = next(self.model.parameters()).device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        batch["pixel_values"] = as_numbers(batch["pixel_values"])
        width = batch["input_ids"].shape[1]
        tokenizer = self.collator.tokenizer
        constraint = {"prefix_allowed_tokens_fn": self._allowed(width)} if self.trie else {}
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with generating(self.model), bf16:
            generated = self.model.generate(
                **batch,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=[self.collator.end_of_turn_id, tokenizer.eos_token_id],
                pad_token_id=tokenizer.pad_token_id,
                **constraint,
            )
        return [_until_end_of_turn(self.collator.text_of(row), tokenizer) for row in generated[:, width:].tolist()]

    def _allowed(self, width: int) -> Callable[[int, torch.Tensor], list[int]]:
        """For generate: the tokens that may follow, from a trie of the label names."""

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            node = self.trie
            for token in ids[width:].tolist():
                node = (node or {}).get(token)
            return list(node) if node else [self.collator.tokenizer.pad_token_id]

        return allowed


def generator_of(model: Any, collator: Collator, labels: Sequence[str], settings: recipes.Evaluation) -> Generator:
    """The generator that a recipe asks for: it makes all answers of a run, and all later ones of its adapter."""
    stated = settings.max_new_tokens
    return Generator(
        model,
        collator,
        labels,
        max_new_tokens=longest_answer(collator, labels) if stated == "auto" else stated,
        constrained=settings.constrained,
    )


def longest_answer(collator: Collator, labels: Sequence[str]) -> int:
    """Tokens that the longest label needs, the end of the turn included."""
    return max((len(collator.answer_ids(label)) for label in labels), default=CHAT_ANSWER_TOKENS - 1) + 1


def label_trie(collator: Collator, labels: Sequence[str]) -> dict[int, Any]:
    """Nested dictionaries of token ids; each label ends with the end of the turn."""
    trie: dict[int, Any] = {}
    for label in labels:
        node = trie
        for token in [*collator.answer_ids(label), collator.end_of_turn_id]:
            node = node.setdefault(token, {})
    return trie


@as_out_of_memory()
def predict(
    generator: Generator,
    examples: Sequence[Example],
    *,
    batch_size: int,
    finished: Sequence[Prediction] = (),
    on_batch: Callable[[list[Prediction]], None] = lambda predictions: None,
    ranks: Ranks = ALONE,
) -> list[Prediction]:
    """Predictions for all examples, in their order.

    They are answered by the length of their prompts, the longest first: a batch is padded to its longest prompt, and
    memory that is short is short at once.
    finished: predictions of an earlier attempt, in the order of answering; whole batches of them are not made again.
    on_batch: called after each batch with all predictions so far, in the order of answering, to publish them.
    ranks: take the batches in turn, which are those of one process, and get all predictions.
    """
    order = sorted(range(len(examples)), key=lambda index: _prompt_length(examples[index]), reverse=True)
    asked = [examples[index] for index in order]
    for example, prediction in zip(asked, finished, strict=False):
        if example.id != prediction.id:
            raise DataError(
                f"predictions of an earlier attempt are of {prediction.id}, not {example.id}: the data changed."
            )
    predictions = list(finished[: len(asked)])
    if len(predictions) < len(asked):
        del predictions[len(predictions) // batch_size * batch_size :]
        for made in _in_turn(generator, asked, len(predictions), batch_size, ranks):
            predictions += made
            on_batch(predictions)
    placed = dict(zip(order, predictions, strict=True))
    return [placed[index] for index in range(len(examples))]


def _in_turn(
    generator: Generator, examples: Sequence[Example], done: int, batch_size: int, ranks: Ranks
) -> Iterator[list[Prediction]]:
    """Predictions for the examples that are left, a batch of each rank at a time."""
    starts = range(done, len(examples), batch_size * ranks.size)
    own = [examples[start + batch_size * ranks.rank :][:batch_size] for start in starts]
    sharded = is_sharded(generator.model)  # then all must generate as often: who has no batch left answers some other
    answers = generator.answers([batch or examples[-1:] for batch in own if batch or sharded])
    for batch in own:
        made = _answers(generator, batch, next(answers)[: len(batch)] if batch or sharded else [])
        yield [prediction for part in ranks.gather(made) for prediction in part]


def _prompt_length(example: Example) -> tuple[int, int]:
    """By which prompts are compared: an image has more tokens than most texts."""
    return len(example.images), len(example.prompt)


def half_batch(size: int, error: Exception) -> int:
    """The evaluation batch to go on with when memory ran out. Raises OutOfMemory where there is no smaller one."""
    if size == 1:
        raise OutOfMemory(f"out of GPU memory answering one image at a time: {error}") from error
    return size // 2


def _answers(generator: Generator, batch: Sequence[Example], texts: Sequence[str]) -> list[Prediction]:
    made = []
    for example, text in zip(batch, texts, strict=True):
        label = match_label(text, generator.labels) if generator.labels else text.strip()
        made.append(Prediction(example.id, example.answer, label, text, label == example.answer.strip()))
    return made


def match_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text says: the whole text, else the longest label name that stands in it as whole words.

    Case, underscores for blanks and a final full stop make no difference, unless that would make two labels one.
    """
    normalize = _loosely if len({_loosely(label) for label in labels}) == len(labels) else str.casefold
    names = {normalize(label): label for label in labels}
    said = normalize(text.strip())
    for whole in (said, said.rstrip(".")):
        if whole in names:
            return names[whole]
    return next(
        (names[name] for name in sorted(names, key=len, reverse=True) if re.search(_whole_words(name), said)), None
    )


def _loosely(text: str) -> str:
    return " ".join(text.casefold().replace("_", " ").split())


def _whole_words(name: str) -> str:
    """A pattern for a name that no letter or digit touches; in scripts written without blanks, for the name itself."""
    before = "" if _unspaced(name[0]) else r"(?<!\w)"
    after = "" if _unspaced(name[-1]) else r"(?!\w)"
    return f"{before}{re.escape(name)}{after}"


def _unspaced(character: str) -> bool:
    """Whether the character belongs to a script whose words no blank separates."""
    return unicodedata.east_asian_width(character) in "WF" or unicodedata.name(character, "").startswith(UNSPACED)


def score(predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    """The metrics of an evaluation. Fractions run from 0 to 1; without labels (chat) only exact match has a value.

    accuracy with its Wilson 95 % interval, macro-F1 over the labels, unknown rate, a table by class, and the confusion
    matrix (rows: truth; columns: labels, then answers that name none).
    """
    count = len(predictions)
    correct = sum(prediction.correct for prediction in predictions)
    said = sum(prediction.raw_text.strip() == prediction.truth.strip() for prediction in predictions)
    result: dict[str, Any] = {"count": count, "exact_match": said / count}
    if not labels:
        return {**result, "accuracy": None, "macro_f1": None, "unknown_rate": None}
    truths = [prediction.truth for prediction in predictions]
    answers = [prediction.prediction or UNKNOWN for prediction in predictions]
    present = [label for label in labels if label in set(truths) | set(answers)]
    precision, recall, f1, support = precision_recall_fscore_support(
        truths, answers, labels=list(labels), zero_division=0.0
    )
    columns = [*labels, UNKNOWN]
    return {
        **result,
        "accuracy": correct / count,
        "accuracy_interval_95": wilson_interval(correct, count),
        "macro_f1": sum(f1[labels.index(label)] for label in present) / len(present),
        "unknown_rate": Counter(answers)[UNKNOWN] / count,
        "per_class": [
            {
                "label": label,
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "support": int(support[index]),
            }
            for index, label in enumerate(labels)
        ],
        "confusion": {
            "rows": list(labels),
            "columns": columns,
            "counts": confusion_matrix(truths, answers, labels=columns)[: len(labels)].tolist(),
        },
    }


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's score interval at 95 % for a fraction (E. B. Wilson, 1927)."""
    share = successes / count
    spread = Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def to_lines(predictions: Sequence[Prediction]) -> bytes:
    """predictions.jsonl."""
    return b"".join(json.dumps(asdict(p), ensure_ascii=False).encode() + b"\n" for p in predictions)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file; empty where there is none."""
    if not path.exists():
        return []
    return [Prediction(**json.loads(line)) for line in path.read_bytes().splitlines()]


def _until_end_of_turn(text: str, tokenizer: Any) -> str:
    text = text.split(END_OF_TURN)[0].split(tokenizer.eos_token)[0]
    return text.replace(tokenizer.pad_token, "").strip()
