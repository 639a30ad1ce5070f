"""An adapter's directory: adapter_config.json and adapter_model.safetensors, as PEFT writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from losart.config.precision import DTYPES
from losart.errors import CheckpointError, TensorError
from losart.loaders.adapters.change import Change, LowRank, Rows
from losart.loaders.adapters.config import LoraConfig
from losart.loaders.conversion import Conversion, read_conversion
from losart.loaders.hub import directory_of
from losart.loaders.json_files import read_json_object
from losart.loaders.safetensors_files import MappedTensor, map_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Ends of names, and what they are of a module.
ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".base_layer.weight": "weight",  # of an embedding or head that has a product, too
    ".weight": "weight",
    ".bias": "bias",
}
_NAMES_IN_AN_ERROR = 3

Parts = dict[str, dict[str, MappedTensor]]  # by module


@dataclass(frozen=True)
class Adapter:
    """A LoRA whose tensors have been mapped, not read.

    Attributes
    ----------
    path : Path
    config : LoraConfig
    tensors : dict of str to MappedTensor
        By the name in the file.
    conversion : Conversion or None
        Which block-diffusion family it makes its base one of; None where the base is one already.
    """

    path: Path
    config: LoraConfig
    tensors: dict[str, MappedTensor] = field(repr=False)
    conversion: Conversion | None = None

    def changes(self, modules: Mapping[str, tuple[str, tuple[int, ...]]], tied: bool) -> dict[str, Change]:
        """What it changes.

        Parameters
        ----------
        modules : mapping of str to (str, tuple of int)
            The base's canonical names and shapes, by names of tensors as transformers calls them
            ("model.norm.weight").
        tied : bool
            Whether the output projection is the embedding.

        Returns
        -------
        dict of str to Change
            By canonical name.

        Raises
        ------
        TensorError
            A tensor is missing, of no module, or of another shape than the base's, or what it asks for is not
            supported.
        """
        parts, changes = self._parts(), dict[str, Change]()
        for name, (canonical, shape) in modules.items():
            module, _, kind = name.rpartition(".")
            of_module = parts.get(module, {})
            if "experts." in canonical and (of_module or self.config.adapts(module, linear=False)):
                raise TensorError(
                    f"{self.path / TENSORS}: adapts an expert, {module!r}, which is not supported"
                )
            change = self._bias(of_module, module, shape) if kind == "bias" else None
            if kind == "weight":
                change = self._weight(of_module, module, canonical, shape)
            if change is None:
                continue
            if tied and canonical in ("embed", "head") and change.product is not None:
                raise TensorError(
                    f"{change.product.a.file}: tensor {change.product.a.name!r} adapts what is embedding and "
                    "head in one: it would change both"
                )
            changes[canonical] = change
        unknown = [tensor.name for left in parts.values() for tensor in left.values()]
        if unknown:
            shown = ", ".join(map(repr, unknown[:_NAMES_IN_AN_ERROR]))
            more = ", ..." if len(unknown) > _NAMES_IN_AN_ERROR else ""
            raise TensorError(
                f"{self.path / TENSORS}: tensors of modules that the base has not, or that {CONFIG} does not "
                f"name: {shown}{more}"
            )
        if not changes:
            raise TensorError(f"{self.path / TENSORS}: adapts no module of the base")
        return changes

    def _parts(self) -> Parts:
        """The tensors of each module, by what they are."""
        parts: Parts = {}
        for name, tensor in self.tensors.items():
            end = next((end for end in ENDS if name.endswith(end)), None)
            if end is None or not name.startswith(PREFIX) or "lora_magnitude_vector" in name:
                raise TensorError(f"{tensor.file}: tensor {name!r} is none of a LoRA that losart knows")
            if tensor.dtype not in DTYPES:
                raise TensorError(
                    f"{tensor.file}: tensor {name!r} has the dtype {tensor.dtype}; "
                    f"supported: {', '.join(DTYPES)}"
                )
            module = name.removeprefix(PREFIX).removesuffix(end)
            kinds = parts.setdefault(module, {})
            if ENDS[end] in kinds:
                raise TensorError(f"{tensor.file}: tensor {name!r} is there twice: {kinds[ENDS[end]].name!r}")
            kinds[ENDS[end]] = tensor
        return parts

    def _bias(self, parts: dict[str, MappedTensor], module: str, shape: tuple[int, ...]) -> Change | None:
        if "bias" not in parts or not self.config.replaces(module):
            return None
        return Change(self._checked(parts.pop("bias"), shape))

    def _weight(
        self, parts: dict[str, MappedTensor], module: str, canonical: str, shape: tuple[int, ...]
    ) -> Change | None:
        config, embeds = self.config, canonical == "embed"
        a, b = ("embedding_a", "embedding_b") if embeds else ("a", "b")
        linear = len(shape) == 2 and canonical.startswith("layers.") and not canonical.endswith(".router")
        whole = product = rows = None
        if config.adapts(module, linear) and len(shape) == 2:
            product = self._product(parts, module, (a, b), shape)
        tied_copy = canonical == "head" and config.ties
        if "weight" in parts and (product is not None or config.replaces(module) or tied_copy):
            whole = self._checked(parts.pop("weight"), shape)
        if indices := config.rows(module):
            rows = self._rows(parts, module, indices, shape)
        return None if whole is product is rows is None else Change(whole, product, rows)

    def _product(
        self, parts: dict[str, MappedTensor], module: str, names: tuple[str, str], shape: tuple[int, ...]
    ) -> LowRank:
        a, b = (self._part(parts, module, name) for name in names)
        rank, transposed = self.config.rank_of(module), names[0] != "a"
        out, inner = reversed(shape) if transposed else shape
        return LowRank(
            self._checked(a, (rank, inner)),
            self._checked(b, (out, rank)),
            self.config.scale_of(module),
            transposed,
        )

    def _rows(
        self, parts: dict[str, MappedTensor], module: str, indices: tuple[int, ...], shape: tuple[int, ...]
    ) -> Rows:
        if max(indices) >= shape[0]:
            key = "trainable_token_indices"
            raise self.config.keys.error(key, max(indices), f"below the base's {shape[0]} tokens")
        return Rows(indices, self._checked(self._part(parts, module, "rows"), (len(indices), shape[1])))

    def _part(self, parts: dict[str, MappedTensor], module: str, kind: str) -> MappedTensor:
        if kind in parts:
            return parts.pop(kind)
        end = next(end for end, kind_of_end in ENDS.items() if kind_of_end == kind)
        raise TensorError(
            f"{self.path / TENSORS}: tensor {PREFIX + module + end!r} is missing, although {CONFIG} names "
            "its module"
        )

    def _checked(self, tensor: MappedTensor, shape: tuple[int, ...]) -> MappedTensor:
        if tensor.shape != shape:
            raise TensorError(
                f"{tensor.file}: tensor {tensor.name!r} has the shape {list(tensor.shape)}; the base and "
                f"{CONFIG} ask for {list(shape)}"
            )
        return tensor


def read_adapter(adapter: str | os.PathLike[str]) -> Adapter:
    """Open an adapter without reading its matrices.

    Parameters
    ----------
    adapter : str or path
        A directory, or a hub id ("org/name").

    Raises
    ------
    CheckpointError
        The directory or a file is missing, unreadable or corrupt.
    ConfigError
        Its configuration is impossible or not supported.
    """
    directory = directory_of(adapter, "an adapter", (CONFIG, TENSORS, "losart.json"))
    config = LoraConfig.read(read_json_object(directory / CONFIG))
    if not (directory / TENSORS).exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(f"{directory}: only {TENSORS} is supported; this one has adapter_model.bin")
    return Adapter(directory, config, map_file(directory / TENSORS), read_conversion(directory))
