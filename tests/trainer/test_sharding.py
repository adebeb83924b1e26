"""Evaluation shared among tasks: together they say exactly what one alone would have said."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from g4trainer.__main__ import main
from g4trainer.deadline import Deadline
from g4trainer.exits import ExitCode
from g4trainer.predict import Predictor
from g4trainer.rundir import RunDir, file_entry, read_json, write_json
from g4trainer.sharding import Shard, evaluate_shard

BATCH = 2
Copy = Callable[[str], RunDir]


@pytest.fixture
def copy(finished: Path) -> Copy:
    """The finished run under another name, its evaluation cut into batches of two."""

    def make(name: str) -> RunDir:
        run = RunDir(finished.with_name(f"shards-{name}"))
        shutil.copytree(finished, run.path)
        write_json(run.plan, read_json(run.plan) | {"evaluation_batch_size": BATCH})
        return run

    return make


class Near(Deadline):
    """Time to stop after every batch."""

    def __init__(self) -> None:
        super().__init__(None)

    def reason(self) -> str | None:
        return "the test wants it"


def not_again(*_: object) -> None:
    raise AssertionError("the model is loaded for a share that is whole")


def evaluate(run: RunDir, count: int, *indices: int, size: int | None = None) -> list[ExitCode]:
    return [evaluate_shard(run, Shard(index, count), size, Deadline(None)) for index in indices or range(count)]


@pytest.mark.parametrize("total", [1, 6, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_shares_are_whole_batches_and_every_sample_is_in_one(total: int, batch_size: int, count: int) -> None:
    shares = [Shard(index, count).rows(total, batch_size) for index in range(count)]
    assert sorted(row for share in shares for row in share) == list(range(total))
    for share in shares:
        batches = [share[at : at + batch_size] for at in range(0, len(share), batch_size)]
        assert all(batch == list(range(batch[0], min(batch[0] + batch_size, total))) for batch in batches)
        assert all(batch[0] % batch_size == 0 for batch in batches)


def test_together_they_are_the_runs_own_evaluation(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy("together")
    metrics = run.evaluation / "sharded.json"
    assert evaluate(run, 4, 3, 0, 2) == [ExitCode.DONE] * 3
    assert not metrics.exists()
    assert evaluate(run, 4, 1) == [ExitCode.DONE]
    sharded, final = read_json(metrics), read_json(run.evaluation / "final.json")
    assert {name: sharded[name] for name in final} == final
    assert (sharded["shards"], sharded["count"]) == (4, 6)
    answers = run.evaluation / "sharded.predictions.jsonl"
    assert answers.read_bytes() == (run.evaluation / "final.predictions.jsonl").read_bytes()
    folder = run.evaluation / "shards"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{index}-of-4.{end}" for index in range(4) for end in ("json", "predictions.jsonl")
    )
    assert read_json(folder / "3-of-4.json")["count"] == 0, "three batches for four tasks"
    results = read_json(run.results)
    assert results["sharded"]["accuracy"] == results["final"]["accuracy"]
    assert results["artifacts"]["evaluation/sharded.json"] == file_entry(metrics)
    monkeypatch.setattr(Predictor, "load", not_again)
    metrics.unlink()
    assert evaluate(run, 4, 2) == [ExitCode.DONE], "a retry of a task that was killed while it put all together"
    assert read_json(metrics) == sharded


def test_a_share_goes_on_where_it_was_stopped(copy: Copy) -> None:
    run = copy("stopped")
    shard = Shard(0, 1)
    for answered in (2, 4):
        assert evaluate_shard(run, shard, None, Near()) is ExitCode.INTERRUPTED
        partial = next((run.evaluation / "shards").glob("0-of-1.*.partial.jsonl")).read_bytes()
        assert len(partial.splitlines()) == answered
    assert evaluate_shard(run, shard, None, Near()) is ExitCode.DONE
    answers = (run.evaluation / "sharded.predictions.jsonl").read_bytes()
    assert answers.startswith(partial)
    assert answers == (run.evaluation / "final.predictions.jsonl").read_bytes()


def test_a_damaged_share_is_answered_anew_and_another_size_is_another_evaluation(copy: Copy) -> None:
    run = copy("damaged")
    assert evaluate(run, 2) == [ExitCode.DONE] * 2
    (run.evaluation / "shards" / "0-of-2.predictions.jsonl").write_text("")
    assert evaluate(run, 2, 1, 0) == [ExitCode.FAILED, ExitCode.DONE]
    assert read_json(run.evaluation / "sharded.json")["count"] == 6
    assert evaluate(run, 2, size=3) == [ExitCode.DONE] * 2
    sharded = read_json(run.evaluation / "sharded.json")
    assert (sharded["count"], sharded["origin"]["test_size"]) == (3, 3)


def test_what_cannot_work_ends_all_tasks_with_the_same_code(copy: Copy) -> None:
    run = copy("hopeless")
    shutil.rmtree(run.adapter)
    assert evaluate(run, 2) == [ExitCode.BAD_INPUT] * 2
    assert "has no adapter" in read_json(run.evaluation / "shards" / "failed.json")["reason"]


def test_the_verb_takes_its_share_from_the_environment(
    copy: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("verb")
    monkeypatch.setattr(Deadline, "listen", lambda self: None)  # signals are this process's own
    arguments = ["evaluate", str(run.path), "--shards", "2", "--test-size", "2"]
    assert main(arguments) == 2
    assert "CLOUD_RUN_TASK_INDEX: got ''" in capsys.readouterr().err
    monkeypatch.setenv("CLOUD_RUN_TASK_INDEX", "0")
    assert main([*arguments, "--only", "1"]) == 0
    assert (run.evaluation / "shards" / "1-of-2.json").exists()
    assert main(arguments) == 0
    assert read_json(run.evaluation / "sharded.json")["count"] == 2
    for wrong in (["--test-size", "many"], ["--test-size", "0"], ["--shards", "0"], ["--only", "2"]):
        assert main([*arguments, *wrong]) == 2
