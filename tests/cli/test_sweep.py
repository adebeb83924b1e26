"""`g4kit sweep` and the verbs on sweeps, on the local target with a stand-in trainer."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from cli.bench import Bench
from contract.waiting import wait, wait_until
from g4kit.launching import write_run
from g4trainer.rundir import read_json

GRID = ("--grid", "lora.r=4,16", "--grid", "training.learning_rate=1e-3,2e-3")
FINE: list[dict[str, Any]] = [{"steps": 10, "exit": 0}]
Swept = Callable[..., Result]


@pytest.fixture
def swept(g4kit: Bench) -> Swept:
    """Sweeps RECIPE over GRID as sweep `s` and waits for the execution's end."""

    def sweep(plan: Any = None, *arguments: str, ended: bool = True, grid: tuple[str, ...] = GRID) -> Result:
        result = g4kit("sweep", g4kit.recipe, *grid, "--id", "s1", *arguments, plan=plan)
        if ended:
            for execution in g4kit.cloud.jobs.find("s1"):
                wait(g4kit.cloud, execution.name)
        return result

    return sweep


def shown(g4kit: Bench, some_id: str = "s1") -> dict[str, Any]:
    document: dict[str, Any] = json.loads(g4kit("runs", some_id, "--json").stdout)
    return document


def test_a_run_for_every_point_in_one_execution(g4kit: Bench, swept: Swept) -> None:
    result = swept()
    assert (result.exit_code, result.stdout) == (0, "s1\n"), result.stderr
    assert "all     4 points, one after another" in result.stderr
    assert "nothing to pay on this machine" in result.stderr
    folder = g4kit.root / "sweeps" / "s1"
    run_ids = ["s1-00", "s1-01", "s1-02", "s1-03"]
    assert read_json(folder / "tasks.json") == {"sweep_id": "s1", "tasks": run_ids}
    [execution] = g4kit.cloud.jobs.find()
    assert (execution.run_id, len(execution.tasks)) == ("s1", 4)
    recipes = [read_json(g4kit.root / "runs" / run_id / "recipe.json") for run_id in run_ids]
    asked = [(one["recipe"]["lora"]["r"], one["recipe"]["training"]["learning_rate"]) for one in recipes]
    assert asked == [(4, 1e-3), (4, 2e-3), (16, 1e-3), (16, 2e-3)]
    assert [one["sweep"] for one in recipes] == [{"id": "s1", "task": task} for task in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == ["launches", "sweep.json", "tasks.json"]


def test_the_best_is_named_by_validation_and_never_by_test(g4kit: Bench, swept: Swept) -> None:
    swept()
    view = shown(g4kit)
    assert view["state"] == "succeeded"
    assert [point["validation_loss"] for point in view["points"]] == [1 / 4, 1 / 4, 1 / 16, 1 / 16]
    assert view["best"] == {
        "task": 2,
        "run_id": "s1-02",
        "by": "validation loss",
        "value": 1 / 16,
        "finished": 4,
    }, "the worst by test accuracy; of two alike the first"
    lines = g4kit("runs", "s1").stdout.splitlines()
    assert " ".join(lines[0].split()) == "POINT r learning_rate STATE STEP VALIDATION LOSS TEST ACCURACY RUN"
    assert lines[3].split() == ["2", "*", "16", "0.001", "succeeded", "10/10", "0.0625", "0.0625", "s1-02"]
    assert lines[5] == (
        "best by validation loss, of 4 finished: point 2, lora.r=16 training.learning_rate=0.001, 0.0625: s1-02"
    )


def test_what_comes_after_a_sweep_is_told_for_its_best_point(g4kit: Bench, swept: Swept) -> None:
    swept()
    over = g4kit("resume", "s1", "--json")
    assert json.loads(over.stdout)["commands"] == {
        "report": "g4kit report s1",
        "fetch": "g4kit fetch s1-02",
        "try": "g4kit predict s1-02 IMAGE...",
    }
    assert "cancel" not in over.stderr
    for verb in ("fetch", "evaluate", "export"):
        told = g4kit(verb, "s1")
        assert told.exit_code == 2
        assert "run s1: is a sweep; write the id of one of its points, s1-00 to s1-03, of which `g4kit runs s1`" in (
            told.stderr
        )


def test_points_are_retried_alone_and_one_that_fails_stops_no_other(g4kit: Bench, swept: Swept) -> None:
    plan = {"1": [{"steps": 3, "exit": 75}, {"steps": 7, "exit": 0}], "2": [{"steps": 1, "exit": 4}], "*": FINE}
    swept(plan)
    view = shown(g4kit)
    assert [point["run"]["state"] for point in view["points"]] == ["succeeded", "succeeded", "failed", "succeeded"]
    assert (view["state"], view["live"]) == ("failed", False)
    assert view["points"][2]["run"]["exit_code"] == 4
    assert view["best"]["task"] == 3
    assert "point 2: it cannot work" in g4kit("runs", "s1").stdout
    assert "best so far by validation loss, of 3 finished" in g4kit("runs", "s1").stdout
    claims = [len(list((g4kit.root / "runs" / f"s1-{task:02}" / "claims").iterdir())) for task in range(4)]
    assert claims == [1, 2, 1, 1]


def test_resume_runs_what_is_left_and_nothing_else(g4kit: Bench, swept: Swept) -> None:
    swept({"1": [{"steps": 3, "exit": 1}, {"steps": 0, "exit": 1}], "3": [{"steps": 1, "exit": 3}], "*": FINE})
    resumed = g4kit("resume", "s1", "--wait", plan=FINE)
    assert resumed.exit_code == 0, resumed.stderr
    second = g4kit.cloud.jobs.find("s1")[-1]
    assert [task.index for task in second.tasks] == [0, 1]
    assert read_json(g4kit.root / "sweeps" / "s1" / "launches" / "0002.json")["tasks"] == [1, 3]
    view = shown(g4kit)
    assert view["state"] == "succeeded"
    assert [point["run"]["task"] for point in view["points"]] == [0, 0, 2, 1], "each in its own newest execution"
    claims = [len(list((g4kit.root / "runs" / f"s1-{task:02}" / "claims").iterdir())) for task in range(4)]
    assert claims == [1, 3, 1, 2]
    again = g4kit("resume", "s1")
    assert (again.exit_code, len(g4kit.cloud.jobs.find())) == (0, 2)
    assert "nothing to resume" in again.stderr


def test_one_point_is_a_run_like_any_other(g4kit: Bench, swept: Swept) -> None:
    swept({"1": [{"steps": 3, "exit": 1}], "*": FINE})
    view = shown(g4kit, "s1-01")
    assert (view["sweep"], view["task"], view["state"], view["exit_code"]) == ("s1", 1, "failed", 1)
    assert view["message"] == "ended with exit code 1 in attempt 2"
    log = g4kit("logs", "s1-00").stdout.splitlines()
    assert [line for line in log if line.startswith("step")] == [f"step {step} of s1-00" for step in range(1, 11)]
    resumed = g4kit("resume", "s1-01", "--wait", plan=FINE)
    assert resumed.exit_code == 0, resumed.stderr
    assert [execution.run_id for execution in g4kit.cloud.jobs.find()] == ["s1", "s1-01"]
    assert shown(g4kit)["state"] == "succeeded"
    assert g4kit("report", "s1-01").exit_code == 0


def test_the_same_id_is_the_same_sweep(g4kit: Bench, swept: Swept) -> None:
    for _ in range(2):
        assert swept().exit_code == 0
    assert len(g4kit.cloud.jobs.find()) == 1
    refused = swept(None, grid=("--grid", "lora.r=4,8"))
    assert refused.exit_code == 2
    assert "sweep s1: is there with other points; write another --id" in refused.stderr
    assert "--id: got s1, which is a sweep's" in g4kit("launch", g4kit.recipe, "--id", "s1").stderr
    assert "--id: got s1-00, which is a run's" in g4kit("sweep", g4kit.recipe, *GRID, "--id", "s1-00").stderr


def test_what_a_lost_launch_left_is_finished(g4kit: Bench, swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first runs were written: the same command makes the rest."""

    def dies_at_the_third(bucket: Any, plan: Any) -> None:
        if plan.run_id >= "s1-02":
            raise RuntimeError("killed")
        write_run(bucket, plan)

    monkeypatch.setattr("g4kit.sweeping.write_run", dies_at_the_third)
    with pytest.raises(RuntimeError, match="killed"):
        swept()
    monkeypatch.setattr("g4kit.sweeping.write_run", write_run)
    assert shown(g4kit)["points"][3]["run"]["message"] == "was not written yet"
    assert swept().exit_code == 0
    assert shown(g4kit)["state"] == "succeeded"


def test_cancel_ends_all_and_resume_goes_on(g4kit: Bench, swept: Swept) -> None:
    swept({"1": [{"steps": 2, "exit": 0, "sleep_s": 60}], "*": FINE}, ended=False)
    wait_until(lambda: shown(g4kit)["points"][1]["run"]["step"], lambda step: step == 2)
    going_on = g4kit("cancel", "s1-01")
    assert going_on.exit_code == 2
    assert "to end all of it: g4kit cancel s1" in going_on.stderr
    assert "is going on" in g4kit("resume", "s1").stderr
    view = shown(g4kit)
    assert (view["state"], view["live"]) == ("running", True)
    assert view["points"][3]["run"]["message"] == "waits for tasks before it"
    cancelled = g4kit("cancel", "s1")
    assert (cancelled.exit_code, cancelled.stdout) == (0, "s1\n"), cancelled.stderr
    assert [point["run"]["state"] for point in shown(g4kit)["points"]] == ["succeeded", *["cancelled"] * 3]
    assert "was cancelled before" in g4kit("cancel", "s1").stderr
    assert g4kit("resume", "s1", "--wait", plan=FINE).exit_code == 0


def test_wait_goes_on_while_there_is_progress_and_ends_with_the_trainers_code(g4kit: Bench) -> None:
    slow = [{"steps": 2, "exit": 75}] * 4 + FINE
    result = g4kit(
        "sweep", g4kit.recipe, "--grid", "lora.r=4,8", "--id", "s1", "--wait", plan={"0": slow, "1": FINE, "*": FINE}
    )
    assert result.exit_code == 0, result.stderr
    assert "there was progress: starting what is left again, points 0" in result.stderr
    assert len(g4kit.cloud.jobs.find("s1")) == 3
    hopeless = {"1": [{"steps": 1, "exit": 3}], "*": FINE}
    failed = g4kit("sweep", g4kit.recipe, "--grid", "lora.r=4,8", "--id", "s2", "--wait", plan=hopeless)
    assert failed.exit_code == 3
    assert "g4kit resume s2" in failed.stderr


def test_logs_say_which_point_wrote_a_line(g4kit: Bench, swept: Swept) -> None:
    swept({"0": [{"steps": 1, "exit": 1}], "*": FINE})
    g4kit("resume", "s1", "--wait", plan=FINE)
    lines = g4kit("logs", "s1").stdout.splitlines()
    assert "[3] step 10 of s1-03" in lines
    assert "[0] step 2 of s1-00" in lines
    assert all(line.startswith(("[0] ", "[1] ", "[2] ", "[3] ")) for line in lines)
    one = g4kit("logs", "s1", "--task", "3").stdout.splitlines()
    assert [line for line in one if line.startswith("step")] == [f"step {step} of s1-03" for step in range(1, 11)]
    assert "sweep s1 has points 0 to 3" in g4kit("logs", "s1", "--task", "4").stderr
    assert "s1-03 is no sweep" in g4kit("logs", "s1-03", "--task", "0").stderr


def test_the_list_of_runs_names_sweeps(g4kit: Bench, swept: Swept) -> None:
    swept()
    assert "sweep s1: 4 succeeded" in g4kit("runs").stderr
    assert {view["sweep"] for view in json.loads(g4kit("runs", "--json").stdout)} == {"s1"}


def test_points_by_chance(g4kit: Bench) -> None:
    result = g4kit("sweep", g4kit.recipe, *GRID, "--random", "2", "--seed", "7", "--dry-run", "--json")
    document = json.loads(result.stdout)
    again = g4kit("sweep", g4kit.recipe, *GRID, "--random", "2", "--seed", "7", "--dry-run", "--json")
    assert [point["values"] for point in document["points"]] == [
        point["values"] for point in json.loads(again.stdout)["points"]
    ]
    assert len(document["points"]) == 2


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ((), ["--grid: got none; write one or more, for example --grid lora.r=16,64."]),
        (("--grid", "lora.rr=4,8"), ["lora.rr: unknown key; did you mean r"]),
        (("--grid", "lora.r=0,16,1000"), ["lora.r: got 0; write a whole number", "lora.r: got 1000; write a whole"]),
        (("--grid", "lora.r=0,1", "--set", "training.seed=-1"), ["lora.r: got 0", "training.seed: got -1"]),
        (("--grid", "lora.r=4,4"), ["lora.r: got 4 twice"]),
        (("--grid", "job.accelerator=nvidia-l4,nvidia-rtx-pro-6000"), ["so [job] has one value; write --set job.acc"]),
        (("--grid", f"training.seed={','.join(map(str, range(101)))}"), ["got 101 points of at most 100"]),
        (("--grid", "lora.r=4", "--random", "2"), ["--random: got 2, and the grid has 1 points"]),
        (("--grid", "model.id=tiny-gemma4,missing,gone"), ['got "missing", and', 'got "gone", and']),
        (("--grid", "data.dataset=digits,x", "--grid", "lora.r=0,4"), ["lora.r: got 0", 'data.dataset: got "x"']),
        (("--grid", 'lora.target_modules="all-linear",all-linear'), ["lora.target_modules: got all-linear twice"]),
    ],
)
def test_all_problems_are_listed_before_anything_is_written(
    g4kit: Bench, arguments: tuple[str, ...], problems: list[str]
) -> None:
    before = g4kit.files()
    result = g4kit("sweep", g4kit.recipe, *arguments, "--yes")
    assert (result.exit_code, result.stdout) == (2, "")
    for problem in problems:
        assert result.stderr.count(problem) == 1, result.stderr
    assert g4kit.files() == before
    assert not g4kit.cloud.jobs.find()


def test_a_dry_run_starts_nothing(g4kit: Bench, swept: Swept) -> None:
    before = g4kit.files()
    result = swept(None, "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "s1\n")
    assert [line.split()[0] for line in result.stderr.splitlines()[1:6]] == ["POINT", "0", "1", "2", "3"]
    assert g4kit.files() == before


def test_points_whose_figures_do_not_compare_are_told(g4kit: Bench, swept: Swept) -> None:
    swept(None, grid=("--grid", "training.seed=1,2", "--grid", "data.supervise=completion,turn"))
    told = g4kit("runs", "s1").stderr
    assert "points with another training.seed are validated on other samples" in told
    assert "points with another data.supervise count the loss of other tokens" in told


def test_the_report_has_the_table_the_best_and_all_curves_on_one_page(g4kit: Bench, swept: Swept) -> None:
    swept({"1": [{"steps": 1, "exit": 4}], "*": FINE})
    result = g4kit("report", "s1")
    assert result.exit_code == 0, result.stderr
    page = g4kit.root / "sweeps" / "s1" / "report.html"
    assert result.stdout.splitlines()[-1] == str(page)
    assert result.stdout.startswith(g4kit("runs", "s1").stdout.rstrip())
    text = page.read_text()
    assert "Best so far by validation loss, of 3 finished: point 2, lora.r=16" in text
    assert text.count('<polyline class="curve') == 3, "training losses; the point that failed wrote none"
    assert text.count('<circle class="curve') == 3, "validated once each"
    assert text.count("<title>point 2: lora.r 16, training.learning_rate 0.001</title>") == 2
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text), "it loads nothing"
    document = json.loads(g4kit("report", "s1", "--json", "--page", g4kit.folder / "own.html").stdout)
    assert document["page"] == str(g4kit.folder / "own.html")
    assert (g4kit.folder / "own.html").read_text() == text
    assert document["best"]["run_id"] == "s1-02"


def test_a_sweep_that_has_not_begun_has_a_report_all_the_same(g4kit: Bench, swept: Swept) -> None:
    swept({"*": [{"steps": 0, "exit": 4}]})
    result = g4kit("report", "s1")
    assert result.exit_code == 0
    assert "best: not known, for no point has finished" in result.stdout
    assert "Nothing was trained yet." in (g4kit.root / "sweeps" / "s1" / "report.html").read_text()


def test_any_runs_can_be_compared_on_a_page(g4kit: Bench, swept: Swept) -> None:
    swept()
    page = g4kit.folder / "compared.html"
    result = g4kit("report", "--compare", "s1-01", "s1-03", "--page", page)
    assert result.exit_code == 0, result.stderr
    text = page.read_text()
    assert "tiny: 2 points over lora.r, 2 of 2 finished." in text
    assert "Best by validation loss, of 2 finished: point 1, lora.r=16, 0.0625: s1-03." in text
    refused = g4kit("report", "s1-01", "--page", page)
    assert refused.exit_code == 2
    assert "--page: is for --compare and for sweeps" in refused.stderr
