"""The process that fine-tunes Gemma 4: given a run directory as a path, it knows nothing else."""

__version__ = "0.1.0"
