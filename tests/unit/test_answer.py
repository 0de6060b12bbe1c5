"""From a history to the best items in one go: the same as scoring everything, whatever the batch is filled up with."""

import pytest
import torch
from torch import Tensor

from elasticrec.compression.linears import BFloat16Linear
from elasticrec.compression.quantize import BFloat16Table, Int8Table
from elasticrec.compression.recipe import Recipe
from elasticrec.compression.workbench import apply
from elasticrec.errors import ConfigError
from elasticrec.model import integers
from elasticrec.model.answer import AnswerConfig, Answerer, filled_up
from elasticrec.model.bias import TimeGaps
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.head import AnyHead, DotHeadConfig, HeadConfig
from elasticrec.model.history import History
from elasticrec.model.mean import MeanEncoderConfig
from elasticrec.model.network import AnyEncoder, Network, NetworkConfig

N_ITEMS, LENGTH, USERS = 1500, 12, 6
COSINE = HeadConfig()


def network_of(encoder: AnyEncoder | None = None, head: AnyHead = COSINE) -> Network:
    torch.manual_seed(0)
    encoder = encoder or EncoderConfig(width=32, blocks=2, max_length=LENGTH)
    return Network(NetworkConfig(encoder=encoder, head=head), N_ITEMS).eval().requires_grad_(False)


def history_of(seed: int = 0) -> History:
    generator = torch.Generator().manual_seed(seed)
    item_BT = torch.randint(1, N_ITEMS + 1, (USERS, LENGTH), generator=generator)
    item_BT[torch.arange(LENGTH) < torch.tensor([0, 3, 11, 5, 0, 7])[:, None]] = 0
    time_BT = torch.arange(USERS * LENGTH).view(USERS, LENGTH) * 1000
    return History(item_BT, time_BT=time_BT, request_BT=time_BT + 500)


def without_seen(score_BI: Tensor, history: History) -> Tensor:
    return score_BI.clone().scatter_(1, history.item_BT, float("-inf"))


@pytest.mark.parametrize("recipe", [(), (BFloat16Table(),), (Int8Table(), BFloat16Linear())])
@pytest.mark.parametrize("head", [COSINE, DotHeadConfig()])
@pytest.mark.parametrize("buckets", [1, 4])
def test_the_best_of_all_scores(recipe: Recipe, head: AnyHead, buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "multiplies_int8", lambda _: False)  # or the scores beside it have rounded queries
    network, history = network_of(head=head), history_of()
    for step in recipe:
        network = apply(step, network, None)  # type: ignore[arg-type]
    answerer = Answerer(network, AnswerConfig(k=20, buckets=buckets))
    item_BK, score_BK = answerer.answer(history)
    own_BI = answerer.scores(history).clone()
    expected_BI = without_seen(own_BI, history)
    torch.testing.assert_close(score_BK.clone(), expected_BI.topk(20).values)
    torch.testing.assert_close(score_BK.clone(), expected_BI.gather(1, item_BK.clone()))
    torch.testing.assert_close(own_BI, network.scores(history).clone(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "encoder",
    [EncoderConfig(width=32, blocks=1, max_length=LENGTH, time=TimeGaps()), MeanEncoderConfig(max_length=LENGTH)],
)
def test_other_networks(encoder: AnyEncoder) -> None:
    network, history = network_of(encoder), history_of()
    item_BK, score_BK = Answerer(network, AnswerConfig(k=9, remove_seen=False)).answer(history)
    expected_BI = network.scores(history).clone()
    torch.testing.assert_close(score_BK.clone(), expected_BI.topk(9).values, rtol=1e-4, atol=1e-4)
    assert bool((item_BK > 0).all())


def test_users_that_fill_a_batch_up_change_nothing() -> None:
    network, history = network_of(), history_of()
    answerer = Answerer(network, AnswerConfig(k=9))
    wide = filled_up(history, 9)
    assert wide.item_BT.shape == (9, LENGTH)
    torch.testing.assert_close(answerer.answer(wide)[1][:USERS].clone(), answerer.answer(history)[1].clone())
    assert filled_up(history, USERS) is history


def test_few_shapes_whatever_the_histories() -> None:
    answerer = Answerer(network_of(), AnswerConfig(buckets=3))
    shapes = set()
    for events in range(USERS * LENGTH + 1):
        item_BT = (torch.arange(USERS * LENGTH) >= USERS * LENGTH - events).long().view(USERS, LENGTH)
        placed = answerer.placed(History(item_BT))
        assert placed.place_M is not None
        assert len(placed.place_M) >= events
        assert int((placed.place_M < USERS * LENGTH).sum()) == events
        shapes.add(len(placed.place_M))
    assert shapes == {24, 48, 72}


def test_what_stays_is_counted_once() -> None:
    network = apply(Int8Table(), network_of(), None)  # type: ignore[arg-type]
    tensors = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    assert Answerer(network, AnswerConfig()).resident_bytes() == tensors + 4 * (N_ITEMS + 1)  # inverse lengths
    network = network_of()
    tensors = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    assert Answerer(network, AnswerConfig()).resident_bytes() == tensors + 4 * 32 * (N_ITEMS + 1)  # float32 keys


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="capture needs a GPU and the network is on 'cpu'"):
        Answerer(network_of(), AnswerConfig(capture=True))
    with pytest.raises(ConfigError, match="k 0, buckets 4 and batches"):
        AnswerConfig(k=0)
    with pytest.raises(ConfigError, match="must be at least 1"):
        AnswerConfig(batches=())
