"""One decoding step of a Hugging Face model as a function of tensors, to be traced and lowered.

transformers' own `TorchExportableModuleWithStaticCache` keeps its cache in buffers: the batch size is fixed when it is
made, and an ONNX file has no buffers to write to (torch.onnx drops the writes, so that every step would see an empty
cache). Here the cache comes in and goes out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoweringError
from ..integrations.transformers import cache_argument


class DecodeStep(nn.Module):
    """(input_ids, position, keys, values) -> (logits, keys, values), with a static cache of `cache_length` tokens.

    All rows of the batch are at the same position, without padding.

    Args:
        model: a causal language model of transformers with a key-value cache in every layer.
        cache_length: M, tokens that the cache holds; at most the window of a model with sliding attention.

    Raises:
        LoweringError: a layer keeps something else than the last M keys and values, or M is below 1.
    """

    def __init__(self, model: Any, cache_length: int) -> None:
        super().__init__()
        if cache_length < 1:
            raise LoweringError(f"cache_length must be at least 1, got {cache_length}")
        self.model = model
        self.cache_length = cache_length
        self._cache_argument = cache_argument(model)
        for i, layer in enumerate(self._new_cache().layers):
            if getattr(layer, "max_cache_len", None) != cache_length:
                kept = getattr(layer, "max_cache_len", "no")
                raise LoweringError(
                    f"layer {i} of {type(model).__name__} keeps {kept} keys and values ({type(layer).__name__}), "
                    f"where cache_length={cache_length} was asked for"
                )
        self._row = self._cache_of_one_row()

    def forward(
        self, input_ids: Tensor, position: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One step.

        Args:
            input_ids: int64 [B, 1].
            position: int64 scalar, how many tokens the cache holds already; below M.
            keys: for each layer [B, heads, M, width].
            values: for each layer [B, heads, M, width].

        Returns:
            Logits [B, vocabulary], and new caches with this token in them.
        """
        cache = self._cache(position, keys, values)
        output = self.model(input_ids=input_ids, use_cache=True, **{self._cache_argument: cache})
        return output.logits[:, -1], [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]

    def empty_cache(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of a cache without tokens, for `batch` rows."""
        return tuple([one.new_zeros(batch, *one.shape[1:]) for one in kind] for kind in self._row)  # type: ignore[return-value]

    def example_inputs(self, batch: int = 2) -> tuple[Any, ...]:
        """Arguments of `forward` to trace with."""
        device = self.model.device
        token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        return token, torch.tensor(0, device=device), *self.empty_cache(batch)

    def dynamic_shapes(self, max_batch: int = 1024) -> tuple[Any, ...]:
        """What lets the batch size vary from 1 to `max_batch`, as torch.export takes it."""
        batch = {0: torch.export.Dim("batch", min=1, max=max_batch)}
        layers = [batch] * len(self._row[0])
        return batch, None, layers, layers

    def names(self) -> tuple[list[str], list[str]]:
        """Names for the inputs and outputs of a lowered step, in their order."""
        each = [f"{i}.{kind}" for kind in ("key", "value") for i in range(len(self._row[0]))]
        return (
            ["input_ids", "position", *(f"past_key_values.{name}" for name in each)],
            ["logits", *(f"present.{name}" for name in each)],
        )

    def _cache(self, position: Tensor, keys: list[Tensor], values: list[Tensor]) -> Any:
        """A cache over copies of the given tensors: transformers writes into them."""
        from transformers.cache_utils import StaticLayer

        cache = self._new_cache()
        # Up to the length of the window a sliding layer does the same, but counts in Python, which cannot be traced.
        cache.layers = [StaticLayer(self.cache_length) for _ in keys]
        for layer, key, value in zip(cache.layers, keys, values, strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values, layer.cumulative_length = key.clone(), value.clone(), position.clone()
        return cache

    @torch.no_grad()
    def _cache_of_one_row(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values after a first token. Their widths are in no one place of a config: ask the model."""
        cache = self._new_cache()
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        self.model(input_ids=token, use_cache=True, **{self._cache_argument: cache})
        return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]

    def _new_cache(self) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.model.config.get_text_config(), max_cache_len=self.cache_length)
