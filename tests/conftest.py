"""What every test gets."""
import os
from collections.abc import Iterator

import pytest

# Before torch is loaded, for these processes and those that they start. The tests are small: one thread is faster than
# several, and the sums are the same on every machine.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded images in a folder of this test session, not in the user's cache."""
    before = os.environ.get("FEWLABEL_CACHE")
    os.environ["FEWLABEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["FEWLABEL_CACHE"]
    else:
        os.environ["FEWLABEL_CACHE"] = before
