# Every validation refuses what it should. All refusals of a plan are reported at once, so a run breaks several variables,
# each in one way; `jobs` has many rules, and a run of its own for each. tests/infra reads the messages.

mock_provider "google" {
  source = "./tests/mocks"
}

variables {
  project_id = "my-project-123"
}

run "bad_variables" {
  command = plan
  variables {
    project_id                = ""
    prefix                    = "a-prefix-of-24-characters"
    labels                    = { Team = "vision" }
    tools_cpu                 = 3
    tools_timeout             = "4h"
    image                     = "us-central1-docker.pkg.dev/my-project-123/g4kit/trainer:latest"
    bucket_name               = "My-Bucket"
    soft_delete_days          = 3
    checkpoint_retention_days = 1
    keep_images               = 1
    kms_key                   = "projects/my-project-123/locations/global/keyRings/g4kit/cryptoKeys/g4kit"
    subnetwork                = "projects/my-project-123/regions/us-east1/subnetworks/default"
    subnetwork_range          = "10.0.0.0/28"
    egress                    = "ALL"
    hub_token_version         = "1"
    github_repository         = "https://github.com/my-org/my-models"
    github_ref                = "main"
    build_repository          = "my-org/my-models"
    build_recipe              = "recipes/pets.yaml"
    alert_emails              = ["ml-team"]
    budget_billing_account    = "1234567890"
    budget_amount             = 0
  }
  expect_failures = [
    var.project_id, var.prefix, var.labels, var.tools_cpu, var.tools_timeout, var.image, var.bucket_name,
    var.soft_delete_days, var.checkpoint_retention_days, var.keep_images, var.kms_key, var.subnetwork,
    var.subnetwork_range, var.egress, var.hub_token_version, var.github_repository, var.github_ref,
    var.build_repository, var.build_recipe, var.alert_emails, var.budget_billing_account, var.budget_amount,
  ]
}

run "more_bad_variables" {
  command = plan
  variables {
    project_id        = "My-Project"
    prefix            = "G4kit"
    bucket_name       = "gs://my-bucket"
    subnetwork_range  = "10.0.0.0"
    hub_token_secret  = true
    hub_token_version = "hf_abcdef"
    github_ref        = "refs/heads/*"
    tools_memory_gib  = 64
  }
  expect_failures = [
    var.project_id, var.prefix, var.bucket_name, var.subnetwork_range, var.hub_token_version, var.github_ref,
    var.tools_memory_gib,
  ]
}

run "still_more_bad_variables" {
  command = plan
  variables {
    project_id = "abc"
  }
  expect_failures = [var.project_id]
}

run "region_is_a_zone" {
  command = plan
  variables {
    region = "us-central1-a"
  }
  expect_failures = [var.region]
}

run "region_is_a_multi_region" {
  command = plan
  variables {
    region = "US"
  }
  expect_failures = [var.region]
}

run "region_without_the_gpu" {
  command = plan
  variables {
    region = "us-east4"
  }
  expect_failures = [var.jobs]
}

run "region_without_an_l4" {
  command = plan
  variables {
    region = "us-west1"
    jobs   = { train = { accelerator = "nvidia-l4" } }
  }
  expect_failures = [var.jobs]
}

run "jobs_empty" {
  command = plan
  variables {
    jobs = {}
  }
  expect_failures = [var.jobs]
}

run "jobs_named_tools" {
  command = plan
  variables {
    jobs = { tools = {} }
  }
  expect_failures = [var.jobs]
}

run "jobs_name_upper_case" {
  command = plan
  variables {
    jobs = { Train = {} }
  }
  expect_failures = [var.jobs]
}

run "jobs_key_misspelt" {
  command = plan
  variables {
    jobs = { train = { acelerator = "nvidia-l4" } }
  }
  expect_failures = [var.jobs]
}

run "accelerator_unknown" {
  command = plan
  variables {
    jobs = { train = { accelerator = "nvidia-t4" } }
  }
  expect_failures = [var.jobs]
}

run "accelerator_of_vertex" {
  command = plan
  variables {
    jobs = { train = { accelerator = "nvidia-b200" } }
  }
  expect_failures = [var.jobs]
}

run "cpu_below_the_gpus_least" {
  command = plan
  variables {
    jobs = { train = { cpu = 8 } }
  }
  expect_failures = [var.jobs]
}

run "cpu_above_the_most" {
  command = plan
  variables {
    jobs = { train = { cpu = 45 } }
  }
  expect_failures = [var.jobs]
}

run "cpu_with_a_unit" {
  command = plan
  variables {
    jobs = { train = { cpu = "20 vCPU" } }
  }
  expect_failures = [var.jobs]
}

run "memory_below_the_gpus_least" {
  command = plan
  variables {
    jobs = { train = { memory_gib = 32 } }
  }
  expect_failures = [var.jobs]
}

run "memory_above_the_most" {
  command = plan
  variables {
    jobs = { train = { memory_gib = 177 } }
  }
  expect_failures = [var.jobs]
}

run "memory_with_a_unit" {
  command = plan
  variables {
    jobs = { train = { memory_gib = "80Gi" } }
  }
  expect_failures = [var.jobs]
}

run "timeout_in_hours" {
  command = plan
  variables {
    jobs = { train = { timeout = "1h" } }
  }
  expect_failures = [var.jobs]
}

run "timeout_without_a_unit" {
  command = plan
  variables {
    jobs = { train = { timeout = "3600" } }
  }
  expect_failures = [var.jobs]
}

run "timeout_above_a_week" {
  command = plan
  variables {
    jobs = { train = { timeout = "604801s" } }
  }
  expect_failures = [var.jobs]
}

run "timeout_zero" {
  command = plan
  variables {
    jobs = { train = { timeout = "0s" } }
  }
  expect_failures = [var.jobs]
}

run "retries_above_the_most" {
  command = plan
  variables {
    jobs = { train = { max_retries = 11 } }
  }
  expect_failures = [var.jobs]
}

run "retries_negative" {
  command = plan
  variables {
    jobs = { train = { max_retries = -1 } }
  }
  expect_failures = [var.jobs]
}

run "parallelism_zero" {
  command = plan
  variables {
    jobs = { train = { parallelism = 0 } }
  }
  expect_failures = [var.jobs]
}

run "redundancy_is_no_bool" {
  command = plan
  variables {
    jobs = { train = { gpu_zonal_redundancy_disabled = "no" } }
  }
  expect_failures = [var.jobs]
}
