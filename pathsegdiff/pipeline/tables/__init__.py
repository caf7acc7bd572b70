"""The paper's tables: what they say, and the same rows computed here."""
