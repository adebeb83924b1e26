"""Fixtures of the infrastructure tests. A tool that is not there is a visible skip, never a silent pass."""

from __future__ import annotations

import os
import subprocess

import pytest

from infra.terraform_cli import TERRAFORM, Terraform, copy_module, environment


@pytest.fixture(scope="session")
def terraform(tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    """An initialized copy of terraform/.

    TERRAFORM_CLI_SETUP names a script that is sourced first, where the Terraform registry cannot be reached.
    """
    if TERRAFORM is None:
        pytest.skip("terraform is not installed")
    setup = os.environ.get("TERRAFORM_CLI_SETUP")
    env = environment(setup, tmp_path_factory.mktemp("no-credentials"))
    folder = copy_module(tmp_path_factory.mktemp("terraform"))
    command = [TERRAFORM, "init", "-input=false", "-backend=false"]
    init = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500, check=False)
    if init.returncode and setup is None and "registry.terraform.io" in init.stderr:
        pytest.skip("the Terraform registry cannot be reached, and TERRAFORM_CLI_SETUP names no set-up script")
    assert init.returncode == 0, init.stdout + init.stderr
    return Terraform(folder, env)
