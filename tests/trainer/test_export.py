"""Merged models: the base's names, in bf16, the logits of base and adapter, and nothing that looks whole too early."""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bitsandbytes.functional import quantize_4bit
from transformers import AutoConfig

from g4trainer import export as exports
from g4trainer import merging, tiny
from g4trainer import recipe as recipes
from g4trainer.checkpoint import write_hashed
from g4trainer.collator import IGNORED
from g4trainer.dataset import Example, load_splits
from g4trainer.evaluate import generator_of
from g4trainer.exits import ExitCode, ModelError
from g4trainer.merging import BaseWeights, deltas, plan_shards, shard_blocks, weights_at_nf4
from g4trainer.model import adapter_tensors
from g4trainer.model_card import advice
from g4trainer.recipe import load_frozen
from g4trainer.rundir import RunDir, manifest, read_json, write_json
from g4trainer.verifying import MismatchError
from trainer.conftest import Folders
from trainer.making import adapted_model, base_model, collator, examples, fill_adapters, logits, relative_error

LIKES: tuple[tiny.Like, ...] = ("E2B", "26B-A4B", "31B")
RECIPE = recipes.Recipe.model_validate(
    {
        "name": "merged",
        "model": {"id": "tiny-gemma4", "max_soft_tokens": 70},
        "data": {"dataset": "digits"},
        "lora": {"r": 8, "lora_alpha": 16},
    }
)


def merge(folder: Path, tensors: dict[str, torch.Tensor], out: Path, *, onto: str = "bf16") -> dict[str, torch.Tensor]:
    """Merges in shards of 100 kB and makes the folder loadable; returns its tensors."""
    config = read_json(folder / "config.json")
    as_trained = weights_at_nf4(config, RECIPE.model) if onto == "nf4" else frozenset[str]()
    with BaseWeights(folder, as_trained=as_trained) as base:
        changes = deltas(config, RECIPE, tensors)
        shards = plan_shards(base, 100_000)
        out.mkdir()
        for name, names in zip(merging.shard_names(len(shards)), shards, strict=True):
            (out / name).write_bytes(b"".join(shard_blocks(base, names, changes)))
        (out / "model.safetensors.index.json").write_text(json.dumps(merging.index_of(base, shards)))
    write_json(out / "config.json", exports.merged_config(config, tuple(changes)))
    assert len(shards) > 3
    return {k: v for path in out.glob("*.safetensors") for k, v in safetensors.torch.load_file(path).items()}


def in_bf16(folder: Path, copy: Path) -> Path:
    """The model with weights that bf16 holds, as the published ones are."""
    shutil.copytree(folder, copy)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    safetensors.torch.save_file(rounded, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def answer_logits(model: Any, like: tiny.Like) -> torch.Tensor:
    """Logits that predict the answers' tokens: (tokens, vocabulary)."""
    batch = collator(like)(examples())
    rows = torch.arange(len(batch["input_ids"]))[:, None]
    return logits(model, batch)[rows, batch["logits_to_keep"]][batch["kept_labels"] != IGNORED]


@pytest.mark.parametrize("like", LIKES)
def test_the_merged_model_says_what_base_and_adapter_say(like: tiny.Like, tiny_folder: Folders, tmp_path: Path) -> None:
    folder = in_bf16(tiny_folder(like), tmp_path / "base")
    adapted = adapted_model(folder, quantization="none", lora_alpha=16)
    fill_adapters(adapted, std=0.02)
    merged = merge(folder, adapter_tensors(adapted), tmp_path / "merged")
    original = safetensors.torch.load_file(folder / "model.safetensors")
    assert merged.keys() == original.keys()
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in original.items()}
    expected = answer_logits(adapted, like)
    plain, found = (answer_logits(base_model(path, "none"), like) for path in (folder, tmp_path / "merged"))
    assert relative_error(plain, expected) > 0.25, "the adapter changes what is said"
    assert relative_error(found, expected) < 0.06, "no more than bf16 rounds away in a model of random weights"
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    exact = answer_logits(adapted.merge_and_unload(), like)
    assert relative_error(exact, expected) < 1e-4


def test_weights_are_merged_in_fp32_and_rounded_once(tiny_folder: Folders, tmp_path: Path) -> None:
    """Also inside a clipped linear, whose weight is that of its `.linear`; what is not adapted is rounded alone."""
    folder = tiny_folder("E2B")
    adapted = adapted_model(folder, quantization="none", lora_alpha=16)
    fill_adapters(adapted)
    tensors = adapter_tensors(adapted)
    merged = merge(folder, tensors, tmp_path / "merged")
    original = safetensors.torch.load_file(folder / "model.safetensors")
    changed = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in tensors if "_A." in name
    }
    assert any(name.endswith(".linear") for name in changed)
    for name, weight in original.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if name.removesuffix(".weight") in changed:
            expected = weight + 2.0 * (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"])
        assert torch.equal(merged[name], expected.to(torch.bfloat16)), name


@pytest.mark.parametrize("like", ["E2B", "26B-A4B"])
def test_merged_onto_nf4_it_says_what_the_run_said(like: tiny.Like, tiny_folder: Folders, tmp_path: Path) -> None:
    folder = in_bf16(tiny_folder(like), tmp_path / "base")
    adapted = adapted_model(folder, lora_alpha=16)
    fill_adapters(adapted, std=0.02)
    expected = answer_logits(adapted, like)
    errors = {}
    for onto in ("nf4", "bf16"):
        merge(folder, adapter_tensors(adapted), tmp_path / onto, onto=onto)
        errors[onto] = relative_error(answer_logits(base_model(tmp_path / onto, "none"), like), expected)
    assert errors["nf4"] < 0.08
    assert errors["bf16"] > 3 * errors["nf4"]


def test_a_copy_at_nf4_is_dequantized(tiny_folder: Folders, tmp_path: Path) -> None:
    """Tensors packed and named as bitsandbytes writes them give the weights that a run has."""
    folder, copy = tiny_folder("E2B"), tmp_path / "copy"
    copy.mkdir()
    packed = {}
    names = weights_at_nf4(read_json(folder / "config.json"), RECIPE.model)
    for name, weight in safetensors.torch.load_file(folder / "model.safetensors").items():
        packed[name] = weight
        if name in names:
            packed[name], state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            packed |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    safetensors.torch.save_file(packed, copy / "model.safetensors")
    with BaseWeights(copy) as stored, BaseWeights(folder, as_trained=names) as rounded:
        assert set(stored.names) == set(rounded.names)
        assert stored.quantized == names
        for name in stored.names:
            assert stored.shape(name) == rounded.shape(name)
            assert torch.equal(stored.read(name).float(), rounded.read(name).float()), name


def test_a_large_tensor_is_copied_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(1000, 64)
    safetensors.torch.save_file({"table": table, "scalar": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(merging, "CHUNK_BYTES", 10_000)
    with BaseWeights(tmp_path) as base:
        parts = list(base.chunks("table"))
        assert max(part.nbytes for part in parts) <= 10_000
        assert torch.equal(torch.cat(parts), table)
        blocks = b"".join(shard_blocks(base, list(base.names), {}))
    read = safetensors.torch.load(blocks)
    assert torch.equal(read["table"], table.to(torch.bfloat16))
    assert read["scalar"].shape == ()


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "merged"
    exports.export_merged(RunDir(finished), out, shard_bytes=300_000)
    return out


def test_what_is_exported_is_whole(exported: Path, finished: Path) -> None:
    document = read_json(exported / "EXPORTED.json")
    assert manifest(exported, leave_out=frozenset({"EXPORTED.json"})) == document["files"]
    names = {path.name for path in exported.iterdir()}
    base = RunDir(finished).root / "models" / "tiny-gemma4"
    kept = {path.name for path in base.iterdir()} - {"model.safetensors", "STAGED.json"}
    assert kept | {"README.md", "EXPORTED.json", "model.safetensors.index.json"} <= names
    assert "EXPORTING.json" not in names
    index = read_json(exported / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(safetensors.torch.load_file(base / "model.safetensors"))
    assert set(index["weight_map"].values()) == {path.name for path in exported.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == document["weight_bytes"]
    config = AutoConfig.from_pretrained(exported)
    assert getattr(config, "quantization_config", None) is None
    assert {config.dtype, config.text_config.dtype, config.vision_config.dtype} == {torch.bfloat16}


def test_what_the_comparison_found_is_reported(exported: Path) -> None:
    document = read_json(exported / "EXPORTED.json")
    found = document["verification"]
    assert 0 < found["relative_error"] < found["tolerance"]
    assert found["positions"] >= found["samples"] == 6
    assert 0 <= found["same_answer"] <= 1
    card = (exported / "README.md").read_text()
    assert f"{found['relative_error']:.4f} of their norm" in card
    assert f"{found['same_answer']:.1%} get the answer that the run's evaluation" in card
    assert "base_model: tiny-gemma4" in card
    assert "| accuracy | " in card
    assert "vllm serve ." in card


def test_advice_is_given_where_answers_differ(exported: Path) -> None:
    document = read_json(exported / "EXPORTED.json")
    alike, other = (document | {"verification": document["verification"] | {"same_answer": n}} for n in (0.95, 0.6))
    assert advice(alike) == ""
    assert advice(other).startswith("40% of the answers are not the run's")
    assert advice(other | {"base": document["base"] | {"dequantized": 50}}) == ""


def test_the_cards_python_answers_as_the_evaluation_would(
    exported: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(finished)
    recipe = load_frozen(run.recipe).recipe
    splits = load_splits(run.root / "datasets" / "digits", recipe.data, seed=recipe.training.seed)
    sample: Example = splits.test[0]
    for path in exported.iterdir():
        (tmp_path / path.name).symlink_to(path)
    sample.open_images()[0].save(tmp_path / "image.jpg", format="PNG")
    [code] = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"bfloat16"', '"float32"'), {})  # noqa: S102 the bf16 of a CPU rounds otherwise than the test's
    said = capsys.readouterr().out.strip()
    generator = generator_of(base_model(exported, "none"), collator(), splits.labels, recipe.evaluation)
    generator.max_new_tokens = 64
    assert said == generator.answer([sample])[0]


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Iterator[RunDir]:
    """A run directory that may be changed, under the same root."""
    copy = finished.parent / f"copy-{tmp_path.name.replace('_', '-')}"
    shutil.copytree(finished, copy)
    yield RunDir(copy)
    shutil.rmtree(copy)


def test_an_interrupted_export_looks_unfinished_and_goes_on(
    finished: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, written = write_hashed, list[Path]()

    def stop(path: Path, blocks: Any) -> dict[str, Any]:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(next(blocks))
            raise KeyboardInterrupt
        return genuine(path, blocks)

    monkeypatch.setattr(exports, "write_hashed", stop)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        exports.export_merged(RunDir(finished), out, shard_bytes=300_000)
    assert {path.name for path in out.iterdir()} == {"EXPORTING.json", *(path.name for path in written)}
    monkeypatch.undo()
    exports.export_merged(RunDir(finished), out, shard_bytes=300_000, comparing=False)
    assert read_json(out / "EXPORTED.json")["verification"] == {"skipped": "it was left out on request"}
    for name in [path.name for path in exported.glob("*.safetensors")]:
        assert (out / name).read_bytes() == (exported / name).read_bytes()


def test_a_merge_that_went_wrong_is_not_exported(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> dict[str, merging.Delta]:
        return {name: functools.partial(negated, delta) for name, delta in deltas(*arguments).items()}

    def negated(delta: merging.Delta) -> torch.Tensor:
        return -delta()

    monkeypatch.setattr(exports, "deltas", wrong)
    with pytest.raises(MismatchError, match="differ from those of base and adapter"):
        exports.export_merged(RunDir(finished), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"EXPORTING.json", "model.safetensors"}


def test_a_run_without_an_adapter_is_refused(copied: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(copied.adapter)
    assert exports.export(copied, tmp_path / "out") is ExitCode.BAD_INPUT
    assert "has no adapter" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_the_exports_own_is_left_alone(finished: Path, exported: Path, tmp_path: Path) -> None:
    run = RunDir(finished)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not empty"):
        exports.export_merged(run, tmp_path)
    with pytest.raises(ModelError, match="holds another export"):
        exports.export_merged(run, exported, onto="nf4")
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    assert exports.export_merged(run, exported) == read_json(exported / "EXPORTED.json")
    assert {path.name: path.stat().st_mtime_ns for path in exported.iterdir()} == before
