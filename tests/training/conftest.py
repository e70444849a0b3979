"""A folder for runs on the digits, and the result of a run that nothing disturbs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.common import database
from tests.training.digit_runs import settings
from tests.training.runs import Undisturbed, undisturbed


@pytest.fixture(scope="module")
def home(cluster: None, few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with prepared digits and MLflow's database. It is the working directory."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "digits").symlink_to(few_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", database(folder))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def straight(home: Path) -> Undisturbed:
    """The result of a run that nothing disturbs."""
    return undisturbed(settings(home, ""))
