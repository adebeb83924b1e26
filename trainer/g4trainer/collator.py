"""Examples become tensors: image before text, the prompt masked by searching the label backwards.

The ids of a sample are the generation prompt followed by the completion, so that training sees exactly what inference
will see, whatever the chat template adds to its generation prompt:

    <bos><|turn>user\\n<|image>..soft tokens..<image|>Which breed?<turn|>\\n<|turn>model\\n Siamese<turn|>
    |----------------------------- masked -------------------------------------------------|- loss -----|

The search needs to know neither how many soft tokens an image took nor what the template looks like: it finds the
label's tokens from the end, steps back to `<|turn>`, and masks everything before. Where the search and the
construction disagree, the sample is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import torch

from g4trainer.dataset import DataError, Example
from g4trainer.gemma import END_OF_TURN, TURN
from g4trainer.pixels import as_numbers, patches_of

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Encoded:
    """One sample. Lists run over the sequence; image tensors over the sample's images."""

    input_ids: list[int]
    labels: list[int]
    """The id itself where supervised, IGNORED elsewhere; not shifted."""
    pixel_values: torch.Tensor  # (images, patches, 3 * patch_size**2) uint8, or float32 from 0 to 1
    image_position_ids: torch.Tensor  # (images, patches, 2) int64, -1 where padded


class Collator:
    """Turns examples into batches for training, right-padded, and into prompts for generation, left-padded."""

    def __init__(
        self,
        processor: Any,
        *,
        max_soft_tokens: int,
        supervise: Literal["completion", "turn"] = "completion",
        max_length: int | None = None,
        pad_to_multiple_of: int = 1,
        pixels_as_bytes: bool = False,
    ) -> None:
        """
        processor: a Gemma4Processor.
        max_soft_tokens: upper bound of the tokens an image takes: 70, 140, 280, 560 or 1120.
        supervise: what carries loss: the completion, or all of the model's turn from `<|turn>` on.
        max_length: a longer sample is refused, never cut; None sets no bound.
        pad_to_multiple_of: training batches get such a length, so that compiled layers see few different ones.
        pixels_as_bytes: `pixel_values` are uint8 where the processor allows it, for `pixels.as_numbers` on the device.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_soft_tokens = max_soft_tokens
        self.supervise = supervise
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pixels_as_bytes = pixels_as_bytes
        self.turn_id = token_id(self.tokenizer, TURN)
        self.end_of_turn_id = token_id(self.tokenizer, END_OF_TURN)
        self.bos_id = self.tokenizer.bos_token_id
        self.pad_id = self.tokenizer.pad_token_id
        self.image_id = processor.image_token_id
        self.image_start_id = token_id(self.tokenizer, processor.boi_token)
        self.image_end_id = token_id(self.tokenizer, processor.eoi_token)
        self._special_texts = tuple(
            sorted({*self.tokenizer.all_special_tokens, TURN, END_OF_TURN, processor.image_token})
        )
        self._prompts: dict[tuple[str, int], list[int]] = {}
        self._answers: dict[str, list[int]] = {}

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A training batch. `logits_to_keep` and `kept_labels` name the positions that predict a supervised token.

        input_ids, attention_mask, mm_token_type_ids, labels: (batch, sequence) int64, padded on the right
        logits_to_keep: (batch, supervised) int64 positions; kept_labels: the ids they predict, IGNORED where padded
        pixel_values: (images, patches, 3 * patch_size**2) float32, or uint8 with `pixels_as_bytes`
        image_position_ids: (images, patches, 2) int64
        """
        encoded = [self.encode(example) for example in examples]
        batch = self._pad([sample.input_ids for sample in encoded], side="right")
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor(
            [sample.labels + [IGNORED] * (width - len(sample.labels)) for sample in encoded], dtype=torch.int64
        )
        batch["logits_to_keep"], batch["kept_labels"] = supervised_positions([sample.labels for sample in encoded])
        return batch | self._images(encoded)

    def prompts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A generation batch: the same without labels, padded on the left, each row ending with the prompt."""
        encoded = [self._encode(example, completion=[]) for example in examples]
        return self._pad([sample.input_ids for sample in encoded], side="left") | self._images(encoded)

    def encode(self, example: Example) -> Encoded:
        """One training sample. Raises DataError, with the example's id, where it cannot be supervised exactly."""
        answer = self.answer_ids(example.answer, example.id)
        return self._encode(example, completion=[*answer, self.end_of_turn_id], answer=answer)

    def answer_ids(self, answer: str, example_id: str = "answer") -> list[int]:
        """Ids of an answer as the model would generate it, without surrounding space and the end of its turn.

        Raises DataError where they do not read back as the answer, for then the model could not say it.
        """
        text = answer.strip()
        if text not in self._answers:  # samples share few labels
            self._refuse_special(text, "answer", example_id)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise DataError(f"{example_id}: the answer {answer!r} has no tokens; write some text.")
            read = self.text_of(ids)
            if read != text:
                raise DataError(
                    f"{example_id}: the answer {text!r} reads back from the tokenizer as {read!r}; write it with "
                    f"characters that the tokenizer keeps."
                )
            self._answers[text] = ids
        return self._answers[text]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, example: Example, *, completion: list[int], answer: Sequence[int] = ()) -> Encoded:
        if not example.images:
            raise DataError(f"{example.id}: there is no image; add one, or leave the sample out.")
        images = patches_of(self.processor.image_processor, example.open_images(), self.max_soft_tokens)
        prompt = self._expand(self._prompt_ids(example), images.soft_tokens, example.id)
        ids = [*prompt, *completion]
        if ids.count(self.bos_id) != 1 or ids[0] != self.bos_id:
            raise DataError(
                f"{example.id}: {ids.count(self.bos_id)} begin-of-sequence tokens, not one at the start; "
                f"mend the model's chat template."
            )
        if self.max_length is not None and len(ids) > self.max_length:
            raise DataError(
                f"{example.id}: {len(ids)} tokens, more than {self.max_length}; cutting would lose the image or the "
                f"label: shorten the prompt, or lower model.max_soft_tokens."
            )
        labels = [IGNORED] * len(ids)
        if completion:
            start = self._supervised_start(ids, answer, len(prompt), example.id)
            labels[start:] = ids[start:]
        return Encoded(ids, labels, images.values, images.positions)

    def _supervised_start(self, ids: list[int], answer: Sequence[int], prompt_length: int, example_id: str) -> int:
        """First supervised position. The search and the construction must agree on where the answer is."""
        turn, found = find_answer(ids, answer, self.turn_id)
        if found != prompt_length or self.image_id in ids[turn:] or not self._opens_model_turn(ids[turn:found]):
            raise DataError(
                f"{example_id}: the backward search found the label at token {found} after the turn at {turn}, but it "
                f"was put at token {prompt_length} of a model's turn; the chat template or tokenizer is not Gemma 4's."
            )
        return turn if self.supervise == "turn" else found

    def _opens_model_turn(self, ids: Sequence[int]) -> bool:
        """Whether ids begin a turn of the model: `<|turn>model` and a line break."""
        return bool(ids) and ids[0] == self.turn_id and self.text_of(ids[:4]).startswith(f"{TURN}model\n")

    def _prompt_ids(self, example: Example) -> list[int]:
        """The generation prompt with one placeholder an image. Samples share few prompts, so they are kept."""
        key = (example.prompt, len(example.images))
        if key not in self._prompts:
            self._refuse_special(example.prompt, "prompt", example.id)
            text = generation_prompt(self.processor, example.prompt, images=len(example.images))
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            after_images = text.rpartition(self.processor.image_token)[2]
            shown = ids.count(self.image_id)
            if shown != len(example.images) or not after_images.lstrip().startswith(example.prompt.strip()):
                raise DataError(
                    f"{example.id}: the chat template gives {text!r}; it must show each image once, before the text."
                )
            self._prompts[key] = ids
        return self._prompts[key]

    def _expand(self, ids: list[int], soft_tokens: list[int], example_id: str) -> list[int]:
        """Each placeholder becomes `<|image>`, as many soft tokens as the processor counted, and `<image|>`."""
        if ids.count(self.image_id) != len(soft_tokens):
            raise DataError(f"{example_id}: {ids.count(self.image_id)} placeholders for {len(soft_tokens)} images.")
        counts = iter(soft_tokens)
        expanded: list[int] = []
        for token in ids:
            if token == self.image_id:
                expanded += [self.image_start_id, *[self.image_id] * next(counts), self.image_end_id]
            else:
                expanded.append(token)
        return expanded

    def _refuse_special(self, text: str, part: str, example_id: str) -> None:
        for special in self._special_texts:
            if special in text:
                raise DataError(f"{example_id}: the {part} {text!r} holds the special token {special}; leave it out.")

    def _pad(self, rows: list[list[int]], *, side: Literal["left", "right"]) -> dict[str, torch.Tensor]:
        width = -(-max(map(len, rows)) // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(row: list[int], filler: int) -> list[int]:
            padding = [filler] * (width - len(row))
            return padding + row if side == "left" else row + padding

        input_ids = torch.tensor([padded(row, self.pad_id) for row in rows], dtype=torch.int64)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in rows], dtype=torch.int64),
            # Without it the larger sizes silently lose bidirectional attention over image tokens.
            "mm_token_type_ids": (input_ids == self.image_id).to(torch.int64),
        }

    def _images(self, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        values = torch.cat([sample.pixel_values for sample in encoded])
        return {
            "pixel_values": values if self.pixels_as_bytes else as_numbers(values),
            "image_position_ids": torch.cat([sample.image_position_ids for sample in encoded]),
        }


def generation_prompt(processor: Any, question: str, *, images: int) -> str:
    """What the chat template makes of images and a question, with thinking off, up to where the model begins to answer.

    Raises DataError where the template itself is broken.
    """
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    try:
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except jinja2.TemplateError as error:
        raise DataError(f"the model's chat template cannot be used: {error}; stage the model again.") from error
    return text


def find_answer(ids: Sequence[int], answer: Sequence[int], turn_id: int) -> tuple[int, int]:
    """Positions of the `<|turn>` before the last occurrence of `answer` and of that occurrence; -1 where there is none.

    It searches from the end, so a label that is also in the prompt is never taken for the answer.
    """
    found = next(
        (
            start
            for start in range(len(ids) - len(answer), -1, -1)
            if list(ids[start : start + len(answer)]) == list(answer)
        ),
        -1,
    )
    turn = next((position for position in range(found - 1, -1, -1) if ids[position] == turn_id), -1)
    return turn, found


def supervised_positions(labels: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose logits predict a supervised token, and those tokens.

    Returns two (batch, supervised) int64 tensors, short rows padded with position 0 and IGNORED.
    """
    rows = [[i for i, label in enumerate(row) if label != IGNORED and i > 0] for row in labels]
    width = max(map(len, rows))
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        positions[index, : len(row)] = torch.tensor(row, dtype=torch.int64) - 1
        targets[index, : len(row)] = torch.tensor([labels[index][i] for i in row], dtype=torch.int64)
    return positions, targets


def token_id(tokenizer: Any, name: str) -> int:
    """Id of a token by its name. Raises DataError where the tokenizer does not know it: it is not Gemma 4's."""
    found = tokenizer.convert_tokens_to_ids(name)
    if found is None or found == tokenizer.unk_token_id:
        raise DataError(f"the tokenizer has no token {name}; stage a Gemma 4 instruction-tuned model.")
    return int(found)
