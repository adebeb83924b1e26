"""docs/cost.md, from the tables that the command line goes by: `python -m g4kit.cost_page > docs/cost.md`."""

import sys

from g4kit.budget import GRACE_S
from g4kit.pricing import MINIMUM_S, OWN_TABLE, CloudRunRegion, Table, VertexRegion, price_table, prices_of
from g4trainer import calibration
from g4trainer.limits import ACCELERATORS

UNKNOWN = "?"


def markdown() -> str:
    """The page."""
    table = price_table(environ={})
    names = [name for name, gpu in ACCELERATORS.items() if "cloudrun" in gpu.platforms]
    return _PAGE.format(
        regions="\n".join(_region_row(name, region) for name, region in table.cloudrun.items()),
        gpus="\n".join(row for name in names for row in _gpu_rows(name, table)),
        vertex="\n".join(row for name, region in table.vertex.items() for row in _vertex_rows(name, region)),
        notes=_notes(),
        minimum=MINIMUM_S,
        grace=GRACE_S,
        calibration=calibration.markdown(),
        sources="\n".join(sorted({f"- <{one.source}>" for one in (*table.cloudrun.values(), *table.vertex.values())})),
    )


def _region_row(name: str, region: CloudRunRegion) -> str:
    figures = (region.vcpu_s, region.gib_s, region.storage_gib_month)
    return f"| `{name}` | {region.as_of} | {' | '.join(map(_usd, figures))} |"


def _gpu_rows(name: str, table: Table) -> list[str]:
    """One for each region that has the GPU."""
    gpu, rows = ACCELERATORS[name], []
    for place in gpu.regions:
        region = table.cloudrun.get(place, CloudRunRegion(as_of="never", source="none"))
        prices = prices_of(name, region=place, table=table)
        hour = f"{prices.hour:.2f}" if prices else UNKNOWN
        bare, redundant = region.gpu_s.get(name), region.gpu_zonal_redundancy_s.get(name)
        least = f"{gpu.min_cpu} vCPU, {gpu.min_memory_gib} GiB"
        rows.append(f"| `{name}` | `{place}` | {_usd(bare)} | {_usd(redundant)} | {least} | {hour} |")
    return rows


def _vertex_rows(name: str, region: VertexRegion) -> list[str]:
    kinds = (region.machine_hour, region.spot_machine_hour, region.flex_start_machine_hour)
    machines = dict.fromkeys(machine for kind in kinds for machine in kind)
    return [
        f"| `{name}` | {region.as_of} | `{machine}` | {' | '.join(_usd(kind.get(machine)) for kind in kinds)} |"
        for machine in machines
    ]


def _notes() -> str:
    """What prices.toml says of where its regions' figures come from."""
    found = []
    for block in OWN_TABLE.read_text(encoding="utf-8").split("\n\n"):
        comment = " ".join(line.lstrip("# ") for line in block.splitlines() if line.startswith("#"))
        table = next((line for line in block.splitlines() if line.startswith("[")), "")
        found += [f"- `{table}`: {comment}"] if comment and table else []
    return "\n".join(found)


def _usd(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.8f}".rstrip("0")


_PAGE = """\
# Cost: what a run takes of memory, time and money

<!-- Generated from cli/g4kit/prices.toml, cli/g4kit/cost_page.py and trainer/g4trainer/calibration.py by: make cost -->

`g4kit estimate RECIPE` says before a run whether it fits the card, how long it takes and what it costs; `g4kit launch`
and `g4kit preflight` print the same, and `launch` refuses what does not fit and freezes the prices into the run's
`recipe.json`. `g4kit runs ID` compares them with what the run has cost.

## Prices

USD of Google's lists. `?` is a figure that was not seen; none is guessed. Google's pages have the last word.

| region | seen | vCPU, a second | GiB, a second | Standard storage, GiB and month |
|---|---|---|---|---|
{regions}

| GPU | region | USD a second | with zonal redundancy | least beside it | USD an hour in all |
|---|---|---|---|---|---|
{gpus}

An instance is billed for its life, {minimum} s at least: loading the model counts, waiting for a GPU does not. What a
run writes to the bucket (checkpoints, adapter) is small beside the base model. The local target costs nothing.

Machines of Vertex AI, USD an hour with their GPUs and the management fee, without the boot disk:

| region | seen | machine | on demand | spot | flex-start |
|---|---|---|---|---|---|
{vertex}

Where the figures come from:

{notes}

### A price that is not here

Write what your region costs in a file and give it with `--price-table FILE`, or name it in `G4KIT_PRICE_TABLE`. Its
values win over those above, one by one:

    [cloudrun.europe-west4]
    as_of = "2026-11"
    source = "the price list of our billing account"
    gpu_s = {{ nvidia-rtx-pro-6000 = 0.0004 }}

    [vertex.us-east4]
    as_of = "2026-11"
    source = "the price list of our billing account"
    machine_hour = {{ a3-ultragpu-8g = 90.0 }}

The figures in this file are examples. Other keys: `vcpu_s`, `gib_s`, `gpu_zonal_redundancy_s`, `storage_gib_month`;
`spot_machine_hour`, `flex_start_machine_hour`, `boot_disk_gib_hour`. Without a price, estimates give memory and time,
`launch` asks before it starts all the same, and `--max-cost` is refused.

## The bill of a run

| figure | means |
|---|---|
| expected | every phase's expected time, every slice's loading included, at the price a second |
| from, to | the same at the time's lower and upper bound |
| at worst | `job.max_attempts` attempts that each run to `job.timeout_s`, and {grace} s more until they are killed |
| bucket | a month of Standard storage for model, NF4 copy, adapter and the checkpoints kept; in no other figure |

Once a run has ended, `g4kit runs ID`, `fetch` and `--wait` write `cost.json` into its run directory: the lives of its
executions' instances, from the times that Cloud Run tells, at the prices that were frozen. It tells a task's times and
not each attempt's, so `usd` takes them as one life, a minute for each attempt at least, and `at_most_usd` adds a minute
for every attempt but one. Google's bill has the last word: discounts, free tiers, storage and logs are not in it.

## A cap

`--max-cost USD` holds over all attempts and executions of a run. It becomes a timeout and a number of attempts, those
that fit with most time to work in. Cloud Run's retries belong to the job that Terraform made, so the trainer itself
ends those beyond that number at once: they cost a minute each, which is counted. `--wait` and `g4kit resume` count what
is spent, at most, and start another execution only where its worst case still fits under the cap; else they stop, and
say what to write. `g4kit resume ID --max-cost USD` sets another cap.

## How memory and time are predicted

Bytes are counted from config.json: weights, adapters and optimizer exactly, activations tensor by tensor that the
compiler keeps; the peak is sought layer by layer. A step takes what the card computes, floating-point operations over
its rate and bytes over its bandwidth, or what the host needs to start its kernels, whichever is longer. The factors of
time were fitted on an H200; the error of the model on each row measured there:

{calibration}

Not calibrated: micro-batches above 16, other cards (scaled by their published rates, so their range is wide),
other hosts' processors, loading and writing on Cloud Run. `benchmarks/memory_and_time.py` measures settings on a CUDA
card and prints predicted against measured.

## Sources

{sources}
"""


if __name__ == "__main__":
    sys.stdout.write(markdown())
