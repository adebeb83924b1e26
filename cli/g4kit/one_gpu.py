"""Work on a finished run that takes one GPU, however many its training took: answering images, merging, evaluating."""

from dataclasses import dataclass
from typing import Any

from g4kit.errors import UserError
from g4trainer.limits import ACCELERATORS, smallest_machine
from g4trainer.planner import with_changes
from g4trainer.recipe import Recipe


@dataclass(frozen=True)
class OneGpu:
    """Where such work goes on."""

    recipe: Recipe
    """The run's, on the one GPU."""
    gpus: int = 1
    """Of the machine that is asked for and paid: on Vertex AI the smallest that has the card."""

    @property
    def note(self) -> str:
        """What the user should know before paying; empty where there is nothing."""
        if self.gpus == 1:
            return ""
        return f"; its smallest machine has {self.gpus} GPUs, of which one works: --accelerator takes another card"

    @property
    def requested(self) -> dict[str, Any]:
        """What a JobRequest says about the machine, and how it is got."""
        job = self.recipe.job
        return {
            "accelerator": job.accelerator,
            "timeout_s": job.timeout_s,
            "max_attempts": job.max_attempts,
            "gpus": self.gpus,
            "provisioning": job.provisioning,
            "max_wait_s": job.max_wait_s,
        }


def on_one_gpu(recipe: Recipe, target: str, accelerator: str | None = None, provisioning: str | None = None) -> OneGpu:
    """accelerator, provisioning: others than the run's.

    Raises UserError for what the target does not have: the local one takes what this machine has, and only Vertex AI
    has machines in several ways.
    """
    if provisioning and target != "vertex":
        raise UserError(f"--provisioning: got {provisioning} for target {target}, which has one way; leave it out.")
    if accelerator and target == "local":
        raise UserError(f"--accelerator: got {accelerator} for target local, which takes this machine's; leave it out.")
    known = [name for name, gpu in ACCELERATORS.items() if target in gpu.platforms]
    if accelerator and accelerator not in known:
        raise UserError(f'--accelerator: got "{accelerator}" for target {target}; write one of {", ".join(known)}.')
    card = accelerator or recipe.job.accelerator
    machine = smallest_machine(card) if target == "vertex" else None
    changes = [f'job.accelerator="{card}"', "job.gpus=1", "job.hosts=1"]
    if provisioning:
        changes.append(f'job.provisioning="{provisioning}"')
    return OneGpu(with_changes(recipe, changes), machine.gpus if machine else 1)
