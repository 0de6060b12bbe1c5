"""A network and a store in, what its queries look like out: the measure by which an error in a row moves scores.

# U users, T positions, N queries, D width
"""

from typing import Literal

import torch
from torch import Tensor

from elasticrec.columns import PAD
from elasticrec.compression.workbench import Workbench
from elasticrec.data.split import split
from elasticrec.evaluation.ranking import histories
from elasticrec.model.network import Network

Keep = Literal["scores", "rows"]  # of which the mean error is to be small

_USERS = 2000
_BATCH = 256
_RIDGE = 0.3  # of the mean diagonal: rows are inputs of the encoder too, where all directions count


def error_measure(keep: Keep, network: Network, bench: Workbench) -> Tensor:
    """float64 (D, D): an error e in a row counts e^T M e. To keep rows is to let all directions count the same."""
    if keep == "rows":
        return torch.eye(network.config.encoder.width, dtype=torch.float64)
    return query_moment(network, bench)


def query_moment(network: Network, bench: Workbench) -> Tensor:
    """Mean of q q^T over queries of users' training histories, plus a ridge: float64 (D, D).

    An error e in a row moves its scores by e^T (q q^T) e in the mean square. Queries of a trained network lie close to
    few directions, so errors across those cost nothing.
    """
    cases = split(bench.split, bench.store.sequences).validation
    count = min(_USERS, len(cases))
    chosen = torch.randperm(len(cases), generator=torch.Generator().manual_seed(bench.seed))[:count].numpy()
    history_U = histories(bench.store.sequences, cases.take(chosen), network.config.encoder.max_length)
    moment_DD = torch.zeros(network.config.encoder.width, network.config.encoder.width, dtype=torch.float64)
    with torch.inference_mode():
        for begin in range(0, count, _BATCH):
            history = history_U.take(slice(begin, begin + _BATCH))
            query_ND = network.head.query(network(history)[history.item_BT != PAD]).double()
            moment_DD += query_ND.t() @ query_ND
    return moment_DD / moment_DD.diagonal().mean() + _RIDGE * torch.eye(len(moment_DD), dtype=torch.float64)
