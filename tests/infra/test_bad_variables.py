"""Each bad value is refused at plan time, by a message that says what was got and gives an example.

A plan reports all refusals at once, so each plan here breaks many rules, every rule once.
"""

from __future__ import annotations

from typing import Any

import pytest

from infra.terraform_cli import Terraform

KEY = "projects/my-project-123/locations/global/keyRings/g4kit/cryptoKeys/g4kit"
SUBNETWORK = "projects/my-project-123/regions/us-east1/subnetworks/default"

PLANS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {
            "project_id": "",
            "prefix": "G4kit",
            "labels": {"Team": "vision"},
            "jobs": {
                "spelling": {"acelerator": "nvidia-l4"},
                "gpu": {"accelerator": "nvidia-t4"},
                "cpu": {"cpu": 8},
                "memory": {"memory_gib": 32},
                "timeout": {"timeout": "1h"},
                "retries": {"max_retries": 11},
                "parallel": {"parallelism": 0},
                "redundancy": {"gpu_zonal_redundancy_disabled": "no"},
                "Name": {},
            },
            "tools_cpu": 3,
            "tools_timeout": "4h",
            "image": "us-central1-docker.pkg.dev/my-project-123/g4kit/trainer:latest",
            "bucket_name": "My-Bucket",
            "soft_delete_days": 3,
            "checkpoint_retention_days": 1,
            "keep_images": 1,
            "kms_key": KEY,
            "subnetwork": SUBNETWORK,
            "subnetwork_range": "10.0.0.0/28",
            "egress": "ALL",
            "hub_token_version": "hf_abcdef",
            "hub_token_secret": True,
            "github_repository": "https://github.com/my-org/my-models",
            "github_ref": "main",
            "build_repository": "my-org/my-models",
            "build_recipe": "recipes/pets.yaml",
            "alert_emails": ["ml-team"],
            "budget_billing_account": "1234567890",
            "budget_amount": 0,
        },
        [
            'project_id: got ""',
            'prefix: got "G4kit"',
            'labels: got {"Team":"vision"}',
            "jobs: got the names Name, cpu",
            "jobs: got the keys acelerator",
            'jobs: got accelerator {"gpu":"nvidia-t4"}',
            'jobs: got cpu {"cpu":"8"}',
            'jobs: got memory_gib {"memory":"32"}',
            'jobs: got timeout {"timeout":"1h"}',
            'jobs: got max_retries {"retries":"11"}',
            'jobs: got parallelism {"parallel":"0"}',
            'jobs: got gpu_zonal_redundancy_disabled {"redundancy":"no"}',
            'tools_cpu: got "3"',
            'tools_timeout: got "4h"',
            'image: got "us-central1-docker.pkg.dev/my-project-123/g4kit/trainer:latest"',
            'bucket_name: got "My-Bucket"',
            "soft_delete_days: got 3",
            "checkpoint_retention_days: got 1",
            "keep_images: got 1",
            f'kms_key: got "{KEY}"',
            f'subnetwork: got "{SUBNETWORK}"',
            'subnetwork_range: got "10.0.0.0/28"',
            'egress: got "ALL"',
            'hub_token_version: got "hf_abcdef"',
            'github_repository: got "https://github.com/my-org/my-models"',
            'github_ref: got "main"',
            'build_repository: got "my-org/my-models"',
            'build_recipe: got "recipes/pets.yaml"',
            "alert_emails: got ml-team",
            'budget_billing_account: got "1234567890"',
            "budget_amount: got 0",
        ],
    ),
    (
        {
            "project_id": "My-Project",
            "region": "us-east4",
            "prefix": "a-prefix-of-24-characters",
            "jobs": {
                "train": {"accelerator": "nvidia-rtx-pro-6000"},
                "cpu": {"accelerator": "nvidia-l4", "cpu": 45},
                "memory": {"accelerator": "nvidia-l4", "memory_gib": 177},
                "timeout": {"accelerator": "nvidia-l4", "timeout": "604801s"},
                "retries": {"accelerator": "nvidia-l4", "max_retries": -1},
                "parallel": {"accelerator": "nvidia-l4", "parallelism": "many"},
            },
            "tools_memory_gib": 64,
            "bucket_name": "gs://my-bucket",
            "soft_delete_days": 91,
            "subnetwork_range": "10.0.0.0",
            "hub_token_version": "1",
            "github_ref": "refs/heads/*",
            "budget_amount": 9.5,
        },
        [
            'project_id: got "My-Project"',
            'prefix: got "a-prefix-of-24-characters"',
            'jobs: got region "us-east4" with',
            'jobs: got cpu {"cpu":"45"}',
            'jobs: got memory_gib {"memory":"177"}',
            'jobs: got timeout {"timeout":"604801s"}',
            'jobs: got max_retries {"retries":"-1"}',
            'jobs: got parallelism {"parallel":"many"}',
            'tools_memory_gib: got "64"',
            'bucket_name: got "gs://my-bucket"',
            "soft_delete_days: got 91",
            'subnetwork_range: got "10.0.0.0"',
            'hub_token_version: got "1" without the secret',
            'github_ref: got "refs/heads/*"',
            "budget_amount: got 9.5",
        ],
    ),
    (
        {
            "jobs": {
                "gpu": {"accelerator": "nvidia-b200"},
                "cpu": {"cpu": "20 vCPU"},
                "memory": {"memory_gib": "80Gi"},
                "timeout": {"timeout": "3600"},
            },
            "tools_cpu": 8,
            "tools_memory_gib": 2,
        },
        [
            'jobs: got accelerator {"gpu":"nvidia-b200"}',
            'jobs: got cpu {"cpu":"20 vCPU"}',
            'jobs: got memory_gib {"memory":"80Gi"}',
            'jobs: got timeout {"timeout":"3600"}',
            'tools_memory_gib: got "2"',
        ],
    ),
    (
        {"jobs": {"tools": {"cpu": None, "memory_gib": 79.5, "timeout": "0s", "max_retries": 1.5}}},
        [
            "jobs: got the names tools",
            'jobs: got cpu {"tools":null}',
            'jobs: got memory_gib {"tools":"79.5"}',
            'jobs: got timeout {"tools":"0s"}',
            'jobs: got max_retries {"tools":"1.5"}',
        ],
    ),
    ({"jobs": {}}, ["jobs: got an empty map"]),
    ({"region": "us-central1-a"}, ['region: got "us-central1-a"']),
    ({"region": "US"}, ['region: got "US"']),
]


def test_there_are_many() -> None:
    assert sum(len(refusals) for _, refusals in PLANS) >= 25


@pytest.mark.parametrize(("variables", "expected"), PLANS)
def test_bad_values_are_refused_with_an_example(
    terraform: Terraform, variables: dict[str, Any], expected: list[str]
) -> None:
    messages = terraform.refusals(**variables)
    for start in expected:
        (message,) = [message for message in messages if message.startswith(start)]
        assert "; write " in message
        assert "for example" in message
    assert len(messages) == len(expected), messages
