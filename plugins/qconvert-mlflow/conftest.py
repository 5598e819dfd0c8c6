"""Lets the tests run without installing the distribution: pytest puts this folder on sys.path."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before MLflow is imported: tests talk to nobody
