"""The feature store and the stage 1 loop that fills it."""
