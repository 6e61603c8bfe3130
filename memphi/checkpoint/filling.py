"""The places that a model has for weights filled from files: with what is stored, merged, or quantised.

Where four bits are made while loading, a few example texts go through the decoder as it is read. Which of a linear's
inputs are large is known then when its codes are chosen, and no more of it is there at once than without the texts.
Called by `loader`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from memphi.checkpoint.calibration import bare_layer, computed_in, embed, example_rows
from memphi.checkpoint.headers import StoredTensor
from memphi.checkpoint.names import LAYERS, adapted
from memphi.checkpoint.reader import DTYPES, Progress, fill_tensors, make_buffer
from memphi.config import ModelConfig, Scheme
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.costs import LOADING_TOKENS
from memphi.model.adapters import merge_adapter
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant.examples import Examples, StandIn, adapted_linears
from memphi.model.quant.swap import ReadRows, fill, fill_by_inputs, quantised_weights


def loading_examples(scheme: Scheme | None, tokenizer: Tokenizer, config: ModelConfig) -> list[list[int]]:
    """Rows of ids of what a decoder is shown while it is quantised so; none where its codes do not heed it."""
    return example_rows(tokenizer, config, LOADING_TOKENS) if scheme == "int4" else []


class Filling:
    """Reading what a model has a place for: as it is stored, merged, quantised, or merged and then quantised."""

    def __init__(
        self,
        model: Phi4MM,
        stored: Mapping[str, StoredTensor],
        device: torch.device,
        progress: Progress | None,
        examples: Sequence[list[int]],
    ) -> None:
        """Examples: rows of ids, LOADING_TOKENS at most, by which codes of int4 are chosen; or none."""
        self._config, self._stored, self._device, self._examples = model.config, stored, device, examples
        self._targets = model.state_dict()
        self._quantised = {name: weight for name, weight in quantised_weights(model).items() if name in stored}
        self._merged = {weight: (a, b) for weight, a, b in adapted(stored, model.merged)} if model.merged else {}
        self._scale = model.config.adapter(model.merged).scale if model.merged else 0.0
        self._buffer = make_buffer(device)
        self._tell = progress or (lambda done, total: None)

    def run(self) -> None:
        """Fill all; progress counts the bytes that are stored."""
        made = sorted({*self._quantised, *self._merged}, key=lambda name: (self._stored[name].file, name))
        as_stored = [
            (self._stored[name], target)
            for name, target in self._targets.items()
            if name in self._stored and name not in self._merged
        ]
        sources = {name: [self._stored[part] for part in (name, *self._merged.get(name, ()))] for name in made}
        done, made_bytes = sum(map(_bytes, (s for s, _ in as_stored))), sum(map(_bytes, chain(*sources.values())))
        total = done + made_bytes
        fill_tensors(as_stored, self._device, lambda done, _: self._tell(done, total), self._buffer)
        for name in self._make(made):
            done += sum(map(_bytes, sources[name]))
            self._tell(done, total)

    def _make(self, names: Sequence[str]) -> Iterator[str]:
        """Merge or quantise weights; yields the name of each that is done."""
        layers = [self._linears(number) for number in range(self._config.language.layers)] if self._examples else []
        shown = set(chain(*layers)) & self._quantised.keys()  # None, where the folder is quantised already.
        for name in names:
            if name not in shown:
                self._make_alone(name)
                yield name
        if shown:
            for linears in self._show(layers):
                yield from linears

    def _make_alone(self, name: str) -> None:
        """Merge or quantise one weight, or first the one and then the other, which rounds once more."""
        weight = self._quantised.get(name)
        if weight is None:
            self._merge(name, self._read(self._stored[self._merged[name][0]]), self._targets[name], 0)
        else:
            fill(weight, self._place(name), self._reader(name))

    @torch.no_grad()
    def _show(self, layers: Sequence[Mapping[str, str]]) -> Iterator[Iterable[str]]:
        """Quantise the decoder's linears as the examples reach them; yields the names of each layer's, when done."""
        config, norm = self._config, self._stored["language.norm.weight"]
        dtype = computed_in(norm.kind, self._device)
        table = self._stored["language.embedding.weight"]
        embeddings = embed(self._examples, table, dtype, self._device, self._buffer)
        examples = Examples(config.language, [len(row) for row in self._examples], embeddings)
        for number, linears in enumerate(layers):
            layer = bare_layer(config, number, dtype)
            for ours, name in linears.items():
                compute = partial(fill_by_inputs, self._quantised[ours], self._place(ours), self._reader(ours))
                layer.set_submodule(name, StandIn(compute))
            layer.to_empty(device=self._device).requires_grad_(False)
            norms = {f"{LAYERS}.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
            self._fill((self._stored[name], tensor) for name, tensor in norms.items())
            examples.advance(layer)
            yield linears

    def _linears(self, number: int) -> dict[str, str]:
        """The names of a layer's linears within it, by those of their weights."""
        layer = bare_layer(self._config, number, torch.float32)
        return {f"{LAYERS}.{number}.{name}.weight": name for name in adapted_linears(layer)}

    def _place(self, name: str) -> str:
        """Where a weight is stored, for a sentence."""
        return f"{self._stored[name].file}: tensor {self._stored[name].name!r}"

    def _reader(self, name: str) -> ReadRows:
        """Gives outputs of a weight as they are to be quantised: with an adapter merged, where one is to be."""
        stored = self._stored[name]
        if name not in self._merged:
            return lambda first, last: self._read(stored.rows(first, last))
        a = self._read(self._stored[self._merged[name][0]])

        def read_merged(first: int, last: int) -> Tensor:
            rows = torch.empty((last - first, *stored.shape[1:]), dtype=DTYPES[stored.kind], device=self._device)
            self._merge(name, a, rows, first)
            return rows

        return read_merged

    def _merge(self, name: str, a: Tensor, rows: Tensor, start: int) -> None:
        """Fill outputs of a weight, those from `start` on, with what is stored and its adapter, rounded once."""
        weight, b = self._stored[name], self._stored[self._merged[name][1]]

        def read(first: int, last: int) -> tuple[Tensor, Tensor]:
            part = start + first, start + last
            return self._read(weight.rows(*part)), self._read(b.rows(*part))

        merge_adapter(rows, a, self._scale, read)

    def _read(self, tensor: StoredTensor) -> Tensor:
        piece = torch.empty(tensor.shape, dtype=DTYPES[tensor.kind], device=self._device)
        self._fill([(tensor, piece)])
        return piece

    def _fill(self, pairs: Iterable[tuple[StoredTensor, Tensor]]) -> None:
        fill_tensors(pairs, self._device, None, self._buffer)


def _bytes(tensor: StoredTensor) -> int:
    return tensor.end - tensor.start
