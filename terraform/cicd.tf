# Keyless CI/CD: a workflow of one GitHub repository, on one ref, may start, follow and cancel runs, and nothing else.

locals {
  github = var.github_repository == null ? toset([]) : toset([var.github_repository])
  # Folders that a launch reads, and those that it writes.
  ci_folders = var.github_repository == null ? {} : {
    datasets = "roles/storage.objectViewer"
    models   = "roles/storage.objectViewer"
    recipes  = "roles/storage.objectUser"
    runs     = "roles/storage.objectUser"
    sweeps   = "roles/storage.objectUser"
  }
  ci_jobs = var.github_repository == null ? {} : local.job_names
}

resource "google_iam_workload_identity_pool" "github" {
  for_each = local.github

  workload_identity_pool_id = "${var.prefix}-github"
  display_name              = "GitHub Actions"
  depends_on                = [google_project_service.api]
}

resource "google_iam_workload_identity_pool_provider" "github" {
  for_each = local.github

  workload_identity_pool_id          = google_iam_workload_identity_pool.github[each.key].workload_identity_pool_id
  workload_identity_pool_provider_id = "github"
  display_name                       = "GitHub Actions"
  attribute_condition                = "assertion.repository == \"${each.key}\" && assertion.ref == \"${var.github_ref}\""
  attribute_mapping = {
    "google.subject"       = "assertion.sub"
    "attribute.repository" = "assertion.repository"
    "attribute.ref"        = "assertion.ref"
  }

  oidc {
    issuer_uri = "https://token.actions.githubusercontent.com"
  }
}

resource "google_service_account" "ci" {
  for_each = local.github

  account_id   = "${var.prefix}-ci"
  display_name = "${var.prefix}: starts runs from GitHub Actions"
  depends_on   = [google_project_service.api]
}

resource "google_service_account_iam_member" "github_is_ci" {
  for_each = local.github

  service_account_id = google_service_account.ci[each.key].name
  role               = "roles/iam.workloadIdentityUser"
  member             = "principalSet://iam.googleapis.com/${google_iam_workload_identity_pool.github[each.key].name}/attribute.repository/${each.key}"
}

# Execute and cancel, with other arguments, environment and timeout. It cannot change the job, nor its image.
resource "google_cloud_run_v2_job_iam_member" "ci_executes" {
  for_each = local.ci_jobs

  name     = each.value
  location = var.region
  role     = "roles/run.jobsExecutorWithOverrides"
  member   = google_service_account.ci[var.github_repository].member
}

resource "google_cloud_run_v2_job_iam_member" "ci_follows" {
  for_each = local.ci_jobs

  name     = each.value
  location = var.region
  role     = "roles/run.viewer"
  member   = google_service_account.ci[var.github_repository].member
}

resource "google_storage_managed_folder_iam_member" "ci" {
  for_each = local.ci_folders

  bucket         = google_storage_bucket.this.name
  managed_folder = google_storage_managed_folder.this[each.key].name
  role           = each.value
  member         = google_service_account.ci[var.github_repository].member
}
