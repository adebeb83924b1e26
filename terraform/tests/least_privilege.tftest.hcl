# Who may do what, with everything optional switched on. tests/infra checks the same over every resource of the plan.

mock_provider "google" {
  source = "./tests/mocks"

  override_resource {
    target = google_service_account.runtime
    values = {
      name   = "projects/my-project-123/serviceAccounts/g4kit-runtime@my-project-123.iam.gserviceaccount.com"
      member = "serviceAccount:g4kit-runtime@my-project-123.iam.gserviceaccount.com"
    }
  }
  override_resource {
    target = google_service_account.builder
    values = {
      name   = "projects/my-project-123/serviceAccounts/g4kit-builder@my-project-123.iam.gserviceaccount.com"
      member = "serviceAccount:g4kit-builder@my-project-123.iam.gserviceaccount.com"
    }
  }
}

variables {
  project_id        = "my-project-123"
  hub_token_secret  = true
  github_repository = "my-org/my-models"
  build_repository  = "projects/my-project-123/locations/us-central1/connections/github/repositories/my-models"
}

run "runtime" {
  assert {
    condition     = google_storage_bucket_iam_member.runtime.role == "roles/storage.objectUser" && google_storage_bucket_iam_member.runtime.bucket == "my-project-123-g4kit"
    error_message = "The runtime reads and writes objects of the one bucket, and cannot administer it."
  }
  assert {
    condition     = google_secret_manager_secret_iam_member.runtime[0].role == "roles/secretmanager.secretAccessor"
    error_message = "The runtime reads the one secret."
  }
}

run "builder" {
  assert {
    condition     = google_project_iam_member.builder_logs.role == "roles/logging.logWriter"
    error_message = "The only role on the project is to write logs."
  }
  assert {
    condition     = alltrue([for member in google_artifact_registry_repository_iam_member.builder : member.role == "roles/artifactregistry.writer"]) && length(google_artifact_registry_repository_iam_member.builder) == 2
    error_message = "The builder writes to the two repositories, and cannot delete from them."
  }
  assert {
    condition     = keys(google_storage_managed_folder_iam_member.builder) == ["builds", "recipes"]
    error_message = "The builder sees builds/ and recipes/, not the models, the data nor the runs."
  }
  assert {
    condition     = google_service_account_iam_member.builder_acts_as_runtime.role == "roles/iam.serviceAccountUser" && google_service_account_iam_member.builder_acts_as_runtime.member == google_service_account.builder.member && google_service_account_iam_member.builder_acts_as_runtime.service_account_id == google_service_account.runtime.name
    error_message = "Of the accounts, the builder may act as the runtime alone."
  }
}

run "ci" {
  assert {
    condition     = google_iam_workload_identity_pool_provider.github["my-org/my-models"].attribute_condition == "assertion.repository == \"my-org/my-models\" && assertion.ref == \"refs/heads/main\""
    error_message = "Only one repository, on one ref, is let in."
  }
  assert {
    condition     = google_service_account_iam_member.github_is_ci["my-org/my-models"].member == "principalSet://iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/g4kit-github/attribute.repository/my-org/my-models"
    error_message = "Only workflows of that repository become the CI account."
  }
  assert {
    condition     = alltrue([for member in google_cloud_run_v2_job_iam_member.ci_executes : member.role == "roles/run.jobsExecutorWithOverrides"]) && alltrue([for member in google_cloud_run_v2_job_iam_member.ci_follows : member.role == "roles/run.viewer"])
    error_message = "CI executes jobs and looks at them; it cannot change them."
  }
  assert {
    condition = { for folder, member in google_storage_managed_folder_iam_member.ci : folder => member.role } == {
      datasets = "roles/storage.objectViewer"
      models   = "roles/storage.objectViewer"
      recipes  = "roles/storage.objectUser"
      runs     = "roles/storage.objectUser"
      sweeps   = "roles/storage.objectUser"
    }
    error_message = "CI writes run directories and reads what a launch checks."
  }
}

run "no_ci_without_a_repository" {
  variables {
    github_repository = null
  }
  assert {
    condition     = length(google_service_account.ci) == 0 && length(google_storage_managed_folder_iam_member.ci) == 0 && length(google_cloud_run_v2_job_iam_member.ci_executes) == 0
    error_message = "Without a repository there is no CI account and no way in."
  }
}
