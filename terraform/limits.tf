# What Cloud Run gives each GPU, from the file that the command line and docs/limits.md read too.

locals {
  limits     = jsondecode(file("${path.module}/../trainer/g4trainer/limits.json"))
  job_limits = local.limits.job
  gpus       = { for name, gpu in local.limits.accelerators : name => gpu if contains(gpu.platforms, "cloudrun") }
  tools_cpu  = [for count in local.limits.without_gpu.cpu : tostring(count)]

  # cpu and memory_gib: null stands for the least that the accelerator asks for.
  job_defaults = {
    accelerator                   = "nvidia-rtx-pro-6000"
    cpu                           = null
    memory_gib                    = null
    timeout                       = "3600s"
    max_retries                   = "3"
    parallelism                   = "1"
    gpu_zonal_redundancy_disabled = "true"
  }

  regions_text = join("; ", [for name, gpu in local.gpus : "${name}: ${join(", ", gpu.regions)}"])
  cpu_text     = join(", ", [for name, gpu in local.gpus : "${gpu.min_cpu} to ${local.job_limits.max_cpu} for ${name}"])
  memory_text  = join(", ", [for name, gpu in local.gpus : "${gpu.min_memory_gib} to ${local.job_limits.max_memory_gib} for ${name}"])
}
