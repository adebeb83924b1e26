"""Killed or stopped at any step and resumed: the same data order, losses, answers and adapter, byte for byte."""

import signal

import pytest

from chaos.attempts import (
    BEST,
    STEPS,
    Server,
    assert_same_result,
    committed_steps,
    copy_of,
    losses_of,
    new_run,
    recipe,
)
from g4trainer.artifacts import ADAPTER_WEIGHTS
from g4trainer.checkpoint import ADAPTER_FILE
from g4trainer.claims import attempts
from g4trainer.rundir import RunDir, read_json

AFTER_TRAINING = ("results.json", "evaluation/final.json", "evaluation/final.predictions.jsonl")


def test_the_undisturbed_run_has_what_these_tests_need(undisturbed: RunDir) -> None:
    kinds = [kind for kind, _, _ in losses_of(undisturbed)]
    assert (kinds.count("train"), kinds.count("eval")) == (STEPS, 3)
    assert committed_steps(undisturbed) == [BEST, STEPS - 1, STEPS], "the newest two and the best one"
    results = read_json(undisturbed.results)
    assert (results["train"]["best_step"], results["attempts"]) == (BEST, 1)
    assert results["train"]["samples"] == 2 * (8 + 8 + 6)


def test_resumed_at_every_step(server: Server, undisturbed: RunDir, run: RunDir) -> None:
    """Within an epoch, at its boundary, beside a validation, with accumulation and dropout."""
    for step in range(1, STEPS):
        attempt = server.run(run, faults={"signal_at": [step, ("SIGTERM", "SIGINT")[step % 2]]})
        assert attempt.status == 75, attempt.log
        assert committed_steps(run)[-1] == step
        assert read_json(run.status)["state"] == "interrupted"
        assert attempts(run)[-1]["outcome"].startswith(f"stopped at step {step} of {STEPS}: SIG")
    attempt = server.run(run)
    assert attempt.status == 0, attempt.log
    assert_same_result(run, undisturbed)
    assert read_json(run.results)["attempts"] == STEPS
    seconds = read_json(run.results)["seconds"]
    own = [noted["seconds"] for noted in attempts(run)]
    assert seconds["train"] == pytest.approx(sum(part["train"] for part in own), abs=0.5)
    assert seconds["total"] == pytest.approx(sum(part["total"] for part in own), abs=1), "but for its very end"


def test_killed_between_the_last_checkpoint_and_the_adapter(server: Server, undisturbed: RunDir) -> None:
    run = copy_of(undisturbed, "no-adapter", without=(*AFTER_TRAINING, "adapter"))
    half_written = server.run(run, layer={"under": "adapter", "kill_at": 12})
    assert half_written.status == -signal.SIGKILL
    assert {"adapter_config.json", ADAPTER_WEIGHTS} <= {path.name for path in run.adapter.iterdir()}
    resumed = server.run(run)
    assert resumed.status == 0, resumed.log
    assert "training is skipped" not in resumed.log, "a half-written adapter was taken for whole"
    assert "step 1 of" not in resumed.log
    assert_same_result(run, undisturbed)


def test_a_damaged_adapter_is_made_again(server: Server, undisturbed: RunDir) -> None:
    run = copy_of(undisturbed, "damaged-adapter", without=AFTER_TRAINING)
    path = run.adapter / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    resumed = server.run(run)
    assert resumed.status == 0, resumed.log
    assert "the adapter is made again" in resumed.log
    assert_same_result(run, undisturbed)


def test_with_everything_made_only_results_are_written(server: Server, undisturbed: RunDir) -> None:
    run = copy_of(undisturbed, "no-results", without=("results.json",))
    resumed = server.run(run)
    assert resumed.status == 0, resumed.log
    assert "training is skipped" in resumed.log
    assert "step 1 of" not in resumed.log
    assert_same_result(run, undisturbed)
    again = server.run(run)
    assert again.status == 0
    assert "finished already" in again.log
    assert len(attempts(run)) == 2, "a finished run is not claimed again"


def test_a_damaged_best_checkpoint_is_trained_again(server: Server, undisturbed: RunDir) -> None:
    run = copy_of(undisturbed, "damaged-best", without=(*AFTER_TRAINING, "adapter"))
    best = run.checkpoints / f"step-{BEST:08d}" / ADAPTER_FILE
    best.write_bytes(best.read_bytes()[:-1])
    found = server.run(run)
    assert found.status == 1, found.log
    assert "the best checkpoint is damaged" in found.log
    again = server.run(run)
    assert again.status == 0, again.log
    assert_same_result(run, undisturbed)


def test_answers_go_on_after_a_truncated_line(server: Server, undisturbed: RunDir) -> None:
    run = copy_of(undisturbed, "truncated-answers", without=AFTER_TRAINING)
    stopped = server.run(run, faults={"signal_in": ["answer", "SIGTERM"]})
    assert stopped.status == 75, stopped.log
    partial = run.evaluation / "final.partial.jsonl"
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2, "the batch that was under way is kept"
    partial.write_bytes(lines[0] + lines[1][:-9])
    resumed = server.run(run)
    assert resumed.status == 0, resumed.log
    assert "line 2 is damaged" in resumed.log
    assert_same_result(run, undisturbed)


def test_a_stop_in_validation_leaves_it_to_the_next_attempt(server: Server, undisturbed: RunDir, run: RunDir) -> None:
    for _ in range(2):
        stopped = server.run(run, faults={"signal_in": ["validate", "SIGTERM"]})
        assert stopped.status == 75, stopped.log
        assert committed_steps(run)[-1] == 2
        assert [line for line in losses_of(run) if line[0] == "eval"] == []
    resumed = server.run(run)
    assert resumed.status == 0, resumed.log
    assert_same_result(run, undisturbed)


def test_losses_are_the_same_where_several_steps_share_a_line(server: Server) -> None:
    chosen = recipe(training={"num_train_epochs": 1}, evaluation={"baseline": False}, data={"test_size": 1})
    whole, cut = new_run(server.root, "lines-whole", chosen), new_run(server.root, "lines-cut", chosen)
    assert server.run(whole, faults={"log_every": [3]}).status == 0
    assert server.run(cut, faults={"log_every": [3], "signal_at": [2, "SIGTERM"]}).status == 75
    assert server.run(cut, faults={"log_every": [3]}).status == 0
    assert [step for kind, step, _ in losses_of(whole) if kind == "train"] == [3]
    assert losses_of(cut) == losses_of(whole)


def test_all_layers_train_where_nothing_was_answered_before(server: Server) -> None:
    """As in every resumed attempt: the baseline, which would leave the whole model in one mode, is skipped."""
    chosen = recipe(training={"num_train_epochs": 1}, evaluation={"baseline": False}, data={"test_size": 1})
    run = new_run(server.root, "all-train", chosen)
    stopped = server.run(run, faults={"all_must_train": [], "signal_at": [1, "SIGTERM"]})
    assert stopped.status == 75, stopped.log
    resumed = server.run(run, faults={"all_must_train": []})
    assert resumed.status == 0, resumed.log


def test_another_recipe_is_never_resumed(server: Server, undisturbed: RunDir) -> None:
    run = copy_of(undisturbed, "another-recipe", without=(*AFTER_TRAINING, "adapter"))
    new_run(server.root, run.run_id, recipe(training={"learning_rate": 1e-3}))
    attempt = server.run(run)
    assert attempt.status == 2, attempt.log
    assert "was made with another recipe" in read_json(run.failed)["reason"]
    assert server.run(run).status == 2
