"""Fixtures of the pipeline's tests: an S3 server."""

from s3_service import port, s3

__all__ = ["port", "s3"]
