"""Stage 2: the head, its training and its evaluation, from a feature store alone."""
