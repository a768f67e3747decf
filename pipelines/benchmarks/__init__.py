"""What `pipelines/benchmark.py` measures, one subject a file. Needs what `rmt_core` needs and nothing else."""
