"""What every target's logs do."""

import datetime
import threading
import time
from collections.abc import Callable

from contract.waiting import wait, wait_until
from g4kit.cloud.base import Cloud, Execution, LogLine

Start = Callable[..., Execution]


def own(lines: list[LogLine]) -> list[str]:
    return [line.text for line in lines if not line.text.startswith("g4kit:")]


def test_both_streams_are_logged_with_time_task_and_attempt(cloud: Cloud, start: Start) -> None:
    before = datetime.datetime.now(datetime.UTC)
    started = start("print:out", "err:wrong", "exit-at:0=1", max_attempts=2)
    ended = wait(cloud, started.name)
    lines = [line for line in cloud.logs.read(started.name) if not line.text.startswith("g4kit:")]
    assert [(line.text, line.task, line.attempt) for line in lines] == [
        ("out", 0, 0),
        ("wrong", 0, 0),
        ("out", 0, 1),
        ("wrong", 0, 1),
    ]
    assert ended.finished_at is not None
    times = [line.time for line in lines]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= ended.finished_at


def test_an_attempts_end_is_logged(cloud: Cloud, start: Start) -> None:
    started = start("exit:7")
    wait(cloud, started.name)
    assert any("exit code 7" in line.text for line in cloud.logs.read(started.name))


def test_lines_since_a_time(cloud: Cloud, start: Start) -> None:
    started = start("print:1", "sleep:0.2", "print:2", "sleep:0.2", "print:3")
    wait(cloud, started.name)
    lines = list(cloud.logs.read(started.name))
    second = lines[1].time
    assert own(list(cloud.logs.read(started.name, since=second))) == ["2", "3"]
    assert list(cloud.logs.read(started.name, since=lines[-1].time + datetime.timedelta(seconds=1))) == []


def test_following_gives_every_line_once_and_ends(cloud: Cloud, start: Start) -> None:
    args = [part for number in range(30) for part in (f"print:{number}", "sleep:0.02")]
    started = start(*args)
    assert own(list(cloud.logs.follow(started.name))) == [str(number) for number in range(30)]
    assert not cloud.jobs.get(started.name).active
    assert own(list(cloud.logs.follow(started.name))) == [str(number) for number in range(30)]


def test_following_gives_lines_while_the_job_runs(cloud: Cloud, start: Start) -> None:
    started = start("print:early", "sleep:60")
    seen: list[LogLine] = []
    thread = threading.Thread(target=_gather, args=(cloud, started, seen), daemon=True)
    thread.start()
    wait_until(lambda: own(seen), lambda lines: lines == ["early"])
    assert cloud.jobs.get(started.name).active
    begun = time.monotonic()
    cloud.jobs.cancel(started.name)
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - begun < 20


def test_a_last_line_without_its_end_is_not_lost(cloud: Cloud, start: Start) -> None:
    started = start("print:whole", "partial:half")
    assert own(list(cloud.logs.follow(started.name))) == ["whole", "half"]


def test_text_is_kept_as_it_is(cloud: Cloud, start: Start) -> None:
    started = start("print:  blanks and ünïcode 🐈  0/0", "print:", "print:" + "x" * 100_000)
    texts = own(list(cloud.logs.follow(started.name)))
    assert texts[:2] == ["  blanks and ünïcode 🐈  0/0", ""]
    assert "".join(texts[2:]) == "x" * 100_000


def _gather(cloud: Cloud, execution: Execution, seen: list[LogLine]) -> None:
    seen.extend(cloud.logs.follow(execution.name))
