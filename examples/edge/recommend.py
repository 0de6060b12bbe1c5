"""Items that a user had in, the best others out: ONNX Runtime and numpy, without Ray, torch or this project.

    elasticrec bundle export runs/shop/bundle --format onnx --out runs/shop/edge
    python examples/edge/recommend.py runs/shop/edge --had sku-3 sku-8 -k 5

`--time` prints what a first answer takes, and the memory of the process.

# T positions, I items + 1 (index 0 pads)
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Edge:
    """An exported folder, opened."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ValueError: the folder is no export to ONNX, or its network reads more than items.
        """
        self.told: dict[str, Any] = json.loads((folder / "edge.json").read_text(encoding="utf-8"))
        if self.told["format"] != "onnx" or self.told["inputs"] != ["item"]:
            raise ValueError(
                f"'{folder}' is an export to {self.told['format']} that reads {', '.join(self.told['inputs'])}; "
                "this example needs --format onnx and a network that reads items alone"
            )
        items = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        self.ids: list[str] = items["item_id"]
        self.titles: list[str | None] = items["title"]
        self.index_of = {item_id: index for index, item_id in enumerate(self.ids, start=1)}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # Optimising takes longer than some answers, and folding keeps a float copy of what the file holds in int8.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")  # another copy
        model = str(folder / "model.onnx")
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def recommend(self, had: list[str], k: int = 10, *, again: bool = False) -> list[tuple[str, str | None, float]]:
        """The k best items, best first, as (id, title, score).

        Args:
            had: ids, oldest first; unknown ones are passed over.
            again: whether items that the user had are answers too, as in a shop.

        Raises:
            ValueError: none of the ids is known.
        """
        known = [self.index_of[item_id] for item_id in had if item_id in self.index_of]
        if not known:
            raise ValueError(f"none of the {len(had)} items is known; name ids as items.json has them")
        item_BT = np.array([known[-self.told["max_length"] :]], dtype=np.int64)
        score_I = self.session.run(["score"], {"item": item_BT})[0][0]
        if not again:
            score_I[known] = -np.inf
        order_I = np.argsort(-score_I, kind="stable")[:k]
        best_K = [int(index) for index in order_I if np.isfinite(score_I[index])]
        return [(self.ids[index - 1], self.titles[index - 1], float(score_I[index])) for index in best_K]


def resident_bytes() -> int:
    """What this process holds in memory now (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--had", nargs="+", required=True, help="ids of items, oldest first")
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--again", action="store_true", help="items that the user had may come again")
    parser.add_argument("--time", action="store_true", help="print times in ms and memory as JSON to standard error")
    chosen = parser.parse_args()
    before_bytes, start_s, start_cpu_s = resident_bytes(), time.perf_counter(), time.process_time()
    try:
        edge = Edge(chosen.folder)
        loaded_s = time.perf_counter()
        answer = edge.recommend(chosen.had, chosen.k, again=chosen.again)
        first_s, first_cpu_s = time.perf_counter(), time.process_time()
        edge.recommend(chosen.had, chosen.k, again=chosen.again)
        second_s = time.perf_counter()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for item_id, title, score in answer:
        print(f"{item_id}\t{title or ''}\t{score:.4f}")
    if chosen.time:
        told = {
            "load_ms": 1e3 * (loaded_s - start_s),
            "first_answer_ms": 1e3 * (first_s - loaded_s),
            "cold_ms": 1e3 * (first_s - start_s),
            "cold_cpu_ms": 1e3 * (first_cpu_s - start_cpu_s),
            "second_answer_ms": 1e3 * (second_s - first_s),
            "resident_bytes": resident_bytes(),
            "of_the_model_bytes": resident_bytes() - before_bytes,
        }
        print(json.dumps(told), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
