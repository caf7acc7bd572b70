"""The frozen latent diffusion model; the only package that imports diffusers or timm."""
