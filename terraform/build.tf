# A push to github_ref builds the image, tests it, deploys it and, with build_recipe, trains with it (cloudbuild.yaml).

locals {
  build_substitutions = {
    _BUCKET  = google_storage_bucket.this.name
    _BUILDER = google_service_account.builder.id
    _CACHE   = local.cache_name
    _IMAGE   = local.image_name
    _JOB     = google_cloud_run_v2_job.gpu[keys(local.jobs)[0]].name
    _JOBS    = join(" ", values(local.job_names))
    _REGION  = var.region
  }
}

resource "google_cloudbuild_trigger" "push" {
  count = var.build_repository == null ? 0 : 1

  name            = "${var.prefix}-push"
  description     = "Builds, tests and deploys the trainer image"
  location        = var.region
  service_account = google_service_account.builder.id
  filename        = "cloudbuild.yaml"
  included_files  = ["Dockerfile", "cloudbuild.yaml", "requirements-train.lock", "trainer/**", "recipes/**"]
  substitutions   = merge(local.build_substitutions, { _RECIPE = var.build_recipe })

  repository_event_config {
    repository = var.build_repository
    push {
      branch = startswith(var.github_ref, "refs/heads/") ? "^${replace(trimprefix(var.github_ref, "refs/heads/"), ".", "\\.")}$" : null
      tag    = startswith(var.github_ref, "refs/tags/") ? "^${replace(trimprefix(var.github_ref, "refs/tags/"), ".", "\\.")}$" : null
    }
  }
}
