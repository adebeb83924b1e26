# The one bucket: base models, data, recipes and runs.

resource "google_storage_bucket" "this" {
  name                        = coalesce(var.bucket_name, "${var.project_id}-${var.prefix}")
  location                    = var.region # reading weights from another region is slow and billed
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = var.bucket_force_destroy
  labels                      = local.labels

  # Checkpoints are rotated: what is deleted must stop billing.
  soft_delete_policy {
    retention_duration_seconds = var.soft_delete_days * 86400
  }

  versioning {
    enabled = var.bucket_versioning
  }

  dynamic "encryption" {
    for_each = var.kms_key[*]
    content {
      default_kms_key_name = encryption.value
    }
  }

  # Checkpoints of old runs go, their marker included; the final adapter has a name of its own.
  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      age            = var.checkpoint_retention_days
      matches_prefix = ["runs/"]
      matches_suffix = ["/COMMITTED.json", "/adapter.safetensors", "/optimizer.safetensors", "/state.json", "/trainer_state.json"]
    }
  }

  # Source archives that `gcloud builds submit` leaves.
  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      age            = 14
      matches_prefix = ["builds/source/"]
    }
  }

  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }
    condition {
      age = 7
    }
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      days_since_noncurrent_time = 7
      with_state                 = "ARCHIVED"
    }
  }

  depends_on = [google_project_service.api, google_kms_crypto_key_iam_member.agent]
}

# Folders that identities are let into one by one. force_destroy drops the folder's policy; the objects stay.
resource "google_storage_managed_folder" "this" {
  for_each = toset(["builds", "datasets", "models", "recipes", "runs", "sweeps"])

  bucket        = google_storage_bucket.this.name
  name          = "${each.key}/"
  force_destroy = true
}
