"""g4kit preflight: the trainer's checks, with the estimate for the recipe's own card beside them."""

import json
import sys
from pathlib import Path

import pytest

from cli.bench import Bench

CHECKS = """\
import sys
print('{"passed": true}' if "--json" in sys.argv else "all checks passed")
sys.exit(int(sys.argv[1]))
"""
PETS = Path(__file__).parents[2] / "recipes" / "oxford-pets-31b.toml"


@pytest.fixture
def environ(bare: Bench) -> dict[str, str]:
    checks = bare.folder / "checks.py"
    checks.write_text(CHECKS)
    return {"G4KIT_TRAINER": f"{sys.executable} {checks} 0"}


def test_the_estimate_is_printed_with_the_checks(
    bare: Bench, environ: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    told = bare("preflight", PETS, env=environ)
    assert told.exit_code == 0
    assert "gemma-4-31B-it on NVIDIA RTX PRO 6000 Blackwell, 96 GB: fits" in told.stderr
    assert "price   $" in told.stderr
    assert "all checks passed" in capfd.readouterr().out
    document = json.loads(bare("preflight", PETS, "--json", env=environ).stdout)
    assert document["passed"] is True
    assert document["estimate"]["fits"] is True


def test_what_does_not_fit_fails_whatever_the_checks_say(bare: Bench, environ: dict[str, str]) -> None:
    small = bare.folder / "small.toml"
    small.write_text(PETS.read_text().replace("nvidia-rtx-pro-6000", "nvidia-l4"))
    told = bare("preflight", small, env=environ)
    assert told.exit_code == 1
    assert "does not fit" in told.stderr
    assert bare("preflight", PETS, env={"G4KIT_TRAINER": environ["G4KIT_TRAINER"][:-1] + "2"}).exit_code == 2


def test_values_are_replaced_for_the_checks_and_the_estimate(bare: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    shows = bare.folder / "shows.py"
    shows.write_text("import sys\nprint(*sys.argv[1:])\n")
    trainer = {"G4KIT_TRAINER": f"{sys.executable} {shows}"}
    stated = ("--set", "job.accelerator=nvidia-l4", "--set", "lora.r=32")
    told = bare("preflight", PETS, *stated, env=trainer)
    assert told.exit_code == 1, "the estimate's: it does not fit"
    assert "does not fit" in told.stderr
    assert f"--recipe {PETS} {' '.join(stated)} --samples 8" in capfd.readouterr().out
    refused = bare("preflight", "31B", "--set", "lora.r=8", env=trainer)
    assert (refused.exit_code, "--set: replaces values of a recipe, and 31B is none" in refused.stderr) == (2, True)


def test_a_size_or_an_unknown_model_has_no_estimate(bare: Bench, environ: dict[str, str]) -> None:
    assert bare("preflight", "31B", env=environ).stderr == ""
    told = bare("preflight", bare.recipe, env=environ)  # its model is not staged
    assert told.exit_code == 0
    assert 'no estimate: model.id: got "tiny-gemma4"' in told.stderr
