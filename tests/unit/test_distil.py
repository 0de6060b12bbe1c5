"""Distillation: the loss to the letter, the student alone, and training that is interrupted.

# M tokens, I items, D width of the student, E of the teacher
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.columns import COUNT, ITEM, ITEM_INDEX, USER, USER_INDEX
from elasticrec.compression.distil import Distil
from elasticrec.compression.finetune import FineTune
from elasticrec.compression.prune import Prune
from elasticrec.compression.recipe import compress
from elasticrec.compression.train import fit, lesson_run, make_loss
from elasticrec.compression.workbench import Workbench
from elasticrec.data.sequences import Sequences, write_store
from elasticrec.data.split import LeaveOneOut
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model import loss
from elasticrec.model.block import BlockConfig
from elasticrec.model.distillation import MATCH, Distillation, DistilledLoss
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.loss import Batch, FullSoftmax, SummedLoss
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.training.journal import EPOCHS, STARTS, read
from elasticrec.training.run import CheckpointConfig

N_ITEMS, LENGTH = 40, 8
SMALL = Distil(width=8, epochs=3, soft_share=0.5, hidden_share=0.3, temperature=2.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(width: int, seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(NetworkConfig(encoder=EncoderConfig(width=width, blocks=1, max_length=LENGTH, dropout=0.1)), N_ITEMS)


def batch() -> Batch:
    item_BT = torch.randint(1, N_ITEMS + 1, (7, LENGTH), generator=torch.Generator().manual_seed(1))
    item_BT[2, :3] = 0
    return Batch(History(item_BT), torch.where(item_BT > 0, item_BT % N_ITEMS + 1, 0))


def plainly(config: Distillation, student: Network, teacher: Network, match: Tensor | None) -> Tensor:
    """The formula of `Distillation`, with all logits at once."""
    given = batch()
    h_BTD, h_BTE = student(given.history), teacher(given.history)
    total = torch.zeros((), dtype=torch.float64)
    for row, column in (given.target_BT != 0).nonzero().tolist():
        h_D, h_E, target = h_BTD[row, column], h_BTE[row, column], int(given.target_BT[row, column])
        open_I = torch.ones(N_ITEMS + 1, dtype=torch.bool)
        if config.mask_seen:
            open_I[given.history.item_BT[row, : column + 1]] = False
        open_I[0], open_I[target] = False, True
        ours_I = (student.head.query(h_D[None]) @ student.keys().t())[0][open_I]
        theirs_I = (teacher.head.query(h_E[None]) @ teacher.keys().t())[0][open_I]
        log_ours_I, log_theirs_I = ((logits_I / config.temperature).log_softmax(0) for logits_I in (ours_I, theirs_I))
        hard = -ours_I.log_softmax(0)[int(open_I[:target].sum())]
        soft = config.temperature**2 * (log_theirs_I.exp() * (log_theirs_I - log_ours_I)).sum()
        total = total + (1 - config.soft_share) * hard + config.soft_share * soft
        if match is not None:
            total = total + config.hidden_share * (1 - F.cosine_similarity(match @ h_D, h_E, dim=0))
    return total


def gradients(network: Network) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("chunk", [3, 1_000])
@pytest.mark.parametrize(
    "config",
    [
        Distillation(temperature=2.5, soft_share=0.7),
        Distillation(temperature=0.5, soft_share=1.0, mask_seen=True),
        Distillation(soft_share=0.4, hidden_share=0.3, mask_seen=True),
        Distillation(soft_share=0.0, hidden_share=0.3),
    ],
    ids=str,
)
def test_the_loss_is_its_definition(config: Distillation, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "MIN_CHUNK", chunk)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * chunk * N_ITEMS)
    student, teacher = network(8, seed=0).eval().double(), network(12, seed=1).double()
    summed = DistilledLoss(student, config, teacher)
    value = summed(batch())
    value.backward()
    found = gradients(student)
    student.zero_grad()
    match = student.get_submodule(MATCH).weight if config.hidden_share else None
    expected = plainly(config, student, teacher, match)  # type: ignore[arg-type]
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert found.keys() == gradients(student).keys()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-9)
    assert not gradients(teacher)


@pytest.mark.parametrize("mask_seen", [False, True])
def test_a_soft_share_of_zero_is_the_hard_loss(mask_seen: bool) -> None:
    student = network(8, seed=0).eval()
    distilled = DistilledLoss(student, Distillation(soft_share=0.0, mask_seen=mask_seen), network(12, seed=1))
    assert torch.equal(distilled(batch()), SummedLoss(student, FullSoftmax(mask_seen=mask_seen))(batch()))


def test_the_teacher_stays_in_evaluation_mode() -> None:
    distilled = DistilledLoss(network(8, seed=0), Distillation(), network(12, seed=1)).train()
    assert distilled.network.training
    assert not any(module.training for module in distilled.teacher.modules())


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """Users who walk through the items in strides of 1 to 3."""
    length_U = 6 + np.arange(60) * 7 % 13
    walks = [(user * 11 + (user % 3 + 1) * np.arange(n)) % N_ITEMS + 1 for user, n in enumerate(length_U)]
    sequences = Sequences(
        item_E=np.concatenate(walks).astype(np.int32), offset_U1=np.concatenate([[0], np.cumsum(length_U)])
    )
    users = pa.table({USER_INDEX: np.arange(60), USER: [f"u{user}" for user in range(60)]})
    count_I = np.bincount(sequences.item_E, minlength=N_ITEMS + 1)[1:]
    index_I = np.arange(1, N_ITEMS + 1)
    items = pa.table({ITEM_INDEX: index_I, ITEM: [f"i{item}" for item in index_I], COUNT: count_I})
    store = write_store(tmp_path / "store", sequences, users, items, command="test")
    teacher = network(12, seed=1).eval().requires_grad_(False)
    return Workbench(
        teacher=teacher,
        store=store,
        split=LeaveOneOut(),
        evaluation=EvaluationConfig(),
        scratch=tmp_path / "scratch",
    )


def told(bench: Workbench) -> tuple[Workbench, list[int]]:
    epochs: list[int] = []

    def report(metrics: Mapping[str, float]) -> None:
        assert 0 <= metrics["ndcg@10"] <= 1
        epochs.append(int(metrics["epoch"]))

    return replace(bench, report=report), epochs


@pytest.mark.parametrize("start", ["scratch", "projection"])
def test_a_student_is_what_was_asked_for_and_the_same_every_time(bench: Workbench, start: Any) -> None:
    step = replace(SMALL, start=start)
    bench, epochs = told(bench)
    student = compress((step,), bench)
    assert epochs == [1, 2, 3]
    assert student.config.encoder.width == 8
    assert MATCH not in dict(student.named_modules()), "the map of hidden vectors is dropped"
    again = compress((step,), replace(bench, scratch=bench.scratch / "again"))
    other = compress((step,), replace(bench, scratch=bench.scratch / "other", seed=1))
    history = batch().history
    assert torch.equal(student.scores(history), again.scores(history))
    assert not torch.equal(student.scores(history), other.scores(history))


def test_finished_training_is_not_repeated(bench: Workbench) -> None:
    first = compress((SMALL,), bench)
    bench, epochs = told(bench)
    assert torch.equal(first.scores(batch().history), compress((SMALL,), bench).scores(batch().history))
    assert epochs == []


def test_interrupted_training_goes_on_and_ends_the_same(bench: Workbench, tmp_path: Path) -> None:
    def train(folder: str, stop_at: int | None = None) -> Network:
        def report(metrics: Mapping[str, float]) -> None:
            if metrics["epoch"] == stop_at:
                raise KeyboardInterrupt

        what = SMALL.distillation(mask_seen=True)
        network = NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=LENGTH, dropout=0.1))
        run = lesson_run(SMALL, network, bench, what, tmp_path / folder)
        run = replace(run, checkpoint=CheckpointConfig(interval_s=0, background=False))
        return fit(run, replace(bench, report=report), None, make_loss(what, bench))

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("cut", stop_at=3)
    resumed = train("cut")
    assert [line["step"] for line in read(tmp_path / "cut" / STARTS)] == [0, 2]
    assert [line["epoch"] for line in read(tmp_path / "cut" / EPOCHS)] == [1, 2, 3]
    assert torch.equal(whole.scores(batch().history), resumed.scores(batch().history))


@pytest.mark.parametrize("soft_share", [0.0, 0.5])
def test_fine_tuning_lowers_the_training_loss(bench: Workbench, soft_share: float) -> None:
    step = FineTune(epochs=8, learning_rate=3e-3, soft_share=soft_share)
    tuned = compress((step,), bench)
    hard = FullSoftmax(mask_seen=True)
    given = Batch(*_windows(bench))
    assert SummedLoss(tuned, hard)(given) < 0.98 * SummedLoss(bench.teacher, hard)(given)


def test_what_was_pruned_is_trained_on(bench: Workbench) -> None:
    bench, epochs = told(bench)
    tuned = compress((Prune(heads=0.5, channels=0.5, batches=2), FineTune(epochs=2)), bench)
    again = compress((Prune(heads=0.5, channels=0.5, batches=2), FineTune(epochs=2)), bench)
    assert isinstance(tuned.config.encoder, EncoderConfig)
    assert tuned.config.encoder.block == BlockConfig(heads=1, head_width=6, hidden=12)
    assert epochs == [1, 2]
    assert torch.equal(tuned.scores(batch().history), again.scores(batch().history))


def _windows(bench: Workbench) -> tuple[History, Tensor]:
    """The first events of each user, and what came after each of them."""
    begin_U, item_E = bench.store.sequences.offset_U1[:-1], np.asarray(bench.store.sequences.item_E)
    item_BT = torch.from_numpy(np.stack([item_E[begin : begin + 4] for begin in begin_U]))
    return History(item_BT[:, :-1]), item_BT[:, 1:]


def test_distil_drops_no_earlier_step(bench: Workbench) -> None:
    with pytest.raises(ConfigError, match="first step"):
        compress((FineTune(epochs=1), SMALL), bench)


def test_a_projection_of_more_than_there_is(bench: Workbench) -> None:
    with pytest.raises(ConfigError, match="lower width"):
        compress((Distil(width=16, start="projection"),), bench)
