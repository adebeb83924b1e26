"""Terraform as the tests use it: a copy of the module, the real command, JSON in and out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT = "my-project-123"
TERRAFORM = shutil.which("terraform")


@dataclass(frozen=True)
class Terraform:
    """An initialized copy of terraform/ with the one file beside it that it reads."""

    folder: Path
    env: Mapping[str, str]

    def run(self, *arguments: str, expect: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(TERRAFORM), *arguments],
            cwd=self.folder,
            env=dict(self.env),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode in expect, (
            f"terraform {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def variables(self, **values: Any) -> str:
        """Writes the variables to a file and returns the option that reads it."""
        path = self.folder / "test.tfvars.json"
        path.write_text(json.dumps({"project_id": PROJECT} | values))
        return f"-var-file={path}"

    def plan(self, **values: Any) -> dict[str, Any]:
        """Returns the plan as `terraform show -json` gives it."""
        self.run("plan", "-input=false", "-out=test.plan", self.variables(**values))
        plan: dict[str, Any] = json.loads(self.run("show", "-json", "test.plan").stdout)
        return plan

    def refusals(self, **values: Any) -> list[str]:
        """Returns the error messages, unwrapped, of a plan that must fail."""
        done = self.run("plan", "-input=false", "-json", self.variables(**values), expect=(1,))
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return [line["diagnostic"]["detail"] for line in lines if line.get("@level") == "error"]

    def copy(self, folder: Path) -> Terraform:
        """Returns the same, with a state of its own."""
        shutil.copytree(self.folder.parent, folder, symlinks=True)
        return Terraform(folder / self.folder.name, self.env)


def planned_resources(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns address, type and values (as far as they are known) of everything that the plan makes."""
    resources: list[dict[str, Any]] = plan["planned_values"]["root_module"]["resources"]
    return [resource for resource in resources if resource["mode"] == "managed"]


def copy_module(folder: Path) -> Path:
    """Copies terraform/ as committed, without what Terraform keeps beside it, and returns the copy."""
    ignored = shutil.ignore_patterns(".terraform", ".terraform.lock.hcl", "*.tfstate*", "*.tfvars", "*.tfvars.json")
    shutil.copytree(ROOT / "terraform", folder / "terraform", ignore=ignored)
    (folder / "trainer/g4trainer").mkdir(parents=True)
    shutil.copy(ROOT / "trainer/g4trainer/limits.json", folder / "trainer/g4trainer")
    return folder / "terraform"


def environment(setup: str | None, home: Path) -> dict[str, str]:
    """Returns the environment that `setup` makes, without anyone's credentials: no test reaches a real project."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GOOGLE_", "CLOUDSDK_", "TF_"))}
    env |= {
        "CHECKPOINT_DISABLE": "1",
        "CLOUDSDK_CONFIG": str(home),
        "GOOGLE_OAUTH_ACCESS_TOKEN": "not-a-token",
        "TF_IN_AUTOMATION": "1",
        "TF_CLI_ARGS": "-no-color",
    }
    if setup is None:
        return env
    sourced = [str(shutil.which("bash")), "-euc", '. "$1" && env -0', "bash", setup]
    done = subprocess.run(sourced, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"TERRAFORM_CLI_SETUP={setup}: {done.stderr}"
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
