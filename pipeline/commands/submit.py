"""Submit a job to a Ray cluster from outside: submit [FLAGS] JOB -- FLAGS OF THE JOB.

Example: ray-ddpm submit --address http://head:8265 --wait train -- --data s3://bucket/photos --output s3://bucket/run
"""

from pipeline.cluster.submit import SubmitConfig, submit
from pipeline.commands import cli


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    own, flags = cli.split_at_dashes(arguments)
    return cli.main(
        "submit", __doc__ or "", SubmitConfig, lambda config: submit(config, flags), own, ray="never"
    )
