"""At full SD 1.5 size, with random weights: parity with diffusers, memory of loading and of guidance.

Skipped if less than 12 GB of memory are free; takes about three minutes on two idle cores. A lock lets only one test
run at a time, also under pytest-xdist.
"""

import fcntl
import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

psutil = pytest.importorskip("psutil")
pytest.importorskip("diffusers")

from bench import parity  # noqa: E402
from bench.load import MEMORY_BOUND, load_once, peak_ratio  # noqa: E402
from bench.memory import measure  # noqa: E402
from bench.models import SD15, TINY, write_folder  # noqa: E402
from bench.parity import FULL, GRIDS  # noqa: E402

FREE = 12e9
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _alone_with_enough_memory() -> Iterator[None]:
    """Wait for other workers' full-size tests, then check the free memory."""
    with (Path(tempfile.gettempdir()) / "minidiff-full-size.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = psutil.virtual_memory().available
        if free < FREE:
            pytest.skip(f"{free / 1e9:.1f} GB of memory are free; the full size needs {FREE / 1e9:.0f} GB")
        threads = torch.get_num_threads()
        torch.set_num_threads(psutil.cpu_count())
        yield
        torch.set_num_threads(threads)
        gc.collect()


@pytest.mark.parametrize(("part", "count"), [("unet", 2), ("vae", 3), ("text", 3)])
def test_parity(part: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if part == "vae":
        monkeypatch.setattr(parity, "GRIDS", GRIDS[1:])  # the one that is not square; each takes a minute
    rows = list(FULL[part]())
    assert len(rows) == count
    assert [row for row in rows if not row.ok] == []


def test_memory_of_a_guided_step() -> None:
    """In addition to the model; the published code takes 5.2 GB (parameters require gradients, maps of every layer)."""
    found = measure("guided", "minidiff", "float32", "full", 64)
    assert found.extra <= 1.1e9, found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Callable[[torch.dtype], Path]]:
    """Writes a full-size model folder in a dtype; deleted after the test, since it takes gigabytes."""
    path = tmp_path / "full"
    yield lambda dtype: write_folder(path, SD15, dtype)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model loaded first, so that late imports do not count."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", TINY)


def test_loading_half_precision(folder: Callable[[torch.dtype], Path], tiny: Path) -> None:
    """A float16 folder, converted. `python -m bench load` checks the time, which other load affects here."""
    path = folder(torch.float16)
    for dtype in ("float32", "bfloat16"):
        load = load_once("minidiff", path, dtype, tiny)
        assert peak_ratio([load]) < MEMORY_BOUND, load


def test_loading_single_precision(folder: Callable[[torch.dtype], Path], tiny: Path) -> None:
    """A float32 folder, converted to bfloat16 and unchanged. The latter stays a mapped file, also after use."""
    path = folder(torch.float32)
    for dtype in ("bfloat16", "float32"):
        load = load_once("minidiff", path, dtype, tiny)
        assert peak_ratio([load]) < MEMORY_BOUND, load
