"""Memory and rate of `g4kit stage` and `g4kit fetch` against the live fake on this machine.

    PYTHONPATH=tests python benchmarks/transfer.py --gb 4

The server shares the machine, so the rate is a lower bound; the memory is the command's own, the highest it reached.
Then one large file over a line that gives each connection so much and no more: in one part, and in parts at once.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fakes.google_cloud import FakeGoogleCloud
from g4trainer.rundir import file_entry

RUN = "digits-tiny-20260101-120000-0a1b"
PARTS = 4
MEASURED = """\
import atexit, os, re, sys
from pathlib import Path
from g4kit.cloud import google_download
from g4kit.main import main
google_download.PARTS = int(os.environ.get("PARTS", google_download.PARTS))
peak = lambda: re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
atexit.register(lambda: sys.stderr.write(f"peak {peak()} kB"))
main()
"""
"""The command line, which says at its end the most memory that it had. What the parent had would count in its usage."""
SLOW_PAUSE_S = 0.01
"""Before each 256 KiB that a connection is sent: at most 26 MB/s."""
BLOCK = random.Random(0).randbytes(1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, default=4.0, help="size of all files together, in 10^9 bytes")
    gb: float = parser.parse_args().gb
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        google = FakeGoogleCloud(folder / "google")
        (folder / "deployment.json").write_text(json.dumps(google.deployment.model_dump()))
        own = {"G4KIT_DEPLOYMENT": str(folder / "deployment.json"), "G4KIT_EMULATOR_HOST": google.server.url}
        environ = os.environ | own | {"XDG_CACHE_HOME": str(folder / "cache")}
        source = make(folder / "source", int(gb * 1e9) // PARTS)
        rows = [measure("stage", ["stage", "data", str(source)], environ, gb)]
        run = google.mount / "runs" / RUN
        run.mkdir(parents=True)
        source.rename(run / "adapter")
        artifacts = {f"adapter/{path.name}": file_entry(path) for path in (run / "adapter").iterdir()}
        (run / "results.json").write_text(json.dumps({"state": "succeeded", "artifacts": artifacts}))
        (run / "recipe.json").write_text("{}")
        rows.append(measure("fetch", ["fetch", RUN, "--out", str(folder / "out")], environ, gb))
        for path in sorted((run / "adapter").iterdir())[1:]:
            path.unlink()
        one = f"adapter/{next((run / 'adapter').iterdir()).name}"
        (run / "results.json").write_text(json.dumps({"state": "succeeded", "artifacts": {one: artifacts[one]}}))
        google.storage.pause_s = SLOW_PAUSE_S
        for parts in ("1", "2", "4"):
            name, out = f"fetch of one file, slow line, parts: {parts}", str(folder / f"slow-{parts}")
            rows.append(measure(name, ["fetch", RUN, "--out", out], environ | {"PARTS": parts}, gb / PARTS))
        google.close()
    print("\n".join(["| | GB | s | MB/s | peak MB |", "|---|---|---|---|---|", *rows]))


def make(folder: Path, size: int) -> Path:
    """A data set of a few large files."""
    folder.mkdir()
    for number in range(PARTS):
        with (folder / f"{'train' if number else 'test'}-{number}.parquet").open("wb") as file:
            file.write(number.to_bytes(1, "big"))
            for _ in range(size // len(BLOCK)):
                file.write(BLOCK)
    return folder


def measure(name: str, command: list[str], environ: dict[str, str], gb: float) -> str:
    """A row of the table. The peak is of this one process."""
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], env=environ, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - begun
    if ended.returncode:
        raise SystemExit(f"{name}: ended with status {ended.returncode}: {ended.stderr}")
    peak_mb = int(ended.stderr.rpartition("peak ")[2].split()[0]) / 1000
    return f"| {name} | {gb:g} | {seconds:.1f} | {gb * 1000 / seconds:.0f} | {peak_mb:.0f} |"


if __name__ == "__main__":
    main()
