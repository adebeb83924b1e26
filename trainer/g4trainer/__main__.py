"""`python -m g4trainer VERB PATH`: the process that Cloud Run, Vertex AI or the local target starts."""

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from g4trainer import __version__

if TYPE_CHECKING:
    from g4trainer.deadline import Deadline
    from g4trainer.rundir import RunDir

STARTED = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns its exit code (see exits.py)."""
    options = _parser().parse_args(arguments)
    told = sys.stderr if options.verb is _predict else sys.stdout  # its own stdout carries the answers
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=told)
    for chatty in ("httpx", "httpx2", "datasets", "accelerate", "bitsandbytes"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if options.verb is not _stage:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is staged: nothing may be looked up outside
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # batches differ in length
    code: int = options.verb(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="g4trainer", description="Fine-tunes Gemma 4 in a run directory.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    run = verbs.add_parser("run", help="do what is left of a run")
    run.add_argument("path", nargs="?", type=Path, help="a run directory, for example /mnt/gcs/runs/ID")
    run.add_argument("--recipe", type=Path, help="a recipe: make a run directory for it under $G4KIT_ROOT, then run it")
    run.add_argument("--sweep", type=Path, help="tasks.json of a sweep: run what $CLOUD_RUN_TASK_INDEX says of it")
    run.add_argument("--only", type=_indices, metavar="I,I", help="of the sweep, the tasks that this execution runs")
    run.set_defaults(verb=_run)

    preflight = verbs.add_parser("preflight", help="check LoRA targets, token alignment, template and processor")
    preflight.add_argument("path", nargs="?", help="a run directory, a model folder, or a size: E2B, E4B, 26B-A4B, 31B")
    preflight.add_argument("--recipe", type=Path, help="a recipe; what it names is looked for under $G4KIT_ROOT")
    preflight.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace one value of it")
    preflight.add_argument("--json", action="store_true", help="print one JSON document")
    preflight.add_argument("--samples", type=int, default=8, help="training samples whose tokens are checked")
    preflight.set_defaults(verb=_preflight)

    tiny = verbs.add_parser("tiny", help="make the embedded model or data set")
    tiny.add_argument("what", choices=("model", "data"))
    tiny.add_argument("path", type=Path, help="the folder to write; it must be empty or missing")
    tiny.set_defaults(verb=_tiny)

    predict = verbs.add_parser("predict", help="answer images with a run's adapter, one JSON line each")
    predict.add_argument("path", type=Path, help="the directory of a run that is finished")
    predict.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files")
    predict.add_argument("--request", type=Path, help="a folder with request.json, in place of images; see predict.py")
    predict.add_argument("--which", choices=("after", "before", "both"), default="after", help="which model answers")
    predict.add_argument("--prompt", help="the question, for a run that was trained on chats")
    predict.add_argument("--quiet", action="store_true", help="print no answers: they are in the request's folder")
    predict.set_defaults(verb=_predict)

    stage = verbs.add_parser("stage", help="copy a model or a data set from the Hugging Face hub into the bucket")
    stage.add_argument("kind", choices=("model", "data"))
    stage.add_argument("id", help="a hub id, for example google/gemma-4-E2B-it; $HF_TOKEN opens gated ones")
    stage.add_argument("--revision", help="a branch, tag or commit; default: the repository's main branch")
    stage.add_argument("--name", required=True, help="name in the bucket, $G4KIT_ROOT/models/NAME or datasets/NAME")
    stage.set_defaults(verb=_stage)

    quantize = verbs.add_parser("quantize", help="write the NF4 copy of a staged model beside it, as FOLDER-nf4")
    quantize.add_argument("folder", type=Path, help="a staged model; models/NAME is looked for under $G4KIT_ROOT")
    quantize.set_defaults(verb=_quantize)

    evaluate = verbs.add_parser("evaluate", help="answer a finished run's test samples, shared among tasks")
    evaluate.add_argument("path", type=Path, help="the directory of a run that is finished")
    evaluate.add_argument("--shards", type=int, required=True, help="how many tasks share the samples")
    evaluate.add_argument("--test-size", help='how many test samples, or "all"; without it as many as the run took')
    evaluate.add_argument("--only", type=_indices, metavar="K,K", help="the shares that this execution's tasks answer")
    evaluate.set_defaults(verb=_evaluate)

    export = verbs.add_parser("export", help="write a run's adapter, merged into its base model, as a folder to serve")
    export.add_argument("path", type=Path, help="the directory of a run that is finished")
    export.add_argument("--out", type=Path, required=True, help="the folder to write; it must be empty or missing")
    export.add_argument(
        "--onto", choices=("bf16", "nf4"), default="bf16", help="base weights to merge into: published, or as trained"
    )
    export.add_argument("--no-compare", action="store_true", help="do not load the result and compare it")
    export.set_defaults(verb=_export)

    report = verbs.add_parser("report", help="make report.html of a finished run again")
    report.add_argument("path", type=Path, help="a run directory, for example .g4kit/runs/ID")
    report.set_defaults(verb=_report)

    selftest = verbs.add_parser(
        "selftest", help="train the embedded model for a few steps, to prove an image or a machine"
    )
    selftest.set_defaults(verb=_selftest)
    return parser


def _run(options: argparse.Namespace) -> int:
    from g4trainer.deadline import Deadline, attempts_used_up
    from g4trainer.exits import ExitCode

    deadline = Deadline.from_environment(STARTED)
    deadline.listen()
    from g4trainer.rundir import RunDir
    from g4trainer.torchrun import under_torchrun

    if sum(given is not None for given in (options.path, options.recipe, options.sweep)) != 1:
        return _usage("run: write one of the PATH of a run directory, --recipe RECIPE, and --sweep TASKS.")
    if options.path is None and under_torchrun():
        return _usage("run: under torchrun write the PATH of a run directory: each process would look for its own.")
    if options.sweep is not None:
        from g4trainer.sweep import SweepError, run_of_task

        try:
            path = run_of_task(options.sweep, options.only).path
        except SweepError as error:
            return _usage(f"run: {error}")
        print(f"task of {options.sweep}: run {path.name}", flush=True)
        if RunDir(path).results.is_file():
            print(f"{path.name}: finished already")
            return 0
    elif options.recipe is not None:
        from g4trainer.launch import make_run
        from g4trainer.recipe import RecipeError

        try:
            path = make_run(options.recipe, Path(os.environ.get("G4KIT_ROOT") or ".g4kit"))
        except RecipeError as error:
            return _usage(str(error))
    else:
        path = options.path
    if not (path / "recipe.json").is_file():
        return _usage(f"run: {path} has no recipe.json; write the path of a run directory that `g4kit launch` made.")
    used_up = attempts_used_up(os.environ)
    if used_up and not RunDir(path).failed.is_file():
        print(f"{path.name}: nothing was done: {used_up}; to go on: g4kit resume {path.name} --max-cost USD")
        return int(ExitCode.INTERRUPTED)
    return _as_rank(RunDir(path), deadline) if under_torchrun() else _run_or_launch(RunDir(path), deadline)


def _run_or_launch(run: "RunDir", deadline: "Deadline") -> int:
    """The attempt in this process, or in several that torchrun starts, where the recipe or the machine has several."""
    import torch

    from g4trainer.recipe import RecipeError, load_frozen
    from g4trainer.torchrun import Launcher, LaunchError, hosts_of, processes_on_this_host

    devices = torch.cuda.device_count()
    try:
        processes = processes_on_this_host(load_frozen(run.recipe), devices=devices)
    except LaunchError as error:
        return _usage(f"run: {error}")
    except RecipeError:  # the attempt itself says so, and writes it down
        processes = 1
    if processes > 1 or hosts_of() > 1:
        return Launcher(run.path, processes, started=STARTED).run()
    if devices > 1:  # the Trainer would divide a micro-batch among all GPUs that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    _quiet_imports()
    from g4trainer.train import run_attempt

    return int(run_attempt(run, deadline))


def _as_rank(run: "RunDir", deadline: "Deadline") -> int:
    """The part of an attempt that falls to this process among those of torchrun."""
    from g4trainer import lifeline
    from g4trainer.exits import ExitCode
    from g4trainer.planner import on_processes
    from g4trainer.ranks import Ranks
    from g4trainer.recipe import RecipeError, load_frozen
    from g4trainer.torchrun import exit_code_for_torchrun, launched

    connection, ranks = launched(), Ranks.of_environment()
    if connection is not None:
        lifeline.before_leaving.append(connection.end)
    if not ranks.leads:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        recipe = load_frozen(run.recipe).recipe
    except RecipeError:  # the attempt itself says so, and writes it down
        pass
    else:
        try:
            on_processes(recipe, ranks.size)
        except RecipeError as error:  # of this start, not of the run: another number of processes can go on
            return exit_code_for_torchrun(_usage(f"run: {error}"), connection)
    _quiet_imports()
    from g4trainer.train import run_attempt

    code = run_attempt(run, deadline, ranks)
    if code not in (ExitCode.DONE, ExitCode.INTERRUPTED):
        lifeline.exit_at_once(exit_code_for_torchrun(code, connection))
    ranks.leave()
    return exit_code_for_torchrun(code, connection)


def _indices(text: str) -> list[int]:
    """`0,3,7`; argparse tells of anything else."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 0:
        raise ValueError(text)
    return numbers


def _preflight(options: argparse.Namespace) -> int:
    if (options.path is None) == (options.recipe is None) or options.samples < 1:
        return _usage("preflight: write a PATH or --recipe RECIPE, and --samples of at least 1.")
    if options.set and options.recipe is None:
        return _usage("preflight: --set replaces values of a recipe; write --recipe RECIPE, or leave it out.")
    from g4trainer.exits import ModelError
    from g4trainer.recipe import RecipeError, load_frozen, load_recipe
    from g4trainer.rundir import RunDir

    _quiet_imports()
    from g4trainer import preflight
    from g4trainer.preflight_text import to_text

    path = Path(options.path or "")
    try:
        if options.recipe is not None:
            root = Path(os.environ.get("G4KIT_ROOT") or ".g4kit")
            subject = preflight.subject_of_recipe(load_recipe(options.recipe, options.set), root)
        elif options.path in preflight.SIZES:
            subject = preflight.subject_of_size(options.path)
        elif (path / "recipe.json").is_file():
            subject = preflight.subject_of_recipe(load_frozen(path / "recipe.json").recipe, RunDir(path).root)
        else:
            subject = preflight.subject_of_folder(path)
    except (RecipeError, ModelError) as error:
        return _usage(f"preflight: {error}")
    report = preflight.preflight(subject, samples=options.samples)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False) if options.json else to_text(report, columns)
    print(text, end="")
    return 0 if report.passed else 1


def _tiny(options: argparse.Namespace) -> int:
    if options.path.exists() and any(options.path.iterdir()):
        return _usage(f"tiny: {options.path} is not empty; write an empty or missing folder.")
    _quiet_imports()
    from g4trainer import tiny

    if options.what == "model":
        tiny.write_model(options.path)
    else:
        tiny.write_digits(options.path)
    return 0


def _predict(options: argparse.Namespace) -> int:
    if bool(options.images) == bool(options.request):
        return _usage("predict: write either IMAGE files, or --request FOLDER.")
    if not (options.path / "recipe.json").is_file():
        return _usage(f"predict: {options.path} has no recipe.json; write the path of a run directory.")
    _quiet_imports()
    from g4trainer.predict import Answer, answer_request, to_line
    from g4trainer.rundir import RunDir, write_json

    def show(answer: Answer) -> None:
        if not options.quiet:
            sys.stdout.buffer.write(to_line(answer))
            sys.stdout.buffer.flush()

    run = RunDir(options.path)
    if options.request:
        return int(answer_request(run, options.request, show=show))
    with tempfile.TemporaryDirectory(prefix="g4trainer-") as folder:
        images = [{"name": str(path), "file": str(path.absolute())} for path in options.images]
        document = {"images": images, "which": options.which, "prompt": options.prompt}
        write_json(Path(folder) / "request.json", document)
        return int(answer_request(run, Path(folder), show=show))


def _stage(options: argparse.Namespace) -> int:
    from g4trainer.hub import HubError, HubUnavailableError
    from g4trainer.recipe import STAGED_NAME
    from g4trainer.staging import FOLDERS, stage

    if not STAGED_NAME.fullmatch(options.name):
        return _usage(f"stage: got --name {options.name!r}; write letters, digits, dots, dashes and underscores.")
    root = Path(os.environ.get("G4KIT_ROOT") or ".g4kit")
    try:
        stage(options.kind, options.id, options.revision, root / FOLDERS[options.kind] / options.name, logging.info)
    except HubUnavailableError as error:
        print(f"g4trainer: stage: {error}", file=sys.stderr)
        return 1  # a retry may help
    except HubError as error:
        return _usage(f"stage: {error}")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from g4trainer.exits import ModelError
    from g4trainer.staged import staged_folder

    root = Path(os.environ.get("G4KIT_ROOT") or ".g4kit")
    under_root = root / options.folder
    folder = under_root if under_root.is_dir() else options.folder
    try:
        staged_folder(folder)
        _quiet_imports()
        from g4trainer.quantize import make_copy

        print(make_copy(folder), flush=True)
    except ModelError as error:
        return _usage(f"quantize: {str(error).rstrip('.')}; {error.remedy}")
    except OSError as error:  # a full disk, a lost mount: a retry may help
        print(f"g4trainer: quantize: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from g4trainer.deadline import Deadline, attempts_used_up
    from g4trainer.exits import ExitCode

    deadline = Deadline.from_environment(STARTED)
    deadline.listen()
    from g4trainer.rundir import RunDir
    from g4trainer.sweep import SweepError, chosen, task_index

    run, stated = RunDir(options.path), options.test_size
    if not run.results.is_file():
        return _usage(f"evaluate: {run.path} has no results.json; write the path of a run directory that is finished.")
    if options.shards < 1 or not (stated is None or stated == "all" or (stated.isdecimal() and int(stated))):
        return _usage('evaluate: write --shards of at least 1, and --test-size as a number or "all".')
    try:
        index = chosen(range(options.shards), options.only, task_index())
    except SweepError as error:
        return _usage(f"evaluate: {error}")
    used_up = attempts_used_up(os.environ)
    if used_up:
        print(f"{run.path.name}: nothing was done: {used_up}")
        return int(ExitCode.INTERRUPTED)
    _quiet_imports()
    from g4trainer.sharding import Shard, evaluate_shard

    size = int(stated) if stated and stated.isdecimal() else stated
    return int(evaluate_shard(run, Shard(index, options.shards), size, deadline))


def _export(options: argparse.Namespace) -> int:
    if not (options.path / "recipe.json").is_file():
        return _usage(f"export: {options.path} has no recipe.json; write the path of a run directory.")
    _quiet_imports()
    from g4trainer.export import export
    from g4trainer.rundir import RunDir

    return int(export(RunDir(options.path), options.out, onto=options.onto, comparing=not options.no_compare))


def _report(options: argparse.Namespace) -> int:
    from g4trainer.rundir import RunDir

    run = RunDir(options.path)
    if not run.results.is_file():
        return _usage(f"report: {run.path} has no results.json; write the path of a run directory that is finished.")
    _quiet_imports()
    from g4trainer.dataset import DataError
    from g4trainer.recipe import RecipeError
    from g4trainer.report import rewrite_report

    try:
        rewrite_report(run)
    except (DataError, RecipeError) as error:
        return _usage(f"report: {error}")
    print(run.report)
    return 0


def _selftest(options: argparse.Namespace) -> int:
    os.environ.setdefault("G4KIT_STATUS_INTERVAL_S", "1")  # its run directory is local
    _quiet_imports()
    from g4trainer.selftest import selftest

    return int(selftest())


def _quiet_imports() -> None:
    """Imports torch and its neighbours in the one order that works everywhere (see torchvision_operators)."""
    from g4trainer import torchvision_operators

    torchvision_operators.declare()
    with contextlib.redirect_stdout(sys.stderr):
        import bitsandbytes  # noqa: F401 prints what its CPU kernels lack
        import datasets
        import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _usage(message: str) -> int:
    print(f"g4trainer: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
