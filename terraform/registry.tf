# Images are deployed by digest. The newest ones are kept whatever their age, so the one in use is.

resource "google_artifact_registry_repository" "images" {
  repository_id = var.prefix
  location      = var.region
  format        = "DOCKER"
  description   = "Trainer images of ${var.prefix}"
  kms_key_name  = var.kms_key
  labels        = local.labels

  cleanup_policies {
    id     = "keep-newest"
    action = "KEEP"
    most_recent_versions {
      keep_count = var.keep_images
    }
  }

  cleanup_policies {
    id     = "delete-old"
    action = "DELETE"
    condition {
      tag_state  = "ANY"
      older_than = "2592000s" # 30 days
    }
  }

  depends_on = [google_project_service.api, google_kms_crypto_key_iam_member.agent]
}

# Apart from the images, so that layers that only builds read neither crowd them out nor live as long.
resource "google_artifact_registry_repository" "cache" {
  repository_id = "${var.prefix}-cache"
  location      = var.region
  format        = "DOCKER"
  description   = "Build cache of ${var.prefix}"
  kms_key_name  = var.kms_key
  labels        = local.labels

  cleanup_policies {
    id     = "delete-old"
    action = "DELETE"
    condition {
      tag_state  = "ANY"
      older_than = "1209600s" # 14 days
    }
  }

  depends_on = [google_project_service.api, google_kms_crypto_key_iam_member.agent]
}

locals {
  image_name = "${var.region}-docker.pkg.dev/${var.project_id}/${google_artifact_registry_repository.images.repository_id}/trainer"
  cache_name = "${var.region}-docker.pkg.dev/${var.project_id}/${google_artifact_registry_repository.cache.repository_id}/trainer"
}
