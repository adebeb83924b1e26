"""What is chosen for a card, and how long it takes: pure functions."""

import itertools
from typing import Any, get_args

import pytest

from g4trainer import gemma, planner, timing, vram
from g4trainer.limits import ACCELERATORS
from g4trainer.recipe import Recipe, RecipeError, parse_recipe

GIB = vram.GIB
PETS = timing.Samples(train=3680, validation=0, test=3669)


def recipe(**sections: dict[str, Any]) -> Recipe:
    document: dict[str, Any] = {"name": "x", "model": {"id": "m"}, "data": {"dataset": "d"}}
    for name, values in sections.items():
        document[name] = document.get(name, {}) | values
    return parse_recipe(document, source="test")


def fit(settings: Recipe, size: gemma.Size, gib: float) -> planner.Fit:
    model = vram.Model(settings, gemma.true_config(size))
    return planner.best_fit(model, model.shape(238), int(gib * GIB))


def test_what_fits_fills_every_auto_of_a_plan() -> None:
    settings = recipe()
    chosen = planner.what_fits(settings, gemma.true_config("31B"), 94 * GIB)
    assert chosen == {"micro_batch": 4, "activation_checkpointing": "none", "evaluation_batch_size": 64}
    plan = planner.choose_plan(settings, train_samples=3680, validation_samples=0, **chosen)
    assert (plan.per_device_train_batch_size, plan.gradient_accumulation_steps) == (4, 2)
    assert (plan.activation_checkpointing, plan.evaluation_batch_size) == ("none", 64)


@pytest.mark.parametrize(
    ("size", "gib", "micro", "checkpointing"),
    [
        ("31B", 94, 4, "none"),
        ("31B", 79, 2, "none"),
        ("E4B", 40, 4, "none"),
        ("31B", 40, 8, "full"),
        ("31B", 178, 8, "none"),
        ("E4B", 94, 8, "none"),
        ("E4B", 21.8, 4, "half"),
        ("E4B", 20, 8, "full"),
    ],
)
def test_the_fastest_setting_that_fits(size: gemma.Size, gib: float, micro: int, checkpointing: str) -> None:
    found = fit(recipe(), size, gib)
    assert (found.micro_batch, found.activation_checkpointing, found.fits) == (micro, checkpointing, True)
    assert found.needed <= gib * GIB


@pytest.mark.parametrize("size", get_args(gemma.Size))
def test_more_memory_is_never_slower(size: gemma.Size) -> None:
    settings = recipe()
    model = vram.Model(settings, gemma.true_config(size))
    shape, card = model.shape(238), timing.CARDS[settings.job.accelerator]
    seconds = []
    for gib in (22, 48, 80, 96, 140, 180):
        found = planner.best_fit(model, shape, gib * GIB)
        if found.fits:
            seconds.append(
                timing.step_seconds(
                    model,
                    shape,
                    card,
                    micro_batch=found.micro_batch,
                    checkpointing=found.activation_checkpointing,
                    accumulation=8 // found.micro_batch,
                )
            )
    assert len(seconds) >= 4
    assert seconds == sorted(seconds, reverse=True)


def test_what_the_recipe_states_stays() -> None:
    training = {"per_device_train_batch_size": 2, "activation_checkpointing": "full"}
    found = fit(recipe(training=training, evaluation={"batch_size": 3}), "31B", 94)
    assert (found.micro_batch, found.activation_checkpointing, found.evaluation_batch_size) == (2, "full", 3)
    too_much = recipe(training={"per_device_train_batch_size": 8, "activation_checkpointing": "none"})
    assert not fit(too_much, "31B", 94).fits


def test_where_nothing_fits_the_smallest_is_chosen() -> None:
    found = fit(recipe(), "31B", 20)
    assert (found.micro_batch, found.activation_checkpointing, found.evaluation_batch_size) == (1, "full", 1)
    assert not found.fits


def test_the_micro_batch_divides_what_one_gpu_has_of_a_step() -> None:
    job = {"accelerator": "nvidia-h100-80gb", "gpus": 2}
    settings = recipe(training={"effective_batch_size": 12}, job=job)
    assert fit(settings, "E2B", 79).micro_batch in (1, 2, 3, 6)


def test_the_nearest_settings_that_fit() -> None:
    config, card = gemma.true_config("31B"), 94 * GIB
    stated = recipe(training={"per_device_train_batch_size": 8, "activation_checkpointing": "none"})
    nearest = planner.nearest_fits(stated, config, card)
    assert nearest[0] == 'training.per_device_train_batch_size="auto" training.activation_checkpointing="auto"'
    for change in nearest:
        changed = planner.with_changes(stated, change.split())
        assert fit(changed, "31B", 94).fits
    wide = recipe(model={"quantization": "none"})
    assert planner.nearest_fits(wide, config, 40 * GIB)[0] == 'model.quantization="nf4"'
    assert planner.nearest_fits(recipe(), config, 12 * GIB) == []


def test_a_prompt_with_labels_is_expected_to_be_long() -> None:
    plain, labels = recipe(data={"prompt": "Which digit is it?"}), recipe(data={"prompt": "One of: {labels}."})
    assert planner.expected_text_tokens(plain) < 50
    assert 200 < planner.expected_text_tokens(labels) < 300


def time(settings: Recipe, size: gemma.Size = "31B", card: str = "nvidia-h200-141gb") -> timing.Time:
    model = vram.Model(settings, gemma.true_config(size))
    return timing.estimate_time(
        settings,
        model,
        model.shape(238),
        PETS,
        micro_batch=4,
        checkpointing="none",
        evaluation_batch_size=64,
        evaluations=0,
        card_name=card,
    )


def test_the_time_of_a_run_is_the_sum_of_its_phases() -> None:
    found = time(recipe(job={"timeout_s": 86400}))
    assert list(found.phases) == ["load", "baseline", "train", "checkpoints", "final", "retries"]
    assert found.phases["train"] == pytest.approx(3 * 3680 * 0.175, rel=0.1)  # as a run was measured
    assert found.low < found.total < found.high
    assert (found.slices, found.phases["retries"], found.calibrated) == (1, 0, True)
    assert time(recipe(evaluation={"baseline": False})).phases["baseline"] == 0


def test_an_answer_takes_what_was_measured_and_a_chats_more() -> None:
    """0.0918 and 0.0965 s in batches of 128, seven tokens and the end of the turn."""

    def seconds(settings: Recipe) -> float:
        model = vram.Model(settings, gemma.true_config("31B"))
        return timing.answer_seconds(model, model.shape(238), timing.CARDS[timing.CALIBRATED_ON], batch=128)

    assert seconds(recipe()) == pytest.approx(0.094, rel=0.05)
    chat = seconds(recipe(data={"task": "chat"}))
    assert chat > 4 * seconds(recipe())
    assert seconds(recipe(data={"task": "chat"}, evaluation={"max_new_tokens": 10})) == seconds(recipe())
    assert seconds(recipe(data={"task": "chat"}, evaluation={"max_new_tokens": 20})) < chat


def test_a_slower_card_takes_longer_and_says_it_is_not_calibrated() -> None:
    totals = [time(recipe(), card=card).total for card in ("nvidia-b200", "nvidia-h200-141gb", "nvidia-rtx-pro-6000")]
    assert totals == sorted(totals)
    other = time(recipe(), card="nvidia-rtx-pro-6000")
    assert not other.calibrated
    assert other.high / other.low > time(recipe()).high / time(recipe()).low


@pytest.mark.parametrize(
    ("total_s", "timeout_s", "attempts"), [(900, 1200, 1), (900, 600, 2), (3000, 600, 7), (10, 600, 1), (900, 145, 0)]
)
def test_attempts_under_a_timeout(total_s: float, timeout_s: int, attempts: int) -> None:
    assert timing.attempts_needed(total_s, 100, timeout_s) == attempts


def test_every_published_size_fits_some_card_with_the_default_recipe() -> None:
    for size in get_args(gemma.Size):
        fitting = [name for name, gpu in ACCELERATORS.items() if fit(recipe(), size, gpu.memory_gib - 0.6).fits]
        assert "nvidia-rtx-pro-6000" in fitting
        assert ("nvidia-l4" in fitting) is (size != "31B")


def plan_of(settings: Recipe, micro_batch: int = 8) -> planner.Plan:
    return planner.choose_plan(
        settings,
        train_samples=100,
        validation_samples=0,
        micro_batch=micro_batch,
        activation_checkpointing="none",
        evaluation_batch_size=8,
    )


def test_processes_share_an_effective_batch() -> None:
    def cut(plan: planner.Plan) -> tuple[int, int, int]:
        return plan.per_device_train_batch_size, plan.gradient_accumulation_steps, plan.processes

    alone = plan_of(recipe())
    assert cut(alone) == (8, 1, 1)
    assert cut(alone.for_processes(2)) == (4, 1, 2)
    assert cut(alone.for_processes(2).for_processes(1)) == (4, 2, 1)
    assert alone.for_processes(1) is alone
    assert cut(plan_of(planner.on_processes(recipe(), 4), micro_batch=3)) == (2, 1, 4)
    assert planner.Plan.from_json({k: v for k, v in alone.to_json().items() if k != "processes"}) == alone


def test_a_number_of_processes_that_cannot_share_it_is_refused() -> None:
    stated = recipe(training={"per_device_train_batch_size": 2})
    assert planner.processes_that_divide(recipe(), 8) == [1, 2, 4, 8]
    assert planner.processes_that_divide(stated, 8) == [1, 2, 4]
    with pytest.raises(RecipeError, match=r"got 8, which 3 processes cannot share .* processes: 1, 2\."):
        planner.on_processes(stated, 3)


def test_nothing_is_chosen_that_does_not_fit_where_something_does() -> None:
    """Over sizes, cards, soft tokens, ranks and text lengths: what is chosen fits, by the bytes that vram counts."""
    checked = fitting = 0
    for size, soft, r in itertools.product(get_args(gemma.Size), (70, 1120), (8, 256)):
        settings = recipe(model={"max_soft_tokens": soft}, lora={"r": r}, training={"effective_batch_size": 16})
        config = gemma.true_config(size)
        model = vram.Model(settings, config)
        for gpu, text_tokens in zip(ACCELERATORS.values(), itertools.cycle((40, 238)), strict=False):
            free, shape = int(gpu.memory_gib * GIB) - vram.CUDA_CONTEXT, model.shape(text_tokens)
            chosen = planner.what_fits(settings, config, free, text_tokens=text_tokens)
            plan = planner.choose_plan(settings, train_samples=1000, validation_samples=10, **chosen)
            micro, checkpointing = plan.per_device_train_batch_size, plan.activation_checkpointing
            needed = max(
                planner.training_memory(model, shape, micro, checkpointing).total,
                planner.evaluation_memory(model, shape, plan.evaluation_batch_size).total,
            )
            least = max(
                planner.training_memory(model, shape, 1, "full").total, planner.evaluation_memory(model, shape, 1).total
            )
            assert (needed <= free) is (least <= free), (size, gpu.name, soft, r, text_tokens)
            assert micro * plan.gradient_accumulation_steps == 16
            checked += 1
            fitting += needed <= free
    assert checked > 100
    assert checked // 2 < fitting < checked


def test_gpus_share_a_base_model_that_fits_none_of_them() -> None:
    config = gemma.true_config("31B")

    def shards(gib: float, gpus: int = 2, quantization: str = "none", sharding: str = "auto") -> int:
        job = {"gpus": gpus, "accelerator": "nvidia-h100-80gb", "sharding": sharding}
        settings = recipe(model={"quantization": quantization}, job=job)
        return planner.model_for(settings, config, int(gib * GIB)).shards

    assert shards(140) == 1
    assert shards(60) == 2
    assert shards(60, gpus=1) == 1
    assert shards(60, sharding="none") == 1
    assert shards(140, sharding="full") == 2
    assert shards(20, quantization="nf4") == 1
    with pytest.raises(RecipeError, match=r'job.sharding: got "full" for a base model in NF4'):
        shards(60, quantization="nf4", sharding="full")


def test_a_shared_model_needs_its_part_and_what_is_gathered() -> None:
    settings = recipe(model={"quantization": "none"}, job={"gpus": 4, "accelerator": "nvidia-h100-80gb"})
    config = gemma.true_config("31B")
    whole, shared = vram.Model(settings, config), vram.Model(settings, config, shards=4)
    bytes_of = sum(whole.weights.values())
    assert shared.weights["weights, its share"] == -(-bytes_of // 4)
    embeddings = whole.vocabulary * whole.width * vram.BF16
    assert embeddings < shared.weights["weights, gathered"] < embeddings + 0.15 * bytes_of


@pytest.mark.parametrize(
    ("cores", "shared_gib", "workers"),
    [(20, 16, 8), (4, 16, 2), (1, 16, 1), (8, 16, 6), (20, 1 / 16, 1), (20, 1 / 64, 0), (20, 0, 0)],
)
def test_workers_go_by_cores_and_by_the_memory_they_pass_batches_through(
    cores: int, shared_gib: float, workers: int
) -> None:
    batch_bytes = 8 * 2520 * 768  # eight photos of 280 soft tokens
    found = planner.loader_workers(cores, int(shared_gib * GIB), batch_bytes)
    assert found == workers
    assert (found * 2 + 1) * batch_bytes <= shared_gib * GIB or not found
