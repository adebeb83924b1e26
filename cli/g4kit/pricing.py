"""What a second of a job costs: a dated table by region, prices.toml, and what a user's own table adds to it."""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from g4kit import billing
from g4kit.errors import UserError
from g4trainer.limits import ACCELERATORS, machine_type

OWN_TABLE = Path(__file__).with_name("prices.toml")
EXAMPLE = "docs/cost.md shows what such a file looks like"
VARIABLE = "G4KIT_PRICE_TABLE"
"""Names a file like prices.toml whose values win."""
REGION = "us-central1"
"""Where no deployment says another."""
MINIMUM_S = billing.MINIMUM_S
BOOT_DISK_GIB = 100
"""Of a machine of Vertex AI, where a job does not ask for another."""
Usd = Annotated[float, Field(gt=0, lt=10_000)]


class PriceTableError(UserError):
    """A table of prices that cannot be read. Lists every problem."""


class Region(BaseModel):
    """What both platforms' prices of a region have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    as_of: str = Field(min_length=4)
    """When the figures were seen, for example `2026-10`."""
    source: str = Field(min_length=1)


class CloudRunRegion(Region):
    vcpu_s: Usd | None = None
    """USD a second for a vCPU beside a GPU, billed for the instance's life."""
    gib_s: Usd | None = None
    """USD a second for a GiB of memory."""
    gpu_s: Mapping[str, Usd] = {}
    """USD a second for a GPU without zonal redundancy, by accelerator."""
    gpu_zonal_redundancy_s: Mapping[str, Usd] = {}
    storage_gib_month: Usd | None = None
    """USD for a GiB of Standard storage a month."""


class VertexRegion(Region):
    machine_hour: Mapping[str, Usd] = {}
    """USD an hour on demand for a machine with its GPUs, management fee included, by machine type."""
    spot_machine_hour: Mapping[str, Usd] = {}
    flex_start_machine_hour: Mapping[str, Usd] = {}
    boot_disk_gib_hour: Usd | None = None


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    cloudrun: Mapping[str, CloudRunRegion] = {}
    vertex: Mapping[str, VertexRegion] = {}


@dataclass(frozen=True)
class Prices:
    """USD a second of all that a run has at a time. Frozen into recipe.json, so that the bill can be compared later."""

    as_of: str
    source: str
    region: str
    """Where the prices hold."""
    accelerator: str
    gpus: int = 1
    cpu: float = 0.0
    memory_gib: float = 0.0
    zonal_redundancy: bool = False
    gpu_s: float = 0.0
    vcpu_s: float = 0.0
    gib_s: float = 0.0
    machine_type: str = ""
    """Of Vertex AI, whose price holds GPUs, CPU and memory; empty on Cloud Run."""
    machines: int = 0
    machine_s: float = 0.0
    """USD a second for one machine with its boot disk."""
    storage_gib_month: float | None = None
    """USD for a GiB of the bucket a month; None where it is not known. It is billed whether or not a run goes on."""

    @property
    def second(self) -> float:
        parts = self.gpus * self.gpu_s + self.cpu * self.vcpu_s + self.memory_gib * self.gib_s
        return parts + self.machines * self.machine_s

    @property
    def hour(self) -> float:
        return 3600 * self.second

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"usd_a_second": round(self.second, 8)}


@dataclass(frozen=True)
class Wanted:
    """What is to be priced."""

    accelerator: str
    region: str = REGION
    cpu: float | None = None
    """None takes the least that Cloud Run asks for beside that GPU; so does memory_gib."""
    memory_gib: float | None = None
    zonal_redundancy: bool = False
    gpus: int = 1
    """Of all hosts together."""
    hosts: int = 1
    provisioning: str = "on-demand"
    """Vertex AI's: `on-demand`, `spot` or `flex-start`."""


def price_table(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Table:
    """prices.toml, and over it the user's own table: `path`, else what $G4KIT_PRICE_TABLE names.

    Raises PriceTableError.
    """
    stated = path or (Path(environ[VARIABLE]) if environ.get(VARIABLE) else None)
    if stated is None:
        return _own_table()
    try:
        document = tomllib.loads(stated.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise PriceTableError(f"--price-table: got {stated}: {error.strerror}; {EXAMPLE}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PriceTableError(f"{stated}: is not TOML: {error}; {EXAMPLE}.") from error
    return merged(_own_table(), _parse(document, str(stated)))


def merged(table: Table, over: Table) -> Table:
    """`table` with the values that `over` has in place of its own; of prices by name, name by name."""
    return Table(
        cloudrun=_merged_regions(table.cloudrun, over.cloudrun), vertex=_merged_regions(table.vertex, over.vertex)
    )


def prices_of(
    accelerator: str,
    *,
    region: str = REGION,
    cpu: float | None = None,
    memory_gib: float | None = None,
    zonal_redundancy: bool = False,
    table: Table | None = None,
) -> Prices | None:
    """Prices of one instance; None where a price that it takes is not known, see `missing_prices`."""
    wanted = Wanted(accelerator, region, cpu, memory_gib, zonal_redundancy)
    return find_prices(wanted, table or _own_table())


def find_prices(wanted: Wanted, table: Table) -> Prices | None:
    """None where a price that it takes is not known."""
    if missing_values(wanted, table):
        return None
    if "cloudrun" in ACCELERATORS[wanted.accelerator].platforms:
        prices = _cloudrun_prices(wanted, table.cloudrun[wanted.region])
    else:
        prices = _vertex_prices(wanted, table.vertex[wanted.region])
    bucket = table.cloudrun.get(wanted.region)
    return dataclasses.replace(prices, storage_gib_month=bucket.storage_gib_month if bucket else None)


def missing_prices(wanted: Wanted, table: Table) -> str:
    """Why there is no price, and how to supply it; empty where there is one."""
    values = missing_values(wanted, table)
    if not values:
        return ""
    share = wanted.gpus // wanted.hosts
    if "cloudrun" not in ACCELERATORS[wanted.accelerator].platforms and not machine_type(wanted.accelerator, share):
        return f"no machine of Vertex AI has {share} {wanted.accelerator}; docs/limits.md lists those there are"
    platform = "cloudrun" if "cloudrun" in ACCELERATORS[wanted.accelerator].platforms else "vertex"
    return (
        f"no price is known for {wanted.accelerator} in {wanted.region}; write {' and '.join(values)} in a file under "
        f"[{platform}.{wanted.region}], as docs/cost.md shows, and give it with --price-table FILE"
    )


def missing_values(wanted: Wanted, table: Table) -> list[str]:
    """Names of the table's values that this takes and that are not there; empty where its price is known."""
    if "cloudrun" in ACCELERATORS[wanted.accelerator].platforms:
        region = table.cloudrun.get(wanted.region)
        kind = "gpu_zonal_redundancy_s" if wanted.zonal_redundancy else "gpu_s"
        missing = [] if region and wanted.accelerator in getattr(region, kind) else [f"{kind}.{wanted.accelerator}"]
        return missing + [name for name in ("vcpu_s", "gib_s") if region is None or getattr(region, name) is None]
    machine, kind = machine_type(wanted.accelerator, wanted.gpus // wanted.hosts), _machine_kind(wanted)
    if machine is None:
        return [kind]
    return [] if machine.name in getattr(table.vertex.get(wanted.region), kind, {}) else [f"{kind}.{machine.name}"]


def _cloudrun_prices(wanted: Wanted, region: CloudRunRegion) -> Prices:
    gpu = ACCELERATORS[wanted.accelerator]
    by_gpu = region.gpu_zonal_redundancy_s if wanted.zonal_redundancy else region.gpu_s
    return Prices(
        as_of=region.as_of,
        source=region.source,
        region=wanted.region,
        accelerator=wanted.accelerator,
        gpus=1,
        cpu=float(gpu.min_cpu or 0) if wanted.cpu is None else wanted.cpu,
        memory_gib=float(gpu.min_memory_gib or 0) if wanted.memory_gib is None else wanted.memory_gib,
        zonal_redundancy=wanted.zonal_redundancy,
        gpu_s=by_gpu[wanted.accelerator],
        vcpu_s=region.vcpu_s or 0.0,
        gib_s=region.gib_s or 0.0,
    )


def _vertex_prices(wanted: Wanted, region: VertexRegion) -> Prices:
    machine = machine_type(wanted.accelerator, wanted.gpus // wanted.hosts)
    name = machine.name if machine else ""
    hour = getattr(region, _machine_kind(wanted))[name] + BOOT_DISK_GIB * (region.boot_disk_gib_hour or 0.0)
    return Prices(
        as_of=region.as_of,
        source=region.source,
        region=wanted.region,
        accelerator=wanted.accelerator,
        gpus=wanted.gpus,
        machine_type=name,
        machines=wanted.hosts,
        machine_s=hour / 3600,
    )


def _machine_kind(wanted: Wanted) -> str:
    return {"on-demand": "", "spot": "spot_", "flex-start": "flex_start_"}[wanted.provisioning] + "machine_hour"


@cache
def _own_table() -> Table:
    return _parse(tomllib.loads(OWN_TABLE.read_text(encoding="utf-8")), str(OWN_TABLE))


def _parse(document: Mapping[str, Any], where: str) -> Table:
    try:
        return Table.model_validate(document)
    except ValidationError as error:
        problems = ((".".join(map(str, one["loc"])), _got(one), one["msg"].lower()) for one in error.errors())
        lines = [f"{where}: {path}: got {got}; {why}." for path, got, why in problems]
        raise PriceTableError("\n".join([*lines, f"{EXAMPLE}."])) from error


def _got(error: Mapping[str, Any]) -> str:
    return "nothing" if error["type"] == "missing" else repr(error["input"])


def _merged_regions(mine: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Of two mappings of regions, whose models need not be complete."""
    found: dict[str, Any] = dict(mine)
    for name, region in over.items():
        known = found.get(name)
        if known is None:
            found[name] = region
            continue
        stated = region.model_dump(exclude_unset=True)
        both = {
            key: {**getattr(known, key), **value} if isinstance(value, dict) else value for key, value in stated.items()
        }
        found[name] = known.model_copy(update=both)
    return found
