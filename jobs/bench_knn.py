"""The comparison of `leadline bench knn`, as the entry point of a Ray job: all layers at once, each on its worker.

ray job submit --address http://HEAD:8265 -- python jobs/bench_knn.py RUN|EMBEDDINGS --out SHARED_FOLDER

`leadline bench knn --help` tells the options; --threads are the CPUs of each worker.
"""

import os
import sys

from leadline.cli import main

if __name__ == "__main__":
    if not any(argument == "--out" or argument.startswith("--out=") for argument in sys.argv):
        # A job's working directory is a copy that is thrown away with the cluster.
        sys.exit(
            "leadline: --out: a job needs a folder for its results, on storage that all nodes share and that stays"
        )
    address = os.environ.get("RAY_ADDRESS", "local")  # a job is told its cluster; without one, Ray is started here
    sys.argv[1:] = ["bench", "knn", *sys.argv[1:], "--address", address]
    main()
