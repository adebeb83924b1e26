# One Cloud Run Job for each entry of `jobs`, and one without a GPU for everything else. All run the same image.

locals {
  jobs = { for name, job in var.jobs : name => {
    accelerator                   = merge(local.job_defaults, job).accelerator
    cpu                           = tonumber(coalesce(merge(local.job_defaults, job).cpu, local.gpus[merge(local.job_defaults, job).accelerator].min_cpu))
    memory_gib                    = tonumber(coalesce(merge(local.job_defaults, job).memory_gib, local.gpus[merge(local.job_defaults, job).accelerator].min_memory_gib))
    timeout_s                     = tonumber(trimsuffix(merge(local.job_defaults, job).timeout, "s"))
    max_retries                   = tonumber(merge(local.job_defaults, job).max_retries)
    parallelism                   = tonumber(merge(local.job_defaults, job).parallelism)
    gpu_zonal_redundancy_disabled = tobool(merge(local.job_defaults, job).gpu_zonal_redundancy_disabled)
  } }

  job_names = merge(
    { for name, job in google_cloud_run_v2_job.gpu : name => job.name },
    { tools = google_cloud_run_v2_job.tools.name },
  )

  first_image = coalesce(var.image, "us-docker.pkg.dev/cloudrun/container/job:latest")
  mount_path  = "/mnt/gcs"

  # The image's user is 10001:10001 (Dockerfile). Metadata may be 5 s old, not Cloud Run's 60: an attempt waits that
  # long before it believes that it is alone. Objects from elsewhere come without folder objects: implicit-dirs.
  metadata_age_s = 5
  mount_options = [
    "uid=10001",
    "gid=10001",
    "file-mode=640",
    "dir-mode=750",
    "implicit-dirs",
    "metadata-cache-ttl-secs=${local.metadata_age_s}",
  ]
}

resource "google_cloud_run_v2_job" "gpu" {
  for_each = local.jobs

  name                = "${var.prefix}-${each.key}"
  location            = var.region
  deletion_protection = var.deletion_protection
  labels              = local.labels

  template {
    task_count  = 1
    parallelism = each.value.parallelism
    labels      = local.labels

    template {
      service_account               = google_service_account.runtime.email
      timeout                       = "${each.value.timeout_s}s"
      max_retries                   = each.value.max_retries
      execution_environment         = "EXECUTION_ENVIRONMENT_GEN2"
      encryption_key                = var.kms_key
      gpu_zonal_redundancy_disabled = each.value.gpu_zonal_redundancy_disabled

      node_selector {
        accelerator = each.value.accelerator
      }

      containers {
        name  = "trainer"
        image = local.first_image
        args  = ["selftest"] # an execution without arguments of its own checks the image on the GPU

        resources {
          limits = {
            cpu              = tostring(each.value.cpu)
            memory           = "${each.value.memory_gib}Gi"
            "nvidia.com/gpu" = tostring(local.job_limits.gpus_per_instance)
          }
        }

        env {
          name  = "G4KIT_ROOT"
          value = local.mount_path
        }
        env {
          name  = "G4KIT_METADATA_AGE_S"
          value = tostring(local.metadata_age_s)
        }
        env {
          name  = "G4KIT_ATTEMPT_TIMEOUT_S"
          value = tostring(each.value.timeout_s)
        }

        volume_mounts {
          name       = "bucket"
          mount_path = local.mount_path
        }
      }

      volumes {
        name = "bucket"
        gcs {
          bucket        = google_storage_bucket.this.name
          read_only     = false
          mount_options = local.mount_options
        }
      }

      vpc_access {
        egress = var.egress
        network_interfaces {
          subnetwork = local.subnetwork
        }
      }
    }
  }

  lifecycle {
    # A build deploys its image; gcloud leaves its name and version.
    ignore_changes = [template[0].template[0].containers[0].image, client, client_version]
  }

  depends_on = [google_storage_bucket_iam_member.runtime, google_kms_crypto_key_iam_member.agent]
}

resource "google_cloud_run_v2_job" "tools" {
  name                = "${var.prefix}-tools"
  location            = var.region
  deletion_protection = var.deletion_protection
  labels              = local.labels

  template {
    task_count  = 1
    parallelism = 1
    labels      = local.labels

    template {
      service_account       = google_service_account.runtime.email
      timeout               = var.tools_timeout
      max_retries           = 1
      execution_environment = "EXECUTION_ENVIRONMENT_GEN2"
      encryption_key        = var.kms_key

      containers {
        name  = "trainer"
        image = local.first_image
        args  = ["selftest"]

        resources {
          limits = {
            cpu    = var.tools_cpu
            memory = "${var.tools_memory_gib}Gi"
          }
        }

        env {
          name  = "G4KIT_ROOT"
          value = local.mount_path
        }
        env {
          name  = "G4KIT_METADATA_AGE_S"
          value = tostring(local.metadata_age_s)
        }
        env {
          name  = "G4KIT_ATTEMPT_TIMEOUT_S"
          value = trimsuffix(var.tools_timeout, "s")
        }
        dynamic "env" {
          for_each = var.hub_token_version[*]
          content {
            name = "HF_TOKEN"
            value_source {
              secret_key_ref {
                secret  = google_secret_manager_secret.hub_token[0].secret_id
                version = env.value
              }
            }
          }
        }

        volume_mounts {
          name       = "bucket"
          mount_path = local.mount_path
        }
      }

      volumes {
        name = "bucket"
        gcs {
          bucket        = google_storage_bucket.this.name
          read_only     = false
          mount_options = local.mount_options
        }
      }

      # No network of ours: this job reads model hubs on the internet.
    }
  }

  lifecycle {
    ignore_changes = [template[0].template[0].containers[0].image, client, client_version]
  }

  depends_on = [
    google_storage_bucket_iam_member.runtime,
    google_secret_manager_secret_iam_member.runtime,
    google_kms_crypto_key_iam_member.agent,
  ]
}

check "gpu_timeout" {
  assert {
    condition     = alltrue([for job in local.jobs : job.timeout_s <= local.job_limits.task_timeout_warn_s])
    error_message = "jobs: got a timeout above ${local.job_limits.task_timeout_warn_s}s; sources differ on whether a GPU task may run that long. Shorter attempts that resume are safe: docs/limits.md."
  }
}
