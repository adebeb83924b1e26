"""Answers of a run's adapter for local images: by a process here, or by one execution of the cloud target's job."""

import contextlib
import json
import os
import secrets
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g4kit.cloud.base import Cloud, Execution, JobRequest, ObjectNotFoundError
from g4kit.cloud.local import trainer_command, trainer_problems
from g4kit.errors import FAILED, USAGE, FailedError, UserError
from g4kit.following import describe
from g4kit.one_gpu import OneGpu
from g4kit.runs import read_document, read_run, run_folder
from g4kit.transfer import in_parallel
from g4trainer.recipe import Recipe

SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What is taken from a folder. A file that is named is taken whatever its name ends with."""
POLL_S = 1.0
LOG_LINES = 12
EXIT_CODES = {1, 2, 3}
"""Of the trainer, passed on."""

Answer = dict[str, Any]
"""`{"image": name, "after": {"prediction", "raw_text"} or None, "before": the same}`."""
Say = Callable[[str], None]


class PredictError(UserError):
    """Images that were not answered. The exit code is the trainer's."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code in EXIT_CODES else FAILED


@dataclass(frozen=True)
class Request:
    run_id: str
    images: tuple[Path, ...]
    which: str
    """`after`, `before` or `both`."""
    prompt: str | None
    """The question, for a run that was trained on chats; None for the run's own."""


def find_images(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Files as they are named, folders as the images below them, sorted. Raises PredictError with every problem."""
    found: list[Path] = []
    problems = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            found += inside
            if not inside:
                problems.append(f"{path}: a folder without images; write one with {', '.join(sorted(SUFFIXES))} files.")
        elif path.is_file():
            found.append(path)
        else:
            problems.append(f"{path}: no such file or folder; write the path of an image, or of a folder of images.")
    if problems:
        raise PredictError("\n".join(problems))
    return tuple(dict.fromkeys(found))


def require_finished(cloud: Cloud, run_id: str) -> Recipe:
    """The recipe of a finished run. Raises RunNotFoundError, PredictError where the run has not finished."""
    view = read_run(cloud, run_id)
    if view.results is None:
        raise PredictError(f"run {run_id}: has not finished ({describe(view)}); write: g4kit runs {run_id} --watch")
    document = read_document(cloud.bucket, f"{run_folder(run_id)}/recipe.json") or {}
    return Recipe.model_validate(document["recipe"])


def predict(cloud: Cloud, where: OneGpu, request: Request, say: Say) -> Iterator[Answer]:
    """Answers in the images' order, as they come. Raises PredictError."""
    if cloud.target == "local":
        yield from predict_here(cloud, request, trainer_command(os.environ), say)
    else:
        yield from predict_there(cloud, where, request, say)


def predict_here(cloud: Cloud, request: Request, trainer: tuple[str, ...], say: Say) -> Iterator[Answer]:
    problems = trainer_problems(trainer)
    if problems:
        raise PredictError("\n".join(problems))
    say("loading the model")
    with tempfile.TemporaryDirectory(prefix="g4kit-") as folder, tempfile.TemporaryFile("w+") as told:
        files = [str(path.absolute()) for path in request.images]
        (Path(folder) / "request.json").write_text(json.dumps(_document(request, files)))
        process = subprocess.Popen(
            [*trainer, "predict", cloud.bucket.job_path(run_folder(request.run_id)), "--request", folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=told,
            env=os.environ | {"G4KIT_ROOT": cloud.bucket.url},
            text=True,
        )
        try:
            assert process.stdout is not None  # noqa: S101 it was asked for
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code:
            told.seek(0)
            failed = Path(folder) / "failed.json"
            said = json.loads(failed.read_text()) if failed.exists() else None
            raise _failure(said, "".join(deque(told, maxlen=LOG_LINES)), code)


def predict_there(cloud: Cloud, where: OneGpu, request: Request, say: Say) -> Iterator[Answer]:
    """Images up, one execution, answers back; then nothing of the request is left in the bucket."""
    token = secrets.token_hex(4)
    # Named below the run and not for it: the run's own executions are another matter.
    own_id = f"{request.run_id}/requests/{token}"
    folder = run_folder(own_id)
    asked = JobRequest(
        run_id=own_id,
        launch_id=token,
        args=(
            *("predict", cloud.bucket.job_path(run_folder(request.run_id))),
            *("--request", cloud.bucket.job_path(folder), "--quiet"),
        ),
        **where.requested,
    )
    problems = cloud.jobs.problems(asked)
    if problems:
        raise PredictError("\n".join(problems))
    try:
        files = [f"images/{number:05}{path.suffix}" for number, path in enumerate(request.images)]
        say(f"copying {len(files)} images to {cloud.bucket.url}/{folder}")
        in_parallel(
            lambda pair: cloud.bucket.upload_file(pair[0], f"{folder}/{pair[1]}"),
            list(zip(request.images, files, strict=True)),
        )
        cloud.bucket.write(f"{folder}/request.json", json.dumps(_document(request, files)).encode())
        try:
            execution = cloud.jobs.run(asked)
            say(f"execution {execution.name}: loading the model")
            yield from _follow(cloud, folder, execution)
        except BaseException:  # Ctrl-C among them: nothing may go on that costs and that nobody reads
            with contextlib.suppress(UserError):
                for begun in cloud.jobs.find(own_id):
                    cloud.jobs.cancel(begun.name)
            raise
    finally:
        for item in list(cloud.bucket.objects(f"{folder}/")):
            with contextlib.suppress(ObjectNotFoundError):
                cloud.bucket.delete(item.name)


def _follow(cloud: Cloud, folder: str, execution: Execution) -> Iterator[Answer]:
    """Yields what is new until the execution has ended. Raises PredictError where it did not succeed."""
    count = 0
    while True:
        current = cloud.jobs.get(execution.name)  # asked before reading: what an ended one wrote is all there
        whole = read_document(cloud.bucket, f"{folder}/answers.json")
        answers = whole["answers"] if whole else _published(cloud, folder)
        yield from answers[count:]
        count = max(count, len(answers))
        if whole:
            return
        if not current.active:
            log = "\n".join(line.text for line in deque(cloud.logs.read(execution.name), maxlen=LOG_LINES))
            said = read_document(cloud.bucket, f"{folder}/failed.json")
            raise _failure(said, f"{execution.name}: {current.state}: {current.message}\n{log}", current.exit_code or 1)
        time.sleep(POLL_S)


def _published(cloud: Cloud, folder: str) -> list[Answer]:
    try:
        return [json.loads(line) for line in cloud.bucket.read(f"{folder}/answers.jsonl").splitlines()]
    except ObjectNotFoundError:
        return []


def _document(request: Request, files: Sequence[str]) -> dict[str, Any]:
    """request.json, as g4trainer.predict reads it."""
    images = [{"name": str(path), "file": file} for path, file in zip(request.images, files, strict=True)]
    return {"images": images, "which": request.which, "prompt": request.prompt}


def _failure(said: dict[str, Any] | None, log: str, code: int) -> UserError:
    if said is None:
        return FailedError(f"the images were not answered; exit code {code}:\n{log.strip()}")
    return PredictError(f"{said['reason']}\n{said['remedy']}", int(said["exit_code"]))
