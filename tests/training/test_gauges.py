"""A run's figures reach Ray's metrics under the names that the dashboard and the alerts use."""

import time

import ray
import requests

from pipeline.training.gauges import GAUGES, RunGauges

REPORT_SECONDS = 10  # Ray's default interval between reports


def test_a_runs_figures_are_scraped_from_its_node(cluster: None) -> None:
    gauges = RunGauges("run-7")
    gauges.logged(40, {"images_per_second": 123.0, "data_wait_share": 0.25, "loss": 1.0})
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found, end = dict[str, float](), time.monotonic() + 4 * REPORT_SECONDS
    while len(found) < len(GAUGES) and time.monotonic() < end:
        time.sleep(0.5)
        try:
            lines = requests.get(address, timeout=5).text.splitlines()
        except requests.ConnectionError:  # Ray's agent is still starting
            continue
        ours = [line for line in lines if line.startswith("ray_ddpm_") and 'run="run-7"' in line]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in ours}
    assert found.pop("ray_ddpm_checkpoint_time_seconds") > time.time() - 100
    assert found == {
        "ray_ddpm_images_per_second": 123.0,
        "ray_ddpm_data_wait_share": 0.25,
        "ray_ddpm_step": 40.0,
    }
