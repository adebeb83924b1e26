"""What carries loss is exactly the label and the end of the turn, whatever the template, the image and the label."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import trl
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st
from PIL import Image

from g4trainer import gemma, tiny
from g4trainer.collator import IGNORED, Collator, find_answer, supervised_positions, token_id
from g4trainer.dataset import DataError, Example
from trainer.making import PROMPT, collator, encoded, example, examples, picture

TRL_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("gemma4*.jinja"))
OURS: dict[str, tiny.Like] = {"ours": "E2B", "ours, empty thought": "31B"}
TEMPLATES = {**OURS, **{path.stem: path for path in TRL_TEMPLATES}}
MODES = ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA", "I", "F", "YCbCr")
KINDS = {"CMYK": "TIFF", "YCbCr": "TIFF", "F": "TIFF", "I": "TIFF"}
"""The file format for a mode that PNG has not."""
_collators: dict[tuple[str, int, str], Collator] = {}


def templated(name: str, soft_tokens: int = 70, supervise: Literal["completion", "turn"] = "completion") -> Collator:
    """A collator with one of TEMPLATES; kept, for making tokenizers takes most of a test's time."""
    key = (name, soft_tokens, supervise)
    if key not in _collators:
        template = TEMPLATES[name]
        processor = tiny.make_processor("E2B" if isinstance(template, Path) else template)
        if isinstance(template, Path):
            processor.chat_template = template.read_text()
        _collators[key] = Collator(processor, max_soft_tokens=soft_tokens, supervise=supervise)
    return _collators[key]


def test_the_real_templates_are_there() -> None:
    assert len(TRL_TEMPLATES) >= 4
    assert all(gemma.TURN in path.read_text() for path in TRL_TEMPLATES)


def supervised_text(collate: Collator, batch: dict[str, torch.Tensor], row: int) -> str:
    labels = batch["labels"][row]
    return collate.text_of(labels[labels != IGNORED].tolist())


# Properties


LETTERS = (
    "abcdefghijABCDÉßñ 0123456789",
    "ab_ ",
    "a .,;:!?'\"()[]<>|/-&",
    "中文字",
    "العربية",
    "ไทยสาม",
    "हिन्दी",
    "🐈🐕",
)
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1, max_size=12)
labels = (
    any_text | st.sampled_from(LETTERS).flatmap(lambda letters: st.text(letters, min_size=1, max_size=12))
).filter(lambda text: text.strip() and not any(token in text for token in tiny.SPECIAL_TOKENS))
sizes = st.tuples(st.integers(1, 300), st.integers(1, 300)) | st.sampled_from([(1, 1), (2000, 3), (3, 2000), (1, 500)])


@st.composite
def samples(draw: st.DrawFn) -> Example:
    """A label, often one that is also in the prompt, or a prefix of a word there; images of any size and mode."""
    label = draw(labels)
    prompt = draw(
        st.sampled_from(
            [
                PROMPT,
                f"Is it {label}, {label} {label} or {label}x?",
                f"{label}",
                "model",
                "user",
                f"model\n{label}",
                "a\n\nb",
            ]
        )
    )
    drawn = draw(st.lists(st.tuples(st.sampled_from(MODES), sizes), min_size=1, max_size=2))
    files = tuple(encoded(Image.new(mode, size), KINDS.get(mode, "PNG")) for mode, size in drawn)
    return Example("train/0", files, prompt, label)


cases = {
    "template": st.sampled_from(sorted(TEMPLATES)),
    "soft_tokens": st.sampled_from(gemma.SOFT_TOKENS),
    "supervise": st.sampled_from(["completion", "turn"]),
    "batch": st.lists(samples(), min_size=1, max_size=3),
}


@given(**cases)
@budget(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_label_and_the_end_of_the_turn_carry_the_loss(
    template: str, soft_tokens: int, supervise: Any, batch: list[Example]
) -> None:
    check_batch(template, soft_tokens, supervise, batch)


@pytest.mark.slow
@given(**cases)
@budget(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_label_and_the_end_of_the_turn_carry_the_loss_over_thousands(
    template: str, soft_tokens: int, supervise: Any, batch: list[Example]
) -> None:
    check_batch(template, soft_tokens, supervise, batch)


def check_batch(template: str, soft_tokens: int, supervise: Any, batch: Sequence[Example]) -> None:
    collate = templated(template, soft_tokens, supervise)
    made = collate(batch)
    thought = gemma.EMPTY_THOUGHT if template == "ours, empty thought" else ""
    turn = f"{gemma.TURN}model\n{thought}" if supervise == "turn" else ""
    ids, mask, kept = made["input_ids"], made["attention_mask"], made["logits_to_keep"]
    for row, sample in enumerate(batch):
        assert supervised_text(collate, made, row) == f"{turn}{sample.answer.strip()}{gemma.END_OF_TURN}"
        length = int(mask[row].sum())
        assert mask[row, :length].all(), "padded on the right"
        assert made["labels"][row, length - 1] == collate.end_of_turn_id, "the sample ends with the end of the turn"
        assert (made["labels"][row, length:] == IGNORED).all()
        assert ids[row].tolist().count(collate.bos_id) == 1
        assert ids[row, 0] == collate.bos_id
        check_images(collate, made, row, sample)
        positions = kept[row][made["kept_labels"][row] != IGNORED]
        assert ids[row, positions + 1].tolist() == [i for i in made["labels"][row].tolist() if i != IGNORED]
    assert_generation_sees_the_same(collate, made, batch)


def check_images(collate: Collator, made: dict[str, torch.Tensor], row: int, sample: Example) -> None:
    """One block of soft tokens an image, between its marks, all of them before the question."""
    ids = made["input_ids"][row].tolist()
    text = collate.text_of(ids)
    assert (
        text.count(gemma.BEGIN_IMAGE + gemma.IMAGE) == text.count(gemma.IMAGE + gemma.END_IMAGE) == len(sample.images)
    )
    assert made["mm_token_type_ids"][row].tolist() == [int(token == collate.image_id) for token in ids]
    assert ids.count(collate.image_id) <= len(sample.images) * collate.max_soft_tokens
    question = text.rpartition(gemma.END_IMAGE)[2]
    assert question.lstrip().startswith(sample.prompt.strip() + gemma.END_OF_TURN)


def assert_generation_sees_the_same(collate: Collator, made: dict[str, torch.Tensor], batch: Sequence[Example]) -> None:
    """Each row of a generation batch ends with the very ids that training puts before the completion."""
    prompts = collate.prompts(batch)
    assert torch.equal(prompts["pixel_values"], made["pixel_values"])
    for row, sample in enumerate(batch):
        length = int(prompts["attention_mask"][row].sum())
        assert prompts["attention_mask"][row, -length:].all(), "padded on the left"
        before = prompts["input_ids"][row, -length:].tolist()
        whole = made["input_ids"][row, : int(made["attention_mask"][row].sum())].tolist()
        assert whole == [*before, *collate.answer_ids(sample.answer), collate.end_of_turn_id]
        assert prompts["mm_token_type_ids"][row].sum() == made["mm_token_type_ids"][row].sum()


# Images


@pytest.mark.parametrize("size", [(1, 1), (10000, 10), (10, 10000), (5, 3000), (640, 480)])
@pytest.mark.parametrize("soft_tokens", gemma.SOFT_TOKENS)
def test_every_size_of_image_becomes_as_many_features_as_soft_tokens(size: tuple[int, int], soft_tokens: int) -> None:
    collate = templated("ours", soft_tokens)
    sample = Example("train/0", (encoded(Image.new("RGB", size, "teal")),), PROMPT, "seven")
    batch = collate([sample])
    patches = int((batch["image_position_ids"] >= 0).all(dim=-1).sum())
    tokens = int((batch["input_ids"] == collate.image_id).sum())
    assert 0 < tokens <= soft_tokens
    assert patches == tokens * tiny.POOLING_KERNEL_SIZE**2
    assert batch["pixel_values"].shape[1] == soft_tokens * tiny.POOLING_KERNEL_SIZE**2


def test_images_stay_in_their_order_and_before_the_text() -> None:
    files = tuple(encoded(picture(width, 16, seed=width)) for width in (16, 64, 16))
    sample = Example("train/0", files, PROMPT, "seven")
    collate = collator()
    together = collate([sample])
    for index, file in enumerate(files):
        alone = collate([dataclasses.replace(sample, images=(file,))])
        assert torch.equal(together["pixel_values"][index], alone["pixel_values"][0])


# Refusals: never a silent fallback


def test_text_before_the_image_is_refused() -> None:
    collate = collator()
    collate.processor.chat_template = (
        "{{ bos_token }}<|turn>user\n{{ messages[0].content[-1].text }}<|image|><turn|>\n<|turn>model\n"
    )
    with pytest.raises(DataError, match=r"train/0: the chat template gives .* each image once, before the text"):
        collate.encode(example())


USER, MODEL = "<|turn>user\n<|image|>" + PROMPT + "<turn|>\n", "<|turn>model\n"
BOS = "{{ bos_token }}"
BROKEN_TEMPLATES = {
    "image twice": (BOS + USER.replace("<|image|>", "<|image|><|image|>") + MODEL, "each image once, before the text"),
    "no image": (BOS + USER.replace("<|image|>", "") + MODEL, "each image once, before the text"),
    "two <bos>": (BOS + BOS + USER + MODEL, "2 begin-of-sequence tokens, not one at the start"),
    "no <bos>": (USER + MODEL, "0 begin-of-sequence tokens, not one at the start"),
    "<bos> at the end": (USER + BOS + MODEL, "1 begin-of-sequence tokens, not one at the start"),
    "no turn of the model": (BOS + USER, "the backward search found the label"),
    "no turns at all": (BOS + "<|image|>" + PROMPT, "the backward search found the label"),
    "another role": (BOS + USER + "<|turn>user\n", "the chat template or tokenizer is not Gemma 4's"),
}


@pytest.mark.parametrize("case", BROKEN_TEMPLATES)
@pytest.mark.parametrize("supervise", ["completion", "turn"])
def test_a_template_that_is_not_gemma_4_s_is_refused_with_the_sample_s_id(case: str, supervise: Any) -> None:
    template, said = BROKEN_TEMPLATES[case]
    collate = collator(supervise=supervise)
    collate.processor.chat_template = template
    with pytest.raises(DataError, match=r"^train/7: ") as caught:
        collate.encode(example(seed=7))
    assert said in str(caught.value)


@pytest.mark.parametrize("special", ["<|turn>", "<turn|>", "<|image|>", "<bos>", "<eos>", "<pad>", "<|image>"])
@pytest.mark.parametrize("part", ["answer", "prompt"])
def test_special_tokens_in_the_data_are_refused(special: str, part: str) -> None:
    text = f"a {special} b"
    sample = example(text, seed=3) if part == "answer" else example(prompt=text, seed=3)
    with pytest.raises(DataError, match=f"train/3: the {part} .* holds the special token"):
        collator().encode(sample)


def test_an_answer_that_the_tokenizer_cannot_keep_is_refused() -> None:
    with pytest.raises(DataError, match="train/0: the answer 'a▁b' reads back from the tokenizer as 'a b'"):
        collator().encode(example("a▁b"))


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_empty_answer_is_refused(answer: str) -> None:
    with pytest.raises(DataError, match="has no tokens; write some text"):
        collator().encode(example(answer))


def test_a_sample_that_is_too_long_is_refused_and_never_cut() -> None:
    length = len(collator().encode(example()).input_ids)
    assert len(collator(max_length=length).encode(example()).input_ids) == length
    with pytest.raises(DataError, match=f"train/0: {length} tokens, more than {length - 1}; cutting would lose"):
        collator(max_length=length - 1).encode(example())


def test_a_sample_without_an_image_is_refused() -> None:
    with pytest.raises(DataError, match="train/0: there is no image"):
        collator().encode(Example("train/0", (), PROMPT, "seven"))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    class Other:
        unk_token_id = 3

        def convert_tokens_to_ids(self, _: str) -> int:
            return 3

    with pytest.raises(DataError, match=r"the tokenizer has no token <\|turn>"):
        token_id(Other(), gemma.TURN)


# Parts


def test_the_search_takes_the_last_occurrence_and_the_turn_before_it() -> None:
    turn, answer = 9, [5, 6]
    assert find_answer([9, 5, 6, 1, 9, 2, 5, 6, 7], answer, turn) == (4, 6)
    assert find_answer([9, 5, 6, 1], answer, turn) == (0, 1)
    assert find_answer([5, 6], answer, turn) == (-1, 0)
    assert find_answer([9, 1, 2], answer, turn) == (-1, -1)


def test_kept_positions_are_those_before_each_supervised_token() -> None:
    positions, targets = supervised_positions([[IGNORED, IGNORED, 4, 5], [IGNORED, 7, IGNORED, IGNORED]])
    assert positions.tolist() == [[1, 2], [0, 0]]
    assert targets.tolist() == [[4, 5], [7, IGNORED]]


def test_the_loss_is_counted_over_the_kept_labels() -> None:
    batch = collator()(examples())
    assert (batch["labels"] != IGNORED).sum() == (batch["kept_labels"] != IGNORED).sum()
