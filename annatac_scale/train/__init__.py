"""Training: one visible loop, and what pretraining and fine-tuning put into it."""
