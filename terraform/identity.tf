# Who may do what. Every role is bound to one bucket, folder, repository, job or secret; writing logs is the one role
# that Google grants on projects only.

# ---- runtime: the jobs run as it ---------------------------------------------------------------------------------

resource "google_service_account" "runtime" {
  account_id   = "${var.prefix}-runtime"
  display_name = "${var.prefix}: runs training"
  depends_on   = [google_project_service.api]
}

resource "google_storage_bucket_iam_member" "runtime" {
  bucket = google_storage_bucket.this.name
  role   = "roles/storage.objectUser"
  member = google_service_account.runtime.member
}

# ---- builder: Cloud Build runs as it ----------------------------------------------------------------------------

resource "google_service_account" "builder" {
  account_id   = "${var.prefix}-builder"
  display_name = "${var.prefix}: builds images and deploys them to the jobs"
  depends_on   = [google_project_service.api]
}

resource "google_project_iam_member" "builder_logs" {
  project = var.project_id
  role    = "roles/logging.logWriter"
  member  = google_service_account.builder.member
}

resource "google_artifact_registry_repository_iam_member" "builder" {
  for_each = {
    images = google_artifact_registry_repository.images.repository_id
    cache  = google_artifact_registry_repository.cache.repository_id
  }

  location   = var.region
  repository = each.value
  role       = "roles/artifactregistry.writer"
  member     = google_service_account.builder.member
}

# builds/: the source it gets and the digest it leaves. recipes/: the recipe that it trains with.
resource "google_storage_managed_folder_iam_member" "builder" {
  for_each = toset(["builds", "recipes"])

  bucket         = google_storage_bucket.this.name
  managed_folder = google_storage_managed_folder.this[each.key].name
  role           = "roles/storage.objectUser"
  member         = google_service_account.builder.member
}

resource "google_cloud_run_v2_job_iam_member" "builder" {
  for_each = local.job_names

  name     = each.value
  location = var.region
  role     = "roles/run.developer"
  member   = google_service_account.builder.member
}

# Whoever changes a job's image must be allowed to act as the account that the job runs as.
resource "google_service_account_iam_member" "builder_acts_as_runtime" {
  service_account_id = google_service_account.runtime.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.builder.member
}
