"""Rows in, product codes out: a book of 256 words for each part of a row, by k-means over directions.

# I items + 1, N sampled rows, D width, S parts, W entries of a part, P = S * W, K words
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.model.product_codes import WORDS

_LARGEST_INT8 = 127
_SMALLEST_STEP = 1e-12
_CHUNK_ROWS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class CodebookConfig:
    """Entries of a part, and how its words are found."""

    dims: int
    iterations: int
    sample: int  # rows
    seed: int


def product_codes(row_ID: Tensor, config: CodebookConfig) -> dict[str, Tensor]:
    """The tensors of a `ProductTable`: codes and words of the rows' directions, and the scale that fits each row best.

    Word 0 of each part is zero, so a row of zeros stays one. Words are rounded to int8 by one step for all parts.
    """
    row_IP = F.pad(row_ID, (0, -row_ID.shape[1] % config.dims))
    part_SIW = F.normalize(row_IP, dim=1).view(len(row_IP), -1, config.dims).transpose(0, 1)
    generator = torch.Generator().manual_seed(config.seed)
    some_N = torch.randperm(len(row_IP) - 1, generator=generator)[: config.sample] + 1  # row 0 pads
    word_SKW = torch.stack([_words(part_IW[some_N], config.iterations, generator) for part_IW in part_SIW])
    step = word_SKW.abs().max().clamp_(min=_SMALLEST_STEP) / _LARGEST_INT8
    integer_SKW = (word_SKW / step).round_()
    code_IS = torch.stack([_nearest(*pair) for pair in zip(part_SIW, integer_SKW * step, strict=True)], dim=1)
    code_IS[row_IP.eq(0).all(dim=1)] = 0
    scale_I = _scales(row_IP, code_IS, integer_SKW).bfloat16()
    return {"code_IS": code_IS.to(torch.uint8), "word_SKW": integer_SKW.to(torch.int8), "scale_I": scale_I}


def _words(part_NW: Tensor, iterations: int, generator: torch.Generator) -> Tensor:
    """Zero, then 255 means of k-means: float32 (K, W). A word that nothing is nearest to becomes one of the points."""
    word_KW = torch.zeros(WORDS, part_NW.shape[1])
    start_N = torch.randperm(len(part_NW), generator=generator)[: WORDS - 1]
    word_KW[1 : len(start_N) + 1] = part_NW[start_N]
    for _ in range(iterations):
        code_N = _nearest(part_NW, word_KW)
        count_K = code_N.bincount(minlength=WORDS).clamp_(min=1)
        mean_KW = torch.zeros_like(word_KW).index_add_(0, code_N, part_NW) / count_K.unsqueeze(1)
        unused_K = torch.ones(WORDS, dtype=torch.bool).index_fill_(0, code_N, False)
        other_K = torch.randint(len(part_NW), (WORDS,), generator=generator)
        word_KW = torch.where(unused_K.unsqueeze(1), part_NW[other_K], mean_KW)
        word_KW[0] = 0
    return word_KW


def _nearest(part_IW: Tensor, word_KW: Tensor) -> Tensor:
    """int64 (I,): the word at the least distance from each part."""
    half_K = word_KW.square().sum(dim=1) / 2
    nearness = (torch.addmm(-half_K, part_RW, word_KW.t()) for part_RW in part_IW.split(_CHUNK_ROWS))
    return torch.cat([near_RK.argmax(dim=1) for near_RK in nearness])


def _scales(row_IP: Tensor, code_IS: Tensor, integer_SKW: Tensor) -> Tensor:
    """float32 (I,): what the looked-up integers are multiplied with to be nearest to the rows."""
    part_S = torch.arange(len(integer_SKW))
    pairs = zip(row_IP.split(_CHUNK_ROWS), code_IS.split(_CHUNK_ROWS), strict=True)
    looked_up = ((row_RP, integer_SKW[part_S, code_RS].flatten(1)) for row_RP, code_RS in pairs)
    return torch.cat([(row * word).sum(dim=1) / word.square().sum(dim=1).clamp_(min=1) for row, word in looked_up])
