"""Model and data -> a trained model and the curve of how it got there."""
