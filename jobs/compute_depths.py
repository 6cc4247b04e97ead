"""The run of `leadline run`, as the entry point of a Ray job:

ray job submit --address http://HEAD:8265 -- python jobs/compute_depths.py CONFIG --out SHARED_FOLDER

CONFIG is a preset or a YAML file; `leadline run --help` tells the options. The same command resumes.
"""

import sys

from leadline.cli import main


def run_job(*options: str) -> None:
    """`leadline run` with the arguments of this process, and `options` before them."""
    if not any(argument == "--out" or argument.startswith("--out=") for argument in sys.argv):
        # A job's working directory is a copy that is thrown away with the cluster.
        sys.exit("leadline: --out: a job needs the run's directory, on storage that all nodes share and that stays")
    sys.argv[1:1] = ["run", *options]
    main()


if __name__ == "__main__":
    run_job()
