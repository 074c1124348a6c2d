"""Wait for the object store and make the bucket if it is missing; run once by compose before everything else."""

import os
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

LIMIT = 120.0


def main() -> None:
    """Retry until the store answers; whatever it says in the end is raised."""
    client = boto3.client("s3")
    bucket = os.environ["ENCODE_BUCKET"]
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            client.head_bucket(Bucket=bucket)
            return
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                client.create_bucket(Bucket=bucket)
                return
            if time.monotonic() > deadline:
                raise
        except BotoCoreError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1)


if __name__ == "__main__":
    main()
