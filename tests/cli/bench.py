"""What a test of the command line works with."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from g4kit.cloud.local import LocalCloud
from g4kit.main import cli
from g4trainer import gemma

STANDIN = (sys.executable, str(Path(__file__).with_name("standin_trainer.py")))
RECIPE = """\
name = "tiny"
[model]
id = "tiny-gemma4"
[data]
dataset = "digits"
[job]
accelerator = "nvidia-l4"
timeout_s = 60
max_attempts = 2
"""


def tiny_config() -> dict[str, Any]:
    """config.json of an E2B with four narrow layers, which fits any machine."""
    config = gemma.true_config("E2B")
    config["text_config"] |= {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 1,
        "intermediate_size": 128,
        "vocab_size": 512,
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 16,
    }
    config["vision_config"] |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config["vision_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return config


@dataclass
class Bench:
    """What a test of the command line works with."""

    folder: Path
    cloud: LocalCloud

    @property
    def root(self) -> Path:
        return self.cloud.bucket.root

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.toml"

    def environ(self, plan: list[dict[str, Any]] | None = None) -> dict[str, str]:
        """Environment of a command; plan: what the stand-in trainer does, see standin_trainer.py."""
        own = {"G4KIT_ROOT": str(self.root), "G4KIT_TRAINER": " ".join(STANDIN)}
        return own | ({"STANDIN_PLAN": json.dumps(plan)} if plan else {})

    def __call__(
        self, *arguments: str | Path, plan: list[dict[str, Any]] | None = None, env: dict[str, str] | None = None
    ) -> Result:
        """Runs a command. An exception that is no exit would be a traceback: it is raised here."""
        result = CliRunner().invoke(
            cli, [str(argument) for argument in arguments], env=self.environ(plan) | (env or {})
        )
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def files(self) -> list[str]:
        """Every file below the root, but for the target's own."""
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return sorted(path.as_posix() for path in paths if path.parts[0] != "local")
