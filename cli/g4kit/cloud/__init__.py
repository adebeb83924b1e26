"""Where runs live: a bucket, jobs and logs behind one protocol, on this machine or on Google Cloud."""
