"""The training of `leadline run` alone, as the entry point of a Ray job:

ray job submit --address http://HEAD:8265 -- python jobs/train_ensemble.py CONFIG --out SHARED_FOLDER

It ends when the weights of every member are stored, in SHARED_FOLDER/weights. jobs/compute_depths.py with the same
CONFIG and SHARED_FOLDER goes on from there, on the same nodes or on others. The same command resumes.
"""

from compute_depths import run_job

if __name__ == "__main__":
    run_job("--train-only")
