"""Base weights with an adapter merged into them, tensor by tensor: memory holds one tensor, never the model.

    merged = bf16(fp32(base) + lora_alpha / r * B A)

The base weights are the published ones, or those that the adapter was trained on: the same at NF4, dequantized. The
names are those of the base model's own files, whose every tensor is taken over, adapted or not.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import ParamWrapper
from safetensors import SafetensorError, safe_open

from g4trainer import nf4
from g4trainer import recipe as recipes
from g4trainer.checkpoint import header_of
from g4trainer.exits import ModelError
from g4trainer.model import (
    ADAPTER,
    STAGE_AGAIN,
    adapted_modules,
    attach_lora,
    load_adapter_weights,
    load_structure,
)
from g4trainer.quantization import NF4_STATE, STATISTICS

SHARD_BYTES = 5_000_000_000
"""What the Hub's own files come to."""
CHUNK_BYTES = 1 << 28
"""Of a tensor that is only copied."""

Delta = Callable[[], torch.Tensor]
"""What an adapter adds to one weight, in fp32 on the CPU, when it is called."""


class BaseWeights:
    """The tensors of a model's safetensors files by name, in the files' order; NF4 ones are dequantized when read."""

    def __init__(self, folder: Path, *, as_trained: frozenset[str] = frozenset()) -> None:
        """as_trained: weights that are rounded to NF4 when read, as the run had them.

        Raises ModelError where there is no file, or one that is damaged.
        """
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{folder}: no *.safetensors file", remedy=STAGE_AGAIN)
        try:
            for path in paths:
                file = self._open.enter_context(safe_open(path, framework="pt"))
                self._files |= dict.fromkeys(file.offset_keys(), file)
        except SafetensorError as error:
            raise ModelError(f"{folder}: the weights cannot be read: {error}", remedy=STAGE_AGAIN) from error
        self._states: dict[str, QuantState] = {}
        quantized = [name.removesuffix(NF4_STATE) for name in self._files if name.endswith(NF4_STATE)]
        statistics = {name + suffix for name in quantized for suffix in STATISTICS}
        self.quantized = frozenset(quantized)
        """Weights that are stored at NF4."""
        self.as_trained = as_trained - self.quantized
        self.names = tuple(name for name in self._files if name not in statistics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight, also where it is packed."""
        if name in self.quantized:
            return tuple(self._state(name).shape)
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """bf16 for every float, whatever it is stored in; others as they are."""
        if name in self.quantized:
            return torch.bfloat16
        part = self._files[name].get_slice(name)
        stored: torch.dtype = (part[:0] if part.get_shape() else self._files[name].get_tensor(name)).dtype
        return torch.bfloat16 if stored.is_floating_point else stored

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if name in self.quantized:
            return nf4.whole(tensor, self._state(name))
        if name in self.as_trained:
            return nf4.whole(*quantize_4bit(tensor.float(), quant_type="nf4", compress_statistics=True))
        return tensor

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in parts of about CHUNK_BYTES, along its first dimension."""
        shape = self.shape(name)
        if name in self.quantized | self.as_trained or not shape:
            yield self.read(name)
            return
        part = self._files[name].get_slice(name)
        rows = max(1, CHUNK_BYTES * shape[0] // max(1, 4 * math.prod(shape)))
        for start in range(0, shape[0], rows):
            yield part[start : start + rows]

    def _state(self, name: str) -> QuantState:
        if name not in self._states:
            found = {
                f"{name}{suffix}": self._files[name + suffix].get_tensor(name + suffix)
                for suffix in STATISTICS
                if name + suffix in self._files
            }
            state = QuantState.from_dict({key.removeprefix(f"{name}."): value for key, value in found.items()}, "cpu")
            state.dtype = torch.float32
            self._states[name] = state
        return self._states[name]


def weights_at_nf4(config: Mapping[str, Any], settings: recipes.Model) -> frozenset[str]:
    """Names of the weights that a run holds at NF4; none where its recipe says so. config: the base's config.json."""
    structure = load_structure(config, settings)
    return frozenset(name for name, value in structure.named_parameters() if isinstance(value, Params4bit))


def deltas(config: Mapping[str, Any], recipe: recipes.Recipe, tensors: dict[str, torch.Tensor]) -> dict[str, Delta]:
    """What the adapter adds, by the name of the weight in the base model's files. PEFT does the arithmetic.

    config: the base model's config.json. tensors: the adapter's, by PEFT's names.
    Raises ModelError where they do not fit the model.
    """
    structure = load_structure(config, recipe.model.model_copy(update={"quantization": "none"}))
    with torch.device("meta"):
        adapted = attach_lora(structure, recipe.lora, base_model=recipe.model.id)
    for module in adapted_modules(adapted).values():  # PEFT puts them where the base weights are: nowhere
        module.lora_A.to_empty(device="cpu")
        module.lora_B.to_empty(device="cpu")
    load_adapter_weights(adapted, tensors)
    found: dict[str, Delta] = {}
    for name, module in adapted_modules(adapted).items():
        weight = name if isinstance(module, ParamWrapper) else f"{name}.weight"
        found[weight] = functools.partial(_delta, module)
    return found


def _delta(module: Any) -> torch.Tensor:
    change: torch.Tensor = module.get_delta_weight(ADAPTER)
    return change.detach().float()


def plan_shards(base: BaseWeights, shard_bytes: int = SHARD_BYTES) -> list[list[str]]:
    """Names of the tensors by shard, in the base model's order, each shard as full as it may be."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in base.names:
        own = _bytes(base, name)
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def shard_names(count: int) -> list[str]:
    """As transformers and the Hub name them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def shard_blocks(base: BaseWeights, names: list[str], changes: Mapping[str, Delta]) -> Iterator[memoryview]:
    """A safetensors file of these tensors as a stream, with the adapter merged. Raises ModelError for a NaN."""
    entries = [(name, base.dtype(name), base.shape(name), _bytes(base, name)) for name in names]
    yield memoryview(header_of(entries))
    for name in names:
        for part in _merged(base, name, changes.get(name)):
            yield memoryview(part.to(base.dtype(name)).contiguous().reshape(-1).view(torch.uint8).numpy())


def index_of(base: BaseWeights, shards: list[list[str]]) -> dict[str, Any]:
    """model.safetensors.index.json."""
    files = shard_names(len(shards))
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    total = sum(_bytes(base, name) for name in base.names)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _merged(base: BaseWeights, name: str, change: Delta | None) -> Iterator[torch.Tensor]:
    if change is None:
        yield from base.chunks(name)
        return
    whole = base.read(name).float()
    whole += change()
    if not torch.isfinite(whole).all():
        raise ModelError(f"{name}: is not finite after merging; the adapter or the base weights are damaged")
    yield whole


def _bytes(base: BaseWeights, name: str) -> int:
    return int(math.prod(base.shape(name)) * base.dtype(name).itemsize)
