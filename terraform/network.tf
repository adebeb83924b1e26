# A network whose only way out is Private Google Access: GPU jobs reach the bucket at full speed, and nothing else.
# It has no address translation and no external addresses, so it bills nothing while idle.

resource "google_compute_network" "this" {
  count = var.subnetwork == null ? 1 : 0

  name                    = var.prefix
  auto_create_subnetworks = false
  depends_on              = [google_project_service.api]
}

resource "google_compute_subnetwork" "this" {
  count = var.subnetwork == null ? 1 : 0

  name                     = var.prefix
  region                   = var.region
  network                  = google_compute_network.this[0].id
  ip_cidr_range            = var.subnetwork_range
  private_ip_google_access = true
}

locals {
  subnetwork = var.subnetwork == null ? google_compute_subnetwork.this[0].id : var.subnetwork
}
