"""Submit a job to a Ray cluster: jobs/submit.py [--address URL] [--wait] JOB -- FLAGS…"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import cli
from pipeline.submission import SubmitConfig, run

if __name__ == "__main__":
    own, flags = cli.split_at_dashes(sys.argv[1:])
    sys.exit(
        cli.main("submit", __doc__ or "", SubmitConfig, lambda config: run(config, flags), own, ray=False)
    )
