"""Pages: what a run has recorded, as one HTML file that opens without a network."""
