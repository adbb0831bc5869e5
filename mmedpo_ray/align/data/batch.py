"""Tokenised pairs and the packed batches made of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mmedpo_ray.align.losses import PairBatch
from mmedpo_ray.align.packing.trees import PackedTrees, TokenSequence, pack
from mmedpo_ray.errors import UserError
from mmedpo_ray.io.images import ImageError, load_rgb
from mmedpo_ray.models.architectures.base import Inputs
from mmedpo_ray.models.prompts import PromptWriter

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pair:
    """One preference pair, ready for the model.

    Attributes:
        pair_id: row of `scored`.
        image_id: its tree.
        is_visual: the rejected side is an image.
        image_uri, rejected_image_uri: images of the two sides.
        prompt, chosen, rejected: token ids with all image tokens; prompt + response is at most
            ``align.max_length`` long.
        weight: effective weight in the loss, not negative; a pair of weight 0 is counted and not computed.
        ref_chosen, ref_rejected: reference log-probabilities, nats; 0 if the objective needs none.
        counts_nll: the chosen answer enters the terms about likelihood, divergence and anchor.
        chosen_weights, rejected_weights: of the response tokens, 0 to 1; ``None``: all 1.
    """

    pair_id: str
    image_id: str
    is_visual: bool
    image_uri: str
    rejected_image_uri: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0
    counts_nll: bool = True
    chosen_weights: list[float] | None = None
    rejected_weights: list[float] | None = None


class ImageLoader:
    """Reads and processes images, and keeps the last ones in memory.

    Args:
        writer: of the model; its processor makes the pixels.
        cached_bytes: how much of them is kept; all pairs of an image follow one another.
        threads: that read and process images in parallel. A radiograph of 2,048 x 2,048 pixels takes a core
            nearly a tenth of a second, which one thread could not hide behind a step on a GPU.
    """

    def __init__(self, writer: PromptWriter, cached_bytes: int = 2**27, threads: int = 1) -> None:
        self._writer = writer
        self._cached_bytes = cached_bytes
        self._cache: OrderedDict[str, Inputs] = OrderedDict()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="images")

    def __call__(self, uris: Sequence[str]) -> Inputs:
        """What the vision tower takes of the images.

        Raises:
            UserError: an image can no longer be read.
        """
        missing = [uri for uri in dict.fromkeys(uris) if uri not in self._cache]
        try:
            for uri, inputs in zip(missing, self._pool.map(self._read, missing), strict=True):
                self._cache[uri] = inputs
                self._bytes += _bytes_of(inputs)
        except ImageError as error:
            raise unreadable_image(error) from error
        for uri in uris:
            self._cache.move_to_end(uri)
        collated = self._writer.architecture.collate([self._cache[uri] for uri in uris])
        while self._bytes > self._cached_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._bytes -= _bytes_of(oldest)
        return collated

    def _read(self, uri: str) -> Inputs:
        return self._writer.pixels([load_rgb(uri)])


def _bytes_of(inputs: Inputs) -> int:
    return sum(value.numel() * value.element_size() for value in inputs.values())


def unreadable_image(error: ImageError) -> UserError:
    """The error for an image that was there when the pairs were made."""
    return UserError(
        f"an image of a pair cannot be read any more ({error}). Restore the file, or run ingest and curate "
        "again so that its rows are dropped."
    )


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results of ``read`` for each item, in order; a thread reads the next one while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        ahead: Future[Result] | None = None
        for item in items:
            before, ahead = ahead, pool.submit(read, item)
            if before is not None:
                yield before.result()
        if ahead is not None:
            yield ahead.result()


def pack_pairs(
    pairs: Sequence[Pair], images: ImageLoader, pad_token_id: int, *, both_sides: bool
) -> PackedTrees:
    """Packs the responses of N pairs: N chosen, then (``both_sides``) N rejected."""
    sides = [(pair.prompt, pair.chosen, pair.image_uri, pair.chosen_weights) for pair in pairs]
    if both_sides:
        sides += [
            (pair.prompt, pair.rejected, pair.rejected_image_uri, pair.rejected_weights) for pair in pairs
        ]
    uris = list(dict.fromkeys(uri for _, _, uri, _ in sides))
    number = {uri: index for index, uri in enumerate(uris)}
    sequences = [
        TokenSequence(prompt, response, number[uri], weights) for prompt, response, uri, weights in sides
    ]
    return pack(sequences, images(uris), pad_token_id)


def pair_batch(
    pairs: Sequence[Pair], *, is_filler: bool = False, device: torch.device | None = None
) -> PairBatch:
    """What the objective needs of the pairs; a filler counts nowhere."""

    def tensor(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return PairBatch(
        weight=tensor([0.0 if is_filler else pair.weight for pair in pairs]),
        ref_chosen=tensor([pair.ref_chosen for pair in pairs]),
        ref_rejected=tensor([pair.ref_rejected for pair in pairs]),
        is_visual=tensor([pair.is_visual for pair in pairs], torch.bool),
        counts_nll=tensor([pair.counts_nll and not is_filler for pair in pairs], torch.bool),
    )
