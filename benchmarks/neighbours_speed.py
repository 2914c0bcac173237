"""Speed of the exact search and of the whole score, beside faiss and scikit-learn; the answers are compared first.

    python -m benchmarks.neighbours_speed --threads 1
    python -m benchmarks.neighbours_speed --device cuda --threads 16 --large-queries 10000
    python -m benchmarks.neighbours_speed --threads 1 --cache runs/features

Random features, and with `--cache` real ones: all CIFAR-10 training images by a frozen ViT-Tiny (`benchmarks.features_cache`)
as the bank, the test images as queries.

faiss is used as OpenOOD's KNN does, an `IndexFlatL2` of unit features; scikit-learn as pytorch-ood's KNN does, a
`NearestNeighbors`. Task `search` is the k nearest of the bank. Task `score` is distance and vote with half of the bank
outliers: theirs needs a search of the images' half and one of the whole bank, ours meets every row once. All get all
queries in one call and the same number of threads, where ours is not on a GPU; each row names its device. What is prepared
once, index, fit or bank, is timed apart. ratio is theirs / ours of the fastest of the repeats; ratio_..._prepared counts what
each prepares for the task, too, as one call on a new bank takes. `peak_gib` is the most memory the process has held up to
then, of a GPU its own (bank and queries are in it). `multiplies_bfloat16` says whether the device of ours does, which its
speed rests on. On one thread of the CPU seconds are the process's own (`time.process_time`), which other work on
the machine disturbs less; else those on the wall.

Ours is compared with the definition for some queries, and its votes with its search of the whole bank; rows of the others
may differ from ours only where the true distances are equal to what a float32 sum can tell.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.record import device_name, write_result
from sdood_plugin.artifacts import read_tensors
from sdood_plugin.neighbours import Bank
from sdood_plugin.neighbours.candidates import multiplies_bfloat16
from sdood_plugin.scoring.terms import distance_and_votes

K_DISTANCE, K_VOTE = 2, 5
SPREAD = {"clustered": 0.4, "collapsed": 0.0316}  # cosine within a class: 0.86 and 0.999
REAL = "ViT-Tiny, CIFAR-10"
KINDS = {"gaussian": "gaussian", **{kind: kind for kind in SPREAD}, "collapsed, far queries": "gaussian"}  # and of the queries
TIE = 1e-5  # squared distances of unit rows that float32 sums of products may take for equal, with room
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # (queries, k) -> squared distances, rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbours_speed", description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=10_000, help="against 50,000 x 512")
    parser.add_argument("--large-queries", type=int, default=1_000, help="against 1,000,000 x 384; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of ours; the others run on the CPU")
    parser.add_argument("--cache", type=Path, help="of benchmarks.features_cache, for real features")
    parser.add_argument("--tiny", action="store_true", help="200 queries against 4,000 x 64: does it run?")
    parser.add_argument("--suffix", default="")
    return parser.parse_args()


def features(kind: str, count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """float32 (count, width) unit rows: `gaussian`, distances concentrated, or ten classes (SPREAD), as of a trained network."""
    rows = torch.randn(count, width, generator=generator)
    spread = SPREAD.get(kind.split(",")[0])
    if spread is not None:
        means = torch.randn(10, width, generator=torch.Generator().manual_seed(1))
        rows = means[torch.randint(10, (count,), generator=generator)] + spread * rows
    return torch.nn.functional.normalize(rows, dim=1)


def real_features(cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows of CIFAR-10: the training images' and the test images'."""
    kept = (read_tensors(cache / f"cifar10_{name}.safetensors")["features"] for name in ("train", "test"))
    bank, queries = (torch.nn.functional.normalize(rows, dim=1) for rows in kept)
    return bank, queries


def peak_gib(device: torch.device) -> float:
    """The most memory so far: of the GPU's what tensors took, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Seconds of the fastest call, and its result."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    seconds = []
    for _ in range(repeats):
        started = clock()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return min(seconds), result


def faiss_search(bank: np.ndarray) -> Search:
    """As in openood/postprocessors/knn_postprocessor.py."""
    import faiss

    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)
    return index.search


def sklearn_search(bank: np.ndarray) -> Search:
    """As in pytorch_ood/detector/knn.py."""
    from sklearn.neighbors import NearestNeighbors

    fitted = NearestNeighbors(n_jobs=-1).fit(bank)

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances, rows = fitted.kneighbors(queries, n_neighbors=k)
        return distances**2, rows

    return search


def two_searches(inside: Search, joint: Search, queries: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance and votes by one search of the images and one of the joint bank."""
    distances, _ = inside(queries, K_DISTANCE)
    _, rows = joint(queries, K_VOTE)
    return distances.sum(axis=1), (rows >= images).sum(axis=1)


def agreement(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> dict[str, float]:
    """Per cent of equal rows or votes, and the largest relative difference of distances."""
    distance, number = (np.asarray(part.cpu()) if isinstance(part, torch.Tensor) else part for part in ours)
    return {
        "same": 100 * float((number == theirs[1]).mean()),
        "largest_difference": float((np.abs(distance - theirs[0]) / np.maximum(distance, 1e-12)).max()),
    }


def check_rows(rows: np.ndarray, own: torch.Tensor, queries: torch.Tensor, bank: torch.Tensor) -> None:
    """Stop unless rows int64 (n, k) that are not ours are, by the definition, as far away as ours but for rounding."""
    theirs = torch.from_numpy(rows)
    for query, ours, others in zip(queries.double(), own, theirs, strict=True):
        if not torch.equal(ours, others):
            exact, found = ((bank[chosen].double() - query).square().sum(dim=1) for chosen in (ours, others))
            assert (exact - found).abs().max() < TIE, f"rows {others.tolist()} are not the nearest: {ours.tolist()} are"


def by_definition(queries: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    """int64 (n, k) rows by sums of squared differences in float64, one query after the other."""
    blocks = bank.split(50_000)
    distances = [torch.cat([(query.double() - block).square().sum(dim=1) for block in blocks]) for query in queries]
    return torch.stack([own.sort(stable=True).indices[:k] for own in distances])


def ours(bank: torch.Tensor, queries: torch.Tensor, repeats: int) -> dict[str, tuple[float, float, Any]]:
    """Seconds of preparation and of the task, and its answer; each bank is dropped before the next is made."""
    found = {}
    for task in ("search", "score"):
        parts = (bank,) if task == "search" else bank.split(len(bank) // 2)
        prepare_s, banks = timed(lambda parts=parts: [Bank(part) for part in parts])

        def call(some: torch.Tensor, banks: list[Bank] = banks) -> Any:
            return banks[0].nearest(some, K_VOTE) if len(banks) == 1 else distance_and_votes(some, *banks, K_DISTANCE, K_VOTE)

        first_s, _ = timed(lambda call=call: call(queries[:64]))  # makes what is kept of the bank
        seconds, answer = timed(lambda call=call: call(queries), repeats)
        found[task] = prepare_s + first_s, seconds, answer
        del banks, call
    return found


def drawn_features(kind: str, queries: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bank and queries of a kind."""
    generator = torch.Generator().manual_seed(0)
    bank, asked = (features(*drawn, width, generator) for drawn in ((kind, rows), (KINDS[kind], queries)))
    return bank, asked


def case(kind: str, bank: torch.Tensor, asked: torch.Tensor, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one bank."""
    (rows, width), queries = bank.shape, len(asked)
    images, device = rows // 2, torch.device(settings.device)
    on_device, asked_there = bank.to(device), asked.to(device)
    own, peak = ours(on_device, asked_there, settings.repeats), peak_gib(device)
    found_rows, votes = (own[task][2][1].cpu() for task in ("search", "score"))
    assert torch.equal(found_rows[:20], by_definition(asked[:20], bank, K_VOTE)), "ours is not exact"
    assert torch.equal((found_rows >= images).sum(dim=1), votes.long()), "ours votes otherwise than its neighbours"
    shape = {"features": kind, "queries": queries, "bank": f"{rows} x {width}", "k": K_VOTE}
    here = {**shape, "device": device_name(settings.device)}
    records = []
    for task, (prepare_s, seconds, _) in own.items():
        row = {"method": "sdood", "task": task, **here, "seconds": seconds, "images_per_s": queries / seconds}
        records.append(row | {"prepare_s": prepare_s, "peak_gib": peak})
    fastest = min(product_seconds(asked_there, on_device, dtype) for dtype in (torch.bfloat16, torch.float32))
    records.append(
        {"method": "matrix product alone", "task": "search", **here, "seconds": fastest, "ratio": fastest / own["search"][1]}
    )
    for name, make in (("faiss", faiss_search), ("sklearn", sklearn_search)):
        joint_s, joint = timed(lambda make=make: make(bank.numpy()))
        half_s, half = timed(lambda make=make: make(bank[:images].numpy()))
        seconds, found = timed(lambda joint=joint: joint(asked.numpy(), K_VOTE), settings.repeats)
        check_rows(found[1], found_rows, asked, bank)
        theirs = {"search": (joint_s, seconds, found)}
        seconds, found = timed(lambda half=half, joint=joint: two_searches(half, joint, asked.numpy(), images), settings.repeats)
        theirs["score"] = joint_s + half_s, seconds, found
        common = {"method": name, **shape, "device": device_name("cpu")}
        records += [{**common, "task": task, **beside(name, theirs[task], own[task], queries)} for task in own]
    return records


def beside(name: str, theirs: tuple[float, float, Any], own: tuple[float, float, Any], queries: int) -> dict[str, float]:
    """Columns of another's task beside ours, both (seconds of preparation, seconds of the task, answer)."""
    (prepare_s, seconds, found), (own_prepare_s, own_s, answer) = theirs, own
    return {
        "seconds": seconds,
        "images_per_s": queries / seconds,
        "prepare_s": prepare_s,
        f"ratio_{name}": seconds / own_s,
        f"ratio_{name}_prepared": (prepare_s + seconds) / (own_prepare_s + own_s),
        **agreement(answer, found),
    }


def product_seconds(queries: torch.Tensor, bank: torch.Tensor, dtype: torch.dtype) -> float:
    """Seconds of queries . bank^T in blocks, nothing done with the result."""
    left, blocks = queries.to(dtype), [block.T for block in bank.to(dtype).split(4096)]
    pieces = left.split(512 if queries.device.type == "cpu" else 4096)

    def multiply() -> None:
        for piece in pieces:
            for block in blocks:
                torch.mm(piece, block)

    return timed(multiply, 2)[0]


def main() -> None:
    """Run and write, after each bank."""
    settings = arguments()
    torch.set_num_threads(settings.threads)
    cases: list[tuple[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]] = []
    cases += [(REAL, partial(real_features, settings.cache))] if settings.cache else []
    sizes = [(kind, *((200, 4_000, 64) if settings.tiny else (settings.queries, 50_000, 512))) for kind in KINDS]
    sizes += [("clustered", settings.large_queries, 1_000_000, 384)] if settings.large_queries and not settings.tiny else []
    cases += [(size[0], partial(drawn_features, *size)) for size in sizes]
    records: list[dict[str, Any]] = []
    with threadpool_limits(settings.threads):
        import faiss

        faiss.omp_set_num_threads(settings.threads)
        for kind, drawn in cases:
            records += case(kind, *drawn(), settings)
            facts = {"data": {}, "device_of_ours": settings.device}
            facts["note"] = f"Random vectors{', but for ' + REAL if settings.cache else ''}."
            facts["multiplies_bfloat16"] = multiplies_bfloat16(torch.device(settings.device))
            write_result(f"neighbours_speed{settings.suffix}", vars(settings), [0], records, facts, device=settings.device)
    for record in records:
        ratios = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name.startswith(("ratio", "same")))
        place = f"{record['features']:10s} {record['bank']:15s} {record['task']:7s} {record['method']:21s}"
        print(f"{place} {record['seconds']:8.2f} s  {ratios}")


if __name__ == "__main__":
    main()
