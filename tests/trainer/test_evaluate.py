"""Generation that stops where it should, labels found in what was said, and the metrics against scikit-learn's."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from g4trainer import tiny
from g4trainer.collator import Collator
from g4trainer.dataset import DataError, Example
from g4trainer.evaluate import (
    UNKNOWN,
    Generator,
    Prediction,
    label_trie,
    longest_answer,
    match_label,
    predict,
    read_predictions,
    score,
    to_lines,
    wilson_interval,
)
from trainer.conftest import Folders
from trainer.making import adapted_model, base_model, collator, example, examples, fill_adapters, relative_error

LABELS = ("one", "one two", "seven", "zero nine", "Bernard St.", "a_b")


def generator(folder: Path, like: tiny.Like, **options: object) -> Generator:
    chosen = {"max_new_tokens": 6, "constrained": False, **options}
    return Generator(base_model(folder), collator(like), LABELS, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("like", ["E2B", "26B-A4B", "31B"])
def test_a_batch_says_what_each_sample_says_alone(like: tiny.Like, tiny_folder: Folders) -> None:
    """Prompts of unequal length, padded on the left: padding and the neighbours must change nothing."""
    model = adapted_model(tiny_folder(like)).eval()
    fill_adapters(model)
    collate = collator(like)
    samples = [example(prompt="Which digit is it? " * (1 + 2 * n), seed=n, images=1 + n % 2) for n in range(4)]
    lengths = collate.prompts(samples)["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) == 4

    def said(batch: list[Example]) -> torch.Tensor:
        """Logits of three tokens one after the other: (batch, 3, vocabulary)."""
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        with torch.inference_mode():
            made = model.generate(**collate.prompts(batch), **options, output_logits=True)
        return torch.stack(made.logits, dim=1)

    together = said(samples)
    assert together.shape[1] == 3
    for row, sample in enumerate(samples):
        assert relative_error(together[row], said([sample])[0]) < 1e-4
    assert relative_error(together[0], together[1]) > 0.01, "samples that say the same would show nothing"


def test_generation_equals_a_greedy_loop_without_a_cache(tiny_folder: Folders) -> None:
    made = generator(tiny_folder("31B"), "31B")
    ids = made.collator.prompts([example()])
    for _ in range(made.max_new_tokens):
        with torch.inference_mode():
            following = made.model(**ids, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids["input_ids"] = torch.cat([ids["input_ids"], following], dim=1)
        ids["attention_mask"] = torch.cat([ids["attention_mask"], torch.ones_like(following)], dim=1)
        ids["mm_token_type_ids"] = torch.cat([ids["mm_token_type_ids"], torch.zeros_like(following)], dim=1)
    width = made.collator.prompts([example()])["input_ids"].shape[1]
    assert made.answer([example()]) == [made.collator.text_of(ids["input_ids"][0, width:].tolist()).strip()]


class Scripted(torch.nn.Module):  # type: ignore[misc]
    """A model that says given texts, then goes on with other tokens after the end of the turn."""

    def __init__(self, collate: Collator, texts: list[str]) -> None:
        super().__init__()
        self.collate, self.texts = collate, texts
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, *, input_ids: torch.Tensor, eos_token_id: list[int], **_: object) -> torch.Tensor:
        assert set(eos_token_id) == {self.collate.end_of_turn_id, self.collate.tokenizer.eos_token_id}
        rows = [self.collate.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.texts]
        width = max(map(len, rows))
        padded = [row + [self.collate.pad_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def test_an_answer_ends_with_the_turn(tiny_folder: Folders) -> None:
    collate = collator()
    model = Scripted(collate, ["seven<turn|>\n<|turn>user", "one two<eos>nine", " zero nine ", "one"])
    made = Generator(model, collate, LABELS, max_new_tokens=6, constrained=False)
    samples = [example(truth, seed=seed) for seed, truth in enumerate(["seven", "one", "zero nine", "one two"])]
    assert predict(made, samples, batch_size=4) == [
        Prediction("train/0", "seven", "seven", "seven", True),
        Prediction("train/1", "one", "one two", "one two", False),
        Prediction("train/2", "zero nine", "zero nine", "zero nine", True),
        Prediction("train/3", "one two", "one", "one", False),
    ]


@pytest.mark.parametrize("like", ["E2B", "31B"])
@pytest.mark.parametrize("max_new_tokens", [1, 20])
def test_constrained_answers_are_labels_whatever_the_model_would_say(
    like: tiny.Like, max_new_tokens: int, tiny_folder: Folders
) -> None:
    made, samples = (
        generator(tiny_folder(like), like, constrained=True, max_new_tokens=max_new_tokens),
        examples(LABELS),
    )
    assert set(made.answer(samples)) <= set(LABELS)
    unconstrained = generator(tiny_folder(like), like, max_new_tokens=6).answer(samples)
    assert not set(unconstrained) & set(LABELS), "or the constraint would show nothing"
    assert score(predict(made, samples, batch_size=4), LABELS)["unknown_rate"] == 0


def test_the_trie_holds_every_label_and_ends_each_with_the_turn() -> None:
    collate = collator()
    trie = label_trie(collate, LABELS)

    def spelled(node: dict[int, dict[int, object]], ids: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
        if not node:
            return [ids]
        return [path for token, below in node.items() for path in spelled(below, (*ids, token))]  # type: ignore[arg-type]

    assert {collate.text_of(path) for path in spelled(trie)} == {f"{label}<turn|>" for label in LABELS}
    assert longest_answer(collate, LABELS) == max(map(len, spelled(trie)))
    assert longest_answer(collate, ()) == 256


SAID = {
    "cat": ("cat", ("cat", "dog")),
    "Cat.": ("cat", ("cat", "dog")),
    "It is a CAT!": ("cat", ("cat", "dog")),
    "a category": (None, ("cat", "dog")),
    "": (None, ("cat", "dog")),
    "Maine Coon cat": ("maine_coon", ("cat", "maine_coon", "coon")),
    "cat dog": ("cat_dog", ("cat", "dog", "cat_dog")),
    "one two": ("one two", ("one", "one two", "two")),
    "St. Bernard": ("st. bernard", ("bernard", "st. bernard")),
    "It is Bernard St.": ("Bernard St.", ("Bernard St.", "Bernard")),
    "Bernard St.": ("Bernard St.", ("Bernard St.", "Bernard")),
    "C++": ("C++", ("C", "C++")),
    "这是猫。": ("猫", ("猫", "狗")),
    "เป็นแมวครับ": ("แมว", ("แมว", "สุนัข")),
    "Straße": ("STRASSE", ("STRASSE", "Weg")),
    "a b": (None, ("a_b", "A b c")),
}


def test_labels_are_found_in_what_was_said() -> None:
    expected = {text: label for text, (label, _) in SAID.items() if text != "a b"}
    assert {text: match_label(text, labels) for text, (_, labels) in SAID.items() if text != "a b"} == expected


def test_labels_that_differ_by_an_underscore_alone_are_kept_apart() -> None:
    assert match_label("a b", ("a_b", "a b")) == "a b"
    assert match_label("A_B", ("a_b", "a b")) == "a_b"
    assert match_label("A B", ("a_b", "c")) == "a_b"


@given(st.lists(st.text("abc_ .", min_size=1, max_size=5).filter(str.strip), min_size=2, max_size=6))
@budget(max_examples=200, deadline=None, derandomize=True)
def test_every_label_that_is_said_alone_is_found(names: list[str]) -> None:
    labels = list({name.strip().casefold(): name.strip() for name in names}.values())
    assert [match_label(label, labels) for label in labels] == labels


def test_metrics_equal_scikit_learn_s() -> None:
    labels = ("a", "b", "c")
    truths, said = "aaabbbccca", ["a", "a", "b", "b", "b", None, "c", "a", None, "c"]
    rows = [Prediction(str(i), t, p, p or "?", t == p) for i, (t, p) in enumerate(zip(truths, said, strict=True))]
    result = score(rows, labels)
    answers = [p or UNKNOWN for p in said]
    assert result["count"] == 10
    assert result["accuracy"] == accuracy_score(list(truths), answers) == 0.5
    assert result["macro_f1"] == pytest.approx(f1_score(list(truths), answers, labels=labels, average="macro"))
    assert result["unknown_rate"] == 0.2
    assert result["exact_match"] == 0.5
    assert result["accuracy_interval_95"] == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert result["confusion"]["columns"] == ["a", "b", "c", UNKNOWN]
    assert result["confusion"]["counts"] == [[2, 1, 1, 0], [0, 2, 0, 1], [1, 0, 1, 1]]
    assert [(row["label"], row["support"]) for row in result["per_class"]] == [("a", 4), ("b", 3), ("c", 3)]
    json.dumps(result, allow_nan=False)


def test_chat_has_exact_match_and_no_accuracy() -> None:
    rows = [Prediction("0", "yes.", "yes.", "yes.", True), Prediction("1", "no", "No", "No", False)]
    result = score(rows, ())
    assert result == {"count": 2, "exact_match": 0.5, "accuracy": None, "macro_f1": None, "unknown_rate": None}


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_intervals_are_the_published_ones(successes: int, count: int, low: float, high: float) -> None:
    """The last is Newcombe's example (Statistics in Medicine 17, 1998, table I)."""
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-4)


def test_finished_batches_are_not_generated_again(tmp_path: Path) -> None:
    collate = collator()
    samples = examples()[:4]
    made = Generator(Scripted(collate, ["one", "seven"]), collate, LABELS, max_new_tokens=6, constrained=False)
    seen: list[int] = []
    whole = predict(made, samples, batch_size=2, on_batch=lambda rows: seen.append(len(rows)))
    assert seen == [2, 4]
    (tmp_path / "p.jsonl").write_bytes(to_lines(whole[:3]))
    seen.clear()
    finished = read_predictions(tmp_path / "p.jsonl")
    assert (
        predict(made, samples, batch_size=2, finished=finished, on_batch=lambda rows: seen.append(len(rows))) == whole
    )
    assert seen == [4]
    assert read_predictions(tmp_path / "missing.jsonl") == []


class Counting(Scripted):
    """A model that says which of the given lengths its prompt has, and how wide the batches were."""

    def __init__(self, collate: Collator, lengths: list[int]) -> None:
        super().__init__(collate, [])
        self.lengths, self.widths = lengths, list[int]()

    def generate(self, *, input_ids: torch.Tensor, eos_token_id: list[int], **inputs: object) -> torch.Tensor:
        mask = inputs["attention_mask"]
        assert isinstance(mask, torch.Tensor)
        self.widths.append(input_ids.shape[1])
        self.texts = [LABELS[self.lengths.index(length)] for length in mask.sum(dim=1).tolist()]
        return super().generate(input_ids=input_ids, eos_token_id=eos_token_id)


def test_long_prompts_are_answered_first_and_every_answer_finds_its_place() -> None:
    collate = collator()
    samples = [example(seed=seed, prompt="what " * times) for seed, times in enumerate((1, 9, 2, 8, 3, 4))]
    lengths = [collate.prompts([sample])["input_ids"].shape[1] for sample in samples]
    model = Counting(collate, lengths)
    made = Generator(model, collate, LABELS, max_new_tokens=4, constrained=False)
    batches: list[list[Prediction]] = []
    whole = predict(made, samples, batch_size=2, on_batch=lambda so_far: batches.append(list(so_far)))
    assert [one.id for one in whole] == [sample.id for sample in samples]
    assert [one.raw_text for one in whole] == list(LABELS)
    order = sorted(range(6), key=lambda seed: -lengths[seed])
    assert [one.id for one in batches[-1]] == [f"train/{seed}" for seed in order]
    assert model.widths == [lengths[seed] for seed in order[::2]]
    finished, batches = batches[0], []
    assert predict(made, samples, batch_size=2, finished=finished, on_batch=lambda so_far: batches.append([])) == whole
    assert len(batches) == 2
    assert predict(made, samples, batch_size=2, finished=[whole[seed] for seed in order]) == whole


def test_predictions_of_other_data_are_refused() -> None:
    made = Generator(Scripted(collator(), ["one"]), collator(), LABELS, max_new_tokens=6, constrained=False)
    with pytest.raises(DataError, match="predictions of an earlier attempt are of test/9, not train/0"):
        predict(made, [example()], batch_size=1, finished=[Prediction("test/9", "one", "one", "one", True)])
