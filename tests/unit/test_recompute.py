"""What a backward pass computes again: everything of a block, or everything but its products."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.recompute import Recompute


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times[str(func)] += 1
        return func(*args, **(kwargs or {}))


def backward(what: Recompute, *, compiled: bool) -> tuple[Counter[str], list[Tensor], Tensor]:
    torch.manual_seed(3)
    encoder = EncoderConfig(width=32, blocks=2, max_length=8, dropout=0.3, block=BlockConfig(heads=2), packed=False)
    network = Network(NetworkConfig(encoder=encoder), 50)
    network.encoder.recompute = what
    forward = torch.compile(network.forward, backend="aot_eager", dynamic=False) if compiled else network.forward
    hidden = forward(History(torch.arange(1, 25).view(3, 8)))
    counted = Counted()
    with counted:
        hidden.square().sum().backward()
    return counted.times, [p.grad for p in network.parameters() if p.grad is not None], hidden


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_products_are_kept_and_the_rest_computed_again(compiled: bool) -> None:
    torch.compiler.reset()
    kept, gradients, hidden = backward("nothing", compiled=compiled)
    for what in ("elementwise", "blocks"):
        torch.compiler.reset()
        times, own, same = backward(what, compiled=compiled)  # type: ignore[arg-type]
        assert torch.equal(same, hidden)
        assert all(torch.equal(one, other) for one, other in zip(own, gradients, strict=True))
        if what == "elementwise":
            assert times["aten.mm.default"] == kept["aten.mm.default"]
            assert compiled or times["aten.silu.default"] > kept["aten.silu.default"]  # compilers do so by themselves
        else:
            assert times["aten.mm.default"] > kept["aten.mm.default"]
