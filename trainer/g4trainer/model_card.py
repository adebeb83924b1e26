"""README.md of what is exported: what it is, what it was made from, how good it is, and how to serve it.

Needs no torch, so that the command line can write the card of an adapter that it has fetched.
"""

import re
from collections.abc import Mapping
from typing import Any

from g4trainer.recipe import ALL_LINEAR, FrozenRecipe, Lora

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
LICENSE_KEYS = ("license", "license_name", "license_link")
HUB = re.compile(r"^(?:hf://|https://huggingface\.co/)?(?P<name>[\w.-]+/[\w.-]+)$")
ENOUGH_ALIKE = 0.95
"""Share of the answers that an export may keep of the run's without a word of advice."""
CHAT_TOKENS, CLASSIFY_TOKENS = 256, 64
"""An answer's length in the commands; both stop earlier, at the end of the turn."""


def model_card(
    frozen: FrozenRecipe,
    results: Mapping[str, Any],
    export: Mapping[str, Any],
    base_card: str | None,
    base_license: str | None,
    *,
    prompt: str,
) -> str:
    """Markdown with the Hub's front matter.

    results: results.json, empty where the run has none. export: EXPORTED.json without its files. base_card,
    base_license: README.md and LICENSE of the staged base model, None where it has none. prompt: as the run asked it.
    """
    recipe, merged = frozen.recipe, export["format"] == "merged"
    base = base_name(frozen, export)
    parts = [
        _front_matter(frozen, base, base_card, merged=merged),
        f"# {frozen.run_id}",
        f"{base} fine-tuned on `{recipe.data.dataset}` with QLoRA by g4kit {frozen.g4kit_version}. "
        + ("The adapter is merged into the weights, in bf16." if merged else "This is the adapter alone."),
        "## How good it is",
        _metrics(results),
        "## How it was trained",
        _training(frozen, results),
    ]
    if merged:
        parts += [
            "## Checked after merging",
            checked(export["verification"], dequantized=export["base"]["dequantized"]),
        ]
    parts += ["## How to use it", _transformers(recipe, base, prompt, merged=merged)]
    if merged:
        parts += [_vllm(frozen.run_id, prompt)]
    parts += ["## License", _license(base, base_card, base_license)]
    return "\n\n".join(parts) + "\n"


def base_name(frozen: FrozenRecipe, export: Mapping[str, Any]) -> str:
    """The base model by its name on the Hub where it was staged from there, else by its folder in the bucket."""
    found = HUB.match(str(export["base"].get("source") or ""))
    return found["name"] if found else frozen.recipe.model.id


def checked(verification: Mapping[str, Any], *, dequantized: int) -> str:
    """What the comparison found, in a few sentences."""
    note = f"Merged into {dequantized} weights at NF4, as they were in training, dequantized. " if dequantized else ""
    if "skipped" in verification:
        return note + f"The merged weights were not loaded and compared: {verification['skipped']}."
    found = verification
    text = (
        f"{note}Loaded from these files, its logits differ from those of the {found['reference']} by "
        f"{found['relative_error']:.4f} of their norm (the adapter itself changes them by "
        f"{found['adapter_effect']:.4f}; at most {found['tolerance']} was allowed), over "
        f"{found['positions']} tokens of {found['samples']} test images; at {found['same_token']:.1%} of them the next "
        f"token is the same."
    )
    if found["same_answer"] is not None:
        text += (
            f" Of {found['images']} test images, {found['same_answer']:.1%} get the answer that the run's evaluation "
            f"got from the base model at NF4 with the adapter"
        )
        if found["accuracy"] is not None:
            text += f" (accuracy {found['accuracy']:.1%}, there {found['run_accuracy']:.1%})"
        text += "."
    return text


def advice(export: Mapping[str, Any]) -> str:
    """What to try where many answers are not the run's; empty where nothing is to be said. export: EXPORTED.json."""
    same = export["verification"].get("same_answer")
    if same is None or same >= ENOUGH_ALIKE or export["base"]["dequantized"]:
        return ""
    return (
        f"{1 - same:.0%} of the answers are not the run's: it was trained beside base weights at NF4. An export with "
        f"--onto nf4 merges into those, and stays closer."
    )


def _front_matter(frozen: FrozenRecipe, base: str, base_card: str | None, *, merged: bool) -> str:
    lines = [
        "---",
        f"base_model: {base}",
        f"base_model_relation: {'finetune' if merged else 'adapter'}",
        "pipeline_tag: image-text-to-text",
        f"library_name: {'transformers' if merged else 'peft'}",
        "tags: [gemma4, qlora, g4kit]",
        *(f"{key}: {value}" for key, value in licenses(base_card).items()),
        "---",
    ]
    return "\n".join(lines)


def licenses(base_card: str | None) -> dict[str, str]:
    """What the base model's card says of its license, by the Hub's keys."""
    found = FRONT_MATTER.match(base_card or "")
    lines = found[1].splitlines() if found else []
    pairs = (line.partition(":") for line in lines)
    return {key: value.strip() for key, _, value in pairs if key in LICENSE_KEYS and value.strip()}


def _metrics(results: Mapping[str, Any]) -> str:
    after, before = results.get("final"), results.get("baseline")
    if not after:
        return "The run has no final evaluation."
    rows = []
    for name, key in (("accuracy", "accuracy"), ("macro F1", "macro_f1"), ("exact match", "exact_match")):
        if after.get(key) is not None:
            earlier = "not measured" if not before or before.get(key) is None else f"{before[key]:.3f}"
            interval = after.get("accuracy_interval_95") if key == "accuracy" else None
            within = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            rows.append(f"| {name} | {earlier} | {after[key]:.3f}{within} |")
    count = f"{after['count']:,} " if "count" in after else ""
    head = f"On {count}test images that were not trained on, by generated answers"
    head += ", with a 95 % interval:" if after.get("accuracy_interval_95") else ":"
    return "\n".join([head, "", "| | before | after |", "|---|---|---|", *rows])


def _training(frozen: FrozenRecipe, results: Mapping[str, Any]) -> str:
    recipe, train, data = frozen.recipe, results.get("train", {}), results.get("data", {})
    counts = ", ".join(f"{data[name]:,} {name}" for name in ("train", "validation", "test") if name in data)
    steps = f", {train['steps']:,} steps" if train.get("steps") else ""
    rows = {
        "data": f"`{recipe.data.dataset}`" + (f" ({counts})" if counts else ""),
        "base weights while training": "NF4, double quantization" if recipe.model.quantization == "nf4" else "bf16",
        "LoRA": f"r {recipe.lora.r}, alpha {recipe.lora.lora_alpha}, on {_targets(recipe.lora)}",
        "optimizer": (
            f"AdamW, learning rate {recipe.training.learning_rate:g} ({recipe.training.lr_scheduler_type}), "
            f"batch {recipe.training.effective_batch_size}, {recipe.training.num_train_epochs:g} epochs{steps}"
        ),
        "image tokens": f"at most {recipe.model.max_soft_tokens} an image",
        "seed": str(recipe.training.seed),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _targets(settings: Lora) -> str:
    modules = "every linear layer" if settings.target_modules == ALL_LINEAR else f"`{settings.target_modules}`"
    without = f" but `{settings.exclude_modules}`" if settings.exclude_modules else ""
    besides = f", and on `{settings.target_parameters}`" if settings.target_parameters else ""
    return modules + without + besides


def _transformers(recipe: Any, base: str, prompt: str, *, merged: bool) -> str:
    """Python that answers one image as the run's evaluation did; a test runs it."""
    tokens = recipe.evaluation.max_new_tokens
    if tokens == "auto":
        tokens = CLASSIFY_TOKENS if recipe.data.task == "classify" else CHAT_TOKENS
    load = ['model = AutoModelForMultimodalLM.from_pretrained(FOLDER, dtype="bfloat16", device_map="auto")']
    if not merged:
        load = [
            'model = AutoModelForMultimodalLM.from_pretrained(BASE, dtype="bfloat16", device_map="auto")',
            "model = PeftModel.from_pretrained(model, FOLDER)",
        ]
    lines = [
        "from PIL import Image",
        *([] if merged else ["from peft import PeftModel"]),
        "from transformers import AutoModelForMultimodalLM, AutoProcessor",
        "",
        'FOLDER = "."',
        *([] if merged else [f"BASE = {base!r}"]),
        f"PROMPT = {prompt!r}",
        f"processor = AutoProcessor.from_pretrained({'FOLDER' if merged else 'BASE'})",
        f"processor.image_processor.max_soft_tokens = {recipe.model.max_soft_tokens}",
        *load,
        'image = Image.open("image.jpg").convert("RGB")',
        'content = [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}],',
        "    tokenize=True,",
        "    add_generation_prompt=True,",
        "    enable_thinking=False,",
        "    return_dict=True,",
        '    return_tensors="pt",',
        ").to(model.device)",
        f"answer = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)",
        'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())',
    ]
    return "With transformers:\n\n```python\n" + "\n".join(lines) + "\n```"


def _vllm(run_id: str, prompt: str) -> str:
    question = prompt.replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\\''")
    return (
        "With vLLM, as a server that speaks OpenAI's protocol (not run by g4kit's tests):\n\n"
        "```sh\n"
        f"vllm serve . --served-model-name {run_id} --max-model-len 4096\n"
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{\n"
        f'  "model": "{run_id}", "temperature": 0,\n'
        '  "messages": [{"role": "user", "content": [\n'
        '    {"type": "image_url", "image_url": {"url": "https://example.com/image.jpg"}},\n'
        f'    {{"type": "text", "text": "{question}"}}]}}]\n'
        "}'\n"
        "```"
    )


def _license(base: str, base_card: str | None, base_license: str | None) -> str:
    said = licenses(base_card)
    if said:
        stated = said.get("license_name") or said.get("license", "")
        where = f" ({said['license_link']})" if "license_link" in said else ""
        return f"The base model's, {stated}{where}, applies to these weights as well."
    if base_license:
        return f"The license of {base} is in LICENSE; it applies to these weights as well."
    return f"The license of {base} applies to these weights as well; the staged copy does not say which it is."
