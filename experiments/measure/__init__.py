"""What a trained model is worth: likelihood, components, agreement with its target."""
