"""Our two stages beside the plain way, measured side by side on the machine at hand."""
