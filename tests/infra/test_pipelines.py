"""cloudbuild.yaml and the workflows: linted, pinned, and their scripts run with stand-ins for docker, gcloud, g4kit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.terraform_cli import ROOT, Terraform, planned_resources

WORKFLOWS = sorted((ROOT / ".github").rglob("*.yaml"))
CLOUDBUILD = yaml.safe_load((ROOT / "cloudbuild.yaml").read_text())
PINNED_IMAGE = re.compile(r"[a-z0-9./-]+(:[A-Za-z0-9._-]+)?@sha256:[0-9a-f]{64}")
SUBSTITUTIONS = {
    "COMMIT_SHA": "0" * 40,
    "PROJECT_ID": "my-project-123",
    "_BUCKET": "my-bucket",
    "_BUILDER": "projects/my-project-123/serviceAccounts/g4kit-builder@my-project-123.iam.gserviceaccount.com",
    "_CACHE": "us-central1-docker.pkg.dev/my-project-123/g4kit-cache/trainer",
    "_IMAGE": "us-central1-docker.pkg.dev/my-project-123/g4kit/trainer",
    "_JOB": "g4kit-train",
    "_JOBS": "g4kit-tools g4kit-train",
    "_REGION": "us-central1",
    "_RECIPE": "",
}
DIGEST = "sha256:" + "a" * 64
DIGESTED = f"{SUBSTITUTIONS['_IMAGE']}@{DIGEST}"


# ---- linters and pins ----------------------------------------------------------------------------------------------


def linter(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_hadolint_is_content() -> None:
    done = subprocess.run([linter("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_zizmor_is_content() -> None:
    command = [linter("zizmor"), "--offline", "--strict-collection", ".github"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert all(path.name in done.stderr for path in WORKFLOWS)


def test_every_action_is_pinned_and_says_its_release() -> None:
    uses = [line.strip() for path in WORKFLOWS for line in path.read_text().splitlines() if "uses: " in line]
    assert len(uses) >= 10
    for line in uses:
        action = line.split("uses: ")[1]
        assert action.startswith("$/.github/") or re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


def test_every_image_is_pinned() -> None:
    base = re.findall(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    froms = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert froms == ["${PYTHON}", "${PYTHON}"]
    steps = [step["name"] for step in CLOUDBUILD["steps"]]
    kits = re.findall(r"image=(\S+)", (ROOT / "cloudbuild.yaml").read_text())
    assert (len(base), len(steps), len([kit for kit in kits if "buildkit" in kit])) == (1, 5, 1)
    for image in [*base, *steps, *(kit for kit in kits if "buildkit" in kit)]:
        assert PINNED_IMAGE.fullmatch(image), image


# ---- Cloud Build ---------------------------------------------------------------------------------------------------


def test_the_build_has_room_time_and_an_account_of_its_own() -> None:
    assert CLOUDBUILD["serviceAccount"] == "${_BUILDER}"
    assert CLOUDBUILD["options"]["logging"] == "CLOUD_LOGGING_ONLY"
    assert CLOUDBUILD["options"]["diskSizeGb"] >= 100
    assert CLOUDBUILD["options"]["machineType"] == "E2_HIGHCPU_8"
    assert int(CLOUDBUILD["timeout"].removesuffix("s")) <= 24 * 3600


def test_terraform_gives_the_build_every_substitution(terraform: Terraform) -> None:
    repository = "projects/my-project-123/locations/us-central1/connections/github/repositories/my-models"
    resources = planned_resources(terraform.plan(build_repository=repository))
    (trigger,) = [found for found in resources if found["type"] == "google_cloudbuild_trigger"]
    assert trigger["values"]["filename"] == "cloudbuild.yaml"
    source = (ROOT / "terraform/build.tf").read_text() + (ROOT / "terraform/outputs.tf").read_text()
    assert {name for name in CLOUDBUILD["substitutions"] if name not in source} == set()


def test_a_build_deploys_the_digest_that_was_tested(tmp_path: Path) -> None:
    calls = run_build(tmp_path, {})
    assert [call.split()[:3] for call in calls] == [
        ["docker", "buildx", "create"],
        ["docker", "buildx", "build"],
        ["docker", "run", "--rm"],
        ["docker", "push", f"{SUBSTITUTIONS['_IMAGE']}:{SUBSTITUTIONS['COMMIT_SHA']}"],
        ["docker", "inspect", "--format"],
        ["gcloud", "storage", "cp"],
        ["gcloud", "run", "jobs"],
        ["gcloud", "run", "jobs"],
    ]
    assert f"--cache-from type=registry,ref={SUBSTITUTIONS['_CACHE']}:cache" in calls[1]
    assert calls[2].endswith(f"--network none --read-only --tmpfs /tmp {SUBSTITUTIONS['_IMAGE']}:{'0' * 40} selftest")
    assert calls[5].endswith(f"gs://my-bucket/builds/images/{'0' * 40}.txt")
    assert [(call.split()[4], call.split("--image=")[1].split()[0]) for call in calls[6:]] == [
        ("g4kit-tools", DIGESTED),
        ("g4kit-train", DIGESTED),
    ]
    assert (tmp_path / "output").read_text().strip() == DIGESTED


def test_a_build_with_a_recipe_trains_waits_and_fails_with_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes/pets.toml"
    recipe.parent.mkdir()
    recipe.write_text('name = "pets"\n')
    calls = run_build(tmp_path, {"_RECIPE": "recipes/pets.toml"})
    name = f"pets-{'0' * 40}.toml"
    assert calls[-2] == f"gcloud storage cp recipes/pets.toml gs://my-bucket/recipes/{name}"
    assert "run jobs execute g4kit-train" in calls[-1]
    assert "--wait" in calls[-1]
    assert calls[-1].endswith(f"--args=run,--recipe,/mnt/gcs/recipes/{name}")

    failing = {"gcloud": 'case "$*" in *execute*) exit 1;; esac'}
    run_build(tmp_path, {"_RECIPE": "recipes/pets.toml"}, failing, fails_at="train")


def test_an_image_that_fails_its_selftest_is_not_pushed(tmp_path: Path) -> None:
    calls = run_build(tmp_path, {}, {"docker": 'case "$*" in run*) exit 1;; esac'}, fails_at="selftest")
    assert not any("push" in call or "gcloud" in call for call in calls)


def test_a_build_without_its_substitutions_says_so(tmp_path: Path) -> None:
    assert run_build(tmp_path, {"_IMAGE": ""}, fails_at="build") == []


def run_build(
    folder: Path, substitutions: dict[str, str], fakes: dict[str, str] | None = None, fails_at: str | None = None
) -> list[str]:
    """Runs the steps in order as Cloud Build does; returns the calls of docker and gcloud, one line each."""
    inspect = f'case "$*" in inspect*) printf "%s\\n" other@{DIGEST} {DIGESTED};; esac'
    env = SUBSTITUTIONS | substitutions | {"BUILDER_OUTPUT": str(folder)}
    log = folder / "calls.log"
    log.unlink(missing_ok=True)
    for step in CLOUDBUILD["steps"]:
        done = run_script(step["script"], folder, env, {"docker": inspect, "gcloud": ""} | (fakes or {}))
        if step["id"] == fails_at:
            assert done.returncode != 0
            break
        assert done.returncode == 0, f"{step['id']}: {done.stderr}"
    return log.read_text().splitlines() if log.exists() else []


def run_script(
    script: str, folder: Path, env: dict[str, str], fakes: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a script of a pipeline with stand-ins for commands; each call is a line of calls.log."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, body in fakes.items():
        command = commands / name
        command.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{folder}/calls.log"\n{body}\n')
        command.chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(folder)} | env
    bash = str(shutil.which("bash"))
    return subprocess.run(
        [bash, "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


# ---- GitHub workflows ----------------------------------------------------------------------------------------------


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows" / name).read_text())
    return loaded


def step_of(job: dict[str, Any], name: str) -> dict[str, Any]:
    (step,) = [step for step in job["steps"] if step.get("name") == name]
    return dict(step)


def test_a_run_is_followed_for_longer_than_one_hosted_job_may_last() -> None:
    jobs = workflow("train.yaml")["jobs"]
    stretches = [job for name, job in jobs.items() if name.startswith("follow-")]
    assert len(stretches) == 5
    for number, job in enumerate(stretches[1:], start=2):
        assert job["if"] == f"needs.follow-{number - 1}.outputs.state == 'going on'"
    follow = workflow("follow.yaml")["jobs"]["follow"]
    assert follow["timeout-minutes"] < 360
    assert "timeout --signal=INT --kill-after=60 5h" in step_of(follow, "Launch once, then follow")["run"]


def test_only_what_signs_in_may_ask_for_a_token() -> None:
    assert workflow("ci.yaml")["permissions"] == {"contents": "read"}
    for name in ("train.yaml", "follow.yaml"):
        loaded = workflow(name)
        assert loaded["permissions"] == {}
        for job in loaded["jobs"].values():
            assert job["permissions"] == {"contents": "read", "id-token": "write"}


@pytest.mark.parametrize(
    ("code", "exit_code", "state"), [(0, 0, "ended"), (3, 3, "ended"), (124, 0, "going on"), (137, 0, "going on")]
)
def test_following_hands_on_or_ends_with_the_trainers_code(
    tmp_path: Path, code: int, exit_code: int, state: str
) -> None:
    step = step_of(workflow("follow.yaml")["jobs"]["follow"], "Launch once, then follow")
    env = {"RECIPE": "recipes/pets.toml", "RUN_ID": "pets-1", "MAX_COST": "50", "GITHUB_OUTPUT": str(tmp_path / "out")}
    done = run_script(step["run"], tmp_path, env, {"timeout": f"exit {code}"})
    assert (done.returncode, (tmp_path / "out").read_text()) == (exit_code, f"state={state}\n")
    launch = "g4kit launch recipes/pets.toml --id pets-1 --target cloudrun --yes --max-cost 50 --wait"
    assert (tmp_path / "calls.log").read_text().strip().endswith(launch)


def test_a_push_trains_with_the_one_recipe_that_it_changed(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "recipes").mkdir(parents=True)
    git = [str(shutil.which("git")), "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for number, names in enumerate([["a"], ["b"], ["a", "b"]]):
        for name in names:
            (repository / f"recipes/{name}.toml").write_text(f"# {number}")
        if number == 0:
            subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", str(number)], check=True)
    step = step_of(workflow("train.yaml")["jobs"]["plan"], "Choose the recipe")

    def choose(before: str, after: str, asked: str = "") -> tuple[int, str]:
        output = tmp_path / "out"
        output.write_text("")
        env = {"BEFORE": before, "GITHUB_SHA": after, "ASKED": asked, "GITHUB_OUTPUT": str(output)}
        done = run_script(step["run"], repository, env | {"GITHUB_RUN_ID": "123456789"}, {})
        return done.returncode, output.read_text() or done.stdout

    code, output = choose("HEAD~2", "HEAD~1")
    assert code == 0
    assert re.fullmatch(r"recipe=recipes/b\.toml\nrun_id=b-\d{8}-\d{6}-cd15\n", output)
    assert choose("HEAD~2", "HEAD~1", asked="recipes/a.toml")[1].startswith("recipe=recipes/a.toml\n")
    code, output = choose("HEAD~1", "HEAD")
    assert code == 1
    assert "got 'recipes/a.toml recipes/b.toml'; change one recipe in a push" in output
