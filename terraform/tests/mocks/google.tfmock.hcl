# Values in the form that Google gives them, so that what is built from them is checked too.

mock_resource "google_service_account" {
  defaults = {
    name   = "projects/my-project-123/serviceAccounts/mocked@my-project-123.iam.gserviceaccount.com"
    id     = "projects/my-project-123/serviceAccounts/mocked@my-project-123.iam.gserviceaccount.com"
    email  = "mocked@my-project-123.iam.gserviceaccount.com"
    member = "serviceAccount:mocked@my-project-123.iam.gserviceaccount.com"
  }
}

mock_resource "google_iam_workload_identity_pool" {
  defaults = {
    name = "projects/123456789012/locations/global/workloadIdentityPools/g4kit-github"
  }
}

mock_data "google_project" {
  defaults = {
    number = "123456789012"
  }
}
