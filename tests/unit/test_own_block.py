"""A block of one's own is built, trained, kept in a bundle and opened, where its module is allowed and nowhere else."""

import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.config import from_mapping
from elasticrec.errors import ConfigError
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig

CODE = """
from torch import nn

class Convolution(nn.Module):
    def __init__(self, width, max_length, dropout, kernel=3):
        super().__init__()
        self.kernel = kernel
        self.mix = nn.Conv1d(width, width, kernel)

    def forward(self, x_MD, scene):
        x_BDL = scene.layout.grid(x_MD).transpose(1, 2)
        return x_MD + scene.layout.gather(self.mix(nn.functional.pad(x_BDL, (self.kernel - 1, 0))).transpose(1, 2))

SIZE = 3
"""
BLOCK = {"kind": "own", "target": "shop_blocks:Convolution", "options": '{"kernel": 2}'}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_blocks.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ELASTICREC_OWN_BLOCKS", "other, shop_blocks")
    monkeypatch.delitem(sys.modules, "shop_blocks", raising=False)


def config(**block: str) -> NetworkConfig:
    return from_mapping(NetworkConfig, {"encoder": {"width": 8, "blocks": 2, "max_length": 4, "block": BLOCK | block}})


def test_it_learns_and_a_bundle_keeps_it(module: None, tmp_path: Path) -> None:
    network = Network(config(), 3)
    history = History(item_BT=torch.tensor([[0, 1, 2], [1, 2, 3]]))
    assert network.encoder.get_submodule("blocks.0").kernel == 2
    network(history).sum().backward()
    weight = network.encoder.get_parameter("blocks.1.mix.weight")
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    items = pa.table({"item_index": [1, 2, 3], "item_id": list("abc"), "title": list("abc")})
    items = items.append_column("categories", [[["x"]] * 3]).append_column("count", [[3, 2, 1]])
    write_bundle(tmp_path / "bundle", network, items, name="own", version="1")
    opened = open_bundle(tmp_path / "bundle").network()
    network.eval()
    torch.testing.assert_close(opened.scores(history), network.scores(history))
    torch.testing.assert_close(opened.newest(history), network(history)[:, -1])


def test_a_bundle_runs_no_code_that_is_not_allowed(
    module: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTICREC_OWN_BLOCKS", "")
    with pytest.raises(ConfigError, match="allow it where it runs: ELASTICREC_OWN_BLOCKS=shop_blocks"):
        Network(config(), 3)
    assert "shop_blocks" not in sys.modules


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"target": "shop_blocks"}, "give MODULE:CLASS"),
        ({"target": "shop_blocks:Convolutoin"}, "cannot be found"),
        ({"target": "other:Block"}, "is it on the PYTHONPATH"),
        ({"target": "shop_blocks:SIZE"}, "is no torch.nn.Module"),
        ({"options": "kernel=2"}, "is no JSON"),
        ({"options": "[2]"}, "give a JSON object"),
    ],
)
def test_mistakes_are_named(module: None, block: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Network(config(**block), 3)
