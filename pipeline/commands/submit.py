"""Submit a job to a Ray cluster, from outside: submit [--address URL] [--wait] JOB -- FLAGS…"""

from pipeline.cluster.submit import SubmitConfig, submit
from pipeline.commands import cli


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    own, flags = cli.split_at_dashes(arguments)
    return cli.main(
        "submit", __doc__ or "", SubmitConfig, lambda config: submit(config, flags), own, ray="never"
    )
