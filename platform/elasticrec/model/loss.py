"""Hidden vectors and targets in, summed loss out; cross-entropy over the whole catalogue among them.

# M tokens (non-padding positions), m tokens of a chunk, D width, I items (without padding), K negatives
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.columns import PAD
from elasticrec.errors import ConfigError
from elasticrec.model.history import History
from elasticrec.model.network import Network

# Logits that are held at a time. On a CPU they should stay in the cache: 1 MB measured fastest of 0.5 to 4 MB. A GPU's
# cache holds too few for good products: the more the faster.
MIN_CHUNK = 128  # tokens: fewer make thin matrix products, which cost more than leaving the cache
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**29}
ALIGNMENT = {"cpu": 1, "cuda": 64}  # rows of logits start where a GPU reads 16 bytes at once


SoftmaxGradient = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


class Softmax(NamedTuple):
    """How logits of a chunk become its loss and the gradient."""

    gradient: SoftmaxGradient
    narrow: bool = False  # takes logits in the type of matrix products, and writes the gradient in their place

    def products(self, asked: torch.dtype) -> torch.dtype:
        """What factors, narrow logits and their gradient are: float16 for bfloat16, as none of them are large.

        A logit's rounding is an error of its exponential, and that of bfloat16 is eight times as coarse: at logits of
        16 to 32 up to 6 % of a probability. Logits beyond 65,504 are infinite.
        """
        return torch.float16 if self.narrow and asked == torch.bfloat16 else asked

    def row_bytes(self, items: int, products: torch.dtype) -> int:
        """What counts of a row for `CHUNK_BYTES`; narrow ones may be twice as many, as nothing else is held of them."""
        return items * products.itemsize // 2 if self.narrow else 4 * items


def gradient_scale(products: torch.dtype) -> float:
    """Times what it is a narrow gradient is written: probabilities under 3e-8 would be 0 in float16."""
    return 2.0**14 if products == torch.float16 else 1.0


class Negatives(NamedTuple):
    """Items that all answers of a global step are told from, each once."""

    item_K: Tensor  # int64, as the batch numbers items
    log_weight_K: Tensor  # float32, added to the item's logit: it stands for that many of the catalogue
    log_expected_K: Tensor | None = None  # float32, of how often the item is a target of others, if that is its source


class Seen(NamedTuple):
    """What users had at each of M tokens: the items of their window up to it."""

    item_BT: Tensor
    place_M: Tensor  # of the tokens among the B * T positions

    def of(self, pick: slice) -> Tensor:
        """int64 (m, T): the items of some tokens; each at least once, others never."""
        columns = self.item_BT.shape[1]
        row_m, column_m1 = self.place_M[pick] // columns, self.place_M[pick, None] % columns
        item_mT = self.item_BT.index_select(0, row_m).long()
        hidden_mT = (torch.arange(columns, device=item_mT.device) > column_m1) | (item_mT == PAD)
        return torch.where(hidden_mT, item_mT.gather(1, column_m1), item_mT)


class Batch(NamedTuple):
    """What one forward pass trains on."""

    history: History
    target_BT: Tensor  # item index of the answer at each position; 0 pads
    negatives: Negatives | None = None  # of losses that do not look at the whole catalogue
    place_M: Tensor | None = None  # where targets are among the B * T positions, if the host has counted them

    def answers(self, h_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden vectors (M, D) and targets (M,) of positions that have one. Without `place_M` a GPU is waited for.

        Of a history that names the places of its events, all tokens; 0 is the target of those that belong to nobody.
        """
        if self.history.place_M is not None:
            target_X = torch.cat([self.target_BT.flatten(), self.target_BT.new_zeros(1)])
            return h_BTD.flatten(0, 1), target_X[self.history.place_M].long()
        if self.place_M is None:
            answered_BT = self.target_BT != PAD
            return h_BTD[answered_BT], self.target_BT[answered_BT].long()
        target_M = self.target_BT.flatten().index_select(0, self.place_M).long()
        return h_BTD.flatten(0, 1).index_select(0, self.place_M), target_M

    def seen(self) -> Seen:
        """What users had when each answer was asked for, in the order of `answers`."""
        place_M = (self.target_BT != PAD).flatten().nonzero().squeeze(1) if self.place_M is None else self.place_M
        if self.history.place_M is not None:  # tokens of nobody have no loss, whatever they have seen
            place_M = self.history.place_M.clamp(max=self.target_BT.numel() - 1)
        return Seen(self.history.item_BT, place_M)


@dataclass(frozen=True, kw_only=True, slots=True)
class FullSoftmax:
    """Cross-entropy over the whole catalogue, or over what a user has not had yet.

    With `mask_seen` the items of the window up to a position are no wrong answers there: for products that never
    recommend an item twice. A target that comes again still counts.
    """

    kind: ClassVar[str] = "full_softmax"
    label_smoothing: float = 0.0
    mask_seen: bool = False
    fused: bool = False  # softmax and its gradient as one compiled kernel: less memory traffic on a GPU

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing, self.mask_seen)


def check_smoothing(label_smoothing: float, mask_seen: bool) -> None:
    """Raises ConfigError unless it is a share below one, spread over items that all are in the softmax."""
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing {label_smoothing} must be at least 0 and below 1")
    if label_smoothing and mask_seen:
        raise ConfigError("label_smoothing spreads over the whole catalogue; leave it out or set mask_seen to false")


class SummedLoss(nn.Module):
    """Network and loss as one module, so that a wrapper sees a single forward."""

    def __init__(self, network: Network, config: object) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.hidden: Callable[[History], Tensor] = network.__call__  # `training.compute` may put a compiled one here
        self.products = torch.float32  # what matrix products take; their results are summed in float32

    def forward(self, batch: Batch) -> Tensor:
        """A batch in, its loss summed over non-padding positions out; a scalar."""
        if self.products == torch.float32:
            return self.summed(self.hidden(batch.history), batch)
        with torch.autocast(batch.target_BT.device.type, self.products):
            return self.summed(self.hidden(batch.history).float(), batch)

    def summed(self, h_BTD: Tensor, batch: Batch) -> Tensor:
        """The loss of hidden vectors of the network; what needs more than the network overrides it."""
        return summed_loss(self.config, self.network, h_BTD, batch)

    def step_rows(self) -> Tensor | None:
        """The leaf (U, D) that takes the item table's place in this step, where only some rows train.

        Wrappers that look for parameters do not see it: who reduces gradients must ask for it in every step.
        """
        focus = self.network.encoder.items.focus
        return None if focus is None else focus.row_UD

    def leaves(self) -> list[Tensor]:
        """All tensors that bear a gradient in this step."""
        rows_UD = self.step_rows()
        trained: list[Tensor] = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return trained if rows_UD is None else [*trained, rows_UD]


@singledispatch
def summed_loss(config: object, network: Network, h_BTD: Tensor, batch: Batch) -> Tensor:  # noqa: ARG001 - dispatched
    """Sum over non-padding positions of the loss of the config's type; a scalar.

    A sum, not a mean: the caller divides by the number of tokens of the global step, so that the loss does not
    depend on how the step was cut.
    """
    raise ConfigError(f"no loss for {type(config).__name__}")


@summed_loss.register
def _(config: FullSoftmax, network: Network, h_BTD: Tensor, batch: Batch) -> Tensor:
    h_MD, target_M = batch.answers(h_BTD)
    target_M = target_M - 1
    query_MD, key_ID = network.head.query(h_MD), network.keys()[1:]
    seen = batch.seen() if config.mask_seen else None
    loss = summed_cross_entropy(query_MD, key_ID, target_M, fused=config.fused, seen=seen)
    if config.label_smoothing:
        target_MD = F.embedding(target_M.clamp(min=0), key_ID)
        if batch.history.place_M is not None:
            query_MD = query_MD * (target_M >= 0).unsqueeze(1)
        loss = loss + config.label_smoothing * smoothing(query_MD, target_MD, key_ID.mean(dim=0))
    return loss


def smoothing(query_MD: Tensor, target_MD: Tensor, mean_D: Tensor) -> Tensor:
    """What one target less and the mean of all items more adds to a summed cross-entropy (arXiv 1512.00567)."""
    return (query_MD * (target_MD - mean_D)).sum()


def summed_cross_entropy(
    query_MD: Tensor, item_ID: Tensor, target_M: Tensor, *, fused: bool = False, seen: Seen | None = None
) -> Tensor:
    """`cross_entropy(query @ item.T, target, reduction="sum")` without ever holding all (M, I) logits.

    Rows with target -1 are left out.
    What a token has seen, but for its target, does not enter the sum of its exponentials; items of `seen` count from 1.

    On the CPU about 2.6 times as fast as the two separate operations (6,400 tokens, 1,682 items, one thread). Within
    autocast the products take its type; softmax and sums stay float32, and logits but for the fused kernel of a GPU,
    which has them in float16: a fifth of the time is saved.
    """
    softmax = fused_softmax(query_MD.device, len(item_ID)) if fused else Softmax(softmax_gradient_in_place)
    loss: Tensor = _ChunkedCrossEntropy.apply(query_MD, item_ID, target_M, softmax, seen)  # type: ignore[no-untyped-call]
    return loss


def chunk_tokens(device: torch.device, row_bytes: int) -> int:
    """Tokens whose logits are held at a time, so many bytes of each."""
    tokens = max(MIN_CHUNK, CHUNK_BYTES[device.type] // row_bytes)
    return tokens if device.type == "cpu" else tokens // MIN_CHUNK * MIN_CHUNK


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the loss, while a chunk of logits is in the cache."""

    @staticmethod
    def forward(
        ctx: Any, query_MD: Tensor, item_ID: Tensor, target_M: Tensor, softmax: Softmax, seen: Seen | None
    ) -> Tensor:
        device = query_MD.device
        products = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query_MD.dtype
        products = softmax.products(products)
        query_grad_MD, item_grad_ID = torch.empty_like(query_MD), torch.zeros_like(item_ID)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        items, missing = len(item_ID), -len(item_ID) % ALIGNMENT[device.type]
        size = chunk_tokens(device, softmax.row_bytes(items, products))
        with torch.autocast(device.type, enabled=False):
            query_MD, item_ID = query_MD.to(products), item_ID.to(products)
            if missing:
                item_ID = F.pad(item_ID, (0, 0, 0, missing))
            held_mI = _held(query_MD, item_ID, size) if softmax.narrow else None
            for begin in range(0, len(query_MD), size):
                pick = slice(begin, begin + size)
                query_mD, target_m1 = query_MD[pick], target_M[pick, None]
                if held_mI is None:
                    logits_mI = _product(query_mD, item_ID.t())
                else:
                    logits_mI = torch.mm(query_mD, item_ID.t(), out=held_mI[: len(query_mD)])
                logits_mI[:, items:] = float("-inf")
                if seen is not None:
                    mask(logits_mI, target_m1, (seen.of(pick) - 1).clamp_(min=0))  # 0: tokens of nobody
                loss_chunk, grad_mI = softmax.gradient(logits_mI, target_m1, products)
                loss += loss_chunk
                query_grad_MD[pick] = _product(grad_mI, item_ID)
                if products == item_grad_ID.dtype:
                    item_grad_ID.addmm_(grad_mI[:, :items].t(), query_mD)
                else:
                    item_grad_ID += _product(grad_mI[:, :items].t(), query_mD)
        ctx.save_for_backward(query_grad_MD, item_grad_ID)
        ctx.scale = gradient_scale(products) if softmax.narrow else 1.0
        return loss.to(query_grad_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query_grad_MD, item_grad_ID = ctx.saved_tensors
        grad = grads[0] / ctx.scale
        return query_grad_MD * grad, item_grad_ID * grad, None, None, None


def _held(query_MD: Tensor, item_ID: Tensor, most: int) -> Tensor:
    """Room for the logits of so many tokens or fewer: of few sizes, which graphs of any number of tokens share."""
    return query_MD.new_empty(min(most, 1 << (len(query_MD) - 1).bit_length()), len(item_ID))


def mask(logits_mI: Tensor, target_m1: Tensor, seen_mT: Tensor) -> None:
    """Takes what has been seen out of the softmax, in place; the target stays."""
    target_m1 = target_m1.clamp(min=0)
    picked_m1 = logits_mI.gather(1, target_m1)
    logits_mI.scatter_(1, seen_mT, float("-inf")).scatter_(1, target_m1, picked_m1)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """one @ other; of half-precision factors in float32."""
    if one.dtype in (torch.float32, torch.float64):
        return one @ other
    if one.is_cuda:
        return torch.mm(one, other, out_dtype=torch.float32)
    if one.dtype == torch.bfloat16 and multiplies_bfloat16():  # sums of float16 may be beyond its range
        return (one @ other).float()  # summed in float32; the sum is rounded, as torch offers nothing else on a CPU
    return one.float() @ other.float()  # what a GPU's tensor cores compute


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; without them it is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def add_product(start: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """start + one @ other, in the type of `start`; the second factor is taken in that of the narrower one."""
    if start.dtype == one.dtype == other.dtype:
        return torch.addmm(start, one, other)
    narrow = one.dtype if one.dtype != start.dtype else other.dtype
    return _product(one.to(narrow), other.to(narrow)).add_(start)


def softmax_gradient_in_place(logits_mI: Tensor, target_m1: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and its gradient by the logits: (m, I) as products take it, in the place of the logits."""
    left_out_m1, target_m1 = target_m1 < 0, target_m1.clamp(min=0)
    peak_m1, picked_m1 = logits_mI.amax(dim=1, keepdim=True), logits_mI.gather(1, target_m1)
    logits_mI.sub_(peak_m1).exp_()
    total_m1 = logits_mI.sum(dim=1, keepdim=True)
    loss = (total_m1.log() + peak_m1 - picked_m1).masked_fill_(left_out_m1, 0.0).sum()
    # softmax; minus one at the target it is the gradient
    grad_mI = logits_mI.div_(total_m1.masked_fill_(left_out_m1, float("inf")))
    return loss, grad_mI.scatter_add_(1, target_m1, left_out_m1.to(picked_m1.dtype) - 1.0).to(products)


def softmax_gradient(logits_mI: Tensor, target_m1: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same without writing in place or scattering, so that a compiler can make two passes of it."""
    hit_mI = torch.arange(logits_mI.shape[1], device=logits_mI.device) == target_m1
    peak_m1 = logits_mI.amax(dim=1, keepdim=True)
    power_mI = (logits_mI - peak_m1).exp()
    total_m1 = power_mI.sum(dim=1, keepdim=True)
    picked_m1 = torch.where(hit_mI, logits_mI, 0.0).sum(dim=1, keepdim=True)
    left_out_m1 = target_m1 < 0
    grad_mI = power_mI / torch.where(left_out_m1, float("inf"), total_m1) - hit_mI.to(logits_mI.dtype)
    return torch.where(left_out_m1, 0.0, total_m1.log() + peak_m1 - picked_m1).sum(), grad_mI.to(products)


def fused_softmax(device: torch.device, n_items: int) -> Softmax:
    """The fastest one: on a GPU a kernel that reads each row once, while registers hold a row."""
    if device.type == "cuda":
        from elasticrec.model import softmax_triton  # late: no Triton where there is no GPU

        if n_items <= softmax_triton.MOST_ITEMS:
            return Softmax(softmax_triton.softmax_gradient_in_place, narrow=True)
    return Softmax(compiled_softmax_gradient())


@functools.cache
def compiled_softmax_gradient() -> SoftmaxGradient:
    """`softmax_gradient`, compiled at its first call."""
    compiled: SoftmaxGradient = torch.compile(softmax_gradient)
    return compiled
