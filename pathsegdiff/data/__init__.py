"""Images, masks and manifests: from files to regions with labels (numpy only)."""
