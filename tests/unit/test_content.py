"""The content tower: new items near the items that they resemble, kept by bundles, and clear words where it cannot."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.data.plan import Plan, PlanConfig
from elasticrec.data.sequences import Sequences
from elasticrec.data.split import LeaveOneOut, split
from elasticrec.errors import BundleError, ConfigError, InputError
from elasticrec.model.content import ContentConfig, ContentTower, fit_tower, vocabulary
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig

N_ITEMS, T = 24, 6
KINDS = ["sea", "hill", "town"]


def item_table(titles: bool = True) -> pa.Table:
    """Item i is of category i mod 3."""
    index_I = np.arange(1, N_ITEMS + 1)
    return pa.table(
        {
            "item_index": index_I,
            "item_id": [f"i{index}" for index in index_I],
            "title": [f"The {KINDS[index % 3]} {index}" if titles else None for index in index_I],
            "categories": pa.array([[KINDS[index % 3]] for index in index_I], pa.list_(pa.string())),
            "count": index_I[::-1],
        }
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost such small products more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(one_thread: None) -> tuple[Network, Plan]:
    """Users stay in one category; a few steps teach the network that."""
    rng = np.random.default_rng(0)
    histories = [
        rng.permutation(np.arange(1, N_ITEMS + 1)[np.arange(1, N_ITEMS + 1) % 3 == user % 3]) for user in range(60)
    ]
    sequences = Sequences(
        item_E=np.concatenate(histories).astype(np.int32), offset_U1=np.arange(0, 60 * 8 + 1, 8, dtype=np.int64)
    )
    plan = Plan(PlanConfig(batch_users=60, shards=1), sequences, split(LeaveOneOut(), sequences), T)
    torch.manual_seed(0)
    encoder = EncoderConfig(width=16, blocks=1, max_length=T, dropout=0.0)
    network = Network(NetworkConfig(encoder=encoder), N_ITEMS)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(30):
        windows = plan.windows(step, plan.users(step))
        target_BT = torch.from_numpy(windows.target_BT).long()
        h_MD = network(History.of(windows))[target_BT > 0]
        logits_MI = network.head.query(h_MD) @ network.keys()[1:].t()
        torch.nn.functional.cross_entropy(logits_MI, target_BT[target_BT > 0] - 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval().requires_grad_(False), plan


CONFIG = ContentConfig(epochs=60, learning_rate=1e-2)
NEW = pa.table({"title": ["A hill", None, None], "categories": pa.array([["hill"], ["town"], None])})


def test_a_new_item_is_recommended_to_who_likes_its_category(trained: tuple[Network, Plan]) -> None:
    network, plan = trained
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tower = fit_tower(network, plan, item_table(), CONFIG)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    key_ND = network.head.key(tower.embed_new(NEW))
    history = History(torch.tensor([[1, 4, 7, 10, 13, 16], [2, 5, 8, 11, 14, 17]]))  # hill, town
    score_BN = network.head.query(network(history)[:, -1]) @ key_ND.t()
    assert score_BN[0, 0] > score_BN[0, 1] + 1
    assert score_BN[1, 1] > score_BN[1, 0] + 1
    known_BI = network.scores(history)
    assert score_BN[0, 0] > known_BI[0, 2::3].max(), "a new hill goes before known towns"
    assert key_ND[2].isfinite().all()  # of an item of which nothing is known


def test_the_same_seed_gives_the_same_tower(trained: tuple[Network, Plan]) -> None:
    one, other = (fit_tower(*trained, item_table(), dataclasses.replace(CONFIG, epochs=2)) for _ in range(2))
    assert torch.equal(one.embed_new(NEW), other.embed_new(NEW))


def test_new_items_are_as_near_to_the_mean_query_as_known_ones(trained: tuple[Network, Plan]) -> None:
    network, plan = trained
    tower = fit_tower(network, plan, item_table(), dataclasses.replace(CONFIG, epochs=2))
    query_D = tower.get_buffer("query_D")
    assert float(query_D.norm()) == pytest.approx(1.0)
    known_I = network.keys()[1:] @ query_D
    new_I = torch.nn.functional.normalize(tower.embed_new(item_table()), dim=-1) @ query_D
    assert float(new_I.mean()) == pytest.approx(float(known_I.mean()), abs=1e-3)
    assert float(new_I.std()) > 0


def test_given_vectors_are_read_too_and_must_fit(trained: tuple[Network, Plan]) -> None:
    network, plan = trained
    vector_IF = np.eye(3, dtype=np.float32)[np.arange(1, N_ITEMS + 1) % 3]
    bare = item_table().drop_columns(["categories", "title"])
    tower = fit_tower(network, plan, bare, CONFIG, vector_IF)
    assert tower.features == ()
    new = pa.table({"item_id": ["x", "y"]})
    key_ND = network.head.key(tower.embed_new(new, np.eye(3, dtype=np.float32)[[1, 2]]))
    history = History(torch.tensor([[1, 4, 7, 10, 13, 16]]))
    score_BN = network.head.query(network(history)[:, -1]) @ key_ND.t()
    assert score_BN[0, 0] > score_BN[0, 1] + 1
    with pytest.raises(InputError, match=r"vectors of shape \(2, 0\) for 2 items; .* give \(2, 3\)"):
        tower.embed_new(new)


def given_vectors(rows: int) -> np.ndarray:
    """Of 3 entries; row i is of item i + 1."""
    return np.eye(3, dtype=np.float32)[np.arange(1, rows + 1) % 3]


@pytest.mark.parametrize("rows", [N_ITEMS + 1, N_ITEMS - 1])
def test_there_are_as_many_vectors_as_items(trained: tuple[Network, Plan], rows: int) -> None:
    said = rf"vectors of shape \({rows}, 3\) for {N_ITEMS} items; .* give \({N_ITEMS}, 3\), .* none for padding"
    with pytest.raises(InputError, match=said):
        fit_tower(*trained, item_table(), CONFIG, given_vectors(rows))


def test_a_single_row_is_no_table_of_vectors(trained: tuple[Network, Plan]) -> None:
    with pytest.raises(InputError, match=rf"vectors of shape \({N_ITEMS},\) for {N_ITEMS} items"):
        fit_tower(*trained, item_table(), CONFIG, np.ones(N_ITEMS, dtype=np.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_vectors_are_finite(trained: tuple[Network, Plan], bad: float) -> None:
    """In float32, which is computed with."""
    vector_IF: Any = given_vectors(N_ITEMS).astype(np.float64)
    vector_IF[4, 1] = vector_IF[7, 2] = bad
    said = f"2 of {N_ITEMS} vectors hold NaN or infinity, the first in row 4; .* zeros"
    with pytest.raises(InputError, match=said):
        fit_tower(*trained, item_table(), CONFIG, vector_IF)
    few = dataclasses.replace(CONFIG, items=3, epochs=1)  # whichever items are drawn
    with pytest.raises(InputError, match=said):
        fit_tower(*trained, item_table(), few, vector_IF)


def test_vectors_of_new_items_are_finite() -> None:
    tower = ContentTower((), 4, vector_width=3)
    new, vector_NF = pa.table({"item_id": ["x", "y"]}), given_vectors(2)
    assert tower.embed_new(new, vector_NF).isfinite().all()
    vector_NF[1, 0] = float("nan")
    with pytest.raises(InputError, match="1 of 2 vectors hold NaN or infinity, the first in row 1"):
        tower.embed_new(new, vector_NF)


def test_words_and_categories_of_few_items_are_left_out() -> None:
    assert vocabulary(item_table(), ContentConfig()) == (
        "category:hill", "category:sea", "category:town", "word:hill", "word:sea", "word:the", "word:town",
    )  # fmt: skip
    assert vocabulary(item_table(), ContentConfig(title_words=False)) == (
        "category:hill", "category:sea", "category:town",
    )  # fmt: skip
    assert vocabulary(item_table(), ContentConfig(least_items=9)) == ("word:the",)
    with pytest.raises(ConfigError, match="must be at least 1"):
        ContentConfig(epochs=0)


def test_a_bundle_embeds_new_items(trained: tuple[Network, Plan], tmp_path: Path) -> None:
    tower = fit_tower(*trained, item_table(), dataclasses.replace(CONFIG, epochs=2))
    write_bundle(tmp_path / "with", trained[0], item_table(), name="n", version="1", content=tower)
    bundle = open_bundle(tmp_path / "with")
    assert torch.equal(bundle.embed_new(NEW), tower.embed_new(NEW))
    (tmp_path / "with" / "content.parquet").write_bytes(b"PAR1")
    with pytest.raises(BundleError, match=r"content.parquet' is damaged"):
        open_bundle(tmp_path / "with")
    plain = write_bundle(tmp_path / "without", trained[0], item_table(), name="n", version="1")
    assert plain.content() is None
    with pytest.raises(BundleError, match=r"has no content.parquet, so it cannot embed new items"):
        plain.embed_new(NEW)


def test_a_tower_comes_back_from_its_table() -> None:
    tower = ContentTower(("category:a", "word:b"), 4, vector_width=3)
    again = ContentTower.of_table(tower.to_table())
    assert again.features == tower.features
    assert all(torch.equal(one, other) for one, other in zip(tower.parameters(), again.parameters(), strict=True))
