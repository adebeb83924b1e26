"""GoogleCloud: a bucket of Cloud Storage, jobs of Cloud Run, logs of Cloud Logging.

Each of the three loads its client when it is first used: a command that only reads the bucket waits for no other.
"""

from functools import cached_property
from typing import TYPE_CHECKING

from g4kit.cloud.base import Finding
from g4kit.cloud.google_client import Access

if TYPE_CHECKING:
    from g4kit.cloud.google_bucket import GoogleBucket
    from g4kit.cloud.google_jobs import GoogleJobs
    from g4kit.cloud.google_logs import GoogleLogs


class GoogleCloud:
    target = "cloudrun"

    def __init__(self, access: Access) -> None:
        self._access = access

    def findings(self) -> list[Finding]:
        from g4kit.cloud.google_checks import findings

        return findings(self._access, self.bucket, self.jobs)

    @cached_property
    def bucket(self) -> "GoogleBucket":
        from g4kit.cloud.google_bucket import GoogleBucket

        return GoogleBucket(self._access)

    @cached_property
    def jobs(self) -> "GoogleJobs":
        from g4kit.cloud.google_jobs import GoogleJobs

        return GoogleJobs(self._access, self.bucket)

    @cached_property
    def logs(self) -> "GoogleLogs":
        from g4kit.cloud.google_logs import GoogleLogs

        return GoogleLogs(self._access, self.jobs)
