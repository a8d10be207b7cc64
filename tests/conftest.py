"""What every test gets."""
import os
from collections.abc import Iterator

import pytest


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
