"""launch, resume and cancel, as a user sees them."""

import json
import threading
from collections.abc import Callable

import pytest

from cli.bench import Bench
from contract.waiting import wait, wait_until
from g4kit.launches import read_launches
from g4kit.launching import LaunchError, launch, plan_launch, resume
from g4trainer.recipe import FrozenRecipe, load_frozen

Launch = Callable[..., str]
SLEEPING = [{"steps": 2, "exit": 0, "sleep_s": 60}]


def executions(g4kit: Bench, run_id: str) -> list[str]:
    return [execution.name for execution in g4kit.cloud.jobs.find(run_id)]


def claims(g4kit: Bench, run_id: str) -> int:
    """Attempts that the run has had."""
    return len(list((g4kit.root / "runs" / run_id / "claims").iterdir()))


def is_running(g4kit: Bench, run_id: str) -> bool:
    return bool(json.loads(g4kit("runs", run_id, "--json").stdout)["state"] == "running")


def test_launch_writes_the_run_directory_and_says_how_to_go_on(g4kit: Bench) -> None:
    result = g4kit("launch", g4kit.recipe, "--set", "training.learning_rate=1e-4")
    assert result.exit_code == 0
    run_id = result.stdout.strip()
    assert result.stdout == f"{run_id}\n"
    assert run_id.startswith("tiny-20")
    for command in (f"runs {run_id} --watch", f"logs {run_id} -f", f"cancel {run_id}", f"fetch {run_id}"):
        assert f"g4kit {command}\n" in result.stderr
    assert f"target: local ({g4kit.root})" in result.stderr
    here = g4kit.root / "runs" / run_id
    frozen = load_frozen(here / "recipe.json")
    assert (frozen.run_id, frozen.target, frozen.recipe.training.learning_rate) == (run_id, "local", 1e-4)
    intent = json.loads((here / "launches" / "0001.json").read_text())
    assert intent.keys() == {"target", "launch_id", "time"}
    (name,) = executions(g4kit, run_id)
    assert json.loads((here / "launches" / "0001.started.json").read_text())["execution"] == name
    request = json.loads((g4kit.root / "local" / "executions" / name / "execution.json").read_text())
    assert request["args"] == ["run", str(here)]
    assert (request["timeout_s"], request["max_attempts"], request["launch_id"]) == (60, 2, intent["launch_id"])


def test_wait_follows_to_the_end(g4kit: Bench) -> None:
    result = g4kit("launch", g4kit.recipe, "--wait", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["state"], document["results"]["final"]["accuracy"]) == ("succeeded", 0.95)
    assert document["commands"]["fetch"] == f"g4kit fetch {document['run_id']}"
    assert "succeeded · accuracy 0.1000 -> 0.9500" in result.stderr


@pytest.mark.parametrize("code", [2, 3, 4])
def test_wait_passes_on_why_no_retry_can_help(g4kit: Bench, code: int) -> None:
    result = g4kit("launch", g4kit.recipe, "--wait", plan=[{"steps": 1, "exit": code}])
    assert result.exit_code == code
    assert "it cannot work\n  change it" in result.stderr


@pytest.mark.parametrize(("code", "state"), [(1, "failed"), (75, "interrupted")])
def test_wait_gives_up_without_progress(g4kit: Bench, code: int, state: str) -> None:
    result = g4kit("launch", g4kit.recipe, "--wait", plan=[{"steps": 0, "exit": code}])
    assert result.exit_code == code
    run_id = result.stdout.strip()
    assert len(executions(g4kit, run_id)) == 1
    assert claims(g4kit, run_id) == 2
    assert f"g4kit resume {run_id}" in result.stderr
    assert ("  | g4kit: attempt 2 ended with exit code 1\n" in result.stderr) is (state == "failed")
    assert json.loads(g4kit("runs", run_id, "--json").stdout)["state"] == state


def test_wait_starts_further_executions_while_there_is_progress(g4kit: Bench) -> None:
    plan = [{"steps": 1, "exit": 75}] * 5 + [{"steps": 1, "exit": 0}]
    result = g4kit("launch", g4kit.recipe, "--wait", plan=plan)
    assert result.exit_code == 0, result.stderr
    run_id = result.stdout.strip()
    assert len(executions(g4kit, run_id)) == 3  # of two attempts each
    assert claims(g4kit, run_id) == 6
    assert result.stderr.count("it made progress: starting it again") == 2


def test_dry_run_starts_and_writes_nothing(g4kit: Bench) -> None:
    before = g4kit.files()
    result = g4kit("launch", g4kit.recipe, "--dry-run", "--json", "--set", "lora.r=8")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["recipe"]["lora"]["r"] == 8
    assert document["path"] == str(g4kit.root / "runs" / document["run_id"])
    assert len(document["hash"]) == 64
    assert g4kit.files() == before
    assert g4kit.cloud.jobs.find() == []


def test_launching_an_id_again_returns_the_run_that_is_there(g4kit: Bench, launched: Launch) -> None:
    run_id = launched(None, "--id", "mine-1")
    assert run_id == "mine-1"
    again = g4kit("launch", g4kit.recipe, "--id", "mine-1", "--set", "job.timeout_s=120", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["state"] == "succeeded"
    assert "take it home  g4kit fetch mine-1" in again.stderr
    assert "g4kit cancel" not in again.stderr, "nothing goes on"
    assert len(executions(g4kit, run_id)) == 1
    assert claims(g4kit, run_id) == 1


def test_an_id_with_another_recipe_is_refused(g4kit: Bench, launched: Launch) -> None:
    launched(None, "--id", "mine-1")
    before = (g4kit.root / "runs" / "mine-1" / "recipe.json").read_bytes()
    result = g4kit("launch", g4kit.recipe, "--id", "mine-1", "--set", "lora.r=8")
    assert result.exit_code == 2
    assert "error: run mine-1: is there with another recipe; write another --id" in result.stderr
    assert (g4kit.root / "runs" / "mine-1" / "recipe.json").read_bytes() == before


@pytest.mark.parametrize("written", ["recipe.json", "launches/0001.json", "execution"])
def test_a_launch_that_was_cut_short_is_finished_by_the_next(g4kit: Bench, launched: Launch, written: str) -> None:
    """The command line was killed after it had written this."""
    run_id = launched(None, "--id", "mine-1")
    here = g4kit.root / "runs" / run_id
    (here / "launches" / "0001.started.json").unlink()
    if written == "recipe.json":
        (here / "launches" / "0001.json").unlink()
    again = g4kit("launch", g4kit.recipe, "--id", "mine-1")
    assert again.exit_code == 0
    names = executions(g4kit, run_id)
    assert len(names) == (2 if written == "recipe.json" else 1)  # without the intent no one can know
    assert json.loads((here / "launches" / "0001.started.json").read_text())["execution"] in names


def test_launches_of_one_id_at_once_start_one_execution(g4kit: Bench) -> None:
    plan = plan_launch(g4kit.cloud, g4kit.recipe, (), "mine-1")
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(launch(g4kit.cloud, plan).name)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(names), len(set(names))) == (5, 1)
    assert executions(g4kit, "mine-1") == [names[0]]


def test_resume_goes_on_with_an_unfinished_run(g4kit: Bench, launched: Launch) -> None:
    run_id = launched([{"steps": 3, "exit": 3}])
    assert (g4kit.root / "runs" / run_id / "failed.json").exists()
    result = g4kit("resume", run_id, "--wait")
    assert result.exit_code == 0, result.stderr
    assert not (g4kit.root / "runs" / run_id / "failed.json").exists()
    assert [started.number for started in read_launches(g4kit.cloud.bucket, f"runs/{run_id}")] == [1, 2]
    assert json.loads(g4kit("runs", run_id, "--json").stdout)["step"] == 13


def test_of_resumes_at_once_one_starts_an_execution(g4kit: Bench, launched: Launch) -> None:
    run_id = launched([{"steps": 1, "exit": 3}])
    names: list[str] = []
    refusals: list[str] = []

    def start() -> None:
        try:
            names.append(resume(g4kit.cloud, run_id).name)
        except LaunchError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 1
    assert len(names) + len(refusals) == 5
    assert set(executions(g4kit, run_id)) - {names[0]} == {executions(g4kit, run_id)[0]}


def test_resume_starts_a_run_that_never_was(g4kit: Bench) -> None:
    """The command line was killed after it had written recipe.json."""
    launched = g4kit("launch", g4kit.recipe, "--id", "mine-1", "--dry-run", "--json")
    plan = plan_launch(g4kit.cloud, g4kit.recipe, (), "mine-1")
    frozen = FrozenRecipe(
        run_id="mine-1",
        recipe=plan.recipe,
        recipe_hash=json.loads(launched.stdout)["hash"],
        created_at="2026-01-01T12:00:00+00:00",
        g4kit_version="0.1.0",
        target="local",
    )
    g4kit.cloud.bucket.write("runs/mine-1/recipe.json", frozen.model_dump_json().encode())
    assert "pending · never started; write: g4kit resume mine-1" in g4kit("runs").stdout
    assert g4kit("resume", "mine-1", "--wait").exit_code == 0
    assert [started.number for started in read_launches(g4kit.cloud.bucket, "runs/mine-1")] == [1]


def test_resume_of_a_finished_run_says_so(g4kit: Bench, launched: Launch) -> None:
    run_id = launched()
    result = g4kit("resume", run_id)
    assert result.exit_code == 0
    assert f"run {run_id}: has finished; nothing to resume" in result.stderr
    assert len(executions(g4kit, run_id)) == 1
    with pytest.raises(LaunchError, match="has finished"):
        resume(g4kit.cloud, run_id)


def test_resume_of_a_live_run_is_refused(g4kit: Bench, launched: Launch) -> None:
    run_id = launched(SLEEPING, ended=False)
    result = g4kit("resume", run_id)
    assert result.exit_code == 2
    assert f"error: run {run_id}: is going on; wait for it, or write: g4kit cancel {run_id}" in result.stderr
    assert len(executions(g4kit, run_id)) == 1


def test_cancel_ends_a_run_which_can_be_resumed(g4kit: Bench, launched: Launch) -> None:
    run_id = launched(SLEEPING, ended=False)
    wait_until(lambda: is_running(g4kit, run_id), bool)
    result = g4kit("cancel", run_id)
    assert result.exit_code == 0, result.stderr
    assert f"run {run_id}: cancelled; to go on later: g4kit resume {run_id}" in result.stderr
    assert g4kit("cancel", run_id).exit_code == 0
    assert g4kit("resume", run_id, "--wait").exit_code == 0
    assert json.loads(g4kit("runs", run_id, "--json").stdout)["state"] == "succeeded"


@pytest.mark.slow
def test_cancel_says_that_a_run_had_to_be_killed(g4kit: Bench, launched: Launch) -> None:
    run_id = launched([{**SLEEPING[0], "ignore_sigterm": True}], ended=False)
    wait_until(lambda: is_running(g4kit, run_id), bool)
    result = g4kit("cancel", run_id)
    assert result.exit_code == 0, result.stderr
    assert "was killed, for it had not stopped within 10 s" in result.stderr


def test_cancel_of_a_run_that_has_ended(g4kit: Bench, launched: Launch) -> None:
    run_id = launched()
    result = g4kit("cancel", run_id)
    assert result.exit_code == 2
    assert f"error: run {run_id}: is succeeded, nothing is going on" in result.stderr


def test_logs_of_all_executions(g4kit: Bench, launched: Launch) -> None:
    run_id = launched([{"steps": 1, "exit": 2}])
    g4kit("resume", run_id, plan=[{"steps": 1, "exit": 0}])
    followed = g4kit("logs", run_id, "-f")
    assert followed.exit_code == 0
    assert followed.stdout.count(f"step 1 of {run_id}\n") == 1
    assert followed.stdout.count(f"step 2 of {run_id}\n") == 1
    assert g4kit("logs", run_id).stdout == followed.stdout


def test_runs_lists_the_newest_first(g4kit: Bench, launched: Launch) -> None:
    first, second = launched(None, "--id", "b-first"), launched([{"steps": 1, "exit": 4}], "--id", "a-second")
    here = g4kit.root / "runs" / first / "recipe.json"
    here.write_text(here.read_text().replace('"created_at": "20', '"created_at": "19'))
    result = g4kit("runs")
    assert result.stdout.splitlines() == [
        "RUN       STATE",
        "a-second  failed · step 1/10 · loss 1.0000 · it cannot work",
        "b-first   succeeded · accuracy 0.1000 -> 0.9500",
    ]
    views = json.loads(g4kit("runs", "--json").stdout)
    assert [view["run_id"] for view in views] == [second, first]
    shown = g4kit("runs", first).stdout
    assert "final_accuracy       0.9500" in shown


def test_runs_without_any(bare: Bench) -> None:
    assert g4kit_lines(bare) == []
    assert json.loads(bare("runs", "--json").stdout) == []


def g4kit_lines(bench: Bench) -> list[str]:
    result = bench("runs")
    assert result.exit_code == 0
    assert "no runs yet" in result.stderr
    return result.stdout.splitlines()


def test_a_damaged_run_does_not_hide_the_others(g4kit: Bench, launched: Launch) -> None:
    good, bad = launched(None, "--id", "good"), launched(None, "--id", "bad")
    (g4kit.root / "runs" / bad / "results.json").write_text('{"state": "succ')
    states = {view["run_id"]: view for view in json.loads(g4kit("runs", "--json").stdout)}
    assert (states[good]["state"], states[bad]["state"]) == ("succeeded", "failed")
    assert "results.json: damaged" in states[bad]["message"]


def test_watching_one_run_ends_with_it(g4kit: Bench, launched: Launch) -> None:
    run_id = launched([{"steps": 3, "exit": 0, "sleep_s": 1}], ended=False)
    result = g4kit("runs", run_id, "--watch")
    assert result.exit_code == 0
    assert "state                succeeded" in result.stdout
    assert not wait(g4kit.cloud, executions(g4kit, run_id)[0]).active
