"""Create the databases and the buckets of compose.yaml; repeated, it only sets the passwords of the environment."""

import os
from contextlib import suppress

import boto3
import psycopg
from psycopg import sql

DATABASES = {"mlflow": "MLFLOW_DATABASE_PASSWORD", "optuna": "OPTUNA_PASSWORD"}  # each has a user of the same name
BUCKETS = {"mlflow": "MLFLOW_S3_SECRET", "dvc": "DVC_S3_SECRET"}  # each has an access key of the same name


def make_database(name: str, password: str) -> None:
    """A database that only its owner can open. PGHOST, PGUSER and PGPASSWORD name the server and its superuser."""
    values = {"name": sql.Identifier(name), "password": sql.Literal(password)}
    with psycopg.connect(dbname="postgres", autocommit=True) as connection:
        known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name]).fetchone()
        verb = sql.SQL("ALTER" if known else "CREATE")
        connection.execute(sql.SQL("{verb} ROLE {name} LOGIN PASSWORD {password}").format(verb=verb, **values))
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {name} OWNER {name}").format(**values))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {name} FROM PUBLIC").format(**values))


def make_bucket(name: str, secret: str) -> None:
    client = boto3.client("s3", aws_access_key_id=name, aws_secret_access_key=secret)
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=name)


if __name__ == "__main__":
    for name, variable in DATABASES.items():
        make_database(name, os.environ[variable])
    for name, variable in BUCKETS.items():
        make_bucket(name, os.environ[variable])
    print("databases and buckets are ready", flush=True)
