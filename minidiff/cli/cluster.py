"""minidiff batch --ray: the same rows on the machines of a Ray cluster, which schedules and tries again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .batch import Draw
from .lines import import_parquet
from .manifest import Row

_ROWS = 256  # per call of a worker: enough to find pictures of one kind in, few enough to share out


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster's workers. cpus: of each; None where each has a GPU."""

    workers: int
    cpus: float | None

    @property
    def threads(self) -> int:
        """What a worker computes with where nothing else is said, in a new folder."""
        import torch

        return torch.get_num_threads() if self.cpus is None else max(1, int(self.cpus))

    def draw(self, requests: Path, lines: Iterable[tuple[int, str]], options: dict[str, Any]) -> Iterator[list[Row]]:
        """Make the pictures of lines with Draw in Ray's actors; yields new rows.

        requests: the file, in the folder of the pictures, that tells Ray the lines. options: of Draw. All machines see
        the folder. ValueError for what Draw raises.
        """
        import ray

        _write(requests, lines)
        made = (
            ray.data.read_parquet(str(requests.resolve()))
            .repartition(target_num_rows_per_block=_ROWS)
            .map_batches(
                Draw,
                fn_constructor_args=(str(requests.parent.resolve()),),
                fn_constructor_kwargs=options,
                batch_size=_ROWS,
                concurrency=self.workers,
                num_cpus=self.cpus,
                num_gpus=None if self.cpus is not None else 1.0,
            )
        )
        for some in made.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield some.to_pylist() if "image" in some.column_names else []


def connect(address: str, workers: int | None) -> Cluster:
    """Join a cluster; "local" begins one on this machine. workers: default: one per GPU, or else one per machine.

    ValueError where Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--ray needs Ray; pip install 'minidiff[ray]'") from error
    ray.init(address, ignore_reinit_error=True, log_to_driver=False)
    there = ray.cluster_resources()
    gpus, machines = int(there.get("GPU", 0)), sum(node["Alive"] for node in ray.nodes())
    count = workers or gpus or machines
    return Cluster(count, None if gpus else max(there["CPU"] - 1, 1) / count)  # one is left to read files


def _write(path: Path, lines: Iterable[tuple[int, str]]) -> None:
    """The lines as Parquet, which Ray reads part by part."""
    parquet = import_parquet("for --ray")
    import pyarrow

    left = iter(lines)
    schema = pyarrow.schema([("line", pyarrow.int64()), ("request", pyarrow.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(left, _ROWS)):
            numbers, texts = zip(*some, strict=True)
            writer.write_table(pyarrow.table([numbers, texts], schema=schema))
