"""What competes, with which settings, and which module runs it."""

from dataclasses import dataclass
from typing import Any

from elasticrec.config import to_mapping
from elasticrec.model.encoder import EncoderConfig
from elasticrec.training.run import RunConfig

OURS = "ours"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A model; a peer with several settings is tested with the one that validates best."""

    module: str
    settings: dict[str, dict[str, Any]]
    seeds: bool = True  # whether another seed gives another result
    in_peers_environment: bool = True


def entries(run: RunConfig) -> dict[str, Entry]:
    """All models by name.

    Args:
        run: ours for the data set; each transformer peer gets its size beside the settings published for it.
    """
    encoder = run.network.encoder
    assert isinstance(encoder, EncoderConfig), "the recipe's encoder has the size that peers are given too"
    size = {
        "n_factors": encoder.width,
        "n_blocks": encoder.blocks,
        "n_heads": encoder.block.heads,
        "dropout_rate": encoder.dropout,
        "loss": "softmax",
    }
    return {
        "popularity": Entry(
            module="benchmarks.quality.popularity", settings={"counts": {}}, seeds=False, in_peers_environment=False
        ),
        "implicit-als": Entry(
            module="benchmarks.peers.als",
            settings={
                f"{factors}f-alpha{alpha}": {"factors": factors, "alpha": float(alpha), "regularization": 0.1}
                for factors in (32, 128)
                for alpha in (1, 10)
            },
        ),
        "rectools-sasrec": Entry(
            module="benchmarks.peers.transformer",
            settings={"default": {"loss": "softmax"}, "our-size": size},  # its defaults: 256 wide, 2 blocks, 4 heads
        ),
        "rectools-hstu": Entry(
            module="benchmarks.peers.transformer",
            settings={
                # Of RecTools' HSTU tutorial, which reproduces the paper: the cosine needs its temperature.
                "published": _PUBLISHED_HSTU,
                "our-size": size | {"lightning_module_kwargs": {"logits_t": 0.05}},
            },
        ),
        OURS: Entry(module="benchmarks.quality.ours", settings={"recipe": to_mapping(run)}, in_peers_environment=False),
    }


_PUBLISHED_HSTU = {
    "loss": "sampled_softmax",
    "n_negatives": 128,
    "n_factors": 50,
    "n_blocks": 2,
    "n_heads": 1,
    "dropout_rate": 0.2,
    "lightning_module_kwargs": {"logits_t": 0.05},
}
