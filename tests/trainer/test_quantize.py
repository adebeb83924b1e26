"""Experts at NF4 against the same in full precision, and the copy of a base model that is at NF4 already."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors import safe_open
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from g4kit.cloud.base import crc32c_of_file
from g4trainer import nf4, quantize, tiny, vram
from g4trainer.__main__ import main as trainer
from g4trainer.exits import ModelError
from g4trainer.quantization import EXPERT_WEIGHTS, quantized_weights
from g4trainer.selftest import mark_staged
from g4trainer.staged import staged_folder
from trainer.making import CPU, adapted_model, base_model, collator, examples, fill_adapters, inputs_of, logits

LIKES: tuple[tiny.Like, ...] = ("E2B", "26B-A4B", "31B")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By shape, a tiny model as published; beside it, under "-nf4", its copy."""
    root = tmp_path_factory.mktemp("models")
    for like in LIKES:
        tiny.write_model(root / like, like=like)
        quantize.quantize(root / like, root / f"{like}-nf4", device=CPU)
    return {path.name: path for path in root.iterdir()}


def experts_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Gemma4TextExperts)]


def routed(module: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, module.hidden_dim, generator=generator)
    scores = torch.randn(tokens, module.num_experts, generator=generator).softmax(-1)
    weights, index = scores.topk(2, dim=-1)
    return hidden, index, weights


def test_the_experts_are_held_at_nf4_and_nothing_else_of_26b_changes(folders: dict[str, Path]) -> None:
    model = base_model(folders["26B-A4B"])
    held = quantized_weights(model)
    experts = [name for name in held if ".experts." in name]
    assert len(experts) == 2 * len(experts_of(model)) > 0
    for module in experts_of(model):
        for name in EXPERT_WEIGHTS:
            weight = getattr(module, name)
            assert weight.dtype == torch.uint8
            assert weight.quant_state.nested
            assert weight.quant_state.shape[0] == module.num_experts
    assert not any(name.endswith("router.proj.weight") for name in held)


def test_experts_at_nf4_compute_what_transformers_computes_of_the_dequantized_weights(folders: dict[str, Path]) -> None:
    ours = experts_of(base_model(folders["26B-A4B"]))[0]
    full = experts_of(base_model(folders["26B-A4B"], "none"))[0]
    for name in EXPERT_WEIGHTS:
        weight = getattr(ours, name)
        plain = nf4.whole(weight, weight.quant_state)
        assert plain.shape == getattr(full, name).shape
        setattr(full, name, torch.nn.Parameter(plain, requires_grad=False))
    hidden, index, weights = routed(ours, 40)
    one, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    output = ours(one, index, weights)
    expected = grouped_mm_experts_forward(full, other, index, weights)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert one.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_the_backward_pass_keeps_the_packed_experts_alone(folders: dict[str, Path]) -> None:
    module = experts_of(base_model(folders["26B-A4B"]))[0]
    hidden, index, weights = routed(module, 4)
    whole = module.gate_up_proj.quant_state.shape.numel() * 4
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(hidden.requires_grad_(), index, weights)
    assert module.gate_up_proj.nbytes in kept
    assert max(kept) < whole


def test_experts_at_nf4_stay_close_to_those_in_full_precision(folders: dict[str, Path]) -> None:
    """Of random weights, to which NF4 is least kind: the experts by themselves, and the output of a whole layer."""
    quantized, full = (base_model(folders["26B-A4B"], kind) for kind in ("nf4", "none"))
    inputs = routed(experts_of(full)[0], 64)
    alone = [experts_of(model)[0](*inputs).flatten() for model in (quantized, full)]
    assert torch.cosine_similarity(*alone, dim=0) > 0.97
    before = layer_output(full)
    for module, held in zip(experts_of(full), experts_of(quantized), strict=True):
        for name in EXPERT_WEIGHTS:
            setattr(module, name, getattr(held, name))
    assert torch.cosine_similarity(before, layer_output(full), dim=0) > 0.99


def layer_output(model: Any) -> torch.Tensor:
    """Of the first text layer, for a batch of examples, flattened."""
    kept: list[torch.Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda *event: kept.append(event[2]))
    logits(model, inputs_of(collator("26B-A4B")(examples())))
    hook.remove()
    return kept[0].flatten()


@pytest.mark.parametrize("like", LIKES)
def test_a_copy_at_nf4_is_loaded_as_what_would_be_quantized_while_loading(like: str, folders: dict[str, Path]) -> None:
    expected = quantized_weights(base_model(folders[like]))
    copied = base_model(folders[f"{like}-nf4"])
    found = quantized_weights(copied)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
        assert weight.quant_state.shape == expected[name].quant_state.shape
        for one, other in zip(nf4.tensors_of(weight), nf4.tensors_of(expected[name]), strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("like", LIKES)
def test_a_copy_at_nf4_gives_the_same_logits_and_gradients(like: tiny.Like, folders: dict[str, Path]) -> None:
    batch = collator(like)(examples())
    results = []
    for name in (like, f"{like}-nf4"):
        model = adapted_model(folders[name])
        fill_adapters(model)
        said = model(**inputs_of(batch), use_cache=False).logits
        said.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append((said.detach(), gradients))
    (one, some), (other, others) = results
    assert torch.equal(one, other)
    assert len(some) > 10
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_a_copy_is_smaller_and_has_everything_else_of_the_model(folders: dict[str, Path]) -> None:
    whole, copy = folders["31B"], folders["31B-nf4"]
    names = {path.name for path in copy.iterdir()}
    assert {path.name for path in whole.iterdir() if path.suffix != ".safetensors"} <= names
    index = json.loads((copy / quantize.INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in copy.glob("*.safetensors")}
    assert index["metadata"]["total_size"] < 0.8 * sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    described = json.loads((copy / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "bitsandbytes"
    assert described["bnb_4bit_use_double_quant"] is True


def test_a_copy_of_several_shards(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "SHARD_BYTES", 30_000)
    summary = quantize.quantize(folders["E2B"], tmp_path / "copy", device=CPU)
    shards = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == "model-00001.safetensors"
    index = json.loads((tmp_path / "copy" / quantize.INDEX).read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    tensors = 0
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            tensors += len(opened.keys())
    assert tensors == summary.tensors == len(index["weight_map"])
    assert quantized_weights(base_model(tmp_path / "copy"))


@pytest.fixture
def staged(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A staged model."""
    model = tmp_path / "models" / "tiny"
    shutil.copytree(folders["31B"], model)
    mark(model)
    return model


def mark(model: Path, revision: str = "1") -> None:
    """STAGED.json of a folder as it is."""
    mark_staged(model, source="a test")
    marker = json.loads((model / "STAGED.json").read_text())
    files = {name: entry for name, entry in marker["files"].items() if name != "STAGED.json"}
    (model / "STAGED.json").write_text(json.dumps(marker | {"revision": revision, "files": files}))


def copy_by_verb(folder: str | Path) -> int:
    return trainer(["quantize", str(folder)])


def test_the_verb_writes_the_copy_and_its_marker_last(
    staged: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    """Each file is made once, under its own name: a mounted bucket renames by copying."""
    monkeypatch.setenv("G4KIT_ROOT", str(staged.parents[1]))
    monkeypatch.setattr(Path, "rename", None)
    written: list[str] = []
    write_bytes = Path.write_bytes

    def noted(path: Path, data: bytes) -> int:
        written.append(path.name)
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", noted)
    assert copy_by_verb("models/tiny") == 0
    copy = staged.with_name("tiny-nf4")
    marker, base = (json.loads((folder / "STAGED.json").read_text()) for folder in (copy, staged))
    assert (marker["source"], marker["revision"]) == (f"{base['source']} at NF4", base["revision"])
    found = {path.name for path in copy.iterdir()}
    assert sorted(written) == sorted(marker["files"]) == sorted(found - {"STAGED.json"})
    assert len(found) > 5
    for name, entry in marker["files"].items():
        assert entry == {"size": (copy / name).stat().st_size, "crc32c": crc32c_of_file(copy / name)}
    assert staged_folder(copy) == copy
    weights = "model-00001.safetensors"
    assert (copy / weights).read_bytes() == (folders["31B-nf4"] / weights).read_bytes()


def test_a_finished_copy_is_left_and_another_revisions_is_made_again(staged: Path) -> None:
    copy = staged.with_name("tiny-nf4")
    assert copy_by_verb(staged) == 0
    first = (copy / "model-00001.safetensors").stat().st_mtime_ns
    assert copy_by_verb(staged) == 0
    assert (copy / "model-00001.safetensors").stat().st_mtime_ns == first
    mark(staged, "another")
    (copy / "model-00002.safetensors").write_bytes(b"of a larger model")
    assert copy_by_verb(staged) == 0
    assert json.loads((copy / "STAGED.json").read_text())["revision"] == "another"
    assert [path.name for path in copy.glob("*.safetensors")] == ["model-00001.safetensors"]


def test_what_a_killed_attempt_left_is_written_again(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, data: bytes) -> dict[str, object]:
        path.write_bytes(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quantize, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            copy_by_verb(staged)
    copy = staged.with_name("tiny-nf4")
    assert [path.name for path in copy.iterdir()] == ["model-00001.safetensors"]
    assert copy_by_verb(staged) == 0
    assert staged_folder(copy) == copy


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "STAGED.json").unlink(), "not staged, for it has no STAGED.json; stage it with"),
        (lambda model: (model / "config.json").write_text("{}"), "config.json is missing or not of"),
        (lambda model: foreign(model, "photo.png", "x"), "holds files that no copy has: photo.png; move "),
        (lambda model: foreign(model, "STAGED.json", "{"), "STAGED.json: damaged"),
        (
            lambda model: foreign(model, "STAGED.json", '{"source": "/x", "revision": "1", "files": {}}'),
            "tiny-nf4: holds /x, and runs may rely on it; move ",
        ),
        (lambda model: quantized_already(model), "its weights are quantized already; use it as it is."),
    ],
)
def test_the_verb_refuses_in_one_line(
    staged: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    damage(staged)
    assert copy_by_verb(staged) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("g4trainer: quantize: ")
    assert said.count("\n") == 1


def foreign(model: Path, name: str, text: str) -> None:
    copy = model.with_name(f"{model.name}-nf4")
    copy.mkdir()
    (copy / name).write_text(text)


def quantized_already(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    mark(model)


def test_what_cannot_be_copied_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="quantized already"):
        quantize.quantize(folders["31B-nf4"], tmp_path / "again")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ModelError, match="something is there already"):
        quantize.quantize(folders["31B"], tmp_path / "full")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((folders["31B"] / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no .*safetensors file"):
        quantize.quantize(tmp_path / "empty", tmp_path / "copy")


def test_a_model_that_lacks_a_weight_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folders["E2B"].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = next(broken.glob("*.safetensors"))
    tensors = load_file(weights)
    lost = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        quantize.quantize(broken, tmp_path / "copy")


@pytest.mark.parametrize("shape", [(96, 4304), (4, 64, 32), (256, 48), (8, 10), (3, 5)], ids=str)
def test_rows_that_end_within_a_block_have_their_own_scales(shape: tuple[int, ...]) -> None:
    original = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(original, quant_type="nf4", blocksize=vram.NF4_BLOCK)
    pairs = packed.flatten().int()
    codes = state.code[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: original.numel()]]
    expected = codes * state.absmax.repeat_interleave(vram.NF4_BLOCK)[: original.numel()]
    found = nf4.whole(packed, state)
    torch.testing.assert_close(found, expected.view(shape), rtol=1e-6, atol=1e-7)
    assert (found - original).norm() / original.norm() < 0.12


def test_dequantized_weights_and_products_are_those_of_bitsandbytes(folders: dict[str, Path]) -> None:
    """Off CUDA; the kernel itself is compared with bitsandbytes by benchmarks/step_time.py, on a card."""
    model = base_model(folders["31B"])
    layer = next(module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))
    weight = layer.weight
    assert isinstance(weight, Params4bit)
    shape = tuple(weight.quant_state.shape)
    ours = nf4.dequantize(*nf4.tensors_of(weight), shape=shape, dtype=torch.float32)
    assert torch.equal(ours, bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state))
    x = torch.randn(3, 5, shape[1], requires_grad=True)
    y = x.detach().clone().requires_grad_()
    product, expected = nf4._Product.apply(x, shape, *nf4.tensors_of(weight)), layer(y)
    torch.testing.assert_close(product, expected)
    product.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad)
