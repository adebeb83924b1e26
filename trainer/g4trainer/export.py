"""A run's adapter merged into its base model: a folder that transformers and vLLM load without PEFT.

In this order, so that a folder that was left half-written never looks whole:

    EXPORTING.json              whose folder this is
    model-*.safetensors         bf16, about 5 GB each, written as streams
    (loaded and compared)
    tokenizer, processor, chat template, README.md, the index, config.json
    EXPORTED.json               every file with its size and SHA-256, and what the comparison found
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from g4trainer.artifacts import read_adapter
from g4trainer.checkpoint import write_hashed
from g4trainer.exits import ExitCode, ModelError
from g4trainer.export_folder import EXPORTED, EXPORTING, FolderTakenError, begin, finish
from g4trainer.merging import (
    SHARD_BYTES,
    BaseWeights,
    deltas,
    index_of,
    plan_shards,
    shard_blocks,
    shard_names,
    weights_at_nf4,
)
from g4trainer.metrics import now
from g4trainer.model import check_architecture
from g4trainer.model_card import advice, checked, model_card
from g4trainer.outcome import KNOWN, NOT_WRITABLE, failure_of
from g4trainer.predict import labels_of
from g4trainer.recipe import FrozenRecipe, load_frozen
from g4trainer.rundir import RunDir, file_entry, read_json, to_json, write_bytes, write_json
from g4trainer.staged import NF4_COPY, staged_folder
from g4trainer.verifying import obstacle, verify

CONFIG, INDEX, CARD = "config.json", "model.safetensors.index.json", "README.md"
MADE_HERE = frozenset({CONFIG, INDEX, CARD, "STAGED.json", EXPORTING, EXPORTED, ".gitattributes"})

log = logging.getLogger(__name__)
Onto = Literal["bf16", "nf4"]


def export(run: RunDir, out: Path, *, onto: Onto = "bf16", comparing: bool = True) -> ExitCode:
    """Exports a run and returns how it ended; every known cause is logged with what to do about it."""
    try:
        export_merged(run, out, onto=onto, comparing=comparing)
    except FileExistsError as error:
        log.error("%s: appeared meanwhile: another export writes there. To mend it: wait for that one.", error.filename)
        return ExitCode.FAILED
    except (*KNOWN, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_WRITABLE:
            raise
        failure = failure_of(error)
        log.error("%s To mend it: %s", failure.reason, failure.remedy)
        return failure.code
    return ExitCode.DONE


def export_merged(
    run: RunDir, out: Path, *, onto: Onto = "bf16", comparing: bool = True, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Writes the folder and returns EXPORTED.json; where it is there already, it is returned as it is.

    out: a folder that is empty, missing, or left by an export of this run that was interrupted.
    onto: the base weights that the adapter is merged into: as published, or as the run had them, at NF4.
    Raises ModelError where the run has no adapter or the folder is another's, MismatchError, OSError.
    """
    frozen = load_frozen(run.recipe)
    adapter = read_adapter(run)
    if adapter is None:
        raise ModelError(f"{run.run_id}: has no adapter.", "wait for the end of its training, or resume the run.")
    folder = base_folder(run.root, frozen.recipe.model.id)
    original = check_architecture(folder)
    done = _begin(out, run.run_id, onto)
    if done is not None:
        log.info("%s: exported already", out)
        return done
    rounded = weights_at_nf4(original, frozen.recipe.model) if onto == "nf4" else frozenset()
    with BaseWeights(folder, as_trained=rounded) as base:
        if base.quantized:
            log.warning("%s: only the NF4 copy is staged: its weights are dequantized and merged", folder.name)
        merged = _write_shards(base, original, frozen, adapter[0], out, shard_bytes)
        config = merged_config(original, base.names)
        dequantized = len(base.quantized | base.as_trained)
    companions = {path.name: path for path in folder.iterdir() if path.is_file() and _belongs(path)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = obstacle(folder, device) if comparing else "it was left out on request"
    comparison: dict[str, Any] = {"skipped": why}
    if why is None:
        view = {name: out / name for name in merged.files} | companions
        with _loadable(view, config, merged.index) as loadable:
            found = verify(
                run, frozen, loadable, folder, adapter[0], as_trained=dequantized > 0 or onto == "nf4", device=device
            )
        comparison = found.to_json()
    document = _document(run, frozen, folder, merged, onto, dequantized, comparison)
    log.info("%s", " ".join(filter(None, (checked(comparison, dequantized=dequantized), advice(document)))))
    for name, path in companions.items():
        write_bytes(out / name, path.read_bytes())
    write_bytes(out / CARD, _card(run, frozen, folder, document).encode())
    if len(merged.files) > 1:
        write_json(out / INDEX, merged.index)
    write_bytes(out / CONFIG, to_json(config))
    made = sorted(path.name for path in out.iterdir() if path.name not in {EXPORTING, *merged.files})
    document["files"] = merged.files | {name: file_entry(out / name) for name in made}
    finish(out, document)
    return document


def base_folder(root: Path, model_id: str) -> Path:
    """The base model's staged folder: the unquantized one, else its NF4 copy. Raises ModelError without either."""
    try:
        return staged_folder(root / "models" / model_id)
    except ModelError:
        if (root / "models" / f"{model_id}{NF4_COPY}" / "STAGED.json").exists():
            return staged_folder(root / "models" / f"{model_id}{NF4_COPY}")
        raise


def merged_config(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The base model's config.json for bf16 weights: nothing quantized, and no audio tower where there are no weights.

    names: of the tensors.
    """
    merged: dict[str, Any] = _in_bf16({key: value for key, value in config.items() if key != "quantization_config"})
    if not any(".audio_tower." in name for name in names):
        merged["audio_config"] = None
    return merged | {"dtype": "bfloat16"}


def _in_bf16(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: "bfloat16" if key in ("dtype", "torch_dtype") and part else _in_bf16(part) for key, part in value.items()
    }


def _begin(out: Path, run_id: str, onto: Onto) -> dict[str, Any] | None:
    """Makes the folder this export's own, empty; EXPORTED.json where the same is there, whole. Raises ModelError."""
    try:
        done = begin(out, run_id, kind="merged", weights=onto)
    except FolderTakenError as error:
        raise ModelError(f"{out}: {error}.", "name a folder that is empty or missing.") from error
    if done is None:
        for path in out.iterdir():
            if path.is_file() and path.name != EXPORTING:
                path.unlink()
    return done


@dataclass(frozen=True)
class _Shards:
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 by name."""
    index: dict[str, Any]


def _write_shards(
    base: BaseWeights,
    config: dict[str, Any],
    frozen: FrozenRecipe,
    tensors: dict[str, torch.Tensor],
    out: Path,
    shard_bytes: int,
) -> _Shards:
    """Raises ModelError where the adapter is of another model."""
    changes = deltas(config, frozen.recipe, tensors)
    unknown = sorted(changes.keys() - set(base.names))
    if unknown:
        raise ModelError(f"the base model has no tensor {unknown[0]}, which the adapter changes")
    shards = plan_shards(base, shard_bytes)
    files = {}
    for name, names in zip(shard_names(len(shards)), shards, strict=True):
        files[name] = write_hashed(out / name, shard_blocks(base, names, changes))
        log.info("%s: %d tensors, %.1f MB", name, len(names), files[name]["size"] / 1e6)
    return _Shards(files, index_of(base, shards))


@contextlib.contextmanager
def _loadable(files: Mapping[str, Path], config: dict[str, Any], index: dict[str, Any]) -> Iterator[Path]:
    """A folder that loads, of links to these files: in the exported one, what makes it loadable comes last."""
    with tempfile.TemporaryDirectory(prefix="g4trainer-") as name:
        view = Path(name)
        for file, target in files.items():
            (view / file).symlink_to(target.resolve())
        write_bytes(view / CONFIG, to_json(config))
        if len(set(index["weight_map"].values())) > 1:
            write_bytes(view / INDEX, to_json(index))
        yield view


def _document(
    run: RunDir,
    frozen: FrozenRecipe,
    folder: Path,
    merged: _Shards,
    onto: Onto,
    dequantized: int,
    comparison: dict[str, Any],
) -> dict[str, Any]:
    """EXPORTED.json without its files."""
    source = read_json(folder / "STAGED.json")
    base = {"id": frozen.recipe.model.id, "source": source.get("source"), "revision": source.get("revision")}
    return {
        "format": "merged",
        "run_id": run.run_id,
        "created_at": now(),
        "base": base | {"weights": onto, "dequantized": dequantized},
        "weight_bytes": merged.index["metadata"]["total_size"],
        "verification": comparison,
    }


def _card(run: RunDir, frozen: FrozenRecipe, folder: Path, document: dict[str, Any]) -> str:
    data = frozen.recipe.data
    results = read_json(run.results) if run.results.exists() else {}
    prompt = "Your question"
    if data.task == "classify":
        prompt = data.prompt.replace("{labels}", ", ".join(labels_of(run)))
    return model_card(frozen, results, document, _text(folder / CARD), _text(folder / "LICENSE"), prompt=prompt)


def _belongs(path: Path) -> bool:
    """Whether a file of the base model's folder goes with the weights: tokenizer, processor, template, license."""
    return path.suffix != ".safetensors" and path.name not in MADE_HERE and not path.name.startswith(".")


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
