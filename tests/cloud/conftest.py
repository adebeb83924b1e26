"""A fake Google Cloud for each test, and the command line talking to it."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import made_up_model
from cli.bench import RECIPE, STANDIN
from fakes.google_cloud import QUICK, FakeGoogleCloud
from g4kit import following
from g4kit.cloud import google_client
from g4kit.main import cli

Call = Callable[..., Result]
PRICES = """\
[cloudrun.europe-west4]
as_of = "2026-11"
source = "a test"
gpu_s = { nvidia-l4 = 0.0002 }
"""
"""Of the fake deployment's region, whose own are not known."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of uploads are kept in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def google(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    made = FakeGoogleCloud(tmp_path / "google")
    yield made
    made.close()


@pytest.fixture
def standins(tmp_path: Path) -> Iterator[FakeGoogleCloud]:
    """Whose jobs run the stand-in trainer. A module takes it by defining `google` as this."""
    made = FakeGoogleCloud(tmp_path / "google", command=STANDIN, grace_s=1.0)
    yield made
    made.close()


@pytest.fixture
def environ(google: FakeGoogleCloud, tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "deployment.json"
    file.write_text(json.dumps({"deployment": {"value": google.deployment.model_dump()}}))
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    found = {"G4KIT_DEPLOYMENT": file, "G4KIT_EMULATOR_HOST": google.server.url, "G4KIT_PRICE_TABLE": prices}
    return {name: str(value) for name, value in found.items()} | {"G4KIT_TRAINER": " ".join(STANDIN)}


@pytest.fixture
def call(environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a command; processes of the fake inherit its environment."""
    monkeypatch.setattr(google_client, "Patience", lambda: QUICK)
    monkeypatch.setattr(following, "INTERVAL_S", 0.1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    def call(*arguments: str, plan: Any = None) -> Result:
        if plan:
            monkeypatch.setenv("STANDIN_PLAN", json.dumps(plan))
        return invoke(*arguments)

    return call


@pytest.fixture
def stage(google: FakeGoogleCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `g4kit stage model` on the fake's deployment, with the real trainer."""
    file = tmp_path / "staging.json"
    file.write_text(json.dumps(google.deployment.model_dump()))
    monkeypatch.setattr(google_client, "Patience", lambda: QUICK)
    monkeypatch.setenv("G4KIT_DEPLOYMENT", str(file))
    monkeypatch.setenv("G4KIT_EMULATOR_HOST", google.server.url)
    monkeypatch.setenv("G4KIT_ROOT", str(tmp_path / "local"))
    return partial(invoke, "stage", "model")


def invoke(*arguments: str) -> Result:
    """What a command printed and how it ended. Raises what it should have told the user."""
    result = CliRunner().invoke(cli, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def staged(call: Call, tmp_path: Path) -> Call:
    source = made_up_model.write(tmp_path / "tiny-gemma4")
    for kind, what in (("model", str(source)), ("data", "builtin:digits")):
        told = call("stage", kind, what)
        assert told.exit_code == 0, told.stderr
    return call
