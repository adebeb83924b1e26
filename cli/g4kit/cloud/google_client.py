"""What every Google client here shares: credentials, endpoints, patience, and errors that a user can act on."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import google.auth
import requests
from google.api_core import exceptions
from google.api_core.retry import Retry
from google.auth import exceptions as auth_exceptions
from google.auth.credentials import AnonymousCredentials, Credentials

from g4kit.cloud.base import StorageError
from g4kit.deployment import Deployment
from g4kit.errors import FailedError, UserError

SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
PERMISSION = re.compile(r"\b([a-z]+\.[a-zA-Z]+\.[a-zA-Z]+)\b(?=.*\b(?:access|denied|permission)|[' ])")
ROLES = {
    "storage.buckets.": "roles/storage.admin",
    "storage.": "roles/storage.objectAdmin",
    "run.": "roles/run.developer",
    "logging.": "roles/logging.viewer",
    "iam.serviceAccounts.getAccessToken": "roles/iam.serviceAccountTokenCreator",
    "iam.serviceAccounts.": "roles/iam.serviceAccountUser",
    "serviceusage.": "roles/serviceusage.serviceUsageConsumer",
    "cloudquotas.": "roles/cloudquotas.viewer",
    "artifactregistry.": "roles/artifactregistry.reader",
    "secretmanager.": "roles/secretmanager.viewer",
}
"""The role that gives a permission, by the permission's beginning; the first that fits."""
REGION = re.compile(r"locations/([a-z0-9-]+)' \(or it may not exist\)")
"""As Google's APIs refuse a region: https://cloud.google.com/apis/design/errors"""
SENTENCE = re.compile(r'"message": *("(?:[^"\\]|\\.)*")')
ASKED = re.compile(r"^[A-Z]+ https?://\S+: ")
"""The request, which the clients write before the service's sentence."""
SERVICE = re.compile(r"\b([a-z]+\.googleapis\.com)\b")
RETRYABLE_STATUS = {408, 429, 500, 502, 503, 504}
RETRYABLE = (
    auth_exceptions.TransportError,
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    ConnectionError,
)


class CredentialsError(UserError):
    """Nobody is signed in, or no longer."""


class NotAllowedError(UserError):
    """The caller may not do this."""


class UnavailableError(FailedError):
    """The service could not be reached, or is overloaded, for as long as we were ready to wait."""


@dataclass(frozen=True)
class Patience:
    """How long clients wait."""

    first_retry_s: float = 1.0
    """Before the first retry; twice as long before each further one, with jitter."""
    retry_for_s: float = 120.0
    timeout_s: float = 60.0
    """Without a byte."""
    poll_s: float = 2.0
    """Between two looks at logs; Cloud Logging allows 60 reads a minute."""
    hold_s: float = 3.0
    """How long followed log lines are held back, so that those that arrive out of order can be put right."""
    relist_s: float = 30.0
    """How long a list of a run's executions is believed while one of them goes on."""
    settle_s: float = 10.0
    """How long log lines and executions may take until they show."""


@dataclass(frozen=True)
class Access:
    """A deployment and how to reach it."""

    deployment: Deployment
    credentials: Credentials
    emulator: str | None
    """Address that stands in for every service; None for Google's own."""
    patience: Patience

    def errors(self, where: str) -> contextlib.AbstractContextManager[None]:
        """google_errors, for calls that concern `where`."""
        return google_errors(where, self.deployment.project)

    def retry(self, on_error: Callable[[Exception], Any] | None = None) -> Any:
        """A retry for calls that may be made twice. on_error is told of each failure that is retried."""
        return Retry(
            predicate=is_retryable,
            initial=self.patience.first_retry_s,
            maximum=30.0,
            multiplier=2.0,
            timeout=self.patience.retry_for_s,
            on_error=on_error,
        )


def open_access(deployment: Deployment, emulator: str | None = None, patience: Patience | None = None) -> Access:
    """Application default credentials, impersonation and quota project included. Raises CredentialsError."""
    if emulator:
        return Access(deployment, AnonymousCredentials(), emulator, patience or Patience())
    with google_errors("credentials", deployment.project):
        credentials, _ = google.auth.default(scopes=SCOPES)
    return Access(deployment, credentials, None, patience or Patience())


def is_retryable(error: BaseException) -> bool:
    """Also of uploads and downloads, whose errors carry the response instead of a code."""
    response = getattr(error, "response", None)
    status = error.code if isinstance(error, exceptions.GoogleAPICallError) else getattr(response, "status_code", None)
    return status in RETRYABLE_STATUS or isinstance(error, RETRYABLE)


@contextlib.contextmanager
def google_errors(where: str, project: str) -> Iterator[None]:
    """Turns what Google's clients raise, and nobody here handled, into errors that say what to do."""
    try:
        yield
    except exceptions.RetryError as error:
        if isinstance(error.cause, exceptions.TooManyRequests):
            raise explain(where, project, error.cause) from error
        raise UnavailableError(f"{where}: no answer in time ({error.cause or error}); try again.") from error
    except exceptions.GoogleAPICallError as error:
        raise explain(where, project, error) from error
    except auth_exceptions.TransportError as error:
        raise UnavailableError(f"{where}: cannot be reached ({error}); check the network and try again.") from error
    except auth_exceptions.GoogleAuthError as error:
        if "getAccessToken" in str(error) and "denied" in str(error):
            raise NotAllowedError(
                "credentials: this account may not act as the service account that it impersonates "
                f"({_denied_account(error)}); write: gcloud iam service-accounts add-iam-policy-binding "
                "SERVICE_ACCOUNT --member=user:YOU --role=roles/iam.serviceAccountTokenCreator"
            ) from error
        raise CredentialsError(
            f"credentials: got none that work ({_first_line(error)}); write: gcloud auth application-default login"
        ) from error
    except (requests.RequestException, ConnectionError) as error:
        raise UnavailableError(f"{where}: cannot be reached ({error}); check the network and try again.") from error


@contextlib.contextmanager
def unless_ended(active: Callable[[], bool]) -> Iterator[None]:
    """Around the cancelling of what was active when it was read: a refusal is no error where it has ended since.

    active: reads it again.
    """
    try:
        yield
    except exceptions.BadRequest:
        if active():
            raise


def explain(where: str, project: str, error: exceptions.GoogleAPICallError) -> UserError:
    """One failed call, as what the user can do about it."""
    said = _said(error)
    if isinstance(error, exceptions.Unauthorized):
        return CredentialsError(f"{where}: not signed in ({said}); write: gcloud auth application-default login")
    if isinstance(error, exceptions.Forbidden):
        return _explain_forbidden(where, project, error, said)
    if isinstance(error, exceptions.TooManyRequests):
        return UnavailableError(
            f"{where}: a quota is used up ({said}); wait, or ask for more: docs/limits.md says which."
        )
    if is_retryable(error):
        return UnavailableError(f"{where}: no answer ({said}); try again.")
    return StorageError(f"{where}: {said}")


def _explain_forbidden(where: str, project: str, error: exceptions.Forbidden, said: str) -> UserError:
    if error.reason == "SERVICE_DISABLED" or "has not been used in project" in error.message:
        service = SERVICE.search(said)
        name = (error.metadata or {}).get("service") or (service[1] if service else "the service")
        return UserError(f"{where}: the API is off; write: gcloud services enable {name} --project={project}")
    permission = PERMISSION.search(error.message)
    region = REGION.search(error.message)
    if region:
        return UserError(
            f"{where}: got region {region[1]}, which is not there or not for this project; write region = one of "
            "docs/limits.md in terraform.tfvars, and apply."
        )
    if permission is None:
        return NotAllowedError(f"{where}: not allowed ({said}); ask for the role that allows it.")
    role = next((role for start, role in ROLES.items() if permission[1].startswith(start)), "a role that has it")
    return NotAllowedError(
        f"{where}: {permission[1]} is not allowed; write: gcloud projects add-iam-policy-binding {project} "
        f"--member=user:YOU --role={role}"
    )


def _denied_account(error: Exception) -> str:
    """google-auth passes the service's JSON on as an argument of its own error."""
    found = SENTENCE.search(" ".join(map(str, error.args)))
    return _first_line(json.loads(found[1]) if found else error)


def _said(error: exceptions.GoogleAPICallError) -> str:
    """The service's own sentence, without the request and the JSON around it."""
    inner = SENTENCE.search(error.message)
    return _first_line(json.loads(inner[1]) if inner else ASKED.sub("", error.message))


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or ["no reason given"])[0]
