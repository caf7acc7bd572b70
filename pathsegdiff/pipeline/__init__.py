"""What needs both stages: prediction of new images, the demo."""
