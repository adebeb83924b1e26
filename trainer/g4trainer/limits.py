"""What Cloud Run and Vertex AI give each accelerator, read from limits.json, and a check of a job against it.

limits.json is the one source: Terraform reads the same file, and docs/limits.md is generated from it
(`python -m g4trainer.limits > docs/limits.md`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

_LIMITS: dict[str, Any] = json.loads(Path(__file__).with_name("limits.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Accelerator:
    """One GPU and what a job must ask for to get it."""

    name: str
    """Cloud Run's own name, for example `nvidia-rtx-pro-6000`."""
    title: str
    memory_gib: float
    """GPU memory as nvidia-smi reports it, in GiB, rounded down."""
    platforms: tuple[str, ...]
    """Where it can be had: `cloudrun`, `vertex`."""
    regions: tuple[str, ...]
    """Cloud Run regions; empty for GPUs that only Vertex AI has (their regions were not checked)."""
    min_cpu: int | None
    """vCPU that Cloud Run asks for beside the GPU; None where the machine type fixes them."""
    min_memory_gib: int | None
    """Memory that Cloud Run asks for beside the GPU, in GiB; None where the machine type fixes it."""
    driver: str
    """NVIDIA driver and its CUDA version as documented; empty where unknown."""
    quota: str
    """Quota to ask for: Cloud Run's (without zonal redundancy), or Vertex AI's on demand; empty where unknown."""
    quota_per_gpu: int
    """Units of that quota for one GPU."""
    vertex_type: str
    """Vertex AI's AcceleratorType; empty where it is not offered here."""
    unverified: tuple[str, ...]
    """What could not be verified, as sentences."""

    @property
    def machine_types(self) -> tuple[str, ...]:
        """Vertex AI's machines that carry it, the smallest first; none on Cloud Run."""
        return tuple(machine.name for machine in MACHINE_TYPES.values() if machine.accelerator == self.name)


@dataclass(frozen=True)
class MachineType:
    """A machine of Vertex AI, as Compute Engine names it."""

    name: str
    accelerator: str
    gpus: int
    vcpu: int
    memory_gib: int


def _accelerator(name: str, facts: Mapping[str, Any]) -> Accelerator:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    unknown = values.keys() - {field.name for field in fields(Accelerator)}
    if unknown:
        raise ValueError(
            f"limits.json: accelerators.{name}: got unknown keys {sorted(unknown)}; write those of Accelerator"
        )
    return Accelerator(name=name, **values)


ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {name: _accelerator(name, facts) for name, facts in _LIMITS["accelerators"].items()}
)
MACHINE_TYPES: Mapping[str, MachineType] = MappingProxyType(
    {name: MachineType(name, **facts) for name, facts in _LIMITS["vertex"]["machine_types"].items()}
)
VERTEX_TIMEOUT_MAX_S: int = _LIMITS["vertex"]["timeout_max_s"]
"""Longest running time of a custom job: the default, and the limit of flex-start."""
MAX_WAIT_DEFAULT_S: int = _LIMITS["vertex"]["max_wait_default_s"]
MAX_CPU: int = _LIMITS["job"]["max_cpu"]
MAX_MEMORY_GIB: int = _LIMITS["job"]["max_memory_gib"]
TASK_TIMEOUT_MAX_S: int = _LIMITS["job"]["task_timeout_max_s"]
TASK_TIMEOUT_WARN_S: int = _LIMITS["job"]["task_timeout_warn_s"]
MAX_RETRIES: int = _LIMITS["job"]["max_retries"]
SOURCES: Mapping[str, str] = MappingProxyType(_LIMITS["sources"])
UNVERIFIED: tuple[str, ...] = tuple(_LIMITS["unverified"])


def job_problems(
    *, accelerator: str, region: str, cpu: int, memory_gib: int, timeout_s: int, max_retries: int
) -> list[str]:
    """Returns all that Cloud Run would refuse about a GPU job, one sentence each; empty when it fits.

    Each says where, what was got, what to write with an example, and the limit's source.
    """
    problems = []
    gpu = ACCELERATORS.get(accelerator)
    if gpu is None or "cloudrun" not in gpu.platforms:
        names = ", ".join(name for name, known in ACCELERATORS.items() if "cloudrun" in known.platforms)
        why = "" if gpu is None else f" ({gpu.title} is on Vertex AI only: use target vertex)"
        problems.append(
            f'accelerator: got "{accelerator}"{why}; write one of {names}, for example "nvidia-rtx-pro-6000" '
            f"({SOURCES['gpu']})"
        )
        min_cpu, min_memory_gib, needs = 1, 1, "a Cloud Run job"
    else:
        if region not in gpu.regions:
            problems.append(
                f'region: got "{region}", which has no {accelerator}; write one of {", ".join(gpu.regions)}, '
                f'for example "{gpu.regions[0]}" ({SOURCES["gpu"]})'
            )
        min_cpu, min_memory_gib, needs = gpu.min_cpu or 1, gpu.min_memory_gib or 1, accelerator
    problems += _out_of_range("cpu", cpu, min_cpu, MAX_CPU, f"vCPU for {needs}", min_cpu, "gpu")
    problems += _out_of_range(
        "memory_gib", memory_gib, min_memory_gib, MAX_MEMORY_GIB, f"GiB for {needs}", min_memory_gib, "gpu"
    )
    problems += _out_of_range("timeout_s", timeout_s, 1, TASK_TIMEOUT_MAX_S, "seconds", TASK_TIMEOUT_WARN_S, "timeout")
    problems += _out_of_range("max_retries", max_retries, 0, MAX_RETRIES, "retries of a task", 3, "retries")
    return problems


def job_warnings(*, accelerator: str, timeout_s: int) -> list[str]:
    """Returns what Cloud Run may refuse or do otherwise, because sources differ; one sentence each."""
    warnings = list(ACCELERATORS[accelerator].unverified) if accelerator in ACCELERATORS else []
    if timeout_s > TASK_TIMEOUT_WARN_S:
        warnings.append(
            f"timeout_s: got {timeout_s}; sources differ on whether a GPU task may run for more than "
            f"{TASK_TIMEOUT_WARN_S} seconds; write {TASK_TIMEOUT_WARN_S} and let retries resume the run to be safe "
            f"({SOURCES['timeout']})"
        )
    return warnings


def machine_type(accelerator: str, gpus: int) -> MachineType | None:
    """The machine of Vertex AI with so many of these GPUs; None where there is none."""
    fitting = (one for one in MACHINE_TYPES.values() if one.accelerator == accelerator and one.gpus == gpus)
    return next(fitting, None)


def smallest_machine(accelerator: str) -> MachineType | None:
    """The machine of Vertex AI with the fewest of these GPUs; None where none has it."""
    having = (one for one in MACHINE_TYPES.values() if one.accelerator == accelerator)
    return min(having, key=lambda one: one.gpus, default=None)


def _out_of_range(where: str, got: int, low: int, high: int, unit: str, example: int, source: str) -> list[str]:
    if low <= got <= high:
        return []
    return [f"{where}: got {got}; write {low} to {high} {unit}, for example {example} ({SOURCES[source]})"]


def markdown() -> str:
    """Returns docs/limits.md."""
    job, bare = _LIMITS["job"], _LIMITS["without_gpu"]
    cloudrun = [
        f"| `{gpu.name}` | {gpu.memory_gib} GiB | {gpu.min_cpu} vCPU, {gpu.min_memory_gib} GiB "
        f"| {', '.join(gpu.regions)} | {gpu.driver} | {gpu.quota_per_gpu} of `{gpu.quota}` |"
        for gpu in ACCELERATORS.values()
        if "cloudrun" in gpu.platforms
    ]
    vertex = [
        f"| `{gpu.name}` | {gpu.memory_gib} GiB | `{gpu.vertex_type}` | {f'`{gpu.quota}`' if gpu.quota else '?'} |"
        for gpu in ACCELERATORS.values()
        if "vertex" in gpu.platforms
    ]
    machines = [
        f"| `{one.name}` | {one.gpus} x `{one.accelerator}` | {one.vcpu} | {one.memory_gib} |"
        for one in MACHINE_TYPES.values()
    ]
    unverified = [f"- {sentence}" for sentence in UNVERIFIED]
    unverified += [f"- `{gpu.name}`: {sentence}" for gpu in ACCELERATORS.values() for sentence in gpu.unverified]
    return _PAGE.format(
        **job,
        checked=_LIMITS["checked"],
        cloudrun="\n".join(cloudrun),
        vertex="\n".join(vertex),
        machines="\n".join(machines),
        bare_cpu=", ".join(str(count) for count in bare["cpu"]),
        bare_max_memory_gib=bare["max_memory_gib"],
        bare_min_memory=", ".join(f"{least} GiB with {count} vCPU" for count, least in bare["min_memory_gib"].items()),
        unverified="\n".join(unverified),
        sources="\n".join(f"- {topic}: <{address}>" for topic, address in SOURCES.items()),
    )


_PAGE = """\
# Limits: timeouts, memory, retries, regions and drivers

<!-- Generated from trainer/g4trainer/limits.json; edit that file, then: python -m g4trainer.limits > docs/limits.md -->

Checked on {checked}. Terraform's validations, `g4kit launch` and this page read the same file.

## GPUs of Cloud Run jobs

| accelerator | GPU memory | at least | regions | driver | quota for one GPU |
|---|---|---|---|---|---|
{cloudrun}

An instance has {gpus_per_instance} GPU, up to {max_cpu} vCPU and up to {max_memory_gib} GiB. The container's file
system is memory: what is written outside the mounted bucket counts.

## GPUs of Vertex AI

| accelerator | GPU memory | Vertex AI's name | quota for one GPU, on demand |
|---|---|---|---|
{vertex}

Spot and flex-start count on the quota with `training_preemptible_` in its name.

| machine | GPUs | vCPU | GiB |
|---|---|---|---|
{machines}

`job.gpus` over `job.hosts` picks the machine: `hosts = 2`, `gpus = 16` of `nvidia-h200-141gb` are two a3-ultragpu-8g.

## Time and retries

| what | value |
|---|---|
| task timeout when none is set | {task_timeout_default_s} s; too short for a run, so `jobs` always sets one |
| task timeout accepted | 1 to {task_timeout_max_s} s; above {task_timeout_warn_s} s with a warning |
| retries | 0 to {max_retries}; Cloud Run's default is {default_retries} |
| a timeout counts | per attempt: four attempts of 3600 s are up to four hours |
| what one execution can override | the timeout, the arguments and the environment; not CPU, memory or retries |

An attempt knows its deadline, commits a checkpoint before it and exits 75; the retry resumes from there. GPU tasks
are not moved to another host during maintenance, they are ended: that too is a retry.

## Jobs without a GPU (the tools job)

CPU: {bare_cpu}. Memory: up to {bare_max_memory_gib} GiB, and at least {bare_min_memory}.

## Not verified

{unverified}

## Sources

{sources}
"""


if __name__ == "__main__":
    sys.stdout.write(markdown())
