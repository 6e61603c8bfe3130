"""The whole model: encode media, embed text, run the decoder, score the rows that need it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from memphi.config import ROOMS, AdapterForm, AdapterName, ModelConfig, Placement, Scheme
from memphi.model.adapters import AdaptedLinear, remove_adapters
from memphi.model.attention import Attention, select_attention
from memphi.model.audio import AudioEncoder, Window
from memphi.model.kernels.launch import is_available
from memphi.model.language import KeyValuePool, LanguageModel
from memphi.model.packing import PackedLinear, pack_adapters
from memphi.model.prefill import compute
from memphi.model.projector import ImageProjector, Projector, token_order
from memphi.model.quant.linears import QuantisedAdaptedLinear
from memphi.model.quant.packed import PackedQuantisedLinear
from memphi.model.quant.swap import quantise
from memphi.model.quant.weights import QuantisedWeight
from memphi.model.rooms import LayerStream, Room, groups_of, lay_out, layers_of
from memphi.model.rows import Row, pack
from memphi.model.upload import upload
from memphi.model.vision import VisionTower
from memphi.request import ClipInput, ImageInput, Prompt

CROP_BATCH = 8
"""Crops encoded at once."""


class Phi4MM(nn.Module):
    """Phi-4-multimodal: decoder with two adapters, vision tower, audio encoder and their projectors."""

    def __init__(self, config: ModelConfig, attention: Attention | None = None) -> None:
        super().__init__()
        attention = attention or select_attention("auto")
        hidden = config.language.hidden_size
        self.config = config
        self.adapter_form: AdapterForm = "plain"
        self.merged: AdapterName | None = None
        self.placement: Placement = "resident"
        self.rooms: dict[str, Room] = {}
        """The rooms of the groups that lie on the host, by group."""
        self.kernels = False
        """Whether the decoder goes through memphi's own kernels, where the device has them."""
        self.language = LanguageModel(config, attention)
        self.vision = VisionTower(config.vision, attention)
        self.image_projector = ImageProjector(config.vision.hidden_size, hidden)
        self.audio = AudioEncoder(config.audio, attention)
        self.audio_projectors = nn.ModuleDict(
            {head: Projector(config.audio.hidden_size, hidden) for head in ("speech", "vision")}
        )

    @property
    def device(self) -> torch.device:
        return self.language.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language.norm.weight.dtype

    def quantise(self, scheme: Scheme) -> None:
        """Keep the weights under a scheme, for inference; before anything is said of how adapters are kept.

        On the meta device linears are only made, to be filled later. Needs one linear's memory beside the model's.
        Raises CheckpointError for a number that is infinite or none at all.
        """
        self.config = replace(self.config, scheme=scheme)
        quantise(self, scheme, self.config.other_scheme)

    @property
    def uses_kernels(self) -> bool:
        """Whether kernels are wanted and the device has them."""
        return self.kernels and is_available(self.device)

    def keep_adapters(self, packed: bool, merge: AdapterName | None) -> None:
        """Keep adapters beside the weights they adapt, for inference, or none of them: then the caller merges one.

        Needs one linear's memory beside the model's; none on the meta device.
        """
        if merge:
            remove_adapters(self.language)
            self.adapter_form, self.merged = "merged", merge
        elif packed:
            pack_adapters(self.language, {AdaptedLinear: PackedLinear, QuantisedAdaptedLinear: PackedQuantisedLinear})
            self.adapter_form = "packed"

    def take_memory(self, device: torch.device | str, placement: Placement) -> None:
        """Move from the meta device to where weights are filled in: what a placement has on the host to the host.

        What stays on a CUDA device lies in one piece there: its allocator would round every tensor by itself. To be
        said after `quantise` and `keep_adapters`; `place` follows when all is filled.
        """
        groups = groups_of(self)
        moved = [groups[name] for room in ROOMS[placement] for name in room if name in groups]
        moved += layers_of(self) if placement == "streamed" else []
        for module in (module for modules in moved for module in modules):
            module.to_empty(device="cpu", recurse=False)
        if torch.device(device).type == "cuda":
            lay_out(self, device)
            return

        def move(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            # Not `empty_like`: of a tensor on the meta device it brings sympy along, half a second.
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

        self._apply(move)  # type: ignore[no-untyped-call]  # nn.Module's has no types

    def place(self, placement: Placement) -> None:
        """Keep groups of weights on the host, for inference; they come when they are needed. To be said once, at last.

        Adapters that lie there are plain. Takes the device's memory for rooms, and lets go of what was there of them.
        """
        assert self.placement == "resident", "a model is placed once"
        assert placement in ("resident", "towers") or self.adapter_form == "plain", "packed adapters come together"
        groups = groups_of(self)
        for names in ROOMS[placement]:
            room = Room({name: groups[name] for name in names}, self.device)
            self.rooms |= dict.fromkeys(names, room)
        if placement == "streamed":
            self.language.bring = LayerStream(layers_of(self), self.device).through
        self.placement = placement

    @property
    def adapters_at_once(self) -> int | None:
        """How many adapters a step may use; None: any."""
        return 1 if "vision adapter" in self.rooms else None

    def _need(self, group: str) -> None:
        """Have a group of weights where what is launched next finds it."""
        if group in self.rooms:
            self.rooms[group].bring(group)

    def use_kernels(self, wanted: bool) -> None:
        """Let the decoder, and products with quantised weights, go through memphi's own kernels, where the device has
        them, or not.

        To be said after `quantise` and `keep_adapters`.
        """
        self.kernels = wanted = wanted and self.placement != "streamed"
        for module in self.modules():
            if isinstance(module, AdaptedLinear | QuantisedWeight):
                module.kernels = wanted

    def encode_images(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """Embed images, their crops taken as one flat list: one tensor [tokens, hidden] per image."""
        if not images:
            return []
        crops = torch.cat([torch.from_numpy(image.crops) for image in images]).split(CROP_BATCH)
        masks = torch.cat([torch.from_numpy(image.patch_mask) for image in images]).split(CROP_BATCH)
        cells = [self.encode_crops(*pair) for pair in zip(crops, masks, strict=True)]
        order = upload(token_order(images), self.device)
        embeddings = torch.cat((torch.cat(cells).flatten(0, 1), self.encode_separators()))[order]
        return list(embeddings.split([image.footprint.tokens for image in images]))

    def encode_crops(self, crops: Tensor, patch_mask: Tensor) -> Tensor:
        """Embed a flat list of crops of any images, padding too, of which there is little.

        crops [crops, 3, crop_size, crop_size] and patch_mask [crops, patches, patches], on the host or the device.
        Returns [crops, (patches / 2) ** 2, hidden].
        """
        self._need("vision tower")
        return cast(Tensor, self.image_projector(self.image_projector.pool(self.vision(crops, patch_mask))))

    def encode_separators(self) -> Tensor:
        """Embed what ends a row of cells and what stands between an image's two views: [2, hidden]."""
        return cast(Tensor, self.image_projector(self.image_projector.separators()))

    def encode_clips(self, clips: Sequence[ClipInput], head: str) -> list[Tensor]:
        """Embed audio clips with the head that the input mode asks for: one tensor [tokens, hidden] per clip."""
        if not clips:
            return []
        self._need("audio encoder")
        features = self.audio([torch.from_numpy(clip.features) for clip in clips])
        return [self.audio_projectors[head](feature) for feature in features]

    def encode_windows(self, windows: Sequence[Window], heads: Sequence[str]) -> list[Tensor]:
        """Embed windows of any clips, each with its clip's head: one tensor [tokens, hidden] per window."""
        self._need("audio encoder")
        features = self.audio.encode_windows(windows)
        return [self.audio_projectors[head](feature) for head, feature in zip(heads, features, strict=True)]

    def encode_media(self, prompt: Prompt) -> list[tuple[int, Tensor]]:
        """Embed a prompt's attachments: for each, in order, the position where it starts and its [tokens, hidden]."""
        embeddings = {
            "image": self.encode_images(prompt.cropped_images),
            "audio": self.encode_clips(prompt.framed_clips, prompt.mode.audio_head),
        }
        return [(span.start, embeddings[span.kind][span.index]) for span in prompt.spans]

    def embed(self, ids: Tensor, media: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Embed packed ids [tokens] and put media embeddings where they start: [tokens, hidden]."""
        embeddings = cast(Tensor, self.language.embedding(ids))
        if not media:
            return embeddings
        places = upload(np.concatenate([np.arange(start, start + len(rows)) for start, rows in media]), ids.device)
        return embeddings.index_copy(0, places, torch.cat([rows for _, rows in media]).to(embeddings.dtype))

    def forward(
        self,
        ids: Tensor,
        rows: Sequence[Row],
        media: Sequence[tuple[int, Tensor]] = (),
        cache: KeyValuePool | None = None,
        logits_at: Sequence[int] | None = None,
    ) -> Tensor:
        """One step over packed rows of any input modes.

        ids [tokens]; media are (first packed token, embeddings [tokens, hidden]); logits_at are the packed tokens to
        score, by default the last of each row; cache as in LanguageModel. Returns logits [len(logits_at), vocab_size].
        """
        adapters = {row.adapter for row in rows if row.adapter}
        assert self.adapters_at_once is None or len(adapters) <= self.adapters_at_once, "their room is for one adapter"
        for name in adapters:
            self._need(f"{name} adapter")
        by_kernels = cache is not None and self.uses_kernels and not torch.is_grad_enabled()
        page_tokens = None if cache is None else cache.page_tokens
        packing = pack(self._as_kept(rows), ids.device, page_tokens, in_lines=by_kernels)
        if logits_at is None:
            logits_at = [end - 1 for end in accumulate(row.tokens for row in rows)]
        places = upload(np.array(logits_at, dtype=np.int64), ids.device)
        if by_kernels and cache is not None:
            hidden = compute(self.language, self.embed(ids, media), packing, cache)
        else:
            hidden = self.language(self.embed(ids, media), packing, cache)
        return self.language.logits(hidden[places])

    def _as_kept(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows as the weights are: under the adapter that is merged they use none."""
        if self.merged is None:
            return rows
        assert all(row.adapter == self.merged for row in rows), f"the {self.merged} adapter is merged"
        return [replace(row, adapter=None) for row in rows]
