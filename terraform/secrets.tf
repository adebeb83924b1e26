# A Hugging Face token for models that need one. Terraform makes the empty secret; its value is added with
# `gcloud secrets versions add`, so that it is in no state file.

resource "google_secret_manager_secret" "hub_token" {
  count = var.hub_token_secret ? 1 : 0

  secret_id = "${var.prefix}-hub-token"
  labels    = local.labels

  replication {
    user_managed {
      replicas {
        location = var.region
        dynamic "customer_managed_encryption" {
          for_each = var.kms_key[*]
          content {
            kms_key_name = customer_managed_encryption.value
          }
        }
      }
    }
  }

  depends_on = [google_project_service.api, google_kms_crypto_key_iam_member.agent]
}

resource "google_secret_manager_secret_iam_member" "runtime" {
  count = var.hub_token_secret ? 1 : 0

  secret_id = google_secret_manager_secret.hub_token[0].id
  role      = "roles/secretmanager.secretAccessor"
  member    = google_service_account.runtime.member
}
