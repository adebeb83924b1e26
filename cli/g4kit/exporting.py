"""A run's adapter as a folder to serve: merged by a process here or by one execution of the cloud target, or alone."""

import json
import os
import secrets
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g4kit.cloud.base import Cloud, Execution, JobRequest, ObjectNotFoundError, now
from g4kit.cloud.local import trainer_command, trainer_problems
from g4kit.cloud.local_bucket import storage_errors
from g4kit.errors import FAILED, USAGE, FailedError, UserError
from g4kit.fetching import EXPORTS, check_entries, copy_checked, read_exported
from g4kit.one_gpu import OneGpu
from g4kit.runs import read_document, require_run, run_folder
from g4trainer.export_folder import EXPORTED, FolderTakenError, begin, finish
from g4trainer.model_card import model_card
from g4trainer.recipe import FrozenRecipe
from g4trainer.rundir import file_entry, write_bytes

POLL_S = 2.0
LOG_LINES = 12
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

Say = Callable[[str], None]


class ExportError(UserError):
    """A run that cannot be exported as asked. The exit code is the trainer's."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code in (1, 2, 3) else FAILED


@dataclass(frozen=True)
class Options:
    onto: str = "bf16"
    """The base weights to merge into: `bf16` as published, `nf4` as the run had them."""
    compare: bool = True


def require_adapter(cloud: Cloud, run_id: str) -> FrozenRecipe:
    """Raises RunNotFoundError, ExportError where the run has no adapter."""
    require_run(cloud, run_id)
    if read_document(cloud.bucket, f"{run_folder(run_id)}/adapter/training_summary.json") is None:
        raise ExportError(f"run {run_id}: has no adapter yet; write: g4kit runs {run_id}")
    return FrozenRecipe.model_validate_json(cloud.bucket.read(f"{run_folder(run_id)}/recipe.json"))


def export_adapter(cloud: Cloud, frozen: FrozenRecipe, out: Path, say: Say) -> dict[str, Any]:
    """The adapter as PEFT loads it, with a model card; written last is EXPORTED.json, which is returned."""
    run_id = frozen.run_id
    folder = run_folder(run_id)
    done = _begin(out, run_id, "adapter")
    if done is not None:
        say(f"{out}: exported already")
        return done
    summary = read_document(cloud.bucket, f"{folder}/adapter/training_summary.json") or {}
    check_entries(summary["files"], f"run {run_id}: training_summary.json", "launch the run anew")
    entries = {name: summary["files"][name] for name in ADAPTER_FILES}
    copy_checked(cloud.bucket, f"{folder}/adapter", out, entries)
    base = f"models/{frozen.recipe.model.id}"
    staged = read_document(cloud.bucket, f"{base}/STAGED.json") or {}
    document: dict[str, Any] = {
        "format": "adapter",
        "run_id": run_id,
        "created_at": now().isoformat(timespec="seconds"),
        "base": {"id": frozen.recipe.model.id, "source": staged.get("source"), "revision": staged.get("revision")},
    }
    card = model_card(
        frozen,
        read_document(cloud.bucket, f"{folder}/results.json") or {},
        document,
        *(_text(cloud, f"{base}/{name}") for name in ("README.md", "LICENSE")),
        prompt=_prompt(cloud, frozen),
    )
    with storage_errors(out):
        write_bytes(out / "README.md", card.encode())
        document["files"] = {name: file_entry(out / name) for name in (*ADAPTER_FILES, "README.md")}
        finish(out, document)
    return document


def export_here(cloud: Cloud, run_id: str, out: Path, options: Options) -> dict[str, Any]:
    """Merges on this machine; the trainer's lines go to stderr. Returns EXPORTED.json."""
    trainer = trainer_command(os.environ)
    problems = trainer_problems(trainer)
    if problems:
        raise ExportError("\n".join(problems))
    ended = subprocess.run(
        [*trainer, *_arguments(cloud, run_id, str(out.absolute()), options)],
        stdin=subprocess.DEVNULL,
        stdout=2,  # what it says is prose
        env=os.environ | {"G4KIT_ROOT": cloud.bucket.url},
        check=False,
    )
    if ended.returncode:
        raise ExportError(f"run {run_id}: was not exported; the lines above say why.", ended.returncode)
    document: dict[str, Any] = json.loads((out / EXPORTED).read_text())
    return document


def running_export(cloud: Cloud, run_id: str, options: Options) -> Execution | None:
    """The execution that exports this run right now."""
    return next((one for one in cloud.jobs.find(_own_id(run_id, options)) if one.active), None)


def start_there(cloud: Cloud, frozen: FrozenRecipe, where: OneGpu, options: Options) -> Execution:
    """Raises ExportError where the target cannot run it."""
    out = cloud.bucket.job_path(f"{run_folder(frozen.run_id)}/{EXPORTS[options.onto]}")
    asked = JobRequest(
        run_id=_own_id(frozen.run_id, options),
        launch_id=secrets.token_hex(4),
        args=_arguments(cloud, frozen.run_id, out, options),
        **where.requested,
    )
    problems = cloud.jobs.problems(asked)
    if problems:
        raise ExportError("\n".join(problems))
    return cloud.jobs.run(asked)


def wait_there(cloud: Cloud, run_id: str, options: Options, execution: Execution, say: Say) -> None:
    """Follows the execution to its end. Raises FailedError where it did not export."""
    said = ""
    while True:
        current = cloud.jobs.get(execution.name)
        if f"{current.state}" != said:
            said = f"{current.state}"
            say(f"execution {execution.name}: {said} {current.message}".rstrip())
        if not current.active:
            break
        time.sleep(POLL_S)
    if read_exported(cloud.bucket, run_id, options.onto) is None:
        log = "\n".join(line.text for line in deque(cloud.logs.read(execution.name), maxlen=LOG_LINES))
        raise FailedError(f"run {run_id}: was not exported; {current.message}\n{log}")


def fetch_export(cloud: Cloud, run_id: str, options: Options, out: Path, say: Say) -> dict[str, Any]:
    """Copies the export from the bucket, every file checked by its SHA-256, EXPORTED.json last; returns that."""
    document = read_exported(cloud.bucket, run_id, options.onto) or {}
    done = _begin(out, run_id, "merged")
    if done == document:
        say(f"{out}: fetched already")
        return document
    if done is not None:
        raise ExportError(f"--out: got {out}, which holds an earlier export of {run_id}; write another folder.")
    check_entries(document["files"], f"run {run_id}: {EXPORTED}", "export it anew")
    copy_checked(cloud.bucket, f"{run_folder(run_id)}/{EXPORTS[options.onto]}", out, document["files"])
    with storage_errors(out):
        finish(out, document)
    return document


def _begin(out: Path, run_id: str, kind: str) -> dict[str, Any] | None:
    """Makes the folder this export's own; EXPORTED.json where it holds one of this run and kind already.

    Raises ExportError for a folder that holds something else than an unfinished export of this run.
    """
    try:
        with storage_errors(out):
            return begin(out, run_id, kind=kind)
    except FolderTakenError as error:
        raise ExportError(f"--out: got {out}, which {error}; write an empty or missing folder.") from error


def _arguments(cloud: Cloud, run_id: str, out: str, options: Options) -> tuple[str, ...]:
    run = cloud.bucket.job_path(run_folder(run_id))
    return ("export", run, "--out", out, "--onto", options.onto, *(() if options.compare else ("--no-compare",)))


def _own_id(run_id: str, options: Options) -> str:
    """Named below the run and not for it: the run's own executions are another matter."""
    return f"{run_id}/requests/{EXPORTS[options.onto]}"


def _prompt(cloud: Cloud, frozen: FrozenRecipe) -> str:
    data = frozen.recipe.data
    final = read_document(cloud.bucket, f"{run_folder(frozen.run_id)}/evaluation/final.json") or {}
    if data.task == "chat":
        return "Your question"
    return data.prompt.replace("{labels}", ", ".join(final.get("confusion", {}).get("rows", [])))


def _text(cloud: Cloud, name: str) -> str | None:
    try:
        return cloud.bucket.read(name).decode(errors="replace")
    except ObjectNotFoundError:
        return None
