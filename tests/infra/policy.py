"""Our own policy over a plan: what no deployment of g4kit may have, and what each must.

Pure functions from planned resources (`terraform show -json`) to sentences; none means that the plan is fine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Resource = Mapping[str, Any]

PRIMITIVE_ROLES = {"roles/owner", "roles/editor", "roles/viewer"}
PROJECT_ROLES = {"roles/logging.logWriter"}
"""Roles that Google grants on a project only."""

IDLE_BILLING = {
    "google_cloud_run_v2_service",
    "google_cloud_run_v2_worker_pool",
    "google_compute_address",
    "google_compute_global_address",
    "google_compute_router_nat",
    "google_filestore_instance",
    "google_kms_crypto_key",
    "google_vpc_access_connector",
}
"""Resource types that bill while nothing runs."""

ENCRYPTED_BY: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "google_storage_bucket": lambda values: values["encryption"][0]["default_kms_key_name"],
    "google_artifact_registry_repository": lambda values: values["kms_key_name"],
    "google_cloud_run_v2_job": lambda values: values["template"][0]["template"][0]["encryption_key"],
    "google_secret_manager_secret": lambda values: values["replication"][0]["user_managed"][0]["replicas"][0][
        "customer_managed_encryption"
    ][0]["kms_key_name"],
}
"""Where each type that stores something names its key."""


def access_violations(resources: Iterable[Resource]) -> Iterator[str]:
    """No public member, no primitive role, no role on the project that could be on less, no key file."""
    for resource in resources:
        address, kind, values = resource["address"], resource["type"], resource["values"]
        role = values.get("role") or ""
        if kind == "google_service_account_key":
            yield f"{address}: a service account key can be stolen; use workload identity"
        if kind.endswith(("_iam_binding", "_iam_policy")):
            yield f"{address}: it takes away what others were granted; use _iam_member"
        if values.get("member") in {"allUsers", "allAuthenticatedUsers"}:
            yield f"{address}: {values['member']} is everyone"
        if role in PRIMITIVE_ROLES or role.lower().endswith("admin"):
            yield f"{address}: {role} is more than any part needs"
        if kind == "google_project_iam_member" and role not in PROJECT_ROLES:
            yield f"{address}: {role} on the whole project; bind it to the resource"
        if kind.startswith(("google_organization_iam", "google_folder_iam")):
            yield f"{address}: a role beyond the project"
        if kind == "google_iam_workload_identity_pool_provider":
            condition = values.get("attribute_condition") or ""
            if "assertion.repository ==" not in condition or "assertion.ref ==" not in condition:
                yield f"{address}: it lets in more than one repository and ref"


def exposure_violations(resources: Iterable[Resource]) -> Iterator[str]:
    """Buckets are private; jobs run as an account of their own, without secrets in plain text."""
    for resource in resources:
        address, kind, values = resource["address"], resource["type"], resource["values"]
        if kind == "google_storage_bucket":
            if values.get("public_access_prevention") != "enforced":
                yield f"{address}: public access is not prevented"
            if values.get("uniform_bucket_level_access") is not True:
                yield f"{address}: objects may have access lists of their own"
        if kind == "google_cloud_run_v2_job":
            template = values["template"][0]["template"][0]
            # An address that is known only after the apply is left out of the values: it is one of ours.
            account = template.get("service_account", "ours")
            if not account or "compute@" in account:
                yield f"{address}: it runs as the project's default account"
            for container in template["containers"]:
                for env in container.get("env", []):
                    if "TOKEN" in env["name"] and env.get("value"):
                        yield f"{address}: {env['name']} in plain text"
        if kind == "google_compute_firewall" and "0.0.0.0/0" in (values.get("source_ranges") or []):
            yield f"{address}: open to the internet"
        if kind in IDLE_BILLING:
            yield f"{address}: it bills while nothing runs"


def label_violations(resources: Iterable[Resource], required: Mapping[str, str]) -> Iterator[str]:
    """Whatever takes labels has ours."""
    for resource in resources:
        values = resource["values"]
        for field in ("effective_labels", "user_labels"):
            if field in values and not required.items() <= (values[field] or {}).items():
                yield f"{resource['address']}: {field} {values[field]} lack {dict(required)}"


def encryption_violations(resources: Iterable[Resource], key: str) -> Iterator[str]:
    """With a key of the caller's, everything that stores something uses it."""
    for resource in resources:
        if resource["type"] not in ENCRYPTED_BY:
            continue
        try:
            found = ENCRYPTED_BY[resource["type"]](resource["values"])
        except (IndexError, KeyError):
            found = None
        if found != key:
            yield f"{resource['address']}: encrypted with {found}, not with {key}"
