"""LoRA on the experts of 26B-A4B: a run stopped and resumed is the same, and it is answered and exported."""

import json
from pathlib import Path

import pytest
import safetensors.torch

from chaos.attempts import Server, adapter_of, committed_steps, losses_of, new_run, recipe
from g4trainer.artifacts import read_adapter
from g4trainer.dataset import load_splits
from g4trainer.evaluate import read_predictions
from g4trainer.export import export_merged
from g4trainer.predict import Predictor
from g4trainer.recipe import Recipe
from g4trainer.rundir import RunDir, read_json
from trainer.making import CPU

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
STEPS, BEST = 3, 2


@pytest.fixture(scope="module")
def chosen(experts_model: str) -> Recipe:
    lora = {"r": 3, "lora_dropout": 0.0, "target_parameters": EXPERTS, "exclude_modules": ["router.proj"]}
    training = {"num_train_epochs": 1, "learning_rate": 5e-3}
    return recipe(model={"id": experts_model}, lora=lora, training=training)


@pytest.fixture(scope="module")
def whole(server: Server, chosen: Recipe) -> RunDir:
    run = new_run(server.root, "experts-undisturbed", chosen)
    attempt = server.run(run, faults={"best_is": [BEST]})
    assert attempt.status == 0, attempt.log
    return run


def test_stopped_and_resumed_it_is_the_same(server: Server, chosen: Recipe, whole: RunDir) -> None:
    run = new_run(server.root, "experts-stopped", chosen)
    stopped = server.run(run, faults={"best_is": [BEST], "signal_at": [BEST, "SIGTERM"]})
    assert stopped.status == 75, stopped.log
    assert committed_steps(run)[-1] == BEST
    resumed = server.run(run, faults={"best_is": [BEST]})
    assert resumed.status == 0, resumed.log
    assert losses_of(run) == losses_of(whole)
    assert adapter_of(run) == adapter_of(whole)
    final = "final.predictions.jsonl"
    assert (run.evaluation / final).read_bytes() == (whole.evaluation / final).read_bytes()


def test_its_experts_have_learned(whole: RunDir) -> None:
    tensors = safetensors.torch.load(adapter_of(whole)["adapter_model.safetensors"])
    factors = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    assert len(factors) == 4 * 2 * 2
    assert all(tensor.any() for tensor in factors.values())
    assert not any(".router." in name for name in tensors)
    config = json.loads(adapter_of(whole)["adapter_config.json"])
    assert (config["target_parameters"], config["exclude_modules"]) == (EXPERTS, ["router.proj"])
    assert read_json(whole.path / "lora_config.json")["target_parameters"] == EXPERTS


def test_what_is_predicted_is_what_the_evaluation_said(whole: RunDir, chosen: Recipe) -> None:
    predictor = Predictor(whole, CPU)
    splits = load_splits(whole.root / "datasets" / "digits", chosen.data, seed=chosen.training.seed)
    predictor.load(splits.test[0])
    said = [answer for batch in predictor.answers(splits.test, "both") for answer in batch]
    for which, name in (("after", "final"), ("before", "baseline")):
        evaluated = read_predictions(whole.evaluation / f"{name}.predictions.jsonl")
        assert [getattr(answer, which).raw_text for answer in said] == [one.raw_text for one in evaluated]


@pytest.mark.parametrize("onto", ["bf16", "nf4"])
def test_it_is_exported_and_says_the_same(whole: RunDir, tmp_path: Path, onto: str) -> None:
    assert read_adapter(whole) is not None
    document = export_merged(whole, tmp_path / "out", onto=onto)  # type: ignore[arg-type]
    found = document["verification"]
    assert 0 < found["relative_error"] < found["tolerance"]
    assert found["adapter_effect"] > 2 * found["relative_error"], "merging nothing would be farther off"
    assert "experts.gate_up_proj" in (tmp_path / "out" / "README.md").read_text()
