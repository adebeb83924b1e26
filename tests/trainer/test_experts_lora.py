"""LoRA on the experts of 26B-A4B: the arithmetic, PEFT's names, what is kept, what is merged and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache
from transformers import AutoModelForMultimodalLM

from g4trainer import experts, gemma, lora_targets, merging, nf4, tiny, vram
from g4trainer import recipe as recipes
from g4trainer.compiled import compile_layers
from g4trainer.exits import ModelError
from g4trainer.experts import ExpertsLora
from g4trainer.merging import deltas
from g4trainer.model import adapted_modules, adapter_tensors, attach_lora, load_structure
from g4trainer.preflight import preflight, subject_of_size
from trainer.conftest import Folders
from trainer.making import (
    adapted_model,
    base_model,
    collator,
    examples,
    fill_adapters,
    inputs_of,
    logits,
    relative_error,
    settings,
)

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
needs_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's code for a CPU is C++")
RANK = 3  # no multiple of what a grouped product takes: it is filled up


@pytest.fixture(scope="module")
def folder(tiny_folder: Folders) -> Path:
    return tiny_folder("26B-A4B")


@pytest.fixture(scope="module", params=["nf4", "none"])
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    """With filled adapters on every linear layer and on the experts."""
    made = adapted_model(folder, quantization=request.param, r=RANK, lora_alpha=2 * RANK, target_parameters=EXPERTS)
    fill_adapters(made, std=0.2)
    return made


def recipe(**lora: Any) -> recipes.Recipe:
    document = {"name": "x", "model": {"id": "tiny-gemma4", "max_soft_tokens": 70}, "data": {"dataset": "digits"}}
    return recipes.parse_recipe({**document, "lora": {"r": RANK, "lora_alpha": 2 * RANK, **lora}}, source="test")


def wrapper_of(model: Any, layer: int = 0) -> Any:
    """The outer of the two wrappers of a layer's experts."""
    return model.get_base_model().model.language_model.layers[layer].experts


def factors_of(wrapper: Any) -> dict[str, torch.Tensor]:
    """Leaves that train, by parameter and factor."""
    found = {}
    while isinstance(wrapper, ExpertsLora):
        found[f"{wrapper.parameter_name}.A"] = wrapper.lora_A["default"].weight
        found[f"{wrapper.parameter_name}.B"] = wrapper.lora_B["default"].weight
        wrapper = wrapper.base_layer
    return found


def weights_of(experts: Any) -> dict[str, torch.Tensor]:
    """The base weights in fp32, dequantized where they are packed."""
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)
        state = getattr(weight, "quant_state", None)
        found[name] = weight if state is None else nf4.whole(weight.data, state).float()
    return found


def routed(count: int, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, and for each token two of the first three experts: the last one gets none."""
    generator = torch.Generator().manual_seed(3)
    scores, index = torch.topk(torch.rand(tokens, count - 1, generator=generator), 2)
    return torch.randn(tokens, 64, generator=generator), index, scores


def dense(
    experts: Any, weights: dict[str, torch.Tensor], x: torch.Tensor, index: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """One token and one expert at a time."""
    rows = []
    for token, row in enumerate(x):
        total = torch.zeros_like(row)
        for expert, part in zip(index[token].tolist(), share[token], strict=True):
            gate, up = F.linear(row, weights["gate_up_proj"][expert]).chunk(2)
            total = total + part * F.linear(experts.act_fn(gate) * up, weights["down_proj"][expert])
        rows.append(total)
    return torch.stack(rows)


def adapted_by_hand(weights: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + 2 B A of each expert, from PEFT's layout: A (experts x r, inputs), B (outputs, r x experts)."""
    found = {}
    for name, weight in weights.items():
        low = leaves[f"{name}.A"].reshape(len(weight), RANK, -1)
        high = leaves[f"{name}.B"].reshape(weight.shape[1], RANK, len(weight))
        found[name] = weight + 2 * torch.einsum("ore,eri->eoi", high, low)
    return found


# The arithmetic


def test_output_and_gradients_are_those_of_the_changed_weights(model: Any) -> None:
    wrapper = wrapper_of(model)
    experts, leaves = wrapper.get_base_layer(), factors_of(wrapper)
    assert leaves.keys() == {f"{name}.{factor}" for name in ("gate_up_proj", "down_proj") for factor in "AB"}
    x, index, share = routed(experts.num_experts)
    outputs, gradients = [], []
    for through in (wrapper, lambda *a: dense(experts, adapted_by_hand(weights_of(experts), leaves), *a)):
        inputs = [x.clone().requires_grad_(), share.clone().requires_grad_()]
        output = through(inputs[0], index, inputs[1])
        outputs.append(output)
        gradients.append(torch.autograd.grad((output**3).sum(), [*inputs, *leaves.values()]))
    assert relative_error(*outputs) < 1e-5
    for name, found, expected in zip(["x", "share", *leaves], *gradients, strict=True):
        assert expected.norm() > 0, name
        assert relative_error(found, expected) < 1e-5, name
    plain = dense(experts, weights_of(experts), x, index, share)
    assert relative_error(outputs[0], plain) > 0.1, "the adapters must matter"


def test_in_bf16_a_rank_is_filled_up_and_nothing_else_changes(folder: Path) -> None:
    model = adapted_model(folder, quantization="none", r=RANK, target_parameters=EXPERTS)
    fill_adapters(model, std=0.2)
    wrapper = wrapper_of(model)
    x, index, share = routed(wrapper.num_experts)
    exact = wrapper(x, index, share)
    wrapper.get_base_layer().to(torch.bfloat16)
    rounded = wrapper(x.bfloat16(), index, share)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded.float(), exact) < 0.02


def test_nothing_of_a_whole_weight_s_size_is_kept(model: Any) -> None:
    wrapper = wrapper_of(model)
    whole = min(weight.numel() for weight in weights_of(wrapper.get_base_layer()).values())
    parameters = {parameter.data_ptr() for parameter in wrapper.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x, index, share = routed(wrapper.num_experts, tokens=8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wrapper(x.requires_grad_(), index, share)
    others = [tensor for tensor in kept if tensor.data_ptr() not in parameters]
    assert len(others) > 4
    assert max(tensor.numel() for tensor in others) < whole


def test_without_its_adapters_it_is_the_base_model(model: Any, folder: Path) -> None:
    kind = "nf4" if getattr(wrapper_of(model).get_base_layer().down_proj, "quant_state", None) else "none"
    batch = collator("26B-A4B")(examples()[:2])
    with model.disable_adapter():
        plain = logits(model, batch)
    assert torch.equal(plain, logits(base_model(folder, kind), batch))
    assert relative_error(logits(model, batch), plain) > 0.05


def test_a_compiled_layer_says_and_learns_the_same(folder: Path) -> None:
    torch.compiler.reset()
    model = adapted_model(folder, r=RANK, target_parameters=EXPERTS)
    fill_adapters(model)
    model.train()
    batch = inputs_of(collator("26B-A4B")(examples()[:2]))
    leaves = factors_of(wrapper_of(model))
    found = []
    for compiling in (False, True):
        if compiling:
            torch._dynamo.utils.counters.clear()
            compile_layers(model.get_base_model().model.language_model.layers[0], backend="aot_eager")
        said = model(**batch, use_cache=False).logits
        found.append([said, *torch.autograd.grad(said.pow(2).mean(), list(leaves.values()))])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something must have been compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    for plain, compiled in zip(*found, strict=True):
        assert relative_error(compiled, plain) < 1e-4


def test_inductor_leaves_the_operands_of_a_grouped_product_as_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 it calls the product itself, which refuses a matrix none of whose last two strides is 1, in both passes.

    What it fuses between products would be compiled for a quarter of a minute, and does nothing here.
    """
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)
    ends = torch.tensor([8, 8, 20, 24, 32], dtype=torch.int32)
    weight = torch.zeros(5, 16, 24, dtype=torch.bfloat16)
    rows = torch.zeros(32, 24, dtype=torch.bfloat16, requires_grad=True)
    low = torch.zeros(5 * RANK, 24, requires_grad=True)
    high = torch.zeros(16, RANK * 5, requires_grad=True)

    def product(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        down, up = low.unflatten(0, (5, RANK)), high.unflatten(1, (RANK, 5)).permute(2, 0, 1)
        return experts._product(rows, weight, ends, experts.Factors(down, up, 2.0))

    monkeypatch.setenv("CC", "cc")
    compile_layers(torch.nn.Identity(), backend="inductor")  # for what it sets, whatever the layers are
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with fresh_cache():
        torch.compile(product, dynamic=False, fullgraph=True)(rows, low, high).sum().backward()
    assert torch._dynamo.utils.counters["aten_mm_info"]["aten._grouped_mm.default"] == 3 + 5


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("none", 8), ("nf4", RANK)])
def test_what_inductor_makes_of_whole_experts_says_and_learns_the_same(folder: Path, kind: str, rank: int) -> None:
    model = adapted_model(folder, quantization=kind, r=rank, target_parameters=EXPERTS)
    fill_adapters(model, std=0.2)
    wrapper = wrapper_of(model)
    base = wrapper.get_base_layer().to(torch.bfloat16)
    if kind == "nf4":
        for weight in (base.gate_up_proj, base.down_proj):
            weight.quant_state.dtype = torch.bfloat16
    x, index, share = routed(wrapper.num_experts)
    leaves = [x.bfloat16().requires_grad_(), share.bfloat16().requires_grad_(), *factors_of(wrapper).values()]
    compile_layers(torch.nn.Identity(), backend="inductor")
    says_and_learns_the_same(lambda x, share, *_: wrapper(x, index, share), leaves)


def says_and_learns_the_same(work: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Compiled by inductor into one graph, a function of the leaves has the same result and gradients."""
    torch.compiler.reset()
    found = []
    for through in (work, torch.compile(work, dynamic=False, fullgraph=True)):
        output = through(*leaves)
        found.append([output, *torch.autograd.grad(output.float().pow(2).sum(), leaves)])
    for plain, compiled in zip(*found, strict=True):
        assert plain.norm() > 0
        assert relative_error(compiled.detach().float(), plain.detach().float()) < 0.02


# PEFT's names


def test_peft_alone_reads_the_adapter_and_says_the_same(folder: Path, tmp_path: Path) -> None:
    model = adapted_model(folder, quantization="none", r=RANK, lora_alpha=2 * RANK, target_parameters=EXPERTS)
    fill_adapters(model, std=0.2)
    save_file(adapter_tensors(model), tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"] == EXPERTS
    stock = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(stock, tmp_path)
    assert type(wrapper_of(theirs)).__module__.startswith("peft."), "PEFT's own wrapper"
    batch = collator("26B-A4B")(examples()[:2])
    assert relative_error(logits(model, batch), logits(theirs, batch)) < 1e-5


def test_the_lora_config_loads_back() -> None:
    chosen = settings(target_parameters=EXPERTS, exclude_modules=["router.proj"])
    config = LoraConfig(**json.loads(json.dumps(recipes.lora_config(chosen, base_model="m"))))
    assert (config.target_parameters, config.exclude_modules) == (EXPERTS, {"router.proj"})
    assert recipes.lora_config(settings(), base_model="m").keys().isdisjoint({"target_parameters", "exclude_modules"})


# Merging


def test_what_is_merged_is_what_each_expert_gained(model: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    changes = deltas(config, recipe(target_parameters=EXPERTS), adapter_tensors(model))
    names = {name for name in changes if ".experts." in name}
    assert names == {one.name for one in gemma.facts_of(config).expert_weights}
    with merging.BaseWeights(folder) as base:
        assert names < set(base.names), "names of the base model's files"
    wrapper = wrapper_of(model, 2)
    nothing = {name: torch.zeros_like(weight) for name, weight in weights_of(wrapper.get_base_layer()).items()}
    for name, expected in adapted_by_hand(nothing, factors_of(wrapper)).items():
        assert relative_error(changes[f"model.language_model.layers.2.experts.{name}"](), expected) < 1e-5


def test_peft_merges_unquantized_experts_to_the_same(folder: Path) -> None:
    model = adapted_model(folder, quantization="none", r=RANK, target_parameters=EXPERTS)
    fill_adapters(model)
    batch = collator("26B-A4B")(examples()[:2])
    expected = logits(model, batch)
    assert relative_error(logits(model.merge_and_unload(), batch), expected) < 3e-5


# What is counted


@pytest.mark.parametrize(
    "lora",
    [
        {"target_parameters": EXPERTS},
        {"target_parameters": ["layers.1.experts.down_proj"], "exclude_modules": ["router.proj"]},
        {"target_modules": r".*\.language_model\..*(_proj|router\.proj)", "exclude_modules": r".*_proj"},
    ],
    ids=["both", "one of one layer", "routers alone"],
)
def test_parameters_are_those_that_torch_counts(folder: Path, lora: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    counted = vram.Model(recipe(**lora), config)
    adapted = adapted_model(folder, r=RANK, **lora)
    assert counted.lora_parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0
    facts, chosen = gemma.facts_of(config), recipe(**lora).lora
    promised: list[Any] = [*lora_targets.adapted_linears(facts, chosen), *lora_targets.adapted_experts(facts, chosen)]
    assert adapted_modules(adapted).keys() == {one.name for one in promised}


def test_the_routers_can_be_left_out(folder: Path) -> None:
    everything = adapted_modules(adapted_model(folder)).keys()
    fewer = adapted_modules(adapted_model(folder, exclude_modules=["router.proj"])).keys()
    routers = {f"model.language_model.layers.{layer}.router.proj" for layer in range(4)}
    assert everything - fewer == routers


def test_the_published_experts_at_true_shapes() -> None:
    """r (inputs + outputs) for each of 128 experts, in two weights of 30 layers."""
    lora = settings(r=8, target_parameters=EXPERTS, exclude_modules=["router.proj"])
    report = preflight(subject_of_size("26B-A4B", lora=lora))
    assert report.passed
    rows = {group.name: group for group in report.matrix}
    experts, routers = rows["language experts"], rows["language router"]
    assert (experts.found, experts.quantized, experts.adapted) == (60, 60, 60)
    assert (routers.found, routers.adapted) == (30, 0)
    facts = gemma.facts_of(gemma.true_config("26B-A4B"))
    own = 8 * 128 * 30 * (2816 + 1408 + 704 + 2816)
    without = lora_targets.lora_parameters(facts, settings(r=8, exclude_modules=["router.proj"]))
    assert lora_targets.lora_parameters(facts, lora) == own + without
    assert own == 237_895_680
    found = next(check.detail for check in report.checks if check.name == "LoRA targets")
    assert f"{own + without:,} parameters to train" in found


# What is refused


@pytest.mark.parametrize(
    ("like", "lora", "said"),
    [
        ("E2B", {"target_parameters": EXPERTS}, "and this model has no experts (26B-A4B alone has); leave the line"),
        ("26B-A4B", {"target_parameters": ["layers.9.experts.down_proj"]}, "which names none of 8 weights of experts"),
        ("E2B", {"exclude_modules": ["router.proj"]}, 'lora.exclude_modules: got "router.proj", which names no linear'),
        ("26B-A4B", {"exclude_modules": ".*"}, "which leaves nothing to adapt"),
    ],
)
def test_what_a_size_does_not_have_is_refused(like: tiny.Like, lora: dict[str, Any], said: str) -> None:
    document = tiny.make_config(like, tiny.make_tokenizer()).to_dict()
    model = recipes.Model.model_validate({"id": "m"})
    with torch.device("meta"):
        structure = load_structure(document, model)
        with pytest.raises(ModelError) as caught:
            attach_lora(structure, settings(**lora), base_model="m")
    assert said in str(caught.value)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_parameters": ["q_proj.weight"]}, 'write ["experts.gate_up_proj", "experts.down_proj"], one of them'),
        ({"target_parameters": "experts.down_proj"}, "lora.target_parameters: got 'experts.down_proj'; write ["),
        ({"target_parameters": EXPERTS, "lora_dropout": 0.1}, "lora.lora_dropout: got 0.1 with lora.target_parameters"),
        ({"exclude_modules": "*_proj"}, "lora.exclude_modules: got '*_proj', which is no regular expression"),
    ],
)
def test_a_recipe_that_cannot_be_right_is_refused(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(recipes.RecipeError) as caught:
        recipe(**lora)
    assert said in str(caught.value)
