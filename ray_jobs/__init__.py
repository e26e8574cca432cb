"""The service: Ray Train workers run the phisam optimizer, MLflow keeps their metrics and models."""
