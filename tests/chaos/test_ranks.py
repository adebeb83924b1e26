"""Two processes with gloo: the result of one, one end for all, and a resume at another number."""

import shutil
import signal
import socket
from dataclasses import dataclass
from typing import Any

import pytest
import safetensors.torch
import torch

from chaos.attempts import Attempt, Server, committed_steps, losses_of, new_run, recipe
from g4trainer.claims import attempts
from g4trainer.recipe import Recipe
from g4trainer.rundir import RunDir, read_json

BEST = {"best_is": [2]}
"""Of three steps the second one is made to have the lowest validation loss."""
TOLERANCE = 1e-5
"""Relative, for sums in another order; two Adam steps on gradients near zero make the most of it."""
ROOM_S = 30
"""Nothing here may wait for a timeout."""


def chosen(**sections: dict[str, Any]) -> Recipe:
    """22 samples to train and 3 to validate in micro-batches of 2, 5 to answer in batches of 2: all uneven for two."""
    return recipe(
        data={"train_size": 25, "validation_size": 3, "test_size": 5},
        training={"per_device_train_batch_size": 2, "num_train_epochs": 1},
        **{"lora": {"lora_dropout": 0.0}} | sections,
    )


@dataclass
class Pair:
    """Both ranks of an attempt."""

    ranks: tuple[Attempt, Attempt]

    def wait(self) -> list[int]:
        return [rank.wait(ROOM_S) for rank in self.ranks]

    @property
    def log(self) -> str:
        return "\n".join(rank.log for rank in self.ranks)


def start_pair(server: Server, run: RunDir, *faults: dict[str, list[Any]]) -> Pair:
    """As torchrun starts two processes. faults: of rank 0, of rank 1."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common: dict[str, Any] = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    of_rank = (*faults, {}, {})
    first, second = (
        server.start(run, faults=BEST | of_rank[rank], RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in (0, 1)
    )
    return Pair((first, second))


def run_pair(server: Server, run: RunDir, *faults: dict[str, list[Any]], codes: tuple[int, int] = (0, 0)) -> Pair:
    pair = start_pair(server, run, *faults)
    assert tuple(pair.wait()) == codes, pair.log
    return pair


def copy_run(run: RunDir, name: str) -> RunDir:
    copy = RunDir(run.path.with_name(name))
    shutil.copytree(run.path, copy.path)
    return copy


def assert_close(run: RunDir, alone: RunDir) -> None:
    """The run of one process, up to the order of sums."""
    mine, theirs = losses_of(run), losses_of(alone)
    assert [line[:2] for line in mine] == [line[:2] for line in theirs]
    assert [line[2] for line in mine] == pytest.approx([line[2] for line in theirs], rel=TOLERANCE)
    ours, expected = (safetensors.torch.load_file(one.adapter / "adapter_model.safetensors") for one in (run, alone))
    assert ours.keys() == expected.keys()
    flat, flat_expected = (torch.cat([part[name].flatten() for name in sorted(ours)]) for part in (ours, expected))
    assert float((flat - flat_expected).norm() / flat_expected.norm()) < TOLERANCE
    for name in ("baseline.predictions.jsonl", "baseline.json", "final.predictions.jsonl", "final.json"):
        assert (run.evaluation / name).read_bytes() == (alone.evaluation / name).read_bytes(), name
    results, of_one = read_json(run.results), read_json(alone.results)
    for name in ("steps", "samples", "best_step", "checkpoints", "trainable_parameters"):
        assert results["train"][name] == of_one["train"][name], name


@pytest.fixture(scope="module")
def alone(server: Server) -> RunDir:
    run = new_run(server.root, "ranks-alone", chosen())
    attempt = server.run(run, faults=BEST)
    assert attempt.status == 0, attempt.log
    assert read_json(run.results)["train"]["best_step"] == 2
    return run


@pytest.fixture(scope="module")
def halfway(server: Server) -> RunDir:
    """Rank 1 was killed in the third step."""
    run = new_run(server.root, "ranks-killed", chosen())
    pair = run_pair(server, run, {}, {"signal_at": [3, "SIGKILL"]}, codes=(1, -signal.SIGKILL))
    assert "a process of this attempt died" in pair.ranks[0].log
    return run


def test_two_processes_give_the_result_of_one(server: Server, alone: RunDir) -> None:
    run = new_run(server.root, "ranks-two", chosen())
    pair = run_pair(server, run)
    assert_close(run, alone)
    plan, plan_alone = read_json(run.plan), read_json(alone.plan)
    assert (plan["processes"], plan["gradient_accumulation_steps"]) == (2, 2)
    assert (plan_alone["processes"], plan_alone["gradient_accumulation_steps"]) == (1, 4)
    assert pair.ranks[1].log == "", "rank 1 has nothing to say that rank 0 does not"
    assert sorted(path.name for path in run.metrics.iterdir()) == ["0001.jsonl"], "one writer"
    assert len(attempts(run)) == 1


def test_a_killed_rank_ends_the_attempt(halfway: RunDir) -> None:
    assert committed_steps(halfway)[-1] == 2
    assert read_json(halfway.status)["state"] == "failed"
    assert "died" in attempts(halfway)[-1]["outcome"]
    assert not halfway.failed.exists(), "a retry helps"


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_at_any_number_of_processes(server: Server, alone: RunDir, halfway: RunDir, processes: int) -> None:
    run = copy_run(halfway, f"ranks-resumed-{processes}")
    if processes == 2:
        assert "resuming from step 2" in run_pair(server, run).log
    else:
        attempt = server.run(run, faults=BEST)
        assert attempt.status == 0, attempt.log
        assert "resuming from step 2" in attempt.log
    assert_close(run, alone)
    assert read_json(run.plan)["processes"] == processes


def test_a_shared_base_model_gives_the_result_of_a_whole_one(server: Server) -> None:
    settings = chosen(model={"quantization": "none"}, job={"sharding": "full"})
    whole, shared, stopped = (
        new_run(server.root, f"ranks-{name}", settings) for name in ("whole", "shared", "stopped")
    )
    assert server.run(whole, faults=BEST).status == 0
    pair = run_pair(server, shared)
    assert "the base model is shared among 2 processes" in pair.log
    assert_close(shared, whole)
    run_pair(server, stopped, {"signal_at": [2, "SIGTERM"]}, codes=(75, 75))
    resumed = server.run(stopped, faults=BEST)
    assert resumed.status == 0, resumed.log
    assert_close(stopped, whole)


@pytest.mark.slow
def test_experts_of_a_shared_base_model_learn_as_those_of_a_whole_one(server: Server, experts_model: str) -> None:
    settings = chosen(
        model={"id": experts_model, "quantization": "none"},
        lora={"lora_dropout": 0.0, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        job={"sharding": "full"},
    )
    whole, shared = (new_run(server.root, f"ranks-experts-{name}", settings) for name in ("whole", "shared"))
    assert server.run(whole, faults=BEST).status == 0
    pair = run_pair(server, shared)
    assert "the base model is shared among 2 processes" in pair.log
    assert_close(shared, whole)


@pytest.mark.slow
def test_compiled_layers_of_a_shared_base_model_change_nothing(server: Server) -> None:
    settings = chosen(model={"quantization": "none"}, job={"sharding": "full"})
    whole, shared = (new_run(server.root, f"ranks-{name}", settings) for name in ("uncompiled", "compiled"))
    assert server.run(whole, faults=BEST).status == 0
    pair = start_pair(server, shared, {"compiled": []}, {"compiled": []})
    assert [rank.wait() for rank in pair.ranks] == [0, 0], pair.log
    assert "the base model is shared among 2 processes" in pair.log
    assert "6 layers are compiled" in pair.log
    assert_close(shared, whole)


def test_what_is_tried_must_fit_every_rank(server: Server, alone: RunDir) -> None:
    run = new_run(server.root, "ranks-trial", chosen())
    run_pair(server, run, {"card_for": [2]}, {"card_for": [1]})
    plan = read_json(run.plan)
    assert plan["per_device_train_batch_size"] == 1
    assert [(one["per_device_train_batch_size"], one["peak_bytes"]) for one in plan["trial"]] == [(2, None), (1, 2**30)]
    assert_close(run, alone)


def test_without_rank_0_the_others_end(server: Server) -> None:
    run = new_run(server.root, "ranks-headless", chosen())
    run_pair(server, run, {"signal_at": [2, "SIGKILL"]}, codes=(-signal.SIGKILL, 1))


def test_a_signal_to_one_rank_stops_all_at_the_same_step(server: Server, alone: RunDir) -> None:
    run = new_run(server.root, "ranks-signal", chosen())
    run_pair(server, run, {}, {"signal_at": [1, "SIGTERM"]}, codes=(75, 75))
    assert committed_steps(run)[-1] == 1
    assert attempts(run)[-1]["outcome"].startswith("stopped at step 1 of 3: SIGTERM")
    run_pair(server, run, {}, {"signal_in": ["validate", "SIGTERM"]}, codes=(75, 75))
    run_pair(server, run)
    assert_close(run, alone)


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        ({"infinite_loss_at": [2]}, 4, "is nan at step 2"),
        ({"bug_at": [2]}, 1, "ZeroDivisionError: a bug (rank 1)"),
    ],
)
def test_a_failure_of_one_rank_is_told_once(server: Server, fault: dict[str, list[Any]], code: int, told: str) -> None:
    run = new_run(server.root, f"ranks-failure-{code}", chosen())
    pair = run_pair(server, run, {}, fault, codes=(code, code))
    assert told in read_json(run.status)["message"]
    assert run.failed.exists() == (code == 4)
    assert pair.log.count("To mend it") == 1


@pytest.mark.slow
def test_a_rank_short_of_memory_leaves_a_smaller_plan(server: Server, alone: RunDir) -> None:
    run = new_run(server.root, "ranks-memory", chosen())
    short = {"memory_for": [1, 64]}
    pair = run_pair(server, run, {}, short, codes=(1, 1))
    assert "micro-batch 2 becomes 1" in pair.log
    assert read_json(run.plan)["per_device_train_batch_size"] == 1
    run_pair(server, run, {}, short)
    assert_close(run, alone)
