"""PathSegDiff: tissue segmentation from the features of a frozen latent diffusion model."""

__version__ = "0.1.0"
