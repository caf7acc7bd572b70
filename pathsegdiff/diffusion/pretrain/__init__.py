"""Train the three parts of a bundle: autoencoder, patch encoder and latent diffusion model."""
