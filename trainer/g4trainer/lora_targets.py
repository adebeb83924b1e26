"""What a recipe's LoRA adapts of a model, by names and shapes alone: neither torch nor PEFT is needed.

PEFT decides by the same rules when it attaches the adapters; g4trainer.model verifies that it did.
"""

import re
from collections.abc import Collection, Iterable, Sequence

from g4trainer.gemma import ExpertWeight, Linear, ModelFacts
from g4trainer.recipe import ALL_LINEAR, Lora


def adapted_linears(facts: ModelFacts, settings: Lora) -> list[Linear]:
    """Linear modules that get an adapter."""
    excluded = matching(settings.exclude_modules, [one.name for one in facts.linears])
    if settings.target_modules == ALL_LINEAR:
        return [one for one in facts.linears if one.name not in excluded]
    wanted = matching(settings.target_modules, [one.name for one in facts.linears])
    return [one for one in facts.linears if one.name in wanted - excluded]


def adapted_experts(facts: ModelFacts, settings: Lora) -> list[ExpertWeight]:
    """Weights of experts that get an adapter."""
    wanted = matching(settings.target_parameters, [one.name for one in facts.expert_weights])
    return [one for one in facts.expert_weights if one.name in wanted]


def lora_parameters(facts: ModelFacts, settings: Lora) -> int:
    """Parameters that the recipe's LoRA trains."""
    linears = sum(one.inputs + one.outputs for one in adapted_linears(facts, settings))
    experts = sum(one.experts * (one.inputs + one.outputs) for one in adapted_experts(facts, settings))
    return settings.r * (linears + experts)


def largest_adapter(facts: ModelFacts, settings: Lora) -> int:
    """Parameters of the largest tensor among those."""
    linears = [max(one.inputs, one.outputs) for one in adapted_linears(facts, settings)]
    experts = [one.experts * max(one.inputs, one.outputs) for one in adapted_experts(facts, settings)]
    return settings.r * max([*linears, *experts], default=0)


def problems(settings: Lora, *, modules: Collection[str], expert_weights: Collection[str]) -> list[str]:
    """What a model does not have of what a recipe names, each with what to write; empty where all is there.

    modules: names of the model's linear modules. expert_weights: names of its experts' weights.
    """
    found = []
    for name in settings.target_parameters:
        if not expert_weights:
            found.append(
                f"lora.target_parameters: got {settings.target_parameters}, and this model has no experts (26B-A4B "
                "alone has); leave the line out."
            )
            break
        if not matching([name], expert_weights):
            found.append(
                f'lora.target_parameters: got "{name}", which names none of {len(expert_weights)} weights of experts; '
                f'write "experts.gate_up_proj", "experts.down_proj" or a whole name, for example '
                f'"{min(expert_weights)}".'
            )
    excluded = [settings.exclude_modules] if isinstance(settings.exclude_modules, str) else settings.exclude_modules
    for one in excluded:
        pattern = one if isinstance(settings.exclude_modules, str) else [one]
        if not matching(pattern, modules):
            endings = ", ".join(sorted({_ending(name) for name in modules}))
            found.append(
                f'lora.exclude_modules: got "{one}", which names no linear module; write endings of names, as PEFT '
                f"takes them, of {endings}."
            )
    return found


def matching(patterns: str | Sequence[str], names: Iterable[str]) -> set[str]:
    """The names that a pattern matches, as PEFT matches: a string is a regular expression, a list holds endings."""
    if isinstance(patterns, str):
        return {name for name in names if re.fullmatch(patterns, name)}
    endings = tuple(f".{pattern}" for pattern in patterns)
    return {name for name in names if f".{name}".endswith(endings)}


def _ending(name: str) -> str:
    """The last part of a name that says what it is: `router.proj`, not `proj`."""
    parts = name.removesuffix(".linear").split(".")
    return ".".join(parts[-2:]) if parts[-1] == "proj" else parts[-1]
