"""Training: pretraining a base, and fitting a variant to its base."""
