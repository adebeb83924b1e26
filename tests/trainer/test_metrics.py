"""What a run tells: paced writes, segments of metrics that several attempts share."""

import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from g4trainer.exits import RunTaken
from g4trainer.metrics import MetricsLog, Publisher, Status, read_metrics
from g4trainer.rundir import RunDir, read_json, write_bytes

INTERVAL_S = 0.15


class Journal:
    """Notes each write of a publisher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from g4trainer import metrics

        self.writes: list[tuple[float, str, bytes]] = []

        def noted(path: Path, data: bytes) -> None:
            write_bytes(path, data)
            self.writes.append((time.monotonic(), path.name, data))

        monkeypatch.setattr(metrics, "write_bytes", noted)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    return Journal(monkeypatch)


def opened(publisher: Publisher) -> Publisher:
    publisher.open()
    return publisher


def test_a_file_is_written_once_an_interval_and_its_last_content_wins(tmp_path: Path, journal: Journal) -> None:
    with opened(Publisher(INTERVAL_S)) as publisher:
        for number in range(40):
            publisher.publish(tmp_path / "a", str(number).encode)
            time.sleep(0.01)
    times = [at for at, _, _ in journal.writes]
    assert 3 <= len(times) <= 6
    assert min(later - earlier for earlier, later in itertools.pairwise(times)) >= INTERVAL_S
    assert (tmp_path / "a").read_bytes() == b"39", "the end waits for the last one"


def test_a_file_of_an_earlier_attempt_keeps_the_pace(tmp_path: Path, journal: Journal) -> None:
    (tmp_path / "old").write_bytes(b"before")
    started = time.monotonic()
    with opened(Publisher(INTERVAL_S)) as publisher:
        publisher.publish(tmp_path / "old", lambda: b"now")
        publisher.publish(tmp_path / "new", lambda: b"now")
    when = {name: at - started for at, name, _ in journal.writes}
    assert when["new"] < INTERVAL_S <= when["old"]


def test_nothing_is_written_before_the_run_is_ours(tmp_path: Path) -> None:
    with Publisher(INTERVAL_S) as publisher:
        publisher.publish(tmp_path / "a", lambda: b"x")
        time.sleep(2 * INTERVAL_S)
    assert not (tmp_path / "a").exists()


def test_an_end_in_a_hurry_leaves_what_is_not_due(tmp_path: Path) -> None:
    started = time.monotonic()
    with opened(Publisher(30, closing_s=lambda: 0.2)) as publisher:
        publisher.publish(tmp_path / "a", lambda: b"first")
        time.sleep(0.1)
        publisher.publish(tmp_path / "a", lambda: b"second")
        publisher.publish(tmp_path / "b", lambda: b"first")
    assert time.monotonic() - started < 5
    assert (tmp_path / "a").read_bytes() == b"first"
    assert (tmp_path / "b").read_bytes() == b"first"


def test_who_lost_the_run_publishes_nothing_more(tmp_path: Path) -> None:
    publisher = opened(Publisher(INTERVAL_S)).__enter__()
    publisher.publish(tmp_path / "a", lambda: b"first")
    time.sleep(0.05)
    publisher.publish(tmp_path / "a", lambda: b"second")
    publisher.__exit__(RunTaken, RunTaken("another's"), None)
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_removed_file_does_not_come_back(tmp_path: Path) -> None:
    with opened(Publisher(INTERVAL_S)) as publisher:
        publisher.publish(tmp_path / "a", lambda: b"first")
        time.sleep(0.05)
        publisher.publish(tmp_path / "a", lambda: b"second")
        publisher.remove(tmp_path / "a")
        time.sleep(2 * INTERVAL_S)
    assert not (tmp_path / "a").exists()


def test_a_write_that_fails_is_raised_where_someone_can_act(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with opened(Publisher(INTERVAL_S)) as publisher:
        publisher.publish(tmp_path / "file" / "a", lambda: b"x")
        time.sleep(0.1)
        with pytest.raises(FileExistsError):
            publisher.publish(tmp_path / "b", lambda: b"x")


def test_a_status_stays_fresh_while_a_phase_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with opened(Publisher(INTERVAL_S)) as publisher:
        status = Status(path, publisher, attempt=3)
        status.start()
        time.sleep(0.05)
        first = read_json(path)
        time.sleep(3 * INTERVAL_S)
        later = read_json(path)
        with pytest.raises(KeyError):
            status.update(colour="red")
        status.update(state="succeeded")
        status.stop()
    assert (first["state"], first["attempt"]) == ("loading", 3)
    assert later["heartbeat"] > first["heartbeat"]
    assert read_json(path)["state"] == "succeeded"


def test_lines_that_were_lost_and_repeated_count_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.mkdir()
    for attempt, steps in ((1, (1, 2, 3)), (2, (3, 4))):
        lines = [{"kind": "train", "step": step, "loss": attempt} for step in steps]
        (run.metrics / f"{attempt:04d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(line["step"], line["loss"]) for line in read_metrics(run)] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_lines_that_a_kill_lost_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.mkdir()
    (run.metrics / "0001.jsonl").write_text('{"kind": "train", "step": 1, "loss": 3.0}\n')
    history = [
        {"loss": 3.0, "learning_rate": 0.1, "step": 1},
        {"loss": 2.0, "learning_rate": 0.1, "step": 2},
        {"eval_loss": 2.5, "step": 2},
        {"train_runtime": 9.0, "step": 2},
    ]
    with opened(Publisher(INTERVAL_S)) as publisher:
        log = MetricsLog(run, publisher, attempt=2)
        log.resume(2, history)
        log.add("train", 3, loss=1.0)
    assert [(line["kind"], line["step"]) for line in read_metrics(run)] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
    ]
    assert (run.tensorboard / "0002").is_dir()


def test_threads_end_with_the_publisher(tmp_path: Path) -> None:
    with opened(Publisher(INTERVAL_S)):
        assert any(thread.name == "publisher" for thread in threading.enumerate())
    assert not any(thread.name == "publisher" for thread in threading.enumerate())
