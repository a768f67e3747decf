"""What `pipelines/storage.py` is made of: an S3 that retries, faults in one line, checksums, listings."""
