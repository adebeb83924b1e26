"""Names of the environment variables that choose a target."""

DEPLOYMENT = "G4KIT_DEPLOYMENT"
"""The file that holds `terraform output -json`, or the folder to ask Terraform in."""
EMULATOR = "G4KIT_EMULATOR_HOST"
"""Names an address, for example http://127.0.0.1:8080, that stands in for Google's services; nobody signs in there."""
