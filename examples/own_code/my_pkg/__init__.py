"""A model, a measure and data of one's own: own.yaml names them, docs/own_code.md explains."""
