#!/usr/bin/env python3
"""ensure_bucket.py s3://BUCKET/PATH: makes the bucket if it is not there, and shows that it can be written."""

import os
import sys
from typing import Any
from urllib.parse import urlparse

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def _make(client: Any, bucket: str) -> None:
    """The bucket, if it is not there. Keys that may use this bucket alone are enough where it is."""
    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        region = client.meta.region_name
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        client.create_bucket(Bucket=bucket, **where)


def main(uri: str) -> int:
    """0, or 1 with the reason on stderr."""
    place = urlparse(uri)
    if place.scheme != "s3" or not place.netloc:
        print(f"ensure_bucket.py: MLFLOW_ARTIFACTS must be s3://BUCKET/PATH, not {uri!r}", file=sys.stderr)
        return 1
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    client = boto3.client("s3", endpoint_url=endpoint, region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
    try:
        _make(client, place.netloc)
        client.put_object(Bucket=place.netloc, Key=f"{place.path.strip('/')}/.phisam-writable".lstrip("/"), Body=b"")
    except (BotoCoreError, ClientError) as error:
        print(f"ensure_bucket.py: {uri} at {endpoint or 'AWS'} cannot be used: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
