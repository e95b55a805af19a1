"""Training objectives, in bounded memory."""
