"""limits.json is the one source: the Python view, the refusals and docs/limits.md agree with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from g4trainer import limits

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "accelerator": "nvidia-rtx-pro-6000",
    "region": "us-central1",
    "cpu": 20,
    "memory_gib": 80,
    "timeout_s": 3600,
    "max_retries": 3,
}


def test_a_job_that_fits_has_no_problems() -> None:
    assert limits.job_problems(**GOOD) == []
    assert limits.job_problems(**GOOD | {"accelerator": "nvidia-l4", "cpu": 4, "memory_gib": 16}) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"region": "us-east4"}, 'region: got "us-east4", which has no nvidia-rtx-pro-6000; write one of us-central1'),
        ({"cpu": 8}, "cpu: got 8; write 20 to 44 vCPU for nvidia-rtx-pro-6000, for example 20"),
        ({"cpu": 45}, "cpu: got 45; write 20 to 44 vCPU"),
        ({"memory_gib": 32}, "memory_gib: got 32; write 80 to 176 GiB for nvidia-rtx-pro-6000, for example 80"),
        ({"memory_gib": 177}, "memory_gib: got 177; write 80 to 176 GiB"),
        ({"timeout_s": 0}, "timeout_s: got 0; write 1 to 604800 seconds, for example 3600"),
        ({"timeout_s": 604801}, "timeout_s: got 604801; write 1 to 604800 seconds"),
        ({"max_retries": 11}, "max_retries: got 11; write 0 to 10 retries of a task, for example 3"),
        ({"accelerator": "t4"}, 'accelerator: got "t4"; write one of nvidia-rtx-pro-6000, nvidia-l4, for example'),
        ({"accelerator": "nvidia-b200"}, "NVIDIA B200, 180 GB is on Vertex AI only: use target vertex"),
    ],
)
def test_each_problem_says_what_was_got_and_what_to_write(change: dict[str, Any], problem: str) -> None:
    (found,) = limits.job_problems(**GOOD | change)
    assert problem in found
    assert "for example" in found
    assert "https://cloud.google.com/run/docs/" in found


def test_all_problems_are_listed_at_once() -> None:
    found = limits.job_problems(
        accelerator="nvidia-rtx-pro-6000", region="us-east4", cpu=8, memory_gib=32, timeout_s=0, max_retries=11
    )
    assert [problem.split(":")[0] for problem in found] == ["region", "cpu", "memory_gib", "timeout_s", "max_retries"]


def test_a_timeout_that_sources_differ_on_is_warned_about_not_refused() -> None:
    day = GOOD | {"timeout_s": 86400}
    assert limits.job_problems(**day) == []
    assert any("timeout_s: got 86400" in line for line in limits.job_warnings(accelerator="nvidia-l4", timeout_s=86400))
    assert not any("timeout_s" in line for line in limits.job_warnings(accelerator="nvidia-l4", timeout_s=3600))


def test_an_l4_is_warned_about_its_driver() -> None:
    assert any("driver 535" in line for line in limits.job_warnings(accelerator="nvidia-l4", timeout_s=3600))


def test_python_reads_the_numbers_of_the_json_file() -> None:
    source = json.loads((ROOT / "trainer/g4trainer/limits.json").read_text())
    assert list(limits.ACCELERATORS) == list(source["accelerators"])
    for name, facts in source["accelerators"].items():
        for key, value in facts.items():
            seen = getattr(limits.ACCELERATORS[name], key)
            assert (list(seen) if isinstance(seen, tuple) else seen) == value
    assert [one.name for one in limits.MACHINE_TYPES.values()] == list(source["vertex"]["machine_types"])
    assert (limits.MAX_CPU, limits.MAX_MEMORY_GIB, limits.MAX_RETRIES) == (44, 176, 10)
    assert (limits.TASK_TIMEOUT_MAX_S, limits.TASK_TIMEOUT_WARN_S) == (604800, 3600)


def test_every_gpu_of_vertex_ai_has_its_machines() -> None:
    found = {name: gpu.machine_types for name, gpu in limits.ACCELERATORS.items() if gpu.machine_types}
    assert set(found) == {name for name, gpu in limits.ACCELERATORS.items() if "vertex" in gpu.platforms}
    assert found["nvidia-h100-80gb"] == ("a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g", "a3-highgpu-8g")
    machine = limits.machine_type("nvidia-h200-141gb", 8)
    assert machine == limits.MachineType("a3-ultragpu-8g", "nvidia-h200-141gb", 8, 224, 2952)
    assert limits.machine_type("nvidia-h200-141gb", 4) is None


def test_the_limits_guide_is_up_to_date() -> None:
    guide = (ROOT / "docs/limits.md").read_text()
    assert guide == limits.markdown(), "run: python -m g4trainer.limits > docs/limits.md"
