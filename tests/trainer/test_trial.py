"""Settings tried before the first step: what is tried and kept, and that a run's results know nothing of it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import TrainingArguments

import finished_run
from g4trainer import gemma, planner, train, trial, vram
from g4trainer.attempt import Attempt
from g4trainer.deadline import Deadline
from g4trainer.exits import ExitCode
from g4trainer.model import adapter_tensors
from g4trainer.planner import Plan, Setting
from g4trainer.ranks import ALONE
from g4trainer.recipe import load_frozen, parse_recipe
from g4trainer.run_plan import RunPlan
from g4trainer.rundir import RunDir, create_json, read_json
from g4trainer.state import pack_random_states
from g4trainer.trainer import RunTrainer
from g4trainer.trial_choice import Room, Tried, best_of, next_setting
from trainer.making import adapted_model, collator, examples

GIB = 2**30


def setting(micro: int, again: vram.Checkpointing, gib: float, seconds: float, *, allowed: bool = True) -> Setting:
    return Setting(micro, again, vram.Memory({"all": int(gib * GIB)}, "peak"), seconds, allowed)


SETTINGS = [
    setting(8, "none", 130, 1.0),
    setting(4, "none", 80, 1.1),
    setting(8, "half", 75, 1.2),
    setting(4, "half", 50, 1.3),
    setting(8, "full", 35, 1.5),
    setting(1, "full", 20, 4.0),
]
"""As `settings_of` sorts them."""
WEIGHTS_GIB = 19


def room(limit_gib: float, samples: int = 11_000) -> Room:
    return Room(int(limit_gib * GIB), WEIGHTS_GIB * GIB, samples)


def tried(index: int, gib: float | None, *, sample_s: float = 0.2, first_s: float = 45.0) -> Tried:
    return Tried(SETTINGS[index], None if gib is None else int(gib * GIB), sample_s, first_s)


def test_what_fits_as_predicted_is_kept() -> None:
    assert next_setting(SETTINGS, [tried(1, 80)], room(90)) is None
    assert best_of([tried(1, 80)], room(90)) == SETTINGS[1]


def test_out_of_memory_the_fastest_setting_of_clearly_less_memory_is_next() -> None:
    failed = [tried(1, None)]
    assert next_setting(SETTINGS, failed, room(70)) == SETTINGS[3], "75 GiB is too near to 80"
    assert next_setting(SETTINGS, [*failed, tried(3, 55)], room(70)) is None
    assert best_of([*failed, tried(3, 55)], room(70)) == SETTINGS[3]


def test_a_peak_without_a_margin_is_no_fit() -> None:
    assert next_setting(SETTINGS, [tried(1, 79)], room(80)) == SETTINGS[3]


def test_where_nothing_fits_the_smallest_is_the_last() -> None:
    history: list[Tried] = []
    following: Setting | None = SETTINGS[0]
    while following is not None:
        history.append(Tried(following, None, 0.0, 0.0))
        following = next_setting(SETTINGS, history, room(10))
    assert [SETTINGS.index(one.setting) for one in history] == [0, 1, 3, 4, 5]
    assert best_of(history, room(10)) == SETTINGS[-1]


def test_unexpectedly_free_memory_is_tried_once_and_kept_if_it_is_faster() -> None:
    """80 GiB were predicted and 50 needed: of 130, some 75 should be."""
    first = tried(1, 50)
    assert next_setting(SETTINGS, [first], room(90)) == SETTINGS[0]
    assert next_setting(SETTINGS, [first], room(75)) is None
    both = [first, tried(0, 76, sample_s=0.19)]
    assert next_setting(SETTINGS, both, room(90)) is None
    assert best_of(both, room(90)) == SETTINGS[0]
    assert best_of([first, tried(0, 76, sample_s=0.21)], room(90)) == SETTINGS[1]
    assert best_of([first, tried(0, None)], room(90)) == SETTINGS[1]
    assert next_setting(SETTINGS, [first, tried(0, None)], room(90)) is None


def test_no_more_is_tried_than_a_run_gains_by_it() -> None:
    """A tenth of 0.2 s a sample is saved; the first pass takes 45 s."""
    assert next_setting(SETTINGS, [tried(1, 50)], room(90, samples=2_000)) is None
    assert next_setting(SETTINGS, [tried(1, 50)], room(90, samples=3_000)) == SETTINGS[0]


def test_what_the_recipe_states_is_left_only_where_it_does_not_fit() -> None:
    stated = [setting(8, "none", 130, 1.0, allowed=False), setting(4, "none", 80, 1.1), SETTINGS[3]]
    assert next_setting(stated, [Tried(stated[1], 50 * GIB, 0.2, 45.0)], room(90)) is None
    assert next_setting(stated, [Tried(stated[1], None, 0.2, 45.0)], room(70)) == SETTINGS[3]


def test_the_plan_of_a_card_is_among_the_settings_that_are_tried() -> None:
    recipe = parse_recipe({"name": "r", "model": {"id": "m"}, "data": {"dataset": "d"}}, source="test")
    model = vram.Model(recipe, gemma.true_config("31B"))
    shape = model.shape(240)
    settings = planner.settings_of(model, shape)
    assert [one.seconds for one in settings] == sorted(one.seconds for one in settings)
    fit = planner.best_fit(model, shape, 90 * GIB)
    assert (fit.micro_batch, fit.activation_checkpointing) in {
        (one.micro_batch, one.activation_checkpointing) for one in settings if one.memory.total <= 90 * GIB
    }


class Card:
    """A gauge of a card that is not there. peaks: bytes by micro-batch; of another one, memory runs out."""

    def __init__(self, limit_bytes: int, peaks: Mapping[int, int]) -> None:
        self.limit_bytes, self._peaks = limit_bytes, peaks
        self.plans: list[Plan] = []

    def held_bytes(self) -> int:
        return 0

    @contextlib.contextmanager
    def watched(self, plan: Plan) -> Iterator[None]:
        self.plans.append(plan)
        yield
        if plan.per_device_train_batch_size not in self._peaks:
            raise torch.OutOfMemoryError("the card is full")

    def peak_bytes(self) -> int:
        return self._peaks[self.plans[-1].per_device_train_batch_size]


@pytest.fixture
def attempt(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Card], RunDir]:
    """Runs the finished run's recipe anew, with a trial on a card."""

    def run_on(card: Card) -> RunDir:
        for part in ("models", "datasets"):
            (tmp_path / part).symlink_to(finished.parents[1] / part)
        run = RunDir(tmp_path / "runs" / finished_run.RUN_ID)
        create_json(run.recipe, json.loads((finished / "recipe.json").read_text()))
        monkeypatch.setattr(train, "gauge_of", lambda device: card)
        monkeypatch.setenv("G4KIT_STATUS_INTERVAL_S", "0.5")
        assert train.run_attempt(run, Deadline(None)) is ExitCode.DONE
        return run

    return run_on


def test_a_run_is_the_same_with_and_without_a_trial(finished: Path, attempt: Callable[[Card], RunDir]) -> None:
    card = Card(8 * GIB, {8: GIB})
    run, without = attempt(card), RunDir(finished)
    plan = read_json(run.plan)
    measured = plan.pop("trial")
    assert len(card.plans) == len(measured) == 1
    assert (measured[0]["peak_bytes"], measured[0]["per_device_train_batch_size"]) == (GIB, 8)
    assert measured[0]["seconds_a_sample"] > 0
    assert {**plan, "trial": []} == {**read_json(without.plan), "trial": []}
    assert read_json(without.plan)["trial"] == [], "on a CPU nothing is tried"
    losses, expected = (
        [json.loads(line)["loss"] for line in (one.metrics / "0001.jsonl").read_text().splitlines() if '"loss"' in line]
        for one in (run, without)
    )
    assert losses
    assert losses == expected
    adapters = [(one.adapter / "adapter_model.safetensors").read_bytes() for one in (run, without)]
    assert adapters[0] == adapters[1]


def test_where_memory_runs_out_passes_get_smaller_and_leave_nothing_behind(
    tiny_folder: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, card = adapted_model(tiny_folder("E2B")), Card(8 * GIB, {2: GIB})
    room_for_gradients = Mock(return_value=[])
    monkeypatch.setattr(RunTrainer, "new_buffers", room_for_gradients)
    recipe = parse_recipe(
        {"name": "r", "model": {"id": "m", "max_soft_tokens": 70}, "data": {"dataset": "d"}}, source="test"
    )
    chosen = {"micro_batch": 8, "activation_checkpointing": "none", "evaluation_batch_size": 8}
    plan = planner.choose_plan(recipe, train_samples=8, validation_samples=0, **chosen)  # type: ignore[arg-type]
    before, randomness = adapter_tensors(model), pack_random_states()

    def trainer_of(plan: Plan) -> RunTrainer:
        return RunTrainer(
            model=model,
            args=TrainingArguments(**planner.training_arguments(recipe, plan, device="cpu", output_dir=str(tmp_path))),
            collator=collator(pixels_as_bytes=True),
            train=examples(),
            validation=[],
            plan=plan,
            recipe_hash=recipe.hash,
            load_best=False,
            attempt=Attempt(RunDir(tmp_path / "run"), Deadline(None), *[Mock()] * 4),
        )

    settings = [setting(8, "none", 8, 1.0), setting(4, "none", 4, 1.1), setting(2, "full", 2, 1.2)]
    kept = trial.try_settings(
        plan,
        settings,
        gauge=card,
        trainer_of=trainer_of,
        examples=examples(),
        epochs=1,
        ranks=ALONE,
        check=lambda: None,
    )
    assert [one.per_device_train_batch_size for one in card.plans] == [8, 4, 2]
    assert room_for_gradients.call_count == 3, "a pass leaves room for those that are sent to other ranks"
    assert (kept.per_device_train_batch_size, kept.gradient_accumulation_steps) == (2, 4)
    assert kept.activation_checkpointing == "full"
    assert [one["peak_bytes"] for one in kept.trial] == [None, None, GIB]
    assert Plan.from_json(json.loads(json.dumps(kept.to_json()))).per_device_train_batch_size == 2
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    after = adapter_tensors(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert pack_random_states() == randomness


def test_a_gpu_gets_the_workers_that_this_machine_has_room_for(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = RunDir(finished), load_frozen(finished / "recipe.json").recipe
    plan = RunPlan(run, recipe, Mock(), Mock(), ranks=ALONE, device=torch.device("cuda"))
    plan.current = Plan.from_json(read_json(run.plan))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(20)))
    assert plan.training_arguments()["dataloader_num_workers"] == planner.MAX_LOADER_WORKERS
    batch_bytes = 8 * 70 * 2**2 * 3 * 4**2  # patches of the embedded model, in its batches
    free = Mock(free=3 * batch_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert plan.training_arguments()["dataloader_num_workers"] == 1
    free.free -= 1
    assert plan.training_arguments()["dataloader_num_workers"] == 0
