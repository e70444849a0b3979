"""Every fault of storage and MLflow at every moment of a run: the run ends as the one that nothing disturbs."""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.models.export import load_model
from pipeline.storage import StorageError
from pipeline.tracking import runs
from pipeline.training.trainer import Trained, train
from pipeline.training.worker import Hooks
from tests.data.weather import FAULTS, LOST, Weather
from tests.training.digit_runs import assert_same, curve, newest, settings
from tests.training.runs import Undisturbed
from tests.training.test_runs_in_bad_weather import Slow, at

pytestmark = pytest.mark.soak

SECONDS = 4.0


@dataclass(frozen=True)
class Moment:
    """The beginning of a storm, and the requests that it meets.

    Attributes:
        step: step of the curve at which the storm may begin; 0 is before the run.
        methods: HTTP methods that it meets.
        path: regular expression of paths that it meets.
        after: the storm begins after a request whose path matches this regular expression.
        resumed: whether the storm meets the second half of a run that was stopped after step 10.
        refuses: whether the job may end in an error before it has begun. It is then called again.
    """

    step: int
    methods: tuple[str, ...]
    path: str
    after: str = ""
    resumed: bool = False
    refuses: bool = False

    def meets(self) -> Callable[[str, str], bool]:
        """Return a new storm's choice of requests, by method and path."""
        passed = [not self.after]

        def which(method: str, path: str) -> bool:
            if not passed[0]:
                passed[0] = re.search(self.after, path) is not None
                return False
            return method in self.methods and re.search(self.path, path) is not None

        return which


READ, WRITE, ANY = ("GET", "HEAD"), ("PUT", "POST"), ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE")
STORAGE = {
    "opening the data": Moment(0, READ, "/data/", refuses=True),
    "reading images": Moment(0, READ, "/data/train", after="/run/run.json"),
    "the first checkpoint": Moment(0, WRITE, "/checkpoints/step-"),
    "a later checkpoint": Moment(8, WRITE, "/checkpoints/step-"),
    "Ray Train's list": Moment(4, WRITE, "/checkpoints/checkpoint_manager"),
    "validation": Moment(8, READ, "/checkpoints/step-"),
    "the end": Moment(16, ANY, "/run/"),
    "looking for checkpoints": Moment(0, READ, "prefix=.*run(/|%2F)checkpoints", resumed=True),
    "restoring": Moment(0, READ, "/checkpoints/step-", resumed=True),
    "everything at a resume": Moment(0, ANY, "", resumed=True, refuses=True),
}
MLFLOW = {
    "opening the run": Moment(0, ANY, ""),
    "the curve": Moment(4, ANY, ""),
    "the end": Moment(16, ANY, ""),
    "resuming": Moment(0, ANY, "", resumed=True),
}
# A server that refuses a request is available, so expired credentials aren't waited for.
MLFLOW_FAULTS = [*(fault for fault in FAULTS if fault != "expired"), LOST]


@pytest.fixture(scope="module")
def remote_digits(s3: str, digits: Path) -> str:
    """URI of the prepared digits in the bucket."""
    folder = f"{s3}/{uuid.uuid4().hex[:12]}/data"
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.put(str(digits), path, recursive=True)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("moment", STORAGE)
def test_a_storage_that_fails_for_seconds_changes_nothing(
    home: Path,
    straight: Undisturbed,
    bucket: str,
    remote_digits: str,
    weather: Weather,
    moment: str,
    fault: str,
) -> None:
    config = settings(
        home, f"{bucket}/run", storage_patience=60, validate_every=1, validation_images=16, validation_terms=4
    )
    disturbed(replace(config, data=remote_digits), STORAGE[moment], fault, weather, straight)


@pytest.mark.parametrize("fault", MLFLOW_FAULTS)
@pytest.mark.parametrize("moment", MLFLOW)
def test_a_server_of_mlflow_that_fails_for_seconds_changes_nothing(
    home: Path, straight: Undisturbed, mlflow: Weather, moment: str, fault: str
) -> None:
    output = home / uuid.uuid4().hex[:12]
    config = settings(home, str(output), tracking_patience=60)
    trained = disturbed(config, MLFLOW[moment], fault, mlflow, straight)
    assert not list((output / "undelivered").glob("*"))
    assert runs.open_client().get_run(trained.run.id).info.status == "FINISHED"


def disturbed(
    config: TrainConfig, moment: Moment, fault: str, weather: Weather, straight: Undisturbed
) -> Trained:
    """Train through the storm, and check that the result is the undisturbed run's."""
    slow = Hooks(watch=Slow(0.2))

    def begin() -> None:
        weather.storm(fault, SECONDS, moment.meets())

    on_point: Callable[[int, dict[str, float]], None] = at(moment.step, begin)
    if moment.resumed:
        train(replace(config, steps=10), hooks=slow)
        config = replace(config, resume=True)
    if not moment.step:
        begin()
    before = weather.seen
    try:
        trained = train(config, on_point=on_point, hooks=slow)
    except StorageError:
        if not moment.refuses:
            raise
        weather.calm()
        assert moment.resumed or not storage.exists(config.output)
        trained = train(config, hooks=slow)
    weather.calm()
    assert weather.seen > before
    assert_same(newest(config.output)[0], straight.end)
    # After a stop at step 10 the next logging interval is shorter.
    wanted = {step: loss for step, loss in straight.losses.items() if step != 12 or not moment.resumed}
    assert curve(trained, "loss").items() >= wanted.items()
    assert load_model(trained.folder)[1].provenance["steps"] == 18
    return trained
