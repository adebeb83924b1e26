# Every validation refuses what it should. tests/infra reads the messages of the same refusals.

mock_provider "google" {
  source = "./tests/mocks"
}

variables {
  project_id = "my-project-123"
}

run "project_id_empty" {
  command = plan
  variables {
    project_id = ""
  }
  expect_failures = [var.project_id]
}

run "project_id_upper_case" {
  command = plan
  variables {
    project_id = "My-Project"
  }
  expect_failures = [var.project_id]
}

run "project_id_short" {
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

run "prefix_long" {
  command = plan
  variables {
    prefix = "a-prefix-of-24-characters"
  }
  expect_failures = [var.prefix]
}

run "prefix_upper_case" {
  command = plan
  variables {
    prefix = "G4kit"
  }
  expect_failures = [var.prefix]
}

run "labels_upper_case" {
  command = plan
  variables {
    labels = { Team = "vision" }
  }
  expect_failures = [var.labels]
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

run "tools_cpu_not_offered" {
  command = plan
  variables {
    tools_cpu = 3
  }
  expect_failures = [var.tools_cpu]
}

run "tools_memory_above_the_most" {
  command = plan
  variables {
    tools_memory_gib = 64
  }
  expect_failures = [var.tools_memory_gib]
}

run "tools_timeout_in_hours" {
  command = plan
  variables {
    tools_timeout = "4h"
  }
  expect_failures = [var.tools_timeout]
}

run "image_by_tag" {
  command = plan
  variables {
    image = "us-central1-docker.pkg.dev/my-project-123/g4kit/trainer:latest"
  }
  expect_failures = [var.image]
}

run "bucket_upper_case" {
  command = plan
  variables {
    bucket_name = "My-Bucket"
  }
  expect_failures = [var.bucket_name]
}

run "bucket_with_scheme" {
  command = plan
  variables {
    bucket_name = "gs://my-bucket"
  }
  expect_failures = [var.bucket_name]
}

run "soft_delete_of_three_days" {
  command = plan
  variables {
    soft_delete_days = 3
  }
  expect_failures = [var.soft_delete_days]
}

run "retention_of_a_day" {
  command = plan
  variables {
    checkpoint_retention_days = 1
  }
  expect_failures = [var.checkpoint_retention_days]
}

run "keep_one_image" {
  command = plan
  variables {
    keep_images = 1
  }
  expect_failures = [var.keep_images]
}

run "key_of_another_region" {
  command = plan
  variables {
    kms_key = "projects/my-project-123/locations/global/keyRings/g4kit/cryptoKeys/g4kit"
  }
  expect_failures = [var.kms_key]
}

run "subnetwork_of_another_region" {
  command = plan
  variables {
    subnetwork = "projects/my-project-123/regions/us-east1/subnetworks/default"
  }
  expect_failures = [var.subnetwork]
}

run "range_too_small" {
  command = plan
  variables {
    subnetwork_range = "10.0.0.0/28"
  }
  expect_failures = [var.subnetwork_range]
}

run "range_no_cidr" {
  command = plan
  variables {
    subnetwork_range = "10.0.0.0"
  }
  expect_failures = [var.subnetwork_range]
}

run "egress_unknown" {
  command = plan
  variables {
    egress = "ALL"
  }
  expect_failures = [var.egress]
}

run "token_without_secret" {
  command = plan
  variables {
    hub_token_version = "1"
  }
  expect_failures = [var.hub_token_version]
}

run "token_itself" {
  command = plan
  variables {
    hub_token_secret  = true
    hub_token_version = "hf_abcdef"
  }
  expect_failures = [var.hub_token_version]
}

run "repository_as_address" {
  command = plan
  variables {
    github_repository = "https://github.com/my-org/my-models"
  }
  expect_failures = [var.github_repository]
}

run "ref_is_a_branch_name" {
  command = plan
  variables {
    github_ref = "main"
  }
  expect_failures = [var.github_ref]
}

run "ref_with_a_wildcard" {
  command = plan
  variables {
    github_ref = "refs/heads/*"
  }
  expect_failures = [var.github_ref]
}

run "build_repository_by_name" {
  command = plan
  variables {
    build_repository = "my-org/my-models"
  }
  expect_failures = [var.build_repository]
}

run "recipe_no_toml" {
  command = plan
  variables {
    build_recipe = "recipes/pets.yaml"
  }
  expect_failures = [var.build_recipe]
}

run "mail_without_domain" {
  command = plan
  variables {
    alert_emails = ["ml-team"]
  }
  expect_failures = [var.alert_emails]
}

run "billing_account_number" {
  command = plan
  variables {
    budget_billing_account = "1234567890"
  }
  expect_failures = [var.budget_billing_account]
}

run "budget_zero" {
  command = plan
  variables {
    budget_amount = 0
  }
  expect_failures = [var.budget_amount]
}
