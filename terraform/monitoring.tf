resource "google_monitoring_notification_channel" "email" {
  for_each = var.alert_emails

  display_name = "${var.prefix}: ${each.key}"
  type         = "email"
  labels       = { email_address = each.key }
  user_labels  = local.labels
  depends_on   = [google_project_service.api]
}

# An execution fails once its retries are used up: a stop with a checkpoint, and a resume, are no failure.
resource "google_monitoring_alert_policy" "failed_execution" {
  count = var.alert_on_failure ? 1 : 0

  display_name          = "${var.prefix}: an execution failed"
  combiner              = "OR"
  severity              = "ERROR"
  notification_channels = [for channel in google_monitoring_notification_channel.email : channel.name]
  user_labels           = local.labels

  conditions {
    display_name = "Failed executions"
    condition_threshold {
      filter = join(" AND ", [
        "resource.type = \"cloud_run_job\"",
        "resource.labels.job_name = monitoring.regex.full_match(\"${join("|", values(local.job_names))}\")",
        "metric.type = \"run.googleapis.com/job/completed_execution_count\"",
        "metric.labels.result = \"failed\"",
      ])
      comparison      = "COMPARISON_GT"
      threshold_value = 0
      duration        = "0s"
      aggregations {
        alignment_period     = "300s"
        per_series_aligner   = "ALIGN_DELTA"
        cross_series_reducer = "REDUCE_SUM"
        group_by_fields      = ["resource.label.job_name"]
      }
    }
  }

  documentation {
    subject = "${var.prefix}: an execution failed"
    content = "`g4kit runs` lists the runs, `g4kit logs RUN` says why, `g4kit resume RUN` goes on from the last checkpoint."
  }

  alert_strategy {
    auto_close = "86400s"
  }

  depends_on = [google_project_service.api]
}

# It warns; it stops nothing. Google's figures are hours late.
resource "google_billing_budget" "monthly" {
  count = var.budget_billing_account == null ? 0 : 1

  billing_account = var.budget_billing_account
  display_name    = "${var.prefix}: ${var.project_id}"

  budget_filter {
    projects = ["projects/${data.google_project.this[0].number}"]
  }

  amount {
    specified_amount {
      units = tostring(var.budget_amount)
    }
  }

  dynamic "threshold_rules" {
    for_each = [0.5, 0.9, 1.0]
    content {
      threshold_percent = threshold_rules.value
    }
  }

  dynamic "all_updates_rule" {
    for_each = length(var.alert_emails) > 0 ? [1] : []
    content {
      monitoring_notification_channels = [for channel in google_monitoring_notification_channel.email : channel.name]
    }
  }
}
