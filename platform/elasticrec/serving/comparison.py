"""Two answers to one request in, how alike they are out.

# K items of an answer
"""

from dataclasses import dataclass

from elasticrec.serving.postprocess import Recommendation


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """`overlap`: of K items, the share that both gave. `score_gap`: the mean absolute difference of their scores."""

    same_first: bool
    overlap: float
    score_gap: float


def compare(answer: Recommendation, other: Recommendation) -> Comparison:
    ours, theirs = ({item.item_id: item.score for item in one.items} for one in (answer, other))
    shared = ours.keys() & theirs.keys()
    pairs = [(ours[item_id], theirs[item_id]) for item_id in shared]
    gaps = [abs(one - another) for one, another in pairs if one is not None and another is not None]
    return Comparison(
        same_first=next(iter(ours), None) == next(iter(theirs), None),
        overlap=len(shared) / len(ours) if ours else float(not theirs),
        score_gap=sum(gaps) / len(gaps) if gaps else 0.0,
    )
