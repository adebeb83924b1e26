"""Per-layer embeddings in host memory: where they are, that they stay there, and that nothing else changes."""

from pathlib import Path

import pytest
import torch

from g4trainer import gemma, planner, tiny, vram
from g4trainer import recipe as recipes
from g4trainer.host_embedding import HostEmbedding, embeddings_on_host, keep_on_host
from trainer.making import CPU, adapted_model, base_model, collator, examples, inputs_of, logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model") / "E2B"
    tiny.write_model(made)
    return made


def test_the_table_stays_where_it_is_whatever_the_model_does(folder: Path) -> None:
    model = base_model(folder)
    table = model.model.language_model.embed_tokens_per_layer
    assert keep_on_host(model) == table.weight.nbytes > 0
    assert isinstance(table, HostEmbedding)
    dtype = table.weight.dtype
    model.to(torch.float64)
    assert table.weight.dtype == dtype
    assert model.model.language_model.norm.weight.dtype == torch.float64


def test_logits_and_names_stay_the_same(folder: Path) -> None:
    batch = inputs_of(collator()(examples()[:2]))
    model = adapted_model(folder)
    before, names = logits(model, batch), [name for name, _ in model.named_parameters()]
    assert keep_on_host(model.get_base_model())
    assert torch.equal(logits(model, batch), before)
    assert [name for name, _ in model.named_parameters()] == names


def test_sizes_without_them_have_nothing_to_keep(tmp_path: Path) -> None:
    tiny.write_model(tmp_path, like="31B")
    assert keep_on_host(base_model(tmp_path)) == 0


@pytest.mark.parametrize("setting", ["auto", "card", "host"])
def test_a_cpu_has_no_card_to_keep_them_off(setting: str) -> None:
    assert not embeddings_on_host(recipes.Model.model_validate({"id": "a", "per_layer_embeddings": setting}), CPU)


@pytest.mark.parametrize(
    ("setting", "gib", "on_host"),
    [("auto", 15.9, True), ("auto", 22.3, False), ("card", 15.9, False), ("host", 140.0, True)],
)
def test_a_small_card_keeps_them_on_the_host(
    monkeypatch: pytest.MonkeyPatch, setting: str, gib: float, on_host: bool
) -> None:
    """What torch counts of a card of 16 GB, and of one of 24 GB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(gib * 2**30)))
    settings = recipes.Model.model_validate({"id": "a", "per_layer_embeddings": setting})
    assert embeddings_on_host(settings, torch.device("cuda")) == on_host


@pytest.mark.parametrize(("size", "gigabytes"), [("E2B", 4.70), ("E4B", 5.64), ("31B", 0)])
def test_the_memory_model_leaves_them_out(size: gemma.Size, gigabytes: float) -> None:
    def weights(where: str) -> int:
        document = {"name": "a", "model": {"id": "a", "per_layer_embeddings": where}, "data": {"dataset": "b"}}
        made = vram.Model(recipes.parse_recipe(document, source="a"), gemma.true_config(size))
        return sum(made.weights.values())

    assert (weights("card") - weights("host")) / 1e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(
    ("setting", "gib", "expected"),
    [
        ("auto", 16, True),
        ("auto", 24, False),
        ("auto", None, False),
        ("card", 8, False),
        ("host", 96, True),
        ("host", None, False),
    ],
)
def test_trainer_and_estimate_decide_by_the_same_rule(
    setting: str, gib: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = None if gib is None else gib * vram.GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total, total))
    settings = recipes.Model.model_validate({"id": "a", "per_layer_embeddings": setting})
    assert embeddings_on_host(settings, CPU if gib is None else torch.device("cuda")) is expected
    recipe = recipes.parse_recipe(
        {"name": "a", "model": settings.model_dump(), "data": {"dataset": "b"}, "job": {"accelerator": "nvidia-l4"}},
        source="a",
    )
    planned = planner.for_card(recipe, total)
    counted = vram.Model(planned, gemma.true_config("E4B"))
    assert (counted.host_bytes > 0) is expected
    table = 2 * counted.facts.per_layer_embedding_parameters
    everything = vram.Model(planner.for_card(recipe, None), gemma.true_config("E4B"))
    assert sum(counted.weights.values()) == sum(everything.weights.values()) - (table if expected else 0)
    assert counted.loading == everything.loading, "while the weights are read they are all on the card"


def test_a_card_that_cannot_hold_them_while_loading_is_refused() -> None:
    document = {"name": "a", "model": {"id": "a"}, "data": {"dataset": "b"}, "lora": {"r": 8}}
    recipe = planner.for_card(recipes.parse_recipe(document, source="a"), 8 * vram.GIB)
    model = vram.Model(recipe, gemma.true_config("E4B"))
    shape = model.shape(100)
    free = model.loading - 1
    assert free > planner.best_fit(model, shape, free).training.total, "training alone would fit"
    assert not planner.best_fit(model, shape, free).fits
    assert planner.best_fit(model, shape, free + 1).fits
