"""The model: encoder, heads, calibration, and the folder that carries them."""
