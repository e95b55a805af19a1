"""What a trained model is worth: likelihood, acceptance of its drafts, and time."""
