"""One fork server and one undisturbed run for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.attempts import Server, new_run
from g4trainer import selftest, tiny
from g4trainer.rundir import RunDir


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("bucket"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(server: Server) -> RunDir:
    """A run that nothing interrupts."""
    run = new_run(server.root, "undisturbed")
    attempt = server.run(run)
    assert attempt.status == 0, attempt.log
    return run


@pytest.fixture(scope="session")
def experts_model(server: Server) -> str:
    """The name of a staged model with experts."""
    name = "tiny-26b-a4b"
    tiny.write_model(server.root / "models" / name, like="26B-A4B")
    selftest.mark_staged(server.root / "models" / name, source="builtin")
    return name


@pytest.fixture
def run(server: Server, request: pytest.FixtureRequest) -> RunDir:
    """A new run with the recipe of the undisturbed one."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip("-")
    return new_run(server.root, name[:60].strip("-"))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"
