"""Encode slices of attachments, those of several sequences as one, into the embeddings that their entries keep.

Which slices, and when an entry is complete, the scheduler decides; what a call needs beyond the entries' own memory
depends on its units only.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from memphi.engine.step import EncodeSlice
from memphi.model.audio import make_window
from memphi.model.phi4mm import Phi4MM
from memphi.model.preprocess import make_crops, make_frames
from memphi.model.projector import slice_order
from memphi.model.upload import upload
from memphi.request import ClipInput, DecodedClip, DecodedImage, ImageInput, Prompt


class Encoders:
    """The towers and their projectors, fed with slices."""

    def __init__(self, model: Phi4MM) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, slices: Sequence[EncodeSlice]) -> None:
        """Write the slices' rows into their entries' values [tokens, hidden], made where missing.

        Encoding a slice once more changes nothing. Values are made first: what stays is there when the work takes most,
        as it is priced, and does not lie where the work was.
        """
        for piece in slices:
            self._rows(piece)
        self._encode_crops([piece for piece in slices if piece.kind == "image"])
        self._encode_windows([piece for piece in slices if piece.kind == "audio"])

    def _rows(self, piece: EncodeSlice) -> Tensor:
        entry, size = piece.entry, self.model.config.language.hidden_size
        if entry.value is None:
            entry.value = torch.empty(entry.tokens, size, dtype=self.model.dtype, device=self.model.device)
        rows: Tensor = entry.value
        return rows

    def _encode_crops(self, slices: Sequence[EncodeSlice]) -> None:
        if not slices:
            return
        images = [_prompt(piece).images[piece.index] for piece in slices]
        parts = [slice(piece.first, piece.first + piece.units) for piece in slices]
        masks = [torch.from_numpy(image.patch_mask[part]) for image, part in zip(images, parts, strict=True)]
        units = [piece.units for piece in slices]
        cells = self.model.encode_crops(self._crops(images, parts), torch.cat(masks)).split(units)
        separators = self.model.encode_separators()
        for piece, image, encoded in zip(slices, images, cells, strict=True):
            order = slice_order(image, piece.first, piece.units)
            tokens, sources = (upload(part, self.model.device) for part in order)
            rows = torch.cat((encoded.flatten(0, 1), separators))[sources]
            self._rows(piece).index_copy_(0, tokens, rows)

    def _crops(self, images: Sequence[ImageInput | DecodedImage], parts: Sequence[slice]) -> Tensor:
        """Some crops of each image, on the device: [crops, 3, crop_size, crop_size]."""
        counts, size = [part.stop - part.start for part in parts], self.model.config.vision.crop_size
        crops = torch.empty(sum(counts), 3, size, size, dtype=self.model.dtype, device=self.model.device)
        for image, part, own in zip(images, parts, crops.split(counts), strict=True):
            if isinstance(image, DecodedImage):
                make_crops(image, part.start, own)
            else:
                own.copy_(upload(image.crops[part], own.device))
        return crops

    def _frames(self, clip: ClipInput | DecodedClip, first: int, end: int) -> Tensor:
        """Some of a clip's log-mel frames [frames, mel_bins], where they are made."""
        if isinstance(clip, DecodedClip):
            return make_frames(clip, first, end, self.model.config.audio.mel_bins, self.model.device)
        return torch.from_numpy(clip.features[first:end])

    def _encode_windows(self, slices: Sequence[EncodeSlice]) -> None:
        if not slices:
            return
        config = self.model.config.audio
        windows, heads, places = [], [], []
        for piece in slices:
            prompt, rows = _prompt(piece), self._rows(piece)
            clip = prompt.clips[piece.index]
            for i in range(piece.first, piece.first + piece.units):
                window = make_window(clip.footprint.frames, i, config, partial(self._frames, clip))
                windows.append(window)
                heads.append(prompt.mode.audio_head)
                places.append(rows[i * config.window_tokens :][: window.tokens])
        for place, encoded in zip(places, self.model.encode_windows(windows, heads), strict=True):
            place.copy_(encoded)


def _prompt(piece: EncodeSlice) -> Prompt:
    assert piece.sequence.prompt is not None, "a sequence is prepared before it is encoded"
    return piece.sequence.prompt
